"""What the tests of telemetry share: a limiter, events as a test says, and what watches them."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from asyncbucket import Limiter, telemetry
from asyncbucket.engine.events import Admitted, Event
from asyncbucket.levels import emit, shown_name

Say: TypeAlias = Callable[..., None]

COST = {"requests": 1, "tokens": 900, "input_tokens": 600, "output_tokens": 300, "concurrency": 1}


def scrape(registry: CollectorRegistry) -> Counter[tuple[str, ...]]:
    """Return each sample by its name and the values of its labels, sorted by name."""
    return Counter(
        {
            (
                sample.name.removeprefix("asyncbucket_"),
                *(value for _, value in sorted(sample.labels.items())),
            ): sample.value
            for family in text_string_to_metric_families(generate_latest(registry).decode())
            for sample in family.samples
        }
    )


class Telemetry:
    """Providers that keep what is measured and traced."""

    def __init__(self) -> None:
        self._reader, self._spans = InMemoryMetricReader(), InMemorySpanExporter()
        self.meters, self.tracers = MeterProvider(metric_readers=[self._reader]), TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))

    def watch(self, limiter: Limiter, **options: Any) -> Callable[[], None]:
        providers: dict[str, Any] = {"meter_provider": self.meters, "tracer_provider": self.tracers}
        return telemetry.opentelemetry(limiter, **providers, **options)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._spans.get_finished_spans()

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        return {
            metric.name.removeprefix("asyncbucket."): metric
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str) -> dict[tuple[Any, ...], Any]:
        """Return the points of a metric by the values of their attributes, sorted by name."""
        points = self.metrics()[name].data.data_points
        return {
            tuple(value for _, value in sorted(each.attributes.items())): each for each in points
        }


@pytest.fixture
def otel() -> Iterator[Telemetry]:
    kept = Telemetry()
    yield kept
    kept.meters.shutdown()
    kept.tracers.shutdown()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def limiter() -> Limiter:
    return Limiter(name="openai")


@pytest.fixture
def say() -> Say:
    """Let an event happen in a limiter; a call costs `COST` unless a test says otherwise."""

    def emit_event(limiter: Limiter, event_type: type[Event], **what: Any) -> None:
        if "cost" in event_type.__dataclass_fields__:
            what = {"cost": COST, **what}
        emit(limiter, event_type(limiter=shown_name(limiter), at=1.0, **what))

    return emit_event


@pytest.fixture
def admit(say: Say) -> Say:
    """Admit a call that waited for nothing, unless a test says otherwise."""

    def admit_call(limiter: Limiter, **what: Any) -> None:
        usual = {"waited": 0.0, "bound_by": None, "waiting": 0, "in_flight": 1}
        say(limiter, Admitted, **{**usual, **what})

    return admit_call
