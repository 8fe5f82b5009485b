"""Metrics for Prometheus: counters and histograms, and gauges that are read at each scrape."""

from collections.abc import Callable, Iterator
from typing import Final, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from asyncbucket.engine import events
from asyncbucket.engine.limiter import Limiter
from asyncbucket.telemetry.metrics import BUCKETS, COUNTERS, GAUGES, HISTOGRAMS, Add, Metrics

#: What is 0 from the first scrape of a limiter on, so that a rate sees the first refusal.
_ZEROS: Final = (
    *(("requests", (how,)) for how in (*get_args(events.Outcome), *get_args(events.Reason))),
    ("requests", ("cancelled",)),
    *(("tokens", (kind,)) for kind in ("reserved", "used", "refunded", "cached")),
    *(("prompt_cache", (kind,)) for kind in ("read", "write")),
    *((metric, ()) for metric in ("spent_usd", "upstream_429", "retries")),
)


def prometheus(limiter: Limiter, *, registry: CollectorRegistry = REGISTRY) -> Callable[[], None]:
    """Count into Prometheus metrics, which a scrape of ``registry`` shows.

    Any number of limiters may share a registry; those of one name share their numbers. A limiter's
    numbers include those of the limiters below it, as in its statistics. When it is switched off,
    its gauges disappear, and its counters stay where they are. In prometheus_client's multiprocess
    mode the gauges are missing: what waits now is known to its own process alone.

    Each child has labels of its own. Use `Limiter.key` for users or tenants: they share one.

    Args:
        limiter: the limiter to observe.
        registry: what to register with; by default prometheus_client's own ``REGISTRY``.

    Raises:
        ImportError: prometheus_client is not installed; the message names the extra.
        ValueError: this registry already observes the limiter, or one above or below it, so its
            calls would count twice.
    """
    return PrometheusMetrics.of(registry).watch(limiter)


class PrometheusMetrics(Metrics, Collector):
    """All metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        registry.register(self)  # first: a limiter that is seen by a scrape begins at 0 in it
        self._made: dict[str, Counter | Histogram] = {}
        for name, (text, labels) in HISTOGRAMS.items():
            self._made[name] = Histogram(
                f"asyncbucket_{name}_seconds", text, labels, registry=registry, buckets=BUCKETS
            )
        for name, (text, labels) in COUNTERS.items():
            self._made[name] = Counter(f"asyncbucket_{name}", text, labels, registry=registry)

    def adder(self, metric: str, values: tuple[str, ...]) -> Add:
        child = self._made[metric].labels(*values)
        return child.observe if isinstance(child, Histogram) else child.inc

    def collect(self) -> Iterator[Metric]:
        """Read the gauges."""
        found = self.read()
        for label in found["queued_requests"]:
            for metric, values in _ZEROS:
                self.adder(metric, (*label, *values))
        for name, (text, labels) in GAUGES.items():
            gauge = GaugeMetricFamily(f"asyncbucket_{name}", text, labels=labels)
            for values, value in found[name].items():
                gauge.add_metric(values, value)
            yield gauge

    def describe(self) -> Iterator[Metric]:
        """Give the names, by which a registry refuses others like them and selects what is asked."""
        return self.collect()
