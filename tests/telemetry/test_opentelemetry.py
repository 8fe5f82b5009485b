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
from tests.telemetry.conftest import COST

PREFIX = "asyncbucket.rate_limiting."
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
            metric.name.removeprefix(PREFIX): metric
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str, key: str) -> dict[Any, Any]:
        points = self.metrics()[name].data.data_points
        return {point.attributes[PREFIX + key]: point for point in points}


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
    say(limiter, events.Released, held=2.0, outcome="ok", used={"usd": 12_500})
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
    assert otel.points("agent.duration", "kind")["chat"].sum == 30.0
    counts = {"upstream_refusals": 1, "spent": 0.0125, "active_agents": 0, "retries": 1}
    for name, count in counts.items():
        assert otel.points(name, "policy")["openai"].value == count
    assert {name: metrics[name].unit for name in STABLE} == STABLE
    assert all(metric.description for metric in metrics.values())
    assert not any(metric.name.startswith("gen_ai.") for metric in metrics.values())


def test_requests_are_counted_by_result_and_waits_by_binding_limit(
    limiter: Limiter, otel: Telemetry, say: Any, admit: Any
) -> None:
    otel.watch(limiter)
    admit(limiter, waited=90.0, bound_by="tokens")
    admit(limiter)
    say(limiter, events.Refused, reason="timeout", bound_by="tokens", retry_after=3.0)
    say(limiter, events.Cancelled, waited=1.0)
    results = otel.points("requests", "result")
    assert {result: point.value for result, point in results.items()} == {
        "acquired": 2,
        "timeout": 1,
        "request_canceled": 1,
    }
    waits = otel.metrics()["request.time_in_queue"].data.data_points
    name = PREFIX + "bound_by"
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


def test_gauges_end_when_it_is_switched_off(limiter: Limiter, otel: Telemetry) -> None:
    off = otel.watch(limiter)
    assert "queued_requests" in otel.metrics()
    off()
    assert "queued_requests" not in otel.metrics()
    otel.watch(limiter)


def test_wait_span_is_inside_the_callers_span(
    limiter: Limiter, otel: Telemetry, say: Any, admit: Any
) -> None:
    otel.watch(limiter, attributes={"gen_ai.request.model": "gpt-4o"})
    with otel.tracers.get_tracer("mine").start_as_current_span("agent step"):
        say(limiter, events.Queued, waiting=4)
        admit(limiter, waited=1.8, bound_by="tokens", waiting=3)
    wait, step = otel.spans
    assert wait.name == "wait openai"
    assert wait.parent is not None
    assert step.context is not None
    assert wait.parent.span_id == step.context.span_id
    assert wait.status.status_code is StatusCode.UNSET
    assert dict(wait.attributes or {}) == {
        "gen_ai.request.model": "gpt-4o",
        PREFIX + "policy": "openai",
        PREFIX + "result": "acquired",
        PREFIX + "bound_by": "tokens",
        PREFIX + "queued_requests": 3,
        PREFIX + "cost.requests": 1,
        PREFIX + "cost.tokens": 900,
        PREFIX + "cost.input_tokens": 600,
        PREFIX + "cost.output_tokens": 300,
    }


def test_only_waits_have_spans_and_those_that_end_in_refusal_are_errors(
    limiter: Limiter, otel: Telemetry, say: Any, admit: Any
) -> None:
    otel.watch(limiter)
    admit(limiter)
    say(limiter, events.Refused, reason="would_block", bound_by=None, retry_after=1.0)
    say(limiter, events.Queued, waiting=1)
    say(limiter, events.Refused, reason="timeout", bound_by="tokens", retry_after=3.0)
    say(limiter, events.Refused, reason="queue_full", bound_by=None, retry_after=None)
    say(limiter, events.Queued, waiting=1)
    say(limiter, events.Cancelled, waited=2.0)
    refused, cancelled = otel.spans
    assert refused.status.status_code is StatusCode.ERROR
    assert refused.attributes is not None
    assert refused.attributes["error.type"] == "timeout"
    assert refused.attributes[PREFIX + "result"] == "timeout"
    assert cancelled.status.status_code is StatusCode.UNSET
    assert cancelled.attributes is not None
    assert cancelled.attributes[PREFIX + "result"] == "request_canceled"
