import sys
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from asyncbucket import Limiter, TokenBucket, events, telemetry

COST = {"requests": 1, "tokens": 900, "input_tokens": 600, "output_tokens": 300, "concurrency": 1}
#: Every metric, and its labels.
METRICS = {
    "asyncbucket_wait_seconds": {"limiter", "bound_by"},
    "asyncbucket_requests": {"limiter", "outcome"},
    "asyncbucket_tokens": {"limiter", "kind"},
    "asyncbucket_queued_requests": {"limiter"},
    "asyncbucket_in_flight_requests": {"limiter"},
    "asyncbucket_limit_used_ratio": {"limiter", "limit"},
    "asyncbucket_upstream_429": {"limiter"},
    "asyncbucket_retries": {"limiter"},
}


def scrape(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Return what Prometheus reads: samples by name, without our prefix, and label values."""
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


def test_metric_names_and_labels_are_exactly_as_expected(
    registry: CollectorRegistry, say: Any, admit: Any
) -> None:
    limiter = Limiter(concurrency=5, name="openai")
    telemetry.prometheus(limiter, registry=registry)
    admit(limiter)
    say(limiter, events.Settled, reserved=COST, used={"tokens": 1})
    say(limiter, events.Released, cost=COST, held=1.0, outcome="ok")
    say(limiter, events.Paused, seconds=1.0, reason="429")
    say(limiter, events.Retried, attempt=1, error="HTTP 429", delay=1.0)

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


def test_wait_is_counted_by_binding_limit(
    limiter: Limiter, registry: CollectorRegistry, admit: Any
) -> None:
    telemetry.prometheus(limiter, registry=registry)
    admit(limiter, waited=1.5, bound_by="tokens")
    admit(limiter, waited=2.5, bound_by="tokens")
    admit(limiter)

    seen = scrape(registry)
    assert seen["wait_seconds_count", "tokens", "openai"] == 2
    assert seen["wait_seconds_sum", "tokens", "openai"] == 4.0
    assert seen["wait_seconds_count", "none", "openai"] == 1


def test_counters_begin_at_zero(limiter: Limiter, registry: CollectorRegistry, say: Any) -> None:
    telemetry.prometheus(limiter, registry=registry)
    say(limiter.child("chat"), events.Paused, seconds=1.0, reason="lunch")  # counts as no 429

    seen = scrape(registry)
    assert seen["upstream_429_total", "openai"] == 0
    assert seen["retries_total", "openai/chat"] == 0
    assert seen["requests_total", "openai", "too_costly"] == 0
    assert seen["tokens_total", "used", "openai/chat"] == 0


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


def test_gauges_are_read_at_scrape_time_and_counted_at_every_level(
    registry: CollectorRegistry,
) -> None:
    limiter = Limiter("500 RPM burst 500", "200k TPM", concurrency=4, name="openai")
    chat = limiter.child("chat")
    telemetry.prometheus(limiter, registry=registry)
    leases = [each.acquire_nowait(requests=62, tokens=1) for each in (limiter, limiter, chat)]
    leases[0].settle(tokens=220_000)

    seen = scrape(registry)
    assert (seen["in_flight_requests", "openai"], seen["in_flight_requests", "openai/chat"]) == (
        3,
        1,
    )
    assert {key[1]: value for key, value in seen.items() if key[0].endswith("_ratio")} == {
        "rpm": pytest.approx(0.372, abs=0.001),
        "tpm": 1.10001,
        "concurrency": 0.75,
    }
    for lease in leases:
        lease.release()
    assert scrape(registry)["in_flight_requests", "openai"] == 0


def test_counters_of_a_limiter_include_those_below_it(
    limiter: Limiter, registry: CollectorRegistry, admit: Any
) -> None:
    chat = limiter.child("chat")
    fast = chat.child("fast")
    telemetry.prometheus(limiter, registry=registry)
    for each in (limiter, chat, fast, fast):
        admit(each)

    seen = scrape(registry)
    names = ("openai", "openai/chat", "openai/chat/fast")
    assert [seen["wait_seconds_count", "none", name] for name in names] == [4, 3, 2]


def test_limiter_watched_below_the_root_counts_for_itself_alone(
    limiter: Limiter, registry: CollectorRegistry, admit: Any
) -> None:
    chat = limiter.child("chat")
    telemetry.prometheus(chat, registry=registry)
    admit(chat)
    admit(limiter)

    seen = scrape(registry)
    assert {key: seen[key] for key in seen if key[0] == "wait_seconds_count"} == {
        ("wait_seconds_count", "none", "openai/chat"): 1
    }


def test_limiters_beyond_max_limiters_are_not_told_apart(
    limiter: Limiter, registry: CollectorRegistry, admit: Any
) -> None:
    """Whoever names a limiter after each user has no more labels; no call is lost or counted twice."""
    telemetry.prometheus(limiter, registry=registry, max_limiters=3)
    for number in range(1_000):
        admit(limiter.child(f"user-{number}"))
    others = [Limiter(concurrency=4, name=name) for name in ("one", "two")]
    held = [other.acquire_nowait() for other in others for _ in range(2)]
    for other in others:
        telemetry.prometheus(other, registry=registry)
        admit(other)

    seen = scrape(registry)
    counted = {key[-1]: seen[key] for key in seen if key[0] == "wait_seconds_count"}
    assert counted == {"openai": 1_000, "openai/user-0": 1, "openai/user-1": 1, "other": 2}
    assert seen["in_flight_requests", "other"] == len(held)
    assert len(seen) < 100


def test_limiters_share_registry_until_the_last_is_switched_off(
    registry: CollectorRegistry, admit: Any
) -> None:
    one, two = Limiter(name="openai"), Limiter(name="anthropic")
    off_one = telemetry.prometheus(one, registry=registry)
    off_two = telemetry.prometheus(two, registry=registry)
    admit(one)
    admit(two)
    assert scrape(registry)["wait_seconds_count", "none", "anthropic"] == 1

    off_one()
    off_one()
    admit(one)
    seen = scrape(registry)
    assert seen["wait_seconds_count", "none", "openai"] == 1
    assert ("queued_requests", "openai") not in seen

    off_two()
    assert scrape(registry) == {}

    off_one()  # this one ended long ago: it takes nothing from a later watch
    telemetry.prometheus(one, registry=registry)
    off_two()
    assert scrape(registry)["queued_requests", "openai"] == 0


@pytest.mark.parametrize(("first", "then"), [("root", "root"), ("root", "leaf"), ("leaf", "root")])
def test_watching_one_tree_twice_in_a_registry_is_refused(
    limiter: Limiter, registry: CollectorRegistry, first: str, then: str, admit: Any
) -> None:
    tree = {"root": limiter, "leaf": limiter.child("chat").child("fast")}
    off = telemetry.prometheus(tree[first], registry=registry)

    with pytest.raises(ValueError, match="would count twice") as caught:
        telemetry.prometheus(tree[then], registry=registry)
    assert str(caught.value) == (
        f"this registry watches limiter {tree[first].name!r} already, and the calls of "
        f"{tree[then].name!r} would count twice; switch that off first"
    )

    off()
    telemetry.prometheus(tree[then], registry=registry)
    telemetry.prometheus(tree[first], registry=CollectorRegistry())
    admit(tree["leaf"])
    assert scrape(registry)["wait_seconds_count", "none", "openai/chat/fast"] == 1


def test_invalid_watch_is_refused_and_leaves_registry_unchanged(
    limiter: Limiter, registry: CollectorRegistry
) -> None:
    for strange in (None, "openai", [limiter], TokenBucket(rate=1, burst=1)):
        with pytest.raises(
            TypeError, match=f"only a limiter can be watched, not {type(strange).__name__}"
        ):
            telemetry.prometheus(cast("Any", strange), registry=registry)
    for most in (0, -1, 1.5, "many", True):
        with pytest.raises(ValueError, match="max_limiters must be a whole number of at least 1"):
            telemetry.prometheus(limiter, registry=registry, max_limiters=cast("int", most))
    with pytest.raises(TypeError, match="prometheus_client's CollectorRegistry, not object"):
        telemetry.prometheus(limiter, registry=cast("Any", object()))
    assert generate_latest(registry) == b""
    telemetry.prometheus(limiter, registry=registry)()


def test_default_registry_is_that_of_prometheus_client(limiter: Limiter) -> None:
    off = telemetry.prometheus(limiter)
    assert b"asyncbucket_queued_requests" in generate_latest(REGISTRY)
    off()
    assert b"asyncbucket_" not in generate_latest(REGISTRY)


@pytest.mark.parametrize(
    ("way", "library", "message"),
    [
        (
            "prometheus",
            "prometheus_client",
            'metrics need prometheus_client: .*"asyncbucket.prometheus]"',
        ),
        (
            "opentelemetry",
            "opentelemetry",
            'OpenTelemetry needs opentelemetry: .*"asyncbucket.otel]"',
        ),
        (
            "llama_index",
            "llama_index_instrumentation",
            'LlamaIndex need llama_index_instrumentation: pip install "asyncbucket.llama-index]"',
        ),
    ],
)
def test_missing_library_error_names_its_extra(
    limiter: Limiter, monkeypatch: pytest.MonkeyPatch, way: str, library: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"asyncbucket.telemetry.to_{way}", raising=False)
    with pytest.raises(ImportError, match=message):
        getattr(telemetry, way)(limiter)
