"""Metrics and spans for OpenTelemetry.

The metrics are those of Prometheus: an exporter that writes for Prometheus makes the same names of
them, so one dashboard serves both.

A wait is a span of its own, within the span that was current where the call asked. It says what the
call waited for, and has any other attributes given. It has no ``gen_ai.operation.name`` and no
``gen_ai.usage.*``: those mark an inference, and a sum of inferences or tokens must not include a wait.
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
    BUCKETS,
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    Add,
    Metrics,
    as_given,
)

_SCOPE: Final = "asyncbucket"


def opentelemetry(
    limiter: Limiter,
    *,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    attributes: Mapping[str, str] | None = None,
) -> Callable[[], None]:
    """Measure with OpenTelemetry, and make a span of each wait within the span of the caller.

    The metrics are those of `prometheus`: ``asyncbucket.wait`` is ``asyncbucket_wait_seconds`` there.
    The span of a wait is not a span of inference and has no ``gen_ai.usage.*``, so beside an
    instrumentation of the model nothing is counted twice.

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
        self._record: dict[str, Callable[..., object]] = {}
        for name, (text, _) in HISTOGRAMS.items():
            self._record[name] = meter.create_histogram(
                f"{_SCOPE}.{name}", "s", text, explicit_bucket_boundaries_advisory=BUCKETS
            ).record
        for name, (text, _) in COUNTERS.items():
            self._record[name] = meter.create_counter(f"{_SCOPE}.{name}", description=text).add
        for name, (text, _) in GAUGES.items():
            observe = partial(self._observe, name)
            meter.create_observable_gauge(f"{_SCOPE}.{name}", [observe], description=text)

    def adder(self, metric: str, values: tuple[str, ...]) -> Add:
        _, labels = (HISTOGRAMS | COUNTERS)[metric]
        attributes = dict(zip(labels, values, strict=True))
        return lambda amount: self._record[metric](amount, attributes)

    def _observe(self, gauge: str, _: object) -> Iterator[Observation]:
        for values, value in self.read()[gauge].items():
            yield Observation(value, dict(zip(GAUGES[gauge][1], values, strict=True)))


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
            case Queued(limiter=limiter):
                cost = as_given(event.cost).items()
                said = {f"asyncbucket.cost.{resource}": amount for resource, amount in cost}
                span = self._tracer.start_span(
                    f"wait {limiter}",
                    attributes={**self._attributes, "asyncbucket.limiter": limiter, **said},
                )
                self._waiting.set(span)
            case Admitted(bound_by=bound_by, waiting=waiting):
                self._end("admitted", bound_by=bound_by, waiting=waiting)
            case Refused(reason=reason, bound_by=bound_by):
                self._end(reason, bound_by=bound_by, is_error=True)
            case Cancelled():
                self._end("cancelled")
            case _:
                pass

    def _end(self, result: str, *, is_error: bool = False, **numbers: str | int | None) -> None:
        span = self._waiting.get()
        if span is None:  # a call that is refused at once, or passes, has not waited
            return
        self._waiting.set(None)
        for name, value in {"result": result, **numbers}.items():
            if value is not None:
                span.set_attribute(f"asyncbucket.{name}", value)
        if is_error:
            span.set_attribute("error.type", result)
            span.set_status(Status(StatusCode.ERROR))
        span.end()
