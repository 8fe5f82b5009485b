import contextvars
from typing import Any

import pytest
from opentelemetry.trace import StatusCode

from asyncbucket import Limiter, events
from asyncbucket.telemetry.metrics import BUCKETS, COUNTERS, GAUGES, HISTOGRAMS
from tests.telemetry.conftest import COST, Telemetry


def test_metrics_are_those_of_prometheus(otel: Telemetry, say: Any, admit: Any) -> None:
    limiter = Limiter("500 RPM burst 500", concurrency=8, name="openai")
    off = otel.watch(limiter)
    held = [each.acquire_nowait() for each in (limiter, limiter.child("chat"))]
    admit(limiter, waited=90.0, bound_by="tokens")
    say(limiter, events.Released, held=2.0, outcome="ok", used={"usd": 12_500})
    for used in 700, 950:
        say(limiter, events.Settled, reserved=COST, used={"tokens": used})
    say(limiter, events.Paused, seconds=1.0, reason="429")
    say(limiter, events.Retried, attempt=1, error="HTTP 429", delay=1.0)
    say(limiter, events.AgentFinished, kind="chat", seconds=30.0, ended_well=True)
    say(limiter, events.Shadowed, cost=COST, would_wait=3.0, bound_by="tokens")
    say(limiter, events.PromptCached, read=True, written=False, saved_tokens=9_500)
    metrics = otel.metrics()
    assert sorted(metrics) == sorted([*HISTOGRAMS, *COUNTERS, *GAUGES])
    assert all(metric.description for metric in metrics.values())
    waits, tokens = otel.points("wait"), otel.points("tokens")
    assert (waits["tokens", "openai"].sum, waits["none", "openai"].count) == (90.0, 2)
    assert waits["tokens", "openai"].explicit_bounds == BUCKETS
    assert metrics["wait"].unit == "s"
    counted = {kind: point.value for (kind, _), point in tokens.items()}
    assert otel.points("shadow_wait")["tokens", "openai"].sum == 3.0
    assert counted == {"reserved": 900, "used": 1_650, "refunded": 200, "cached": 9_500}
    cache = {kind: point.value for (kind, _), point in otel.points("prompt_cache").items()}
    assert cache == {"read": 1, "write": 0}
    assert otel.points("agent")["chat", "openai", "ok"].sum == 30.0
    for name, count in {"upstream_429": 1, "spent_usd": 0.0125, "retries": 1}.items():
        assert otel.points(name)["openai",].value == count
    in_flight = {name: each.value for (name,), each in otel.points("in_flight_requests").items()}
    assert in_flight == {"openai": len(held), "openai/chat": 1}
    shares = {limit: point.value for (limit, _), point in otel.points("limit_used_ratio").items()}
    assert shares == {"rpm": 0.004, "concurrency": 0.25}
    off()
    admit(limiter, waited=90.0, bound_by="tokens")
    assert not otel.metrics().keys() & GAUGES.keys()
    assert len(otel.spans) == 1


def test_wait_span_says_what_for(limiter: Limiter, otel: Telemetry, say: Any, admit: Any) -> None:
    otel.watch(limiter, attributes={"gen_ai.request.model": "gpt-4o"})
    contextvars.Context().run(say, limiter, events.Queued, waiting=4)  # told by another thread
    admit(limiter, waited=1.8, bound_by="tokens", waiting=3)
    (wait,) = otel.spans
    assert wait.name == "wait openai"
    assert wait.status.status_code is StatusCode.UNSET
    assert wait.attributes == {
        "gen_ai.request.model": "gpt-4o",
        "asyncbucket.limiter": "openai",
        "asyncbucket.result": "admitted",
        "asyncbucket.bound_by": "tokens",
        "asyncbucket.waiting": 3,
        **{f"asyncbucket.cost.{name}": COST[name] for name in COST if name != "concurrency"},
    }


def test_only_waits_have_spans_and_those_that_end_in_refusal_are_errors(
    limiter: Limiter, otel: Telemetry, say: Any, admit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    otel.watch(limiter)
    admit(limiter)
    say(limiter, events.Refused, reason="would_block", bound_by=None, retry_after=1.0)
    say(limiter, events.Queued, waiting=1)
    say(limiter, events.Refused, reason="timeout", bound_by="tokens", retry_after=3.0)
    say(limiter, events.Refused, reason="queue_full", bound_by=None, retry_after=None)
    say(limiter, events.Queued, waiting=1)
    say(limiter, events.Cancelled, waited=2.0)
    assert caplog.records == []  # no span is ended twice
    refused, cancelled = otel.spans
    assert refused.status.status_code is StatusCode.ERROR
    assert cancelled.status.status_code is StatusCode.UNSET
    said = [dict(span.attributes or {}) for span in (refused, cancelled)]
    assert said[0]["error.type"] == said[0]["asyncbucket.result"] == "timeout"
    assert said[1]["asyncbucket.result"] == "cancelled"
