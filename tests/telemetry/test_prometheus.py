import contextlib
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from asyncbucket import Limiter, agent, telemetry
from tests.telemetry.conftest import scrape


def test_agents_counted_and_timed_by_kind(limiter: Limiter, registry: CollectorRegistry) -> None:
    telemetry.prometheus(limiter, registry=registry)
    with agent("a name", kind="chat"):
        limiter.acquire_nowait().release()
        assert scrape(registry)["running_agents", "openai"] == 1
    with contextlib.suppress(ZeroDivisionError), agent():
        limiter.acquire_nowait().release()
        raise ZeroDivisionError
    seen = scrape(registry)
    assert seen["running_agents", "openai"] == 0
    assert seen["agent_seconds_count", "chat", "openai", "ok"] == 1
    assert seen["agent_seconds_count", "none", "openai", "failed"] == 1
    assert "a name" not in str(seen)


def test_counters_begin_at_zero(registry: CollectorRegistry, limiter: Limiter) -> None:
    """The registry knows all names from the start."""
    telemetry.prometheus(limiter, registry=registry)
    chosen = registry.restricted_registry(["asyncbucket_queued_requests"]).collect()
    assert [metric.name for metric in chosen] == ["asyncbucket_queued_requests"]
    limiter.pause(0, reason="lunch")  # counts as no 429
    limiter.child("idle")
    seen = scrape(registry)
    for name in ("openai", "openai/idle"):
        assert seen["upstream_429_total", name] == seen["retries_total", name] == 0
        assert seen["requests_total", name, "too_costly"] == 0
        assert seen["tokens_total", "used", name] == 0


def test_dollars_are_counted_when_calls_end(registry: CollectorRegistry) -> None:
    limiter = Limiter("25 USD/day", name="openai")
    telemetry.prometheus(limiter, registry=registry)
    for used in (0.0125, 0.05, 0):
        with limiter.child("chat").acquire_nowait(usd=0.05) as lease:
            lease.settle(usd=used)
    seen = scrape(registry)
    assert seen["spent_usd_total", "openai"] == seen["spent_usd_total", "openai/chat"] == 0.0625
    assert seen["limit_used_ratio", "usd/86400s", "openai"] == 0.0625 / 25


def test_counters_include_below(limiter: Limiter, registry: CollectorRegistry, admit: Any) -> None:
    chat = limiter.child("chat")
    telemetry.prometheus(chat, registry=registry)
    for each in (limiter, chat, *[chat.child("fast")] * 2):
        admit(each)
    seen = scrape(registry)
    counted = {key[-1]: seen[key] for key in seen if key[0] == "wait_seconds_count"}
    assert counted == {"openai/chat": 3, "openai/chat/fast": 2}


def test_limiters_share_registry_and_one_name(registry: CollectorRegistry, admit: Any) -> None:
    one, twin = (Limiter(f"{rpm} RPM", name="openai") for rpm in (5, 50))
    two = Limiter(name="anthropic")
    off, *_ = (telemetry.prometheus(each, registry=registry) for each in (one, two, twin))
    for each in (one, two, twin):
        admit(each)
    held = [each.acquire_nowait() for each in (one, twin)]
    seen = scrape(registry)
    assert seen["in_flight_requests", "openai"] == len(held)
    assert seen["limit_used_ratio", "rpm", "openai"] == 0.2  # the fuller
    assert seen["wait_seconds_count", "none", "openai"] == 4
    assert seen["wait_seconds_count", "none", "anthropic"] == 1
    off()
    off()
    admit(one)
    seen = scrape(registry)
    assert seen["wait_seconds_count", "none", "openai"] == 4
    assert seen["in_flight_requests", "openai"] == 1


@pytest.mark.parametrize(("first", "then"), [("root", "root"), ("root", "leaf"), ("leaf", "root")])
def test_watching_one_tree_twice_in_a_registry_is_refused(
    limiter: Limiter, registry: CollectorRegistry, first: str, then: str
) -> None:
    tree = {"root": limiter, "leaf": limiter.child("chat").child("fast")}
    off = telemetry.prometheus(tree[first], registry=registry)
    with pytest.raises(ValueError, match="would count twice") as caught:
        telemetry.prometheus(tree[then], registry=registry)
    assert str(caught.value) == (
        f"limiter {tree[then].name!r}, or one above or below it, is watched here already, and its "
        f"calls would count twice; switch that off first"
    )
    telemetry.prometheus(tree[then], registry=CollectorRegistry())
    off()
    telemetry.prometheus(tree[then], registry=registry)


def test_unknown_name_of_telemetry_is_an_attribute_error() -> None:
    assert dir(telemetry) == sorted(telemetry.__all__)
    with pytest.raises(AttributeError, match="no attribute 'statsd'"):
        _ = getattr(telemetry, "statsd")  # noqa: B009 - a type checker would see it
