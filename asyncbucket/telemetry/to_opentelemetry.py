"""Events as OpenTelemetry's metrics and spans.

The names are those of ASP.NET's rate limiting, the only ones of their kind that are stable in the
semantic conventions
(https://opentelemetry.io/docs/specs/semconv/dotnet/dotnet-aspnetcore-metrics/), with the prefix
``asyncbucket``: a dashboard for one can read the other.

A wait is a span of its own, made when it is over, within the span that was current where the call
asked. It says what the call waited for and, as in the GenAI conventions
(https://github.com/open-telemetry/semantic-conventions-genai), who the provider is, and any other
attributes given. It has no ``gen_ai.operation.name`` and no ``gen_ai.usage.*``: those mark an
inference, and a sum of inferences or tokens must not include a wait.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

from opentelemetry import metrics, trace
from opentelemetry.metrics import (
    CallbackOptions,
    Counter,
    Histogram,
    Meter,
    MeterProvider,
    Observation,
)
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, TracerProvider

from asyncbucket import events
from asyncbucket.telemetry.watched import Source, Watched, as_given, dispatch_by_type, tokens_of

#: Buckets in seconds: ASP.NET's, and longer ones, because waits of minutes are common here.
BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
#: Names by which the GenAI conventions know a provider.
PROVIDERS: Final = frozenset(
    {
        "anthropic",
        "aws.bedrock",
        "azure.ai.inference",
        "azure.ai.openai",
        "cohere",
        "deepseek",
        "gcp.gemini",
        "gcp.gen_ai",
        "gcp.vertex_ai",
        "groq",
        "ibm.watsonx.ai",
        "mistral_ai",
        "moonshot_ai",
        "openai",
        "perplexity",
        "x_ai",
    }
)

_SCOPE: Final = "asyncbucket"
_PREFIX: Final = "asyncbucket.rate_limiting."
_POLICY: Final = _PREFIX + "policy"
_RESULT: Final = _PREFIX + "result"
_BOUND_BY: Final = _PREFIX + "bound_by"
_ACQUIRED: Final = "acquired"
_CANCELED: Final = "request_canceled"

#: When the call of this context began to wait, by the wall clock in ns; 0 if it does not wait.
_waiting_since: Final[ContextVar[int]] = ContextVar("asyncbucket waiting since", default=0)


def watch(
    limiter: Source,
    meter_provider: MeterProvider | None,
    tracer_provider: TracerProvider | None,
    *,
    attributes: Mapping[str, str],
    max_limiters: int,
) -> Callable[[], None]:
    """Measure ``limiter``, and trace its waits, until the returned function is called."""
    meters = metrics.get_meter_provider() if meter_provider is None else meter_provider
    with _LOCK:
        instruments = _INSTRUMENTS.get(meters)
        if instruments is None:
            instruments = _INSTRUMENTS[meters] = Instruments(meters, max_limiters)
        forget = instruments.watched.add(limiter, "this meter provider")
    spans = Spans(trace.get_tracer(_SCOPE, tracer_provider=tracer_provider), attributes)
    stops = (limiter.observe(spans.observe), limiter.observe(instruments.observe))

    def off() -> None:
        for stop in (*stops, forget):
            stop()

    return off


def _seconds(meter: Meter, name: str, description: str) -> Histogram:
    return meter.create_histogram(
        _PREFIX + name,
        unit="s",
        description=description,
        explicit_bucket_boundaries_advisory=BUCKETS,
    )


def _requests(meter: Meter, name: str, description: str) -> Counter:
    return meter.create_counter(_PREFIX + name, unit="{request}", description=description)


class Instruments:
    """All instruments of one meter provider; instruments cannot be removed, only fall silent."""

    def __init__(self, provider: MeterProvider, max_limiters: int) -> None:
        self.watched = Watched(max_limiters)
        meter = provider.get_meter(_SCOPE)
        self._time_in_queue = _seconds(
            meter,
            "request.time_in_queue",
            "The time a request spent in a queue waiting to acquire a lease.",
        )
        self._lease_duration = _seconds(
            meter, "request_lease.duration", "The time that a lease was held by a request."
        )
        self._requests = _requests(
            meter, "requests", "Number of requests that tried to acquire a lease."
        )
        self._refusals = _requests(
            meter,
            "upstream_refusals",
            "Requests that the provider refused for rate all the same.",
        )
        self._retries = _requests(meter, "retries", "Requests that are tried again.")
        self._tokens = meter.create_counter(
            _PREFIX + "tokens",
            unit="{token}",
            description="Tokens reserved by admissions; used and refunded, as they were settled.",
        )
        self._make_observables(meter)
        self.observe = dispatch_by_type(
            {
                events.Admitted: self._admitted,
                events.Refused: self._refused,
                events.Cancelled: self._cancelled,
                events.Settled: self._settled,
                events.Released: self._released,
                events.Paused: self._paused,
                events.Retried: self._retried,
            }
        )

    def _make_observables(self, meter: Meter) -> None:
        """Make the instruments that read a state instead of counting events."""
        meter.create_observable_up_down_counter(
            _PREFIX + "queued_requests",
            [self._observe_queued],
            unit="{request}",
            description="Number of requests that are currently queued.",
        )
        meter.create_observable_up_down_counter(
            _PREFIX + "active_request_leases",
            [self._observe_active],
            unit="{request}",
            description="Number of requests that currently hold a lease.",
        )
        meter.create_observable_gauge(
            _PREFIX + "limit.utilization",
            [self._observe_used],
            unit="1",
            description="Share of a limit that is used now, 1 for all of it.",
        )

    def _admitted(self, event: events.Admitted) -> None:
        self._count_request(event.limiter, _ACQUIRED, event.bound_by, event.waited)
        tokens = event.cost.get("tokens")
        if tokens:
            self._tokens.add(tokens, self._attributes_of(event.limiter, kind="reserved"))

    def _refused(self, event: events.Refused) -> None:
        self._count_request(event.limiter, event.reason, event.bound_by, None)

    def _cancelled(self, event: events.Cancelled) -> None:
        self._count_request(event.limiter, _CANCELED, None, event.waited)

    def _count_request(
        self, limiter: str, result: str, bound_by: str | None, waited: float | None
    ) -> None:
        attributes = self._attributes_of(limiter, result=result)
        self._requests.add(1, attributes)
        if waited is not None:
            self._time_in_queue.record(waited, {**attributes, _BOUND_BY: bound_by or "none"})

    def _settled(self, event: events.Settled) -> None:
        tokens = tokens_of(event)
        if tokens is not None:
            self._tokens.add(tokens[0], self._attributes_of(event.limiter, kind="used"))
            self._tokens.add(tokens[1], self._attributes_of(event.limiter, kind="refunded"))

    def _released(self, event: events.Released) -> None:
        self._lease_duration.record(
            event.held, self._attributes_of(event.limiter, outcome=event.outcome)
        )

    def _paused(self, event: events.Paused) -> None:
        if event.reason == "429":
            self._refusals.add(1, self._attributes_of(event.limiter))

    def _retried(self, event: events.Retried) -> None:
        self._retries.add(1, self._attributes_of(event.limiter))

    def _attributes_of(self, limiter: str, **extra: str) -> dict[str, str]:
        prefixed = {_PREFIX + name: value for name, value in extra.items()}
        return {_POLICY: self.watched.label(limiter), **prefixed}

    def _observe_queued(self, _: CallbackOptions) -> Iterable[Observation]:
        for label, reading in self.watched.read().items():
            yield Observation(reading.queued, {_POLICY: label})

    def _observe_active(self, _: CallbackOptions) -> Iterable[Observation]:
        for label, reading in self.watched.read().items():
            yield Observation(reading.in_flight, {_POLICY: label})

    def _observe_used(self, _: CallbackOptions) -> Iterator[Observation]:
        for label, reading in self.watched.read().items():
            for limit, share in reading.used.items():
                yield Observation(share, {_POLICY: label, _PREFIX + "limit": limit})


class Spans:
    """Make a span of each wait; a call that passes at once has none."""

    def __init__(self, tracer: Tracer, attributes: Mapping[str, str]) -> None:
        self._tracer = tracer
        self._attributes = attributes
        self.observe = dispatch_by_type(
            {
                events.Queued: self._queued,
                events.Admitted: self._admitted,
                events.Refused: self._refused,
                events.Cancelled: self._cancelled,
            }
        )

    def _queued(self, _: events.Queued) -> None:
        _waiting_since.set(time.time_ns())

    def _admitted(self, event: events.Admitted) -> None:
        _waiting_since.set(0)
        if event.waited > 0:
            extra = {_PREFIX + "queued_requests": event.waiting}
            self._span(event, _ACQUIRED, event.bound_by, event.waited, extra)

    def _refused(self, event: events.Refused) -> None:
        since = _waiting_since.get()
        _waiting_since.set(0)
        if since:  # a call refused at once has not waited
            waited = (time.time_ns() - since) * 1e-9
            self._span(event, event.reason, event.bound_by, waited, {"error.type": event.reason})

    def _cancelled(self, event: events.Cancelled) -> None:
        _waiting_since.set(0)
        self._span(event, _CANCELED, None, event.waited, {})

    def _span(
        self,
        event: events.Admitted | events.Refused | events.Cancelled,
        result: str,
        bound_by: str | None,
        waited: float,
        extra: Mapping[str, Any],
    ) -> None:
        now = time.time_ns()
        provider = event.limiter.partition("/")[0]
        provider_attributes = {"gen_ai.provider.name": provider} if provider in PROVIDERS else {}
        bound = {} if bound_by is None else {_BOUND_BY: bound_by}
        cost = {f"{_PREFIX}cost.{name}": amount for name, amount in as_given(event.cost).items()}
        wait_attributes = {_POLICY: event.limiter, _RESULT: result, **bound, **cost, **extra}
        span = self._tracer.start_span(
            f"wait {event.limiter}",
            kind=SpanKind.INTERNAL,
            start_time=now - round(waited * 1e9),
            attributes={**provider_attributes, **self._attributes, **wait_attributes},
        )
        if "error.type" in extra:
            span.set_status(Status(StatusCode.ERROR))
        span.end(now)


#: A meter provider's instruments, made once: callbacks of a second set would never be called.
_INSTRUMENTS: Final["weakref.WeakKeyDictionary[MeterProvider, Instruments]"] = (
    weakref.WeakKeyDictionary()
)
_LOCK: Final = threading.Lock()
