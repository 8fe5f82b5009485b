"""Metrics for Prometheus: plain counters, a histogram and gauges, in one collector per registry.

Limiters of one registry share them; they are removed with the last. Gauges are set when somebody
scrapes, because the use of a limit changes even if nothing happens. In multiprocess mode a scrape
asks other processes only for what they have written into their files, so there a thread sets the
gauges once a second.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Final, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.registry import Collector

from asyncbucket.core import events
from asyncbucket.core.process import reset_after_fork
from asyncbucket.telemetry.metrics import ACQUIRED, Add, Metrics, WatchedLimiter

#: Waits may be as short as a burst's pace or as long as a minute's window plus a pause.
BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
#: How a call may end.
_OUTCOMES: Final = (*get_args(events.Outcome), *get_args(events.Reason), "cancelled")
#: Seconds between two writes in multiprocess mode.
_WRITE_INTERVAL: Final = 1.0
#: Held while gauges are written, and while the process forks: a child that inherited one of
#: prometheus_client's locks during a write would wait for it for ever.
_WRITE_LOCK: Final = threading.RLock()


def watch(
    limiter: WatchedLimiter, registry: CollectorRegistry | None, *, max_limiters: int
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
                metrics.close()
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
        self._queued = Gauge(
            "asyncbucket_queued_requests",
            "Calls that wait for their admission now.",
            ("limiter",),
            registry=None,
            multiprocess_mode="livesum",
        )
        self._in_flight = Gauge(
            "asyncbucket_in_flight_requests",
            "Calls admitted and not yet over.",
            ("limiter",),
            registry=None,
            multiprocess_mode="livesum",
        )
        self._used = Gauge(
            "asyncbucket_limit_used_ratio",
            "Share of a limit that is used now, 1 for all of it.",
            ("limiter", "limit"),
            registry=None,
            multiprocess_mode="livemax",
        )
        #: What the gauges were last set to; those that are gone are set to 0.
        self._set: dict[tuple[Gauge, tuple[str, ...]], float] = {}
        self._closed = threading.Event()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ or "prometheus_multiproc_dir" in os.environ:
            self.after_fork()
            reset_after_fork(self)

    def adder(self, metric: str, label: str, values: tuple[str, ...]) -> Add | None:
        if metric == "waited" and values[0] == ACQUIRED:
            return self._wait.labels(label, values[1]).observe
        counter = self._counters.get(metric)
        return None if counter is None else counter.labels(label, *values).inc

    def collect(self) -> Iterator[Metric]:
        self.set_gauges()
        for each in self._families():
            yield from each.collect()

    def describe(self) -> Iterator[Metric]:
        for each in self._families():
            yield from each.describe()

    def set_gauges(self) -> None:
        """Read the limiters."""
        with _WRITE_LOCK:
            values: dict[tuple[Gauge, tuple[str, ...]], float] = {}
            for label, load in self.loads().items():
                values[self._queued, (label,)] = load.queued
                values[self._in_flight, (label,)] = load.in_flight
                for limit, share in load.used.items():
                    values[self._used, (label, limit)] = share
            for (gauge, labels), value in {**dict.fromkeys(self._set, 0), **values}.items():
                gauge.labels(*labels).set(value)
            self._set = values

    def after_fork(self) -> None:
        """Set the gauges from a thread of this process: the parent's do not exist here."""
        if not self._closed.is_set():
            self._closed = threading.Event()
            arguments = (weakref.ref(self), self._closed)
            threading.Thread(
                target=_set_regularly, args=arguments, name="asyncbucket gauges", daemon=True
            ).start()

    def close(self) -> None:
        """End the thread, if there is one."""
        self._closed.set()
        self.set_gauges()

    def _families(self) -> "tuple[Histogram | Counter | Gauge, ...]":
        return (self._wait, *self._counters.values(), self._queued, self._in_flight, self._used)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"asyncbucket_{name}_total", text, ("limiter", *labels), registry=None)


def _set_regularly(reference: "weakref.ref[PrometheusMetrics]", closed: threading.Event) -> None:
    """Set the gauges until they are closed or garbage-collected."""
    while not closed.wait(_WRITE_INTERVAL):
        metrics = reference()
        if metrics is None:
            return
        metrics.set_gauges()
        del metrics


#: A registry refuses a name that it knows, so its limiters share what was registered.
_COLLECTORS: Final["weakref.WeakKeyDictionary[CollectorRegistry, PrometheusMetrics]"] = (
    weakref.WeakKeyDictionary()
)
_LOCK: Final = threading.Lock()

with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(
        before=_WRITE_LOCK.acquire,
        after_in_parent=_WRITE_LOCK.release,
        after_in_child=_WRITE_LOCK.release,
    )
