from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from asyncbucket import Limiter, events, telemetry
from asyncbucket.telemetry import to_opentelemetry

COST = {"requests": 1, "tokens": 900, "input_tokens": 600, "output_tokens": 300, "concurrency": 1}
POLICY = "asyncbucket.rate_limiting.policy"
#: Names and units of ASP.NET's rate limiting metrics (stable) in the semantic conventions.
STABLE = {
    "request.time_in_queue": "s",
    "request_lease.duration": "s",
    "requests": "{request}",
    "queued_requests": "{request}",
    "active_request_leases": "{request}",
}


class Telemetry:
    """Providers that keep what is measured and traced."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self._spans = InMemorySpanExporter()
        self.meters = MeterProvider(metric_readers=[self._reader])
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))

    def watch(self, limiter: Limiter, **options: Any) -> Callable[[], None]:
        return telemetry.opentelemetry(
            limiter, meter_provider=self.meters, tracer_provider=self.tracers, **options
        )

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._spans.get_finished_spans()

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        return {
            metric.name.removeprefix("asyncbucket.rate_limiting."): metric
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str, key: str) -> dict[Any, Any]:
        points = self.metrics()[name].data.data_points
        prefixed = f"asyncbucket.rate_limiting.{key}"
        return {point.attributes[prefixed]: point for point in points}


@pytest.fixture
def otel() -> Iterator[Telemetry]:
    kept = Telemetry()
    yield kept
    kept.meters.shutdown()
    kept.tracers.shutdown()


def test_metric_names_and_units_follow_aspnet_conventions(
    limiter: Limiter, otel: Telemetry, say: Any, admit: Any
) -> None:
    otel.watch(limiter)
    admit(limiter)
    say(limiter, events.Released, cost=COST, held=2.0, outcome="ok", used={"usd": 12_500})
    say(limiter, events.Settled, reserved=COST, used={"tokens": 700})
    say(limiter, events.Paused, seconds=1.0, reason="429")
    say(limiter, events.Retried, attempt=1, error="HTTP 429", delay=1.0)
    say(limiter, events.AgentFinished, kind="chat", seconds=30.0, ended_well=True)
    metrics = otel.metrics()
    tokens = otel.points("tokens", "kind")
    assert {kind: point.value for kind, point in tokens.items()} == {
        "reserved": 900,
        "used": 700,
        "refunded": 200,
    }
    assert otel.points("request_lease.duration", "outcome")["ok"].sum == 2.0
    assert otel.points("upstream_refusals", "policy")["openai"].value == 1
    assert otel.points("spent", "policy")["openai"].value == 0.0125
    assert otel.points("agent.duration", "kind")["chat"].sum == 30.0
    assert otel.points("active_agents", "policy")["openai"].value == 0
    assert otel.points("retries", "policy")["openai"].value == 1
    assert {name: metrics[name].unit for name in STABLE} == STABLE
    assert all(metric.description for metric in metrics.values())
    assert not any(metric.name.startswith("gen_ai.") for metric in metrics.values())


def test_requests_are_counted_by_result_and_waits_by_binding_limit(
    limiter: Limiter, otel: Telemetry, say: Any, admit: Any
) -> None:
    otel.watch(limiter)
    admit(limiter, waited=90.0, bound_by="tokens")
    admit(limiter)
    say(limiter, events.Refused, cost=COST, reason="timeout", bound_by="tokens", retry_after=3.0)
    say(limiter, events.Cancelled, cost=COST, waited=1.0)
    results = otel.points("requests", "result")
    assert {result: point.value for result, point in results.items()} == {
        "acquired": 2,
        "timeout": 1,
        "request_canceled": 1,
    }
    assert {point.attributes[POLICY] for point in results.values()} == {"openai"}
    waits = otel.metrics()["request.time_in_queue"].data.data_points
    name = "asyncbucket.rate_limiting.bound_by"
    assert {(point.attributes[name], point.count, point.sum) for point in waits} == {
        ("tokens", 1, 90.0),
        ("none", 1, 0.0),
        ("none", 1, 1.0),  # of the call that gave up
    }
    assert waits[0].explicit_bounds == to_opentelemetry.BUCKETS


def test_gauges_are_read_at_collection_and_include_limiters_below(otel: Telemetry) -> None:
    limiter = Limiter("500 RPM burst 500", concurrency=8, name="openai")
    chat = limiter.child("chat")
    otel.watch(limiter)
    held = [each.acquire_nowait() for each in (limiter, limiter, limiter, chat)]

    def values(name: str, key: str = "policy") -> dict[str, float]:
        return {label: point.value for label, point in otel.points(name, key).items()}

    assert values("queued_requests") == {"openai": 0, "openai/chat": 0}
    assert values("active_request_leases") == {"openai": len(held), "openai/chat": 1}
    assert values("requests") == {"openai": 4, "openai/chat": 1}
    assert values("limit.utilization", "limit") == {"rpm": 0.008, "concurrency": 0.5}


def test_limiters_sharing_meter_provider_switch_off_separately(otel: Telemetry) -> None:
    one, two = Limiter(name="openai"), Limiter(name="anthropic")
    off_one, off_two = otel.watch(one), otel.watch(two)
    assert set(otel.points("queued_requests", "policy")) == {"openai", "anthropic"}
    off_one()
    assert set(otel.points("queued_requests", "policy")) == {"anthropic"}
    off_two()
    assert "queued_requests" not in otel.metrics()
    otel.watch(one)
    assert set(otel.points("queued_requests", "policy")) == {"openai"}


def test_wait_span_is_inside_the_callers_span(
    limiter: Limiter, otel: Telemetry, say: Any, admit: Any
) -> None:
    otel.watch(limiter, attributes={"gen_ai.request.model": "gpt-4o"})
    with otel.tracers.get_tracer("mine").start_as_current_span("agent step"):
        say(limiter, events.Queued, cost=COST, waiting=4)
        admit(limiter, waited=1.8, bound_by="tokens", waiting=3)
    wait, step = otel.spans
    assert wait.name == "wait openai"
    assert wait.parent is not None
    assert step.context is not None
    assert wait.parent.span_id == step.context.span_id
    assert wait.start_time is not None
    assert wait.end_time is not None
    assert wait.end_time - wait.start_time == 1_800_000_000
    assert wait.status.status_code is StatusCode.UNSET
    assert dict(wait.attributes or {}) == {
        "gen_ai.request.model": "gpt-4o",
        "asyncbucket.rate_limiting.policy": "openai",
        "asyncbucket.rate_limiting.result": "acquired",
        "asyncbucket.rate_limiting.bound_by": "tokens",
        "asyncbucket.rate_limiting.queued_requests": 3,
        "asyncbucket.rate_limiting.cost.requests": 1,
        "asyncbucket.rate_limiting.cost.tokens": 900,
        "asyncbucket.rate_limiting.cost.input_tokens": 600,
        "asyncbucket.rate_limiting.cost.output_tokens": 300,
    }


def test_call_that_does_not_wait_has_no_span(
    limiter: Limiter, otel: Telemetry, say: Any, admit: Any
) -> None:
    otel.watch(limiter)
    admit(limiter)
    say(limiter, events.Refused, cost=COST, reason="would_block", bound_by=None, retry_after=1.0)
    say(limiter, events.Queued, cost=COST, waiting=1)
    admit(limiter, waited=1.0, bound_by="tokens")
    say(limiter, events.Refused, cost=COST, reason="queue_full", bound_by=None, retry_after=None)
    assert [span.name for span in otel.spans] == ["wait openai"]


def test_wait_that_ends_in_refusal_is_an_error(limiter: Limiter, otel: Telemetry, say: Any) -> None:
    otel.watch(limiter)
    say(limiter, events.Queued, cost=COST, waiting=1)
    say(limiter, events.Refused, cost=COST, reason="timeout", bound_by="tokens", retry_after=3.0)
    say(limiter, events.Queued, cost=COST, waiting=1)
    say(limiter, events.Cancelled, cost=COST, waited=2.0)
    refused, cancelled = otel.spans
    assert refused.status.status_code is StatusCode.ERROR
    assert refused.attributes is not None
    assert refused.attributes["error.type"] == "timeout"
    assert refused.attributes["asyncbucket.rate_limiting.result"] == "timeout"
    assert cancelled.status.status_code is StatusCode.UNSET
    assert cancelled.attributes is not None
    assert cancelled.attributes["asyncbucket.rate_limiting.result"] == "request_canceled"
