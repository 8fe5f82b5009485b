"""Events as OpenTelemetry's metrics and spans.

The names are those of ASP.NET's rate limiting, the only ones of their kind that are stable in the
semantic conventions
(https://opentelemetry.io/docs/specs/semconv/dotnet/dotnet-aspnetcore-metrics/), with the prefix
``asyncbucket``: a dashboard for one can read the other.

A wait is a span of its own, made when it is over, within the span that was current where the call
asked. It says what the call waited for, and has any other attributes given. It has no
``gen_ai.operation.name`` and no ``gen_ai.usage.*``: those mark an inference, and a sum of
inferences or tokens must not include a wait.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider, Observation
from opentelemetry.trace import Status, StatusCode, Tracer, TracerProvider

from asyncbucket.core.events import Admitted, Cancelled, Event, Queued, Refused
from asyncbucket.core.limiter import Limiter
from asyncbucket.telemetry.metrics import (
    ACQUIRED,
    CANCELED,
    Add,
    Metrics,
    as_given,
    check_source,
)

#: Buckets in seconds: ASP.NET's, and longer ones, because waits of minutes are common here.
BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_SCOPE: Final = "asyncbucket"
_PREFIX: Final = "asyncbucket.rate_limiting."
_POLICY: Final = _PREFIX + "policy"
#: When the call of this context began to wait, by the wall clock in ns; 0 if it does not wait.
_waiting_since: Final[ContextVar[int]] = ContextVar("asyncbucket waiting since", default=0)


def opentelemetry(
    limiter: Limiter,
    *,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    attributes: Mapping[str, str] | None = None,
    max_limiters: int = 100,
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
        max_limiters: how many limiters are told apart, as for `prometheus`.

    Raises:
        ImportError: opentelemetry-api is not installed; the message names the extra.
        ValueError: as for `prometheus`, for the meter provider.
        TypeError: ``limiter`` is not a limiter.
    """
    check_source(limiter)
    meters = metrics.get_meter_provider() if meter_provider is None else meter_provider
    stop_measuring = Instruments.of(meters).watch(limiter, max_limiters)
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

    def adder(self, metric: str, label: str, values: tuple[str, ...]) -> Add | None:
        if metric not in self._records:
            return None
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

    def observe(self, event: Event) -> None:
        """Remember when a wait begins, and make its span when it ends."""
        since = _waiting_since.get()
        if isinstance(event, Queued | Admitted | Refused | Cancelled):
            _waiting_since.set(time.time_ns() if isinstance(event, Queued) else 0)
        match event:
            case Admitted(waited=waited) if waited > 0:
                self._span(event, waited, ACQUIRED, queued_requests=event.waiting)
            case Refused(reason=reason) if since:  # at once is no wait
                self._span(event, (time.time_ns() - since) * 1e-9, reason)
            case Cancelled(waited=waited):
                self._span(event, waited, CANCELED)
            case _:
                pass

    def _span(
        self, event: Admitted | Refused | Cancelled, waited: float, result: str, **numbers: Any
    ) -> None:
        now = time.time_ns()
        said = {"policy": event.limiter, "result": result, **numbers}
        bound_by = getattr(event, "bound_by", None)
        if bound_by is not None:
            said["bound_by"] = bound_by
        said |= {f"cost.{name}": amount for name, amount in as_given(event.cost).items()}
        span = self._tracer.start_span(
            f"wait {event.limiter}",
            start_time=now - round(waited * 1e9),
            attributes={**self._attributes, **{_PREFIX + name: said[name] for name in said}},
        )
        if isinstance(event, Refused):
            span.set_attribute("error.type", event.reason)
            span.set_status(Status(StatusCode.ERROR))
        span.end(now)
