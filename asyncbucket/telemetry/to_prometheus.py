"""Metrics for Prometheus: plain counters, a histogram and gauges, in one collector per registry.

Limiters of one registry share them; they are removed with the last. Gauges are read when somebody
scrapes, because the use of a limit changes even if nothing happens.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Final, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from asyncbucket.core import events
from asyncbucket.core.limiter import Limiter
from asyncbucket.telemetry.metrics import ACQUIRED, Add, Metrics
from asyncbucket.waiting import Lock

#: Waits may be as short as a burst's pace or as long as a minute's window plus a pause.
BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
#: How a call may end.
_OUTCOMES: Final = (*get_args(events.Outcome), *get_args(events.Reason), "cancelled")


def watch(
    limiter: Limiter, registry: CollectorRegistry | None, *, max_limiters: int
) -> Callable[[], None]:
    """Count what happens in ``limiter`` into ``registry`` until the returned function is called."""
    registry = REGISTRY if registry is None else registry
    if not isinstance(registry, CollectorRegistry):
        type_name = type(registry).__name__
        raise TypeError(f"registry must be prometheus_client's CollectorRegistry, not {type_name}")
    with _LOCK:
        metrics = _COLLECTORS.get(registry)
        if metrics is None:
            metrics = PrometheusMetrics(max_limiters)
            registry.register(metrics)
            _COLLECTORS[registry] = metrics
        stop = metrics.watch(limiter, "this registry")

    def off() -> None:
        with _LOCK:
            stop()
            if not metrics.is_watching and _COLLECTORS.get(registry) is metrics:
                registry.unregister(metrics)
                del _COLLECTORS[registry]

    return off


class PrometheusMetrics(Metrics, Collector):
    """All metrics of one registry. Counters begin at 0, so that a rate sees the first refusal."""

    zeros = (
        *(("ended", (outcome,)) for outcome in _OUTCOMES),
        *(("tokens", (kind,)) for kind in ("reserved", "used", "refunded")),
        ("upstream_429", ()),
        ("retries", ()),
    )

    def __init__(self, max_limiters: int) -> None:
        super().__init__(max_limiters)
        self._wait = Histogram(
            "asyncbucket_wait_seconds",
            "Seconds between asking and admission, by what bound the call.",
            ("limiter", "bound_by"),
            registry=None,
            buckets=BUCKETS,
        )
        self._counters = {
            "ended": _counter("requests", "Calls by how they ended.", "outcome"),
            "tokens": _counter(
                "tokens",
                "Tokens reserved by admissions; used and refunded, as calls were settled.",
                "kind",
            ),
            "upstream_429": _counter(
                "upstream_429", "Calls that the provider refused for rate all the same."
            ),
            "retries": _counter("retries", "Failed calls that are tried again."),
        }

    def adder(self, metric: str, label: str, values: tuple[str, ...]) -> Add | None:
        if metric == "waited" and values[0] == ACQUIRED:
            return self._wait.labels(label, values[1]).observe
        counter = self._counters.get(metric)
        return None if counter is None else counter.labels(label, *values).inc

    def collect(self) -> Iterator[Metric]:
        loads = self.loads()  # first: counters of limiters that were not seen yet begin at 0
        for each in (self._wait, *self._counters.values()):
            yield from each.collect()
        queued = GaugeMetricFamily(
            "asyncbucket_queued_requests",
            "Calls that wait for their admission now.",
            labels=["limiter"],
        )
        in_flight = GaugeMetricFamily(
            "asyncbucket_in_flight_requests",
            "Calls admitted and not yet over.",
            labels=["limiter"],
        )
        used = GaugeMetricFamily(
            "asyncbucket_limit_used_ratio",
            "Share of a limit that is used now, 1 for all of it.",
            labels=["limiter", "limit"],
        )
        for label, load in loads.items():
            queued.add_metric([label], load.queued)
            in_flight.add_metric([label], load.in_flight)
            for limit, share in load.used.items():
                used.add_metric([label, limit], share)
        yield from (queued, in_flight, used)

    def describe(self) -> Iterator[Metric]:
        """Give the names, by which a registry refuses others like them and selects what is asked."""
        return self.collect()


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"asyncbucket_{name}_total", text, ("limiter", *labels), registry=None)


#: A registry refuses a name that it knows, so its limiters share what was registered.
_COLLECTORS: Final["weakref.WeakKeyDictionary[CollectorRegistry, PrometheusMetrics]"] = (
    weakref.WeakKeyDictionary()
)
_LOCK: Final = Lock()
