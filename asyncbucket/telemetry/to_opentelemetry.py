"""Events as OpenTelemetry's metrics and spans.

The names are those of ASP.NET's rate limiting, the only ones of their kind that are stable in the
semantic conventions
(https://opentelemetry.io/docs/specs/semconv/dotnet/dotnet-aspnetcore-metrics/), with the prefix
``asyncbucket``: a dashboard for one can read the other.

A wait is a span of its own, within the span that was current where the call asked. It says what the call waited for, and has any other attributes given. It has no
``gen_ai.operation.name`` and no ``gen_ai.usage.*``: those mark an inference, and a sum of
inferences or tokens must not include a wait.
"""

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Final

from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider, Observation
from opentelemetry.trace import Span, Status, StatusCode, Tracer, TracerProvider

from asyncbucket.core.events import Admitted, Cancelled, Event, Queued, Refused
from asyncbucket.core.limiter import Limiter
from asyncbucket.telemetry.metrics import (
    ACQUIRED,
    CANCELED,
    Add,
    Metrics,
    as_given,
)

#: Buckets in seconds: ASP.NET's, and longer ones, because waits of minutes are common here.
BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_SCOPE: Final = "asyncbucket"
_PREFIX: Final = "asyncbucket.rate_limiting."
_POLICY: Final = _PREFIX + "policy"


def opentelemetry(
    limiter: Limiter,
    *,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    attributes: Mapping[str, str] | None = None,
) -> Callable[[], None]:
    """Measure with OpenTelemetry, and make a span of each wait within the span of the caller.

    The metrics are named like ASP.NET's, which are stable, with the prefix ``asyncbucket``:
    ``asyncbucket.rate_limiting.request.time_in_queue`` and so on. The span of a wait is not a span
    of inference and has no ``gen_ai.usage.*``, so beside an instrumentation of the model nothing is
    counted twice.

    Args:
        limiter: the limiter to observe.
        meter_provider: where metrics go; by default the global one.
        tracer_provider: where spans go; by default the global one.
        attributes: further attributes of each span, such as ``{"gen_ai.request.model": "gpt-4o"}``.

    Raises:
        ImportError: opentelemetry-api is not installed; the message names the extra.
        ValueError: as for `prometheus`, for the meter provider.
    """
    meters = metrics.get_meter_provider() if meter_provider is None else meter_provider
    stop_measuring = Instruments.of(meters).watch(limiter)
    spans = Spans(trace.get_tracer(_SCOPE, tracer_provider=tracer_provider), attributes or {})
    stop_tracing = limiter.observe(spans.observe)

    def off() -> None:
        stop_tracing()
        stop_measuring()

    return off


class Instruments(Metrics):
    """All instruments of one meter provider; instruments cannot be removed, only fall silent."""

    def __init__(self, registry: MeterProvider) -> None:
        super().__init__(registry)
        meter = registry.get_meter(_SCOPE)
        #: What records or adds a measurement, and its attributes besides the policy.
        self._records: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {}

        def histogram(metric: str, name: str, text: str, *labels: str) -> None:
            made = meter.create_histogram(
                _PREFIX + name, "s", text, explicit_bucket_boundaries_advisory=BUCKETS
            )
            self._records[metric] = (made.record, tuple(_PREFIX + each for each in labels))

        def counter(metric: str, name: str, unit: str, text: str, *labels: str) -> None:
            made = meter.create_counter(_PREFIX + name, f"{{{unit}}}", text)
            self._records[metric] = (made.add, tuple(_PREFIX + each for each in labels))

        waited = "The time a request spent in a queue waiting to acquire a lease."
        histogram("waited", "request.time_in_queue", waited, "result", "bound_by")
        held = "The time that a lease was held by a request."
        histogram("held", "request_lease.duration", held, "outcome")
        agents = "The time from an agent's first request to its end."
        histogram("agents", "agent.duration", agents, "kind", "outcome")
        asked = "Number of requests that tried to acquire a lease."
        counter("asked", "requests", "request", asked, "result")
        refused = "Requests that the provider refused for rate all the same."
        counter("upstream_429", "upstream_refusals", "request", refused)
        counter("retries", "retries", "request", "Requests that are tried again.")
        tokens = "Tokens reserved, used, and refunded by settling."
        counter("tokens", "tokens", "token", tokens, "kind")
        counter("spent_usd", "spent", "USD", "US dollars that calls have cost.")
        for part, name, unit, text in (
            ("queued", "queued_requests", "request", "Requests that are currently queued."),
            ("in_flight", "active_request_leases", "request", "Requests that hold a lease."),
            ("agents", "active_agents", "agent", "Agents that make requests and are not over."),
        ):
            read = partial(self._counts, part)
            meter.create_observable_up_down_counter(_PREFIX + name, [read], f"{{{unit}}}", text)
        used = "Share of a limit that is used now, 1 for all of it."
        meter.create_observable_gauge(_PREFIX + "limit.utilization", [self._shares], "1", used)

    def adder(self, metric: str, label: str, values: tuple[str, ...]) -> Add:
        if metric not in self._records:
            return lambda _: None
        add, names = self._records[metric]
        attributes = {_POLICY: label, **dict(zip(names, values, strict=True))}
        return lambda amount: add(amount, attributes)

    def _counts(self, part: str, _: object) -> Iterator[Observation]:
        for label, load in self.loads().items():
            yield Observation(getattr(load, part), {_POLICY: label})

    def _shares(self, _: object) -> Iterator[Observation]:
        for label, load in self.loads().items():
            for limit, share in load.used.items():
                yield Observation(share, {_POLICY: label, _PREFIX + "limit": limit})


class Spans:
    """Make a span of each wait; a call that passes at once has none."""

    def __init__(self, tracer: Tracer, attributes: Mapping[str, str]) -> None:
        self._tracer = tracer
        self._attributes = attributes
        #: The span of the call of this context while it waits.
        self._waiting: ContextVar[Span | None] = ContextVar("asyncbucket span", default=None)

    def observe(self, event: Event) -> None:
        """Begin a span when a call begins to wait, and end it with the wait."""
        match event:
            case Queued():
                cost = as_given(event.cost).items()
                said = {f"{_PREFIX}cost.{resource}": amount for resource, amount in cost}
                span = self._tracer.start_span(
                    f"wait {event.limiter}",
                    attributes={**self._attributes, _POLICY: event.limiter, **said},
                )
                self._waiting.set(span)
            case Admitted():
                self._end(ACQUIRED, bound_by=event.bound_by, queued_requests=event.waiting)
            case Refused():
                self._end(event.reason, bound_by=event.bound_by, is_error=True)
            case Cancelled():
                self._end(CANCELED)
            case _:
                pass

    def _end(self, result: str, *, is_error: bool = False, **numbers: str | int | None) -> None:
        span = self._waiting.get()
        if span is None:  # a call that is refused at once, or passes, has not waited
            return
        self._waiting.set(None)
        for name, value in {"result": result, **numbers}.items():
            if value is not None:
                span.set_attribute(_PREFIX + name, value)
        if is_error:
            span.set_attribute("error.type", result)
            span.set_status(Status(StatusCode.ERROR))
        span.end()
