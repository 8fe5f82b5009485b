import contextlib
import sys
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from asyncbucket import Limiter, TokenBucket, agent, events, telemetry

COST = {"requests": 1, "tokens": 900, "input_tokens": 600, "output_tokens": 300, "concurrency": 1}
#: Every metric, and its labels.
METRICS = {
    "asyncbucket_wait_seconds": {"limiter", "bound_by"},
    "asyncbucket_requests": {"limiter", "outcome"},
    "asyncbucket_tokens": {"limiter", "kind"},
    "asyncbucket_queued_requests": {"limiter"},
    "asyncbucket_in_flight_requests": {"limiter"},
    "asyncbucket_running_agents": {"limiter"},
    "asyncbucket_agent_seconds": {"limiter", "kind", "outcome"},
    "asyncbucket_limit_used_ratio": {"limiter", "limit"},
    "asyncbucket_upstream_429": {"limiter"},
    "asyncbucket_retries": {"limiter"},
    "asyncbucket_spent_usd": {"limiter"},
}


def scrape(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    text = generate_latest(registry).decode()
    return {
        (
            sample.name.removeprefix("asyncbucket_"),
            *(value for key, value in sorted(sample.labels.items()) if key != "le"),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_metric_names_and_labels_are_as_expected(registry: CollectorRegistry, admit: Any) -> None:
    limiter = Limiter(concurrency=5, name="openai")
    telemetry.prometheus(limiter, registry=registry)
    with agent():
        limiter.acquire_nowait().release()
    admit(limiter)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    labels = {
        family.name: {label for sample in family.samples for label in sample.labels} - {"le"}
        for family in families
        if not family.name.endswith("_created")
    }
    assert labels == METRICS
    assert all(family.documentation for family in families)
    chosen = registry.restricted_registry(["asyncbucket_queued_requests"]).collect()
    assert [metric.name for metric in chosen] == ["asyncbucket_queued_requests"]


def test_agents_are_counted_while_they_run_and_timed_by_kind(
    limiter: Limiter, registry: CollectorRegistry
) -> None:
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


def test_counters_begin_at_zero(limiter: Limiter, registry: CollectorRegistry, say: Any) -> None:
    telemetry.prometheus(limiter, registry=registry)
    limiter.child("idle")
    say(limiter.child("chat"), events.Paused, seconds=1.0, reason="lunch")  # counts as no 429
    seen = scrape(registry)
    assert seen["upstream_429_total", "openai"] == 0
    assert seen["retries_total", "openai/chat"] == 0
    assert seen["requests_total", "openai/idle", "too_costly"] == 0
    assert seen["tokens_total", "used", "openai/chat"] == 0


def test_dollars_are_counted_when_calls_end(registry: CollectorRegistry) -> None:
    limiter = Limiter("25 USD/day", name="openai")
    telemetry.prometheus(limiter, registry=registry)
    for used in (0.0125, None, 0):
        with limiter.child("chat").acquire_nowait(usd=0.05) as lease:
            if used is not None:
                lease.settle(usd=used)

    seen = scrape(registry)
    assert seen["spent_usd_total", "openai"] == seen["spent_usd_total", "openai/chat"] == 0.0625
    assert seen["limit_used_ratio", "usd/86400s", "openai"] == 0.0625 / 25


def test_tokens_are_counted_as_reserved_used_and_refunded(
    limiter: Limiter, registry: CollectorRegistry, say: Any, admit: Any
) -> None:
    telemetry.prometheus(limiter, registry=registry)
    admit(limiter)
    admit(limiter, cost={"requests": 1})
    for used, corrects in ((700, {}), (750, {"tokens": 700}), (720, {"tokens": 750})):
        say(limiter, events.Settled, reserved=COST, used={"tokens": used}, corrects=corrects)
    say(limiter, events.Settled, reserved=COST, used={"requests": 2})
    seen = scrape(registry)
    assert seen["tokens_total", "reserved", "openai"] == 900
    assert seen["tokens_total", "used", "openai"] == 750  # a counter never falls
    assert seen["tokens_total", "refunded", "openai"] == 200 + 30


def test_gauges_are_read_at_scrape_time_at_every_level(registry: CollectorRegistry) -> None:
    limiter = Limiter("500 RPM burst 500", "200k TPM", concurrency=4, name="openai")
    chat = limiter.child("chat")
    telemetry.prometheus(limiter, registry=registry)
    leases = [each.acquire_nowait(requests=62, tokens=1) for each in (limiter, limiter, chat)]
    leases[0].settle(tokens=220_000)
    seen = scrape(registry)
    assert seen["in_flight_requests", "openai"] == 3
    assert seen["in_flight_requests", "openai/chat"] == 1
    assert {key[1]: value for key, value in seen.items() if key[0].endswith("_ratio")} == {
        "rpm": pytest.approx(0.372, abs=0.001),
        "tpm": 1.10001,
        "concurrency": 0.75,
    }
    for lease in leases:
        lease.release()
    assert scrape(registry)["in_flight_requests", "openai"] == 0


@pytest.mark.parametrize(
    ("watched", "counted"),
    [
        ("openai", {"openai": 4, "openai/chat": 3, "openai/chat/fast": 2}),
        ("openai/chat", {"openai/chat": 3, "openai/chat/fast": 2}),
    ],
)
def test_counters_of_watched_limiter_include_those_below_it(
    limiter: Limiter, registry: CollectorRegistry, admit: Any, watched: str, counted: Any
) -> None:
    chat = limiter.child("chat")
    fast = chat.child("fast")
    (top,) = (each for each in (limiter, chat) if each.name == watched)
    telemetry.prometheus(top, registry=registry)
    for each in (limiter, chat, fast, fast):
        admit(each)
    seen = scrape(registry)
    assert {key[-1]: seen[key] for key in seen if key[0] == "wait_seconds_count"} == counted


def test_children_beyond_max_limiters_count_only_above(
    limiter: Limiter, registry: CollectorRegistry, admit: Any
) -> None:
    """Whoever names a child after each user has no more labels; no call is lost or counted twice."""
    telemetry.prometheus(limiter, registry=registry, max_limiters=3)
    for number in range(1_000):
        admit(limiter.child(f"user-{number}"))
    seen = scrape(registry)
    counted = {key[-1]: seen[key] for key in seen if key[0] == "wait_seconds_count"}
    assert counted == {"openai": 1_000, "openai/user-0": 1, "openai/user-1": 1}
    assert len(seen) < 100


def test_limiters_share_registry_and_one_name(registry: CollectorRegistry, admit: Any) -> None:
    one, two, twin = Limiter(name="openai"), Limiter(name="anthropic"), Limiter(name="openai")
    off, *_ = (telemetry.prometheus(each, registry=registry) for each in (one, two, twin))
    for each in (one, two, twin):
        admit(each)
    held = [each.acquire_nowait() for each in (one, twin)]
    seen = scrape(registry)
    assert seen["in_flight_requests", "openai"] == len(held)
    assert seen["wait_seconds_count", "none", "openai"] == 4
    assert seen["wait_seconds_count", "none", "anthropic"] == 1
    off()
    off()
    admit(one)
    seen = scrape(registry)
    assert seen["wait_seconds_count", "none", "openai"] == 4
    assert seen["in_flight_requests", "openai"] == 1
    for lease in held:
        lease.release()


@pytest.mark.parametrize(("first", "then"), [("root", "root"), ("root", "leaf"), ("leaf", "root")])
def test_watching_one_tree_twice_in_a_registry_is_refused(
    limiter: Limiter, registry: CollectorRegistry, first: str, then: str, admit: Any
) -> None:
    tree = {"root": limiter, "leaf": limiter.child("chat").child("fast")}
    off = telemetry.prometheus(tree[first], registry=registry)
    with pytest.raises(ValueError, match="would count twice") as caught:
        telemetry.prometheus(tree[then], registry=registry)
    assert str(caught.value) == (
        f"limiter {tree[first].name!r} is watched here already, and the calls of "
        f"{tree[then].name!r} would count twice; switch that off first"
    )
    off()
    telemetry.prometheus(tree[then], registry=registry)
    telemetry.prometheus(tree[first], registry=CollectorRegistry())
    admit(tree["leaf"])
    assert scrape(registry)["wait_seconds_count", "none", "openai/chat/fast"] == 1


@pytest.mark.parametrize("way", ["logging", "llama_index", "prometheus", "opentelemetry"])
@pytest.mark.parametrize("strange", [None, "openai", TokenBucket(rate=1, burst=1)])
def test_what_is_no_limiter_is_refused(way: str, strange: object) -> None:
    with pytest.raises(TypeError, match=f"can be watched, not {type(strange).__name__}"):
        getattr(telemetry, way)(strange)


@pytest.mark.parametrize("most", [0, -1, 1.5, "many", True])
def test_bad_max_limiters_is_refused(
    limiter: Limiter, registry: CollectorRegistry, most: Any
) -> None:
    with pytest.raises(ValueError, match="max_limiters must be a whole number of at least 1"):
        telemetry.prometheus(limiter, registry=registry, max_limiters=most)
    telemetry.prometheus(limiter, registry=registry)()


def test_default_registry_is_that_of_prometheus_client(limiter: Limiter) -> None:
    off = telemetry.prometheus(limiter)
    shown = b'asyncbucket_queued_requests{limiter="openai"} 0.0'
    assert shown in generate_latest(REGISTRY)
    off()
    assert shown not in generate_latest(REGISTRY)


@pytest.mark.parametrize(
    ("way", "library", "message"),
    [
        ("prometheus", "prometheus_client", "prometheus needs prometheus_client: .*prometheus]"),
        ("opentelemetry", "opentelemetry", "opentelemetry needs opentelemetry: .*otel]"),
        (
            "llama_index",
            "llama_index.core.llms.llm",
            "LlamaIndex models needs llama_index.core.llms.llm: .*llama-index]",
        ),
    ],
)
def test_missing_library_error_names_its_extra(
    limiter: Limiter, monkeypatch: pytest.MonkeyPatch, way: str, library: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for name in tuple(sys.modules):  # as if nobody had asked for it yet
        if name.startswith((f"asyncbucket.telemetry.to_{way}", "asyncbucket.llama_index")):
            monkeypatch.delitem(sys.modules, name)
    if way != "llama_index":
        monkeypatch.delitem(vars(telemetry), way, raising=False)
    with pytest.raises(ImportError, match=f'{message}"$'):
        getattr(telemetry, way)(limiter)


def test_unknown_name_of_telemetry_is_an_attribute_error() -> None:
    assert dir(telemetry) == sorted(telemetry.__all__)
    with pytest.raises(AttributeError, match="no attribute 'statsd'"):
        _ = getattr(telemetry, "statsd")  # noqa: B009 - a type checker would see it
