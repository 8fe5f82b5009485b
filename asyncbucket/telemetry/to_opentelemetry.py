"""Metrics and spans for OpenTelemetry.

The metrics are those of Prometheus: an exporter that writes for Prometheus makes the same names of
them, so one dashboard serves both.

A wait is a span of its own, made when it is over, within the span that was current where the call
asked. It says what the call waited for, and has any other attributes given. It has no
``gen_ai.operation.name`` and no ``gen_ai.usage.*``: those mark an inference, and a sum of inferences
or tokens must not include a wait.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider, Observation
from opentelemetry.trace import Status, StatusCode, Tracer, TracerProvider

from asyncbucket.engine.events import Admitted, Cancelled, Event, Queued, Refused
from asyncbucket.engine.limiter import Limiter
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
#: When the call of this context began to wait, by the wall clock in ns; 0 if it does not wait.
_waiting_since: Final[ContextVar[int]] = ContextVar("asyncbucket waiting since", default=0)


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
    """Make a span of each wait when it is over; a call that passes at once has none."""

    def __init__(self, tracer: Tracer, attributes: Mapping[str, str]) -> None:
        self._tracer = tracer
        self._attributes = attributes

    def observe(self, event: Event) -> None:
        """Make the span of a wait that ends.

        Its beginning may be told by another thread, so only a refused call's span depends on that.
        """
        now, since = time.time_ns(), _waiting_since.get()
        if isinstance(event, Queued | Admitted | Refused | Cancelled):
            _waiting_since.set(now if isinstance(event, Queued) else 0)
        match event:
            case Admitted(waited=waited, bound_by=bound_by, waiting=waiting) if waited:
                begin = now - round(waited * 1e9)
                self._span(event, begin, "admitted", bound_by=bound_by, waiting=waiting)
            case Refused(reason=reason, bound_by=bound_by) if since:  # at once is no wait
                self._span(event, since, reason, bound_by=bound_by)
            case Cancelled(waited=waited):
                self._span(event, now - round(waited * 1e9), "cancelled")
            case _:
                pass

    def _span(
        self, event: Admitted | Refused | Cancelled, begin: int, result: str, **numbers: Any
    ) -> None:
        cost = {f"cost.{resource}": amount for resource, amount in as_given(event.cost).items()}
        said = {"limiter": event.limiter, "result": result, **numbers, **cost}
        known = {f"asyncbucket.{name}": said[name] for name in said if said[name] is not None}
        span = self._tracer.start_span(
            f"wait {event.limiter}", start_time=begin, attributes={**self._attributes, **known}
        )
        if isinstance(event, Refused):
            span.set_attribute("error.type", result)
            span.set_status(Status(StatusCode.ERROR))
        span.end()
