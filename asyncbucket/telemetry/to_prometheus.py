"""Events as Prometheus metrics.

Counters and the histogram count events as they come. Gauges are read from the limiters when
somebody scrapes (see `asyncbucket.telemetry.gauges`), because the use of a limit changes even if
nothing happens. All of it is one collector per registry, shared by the limiters that the registry
observes, and removed with the last of them.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Final, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.registry import Collector

from asyncbucket import events
from asyncbucket.telemetry import gauges
from asyncbucket.telemetry.watched import Source, Watched, dispatch_by_type, tokens_of

#: Waits may be as short as a burst's pace or as long as a minute's window plus a pause.
BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
#: How a call may end.
_OUTCOMES: Final = (*get_args(events.Outcome), *get_args(events.Reason), "cancelled")


def watch(
    limiter: Source, registry: CollectorRegistry | None, *, max_limiters: int
) -> Callable[[], None]:
    """Count what happens in ``limiter`` into ``registry`` until the returned function is called."""
    registry = REGISTRY if registry is None else registry
    if not isinstance(registry, CollectorRegistry):
        type_name = type(registry).__name__
        raise TypeError(f"registry must be prometheus_client's CollectorRegistry, not {type_name}")
    with _LOCK:
        reference = _COLLECTORS.get(registry)
        metrics = None if reference is None else reference()
        if metrics is None:
            metrics = Metrics(max_limiters)
            registry.register(metrics)
            _COLLECTORS[registry] = weakref.ref(metrics)
        forget = metrics.watched.add(limiter, "this registry")
    metrics.series(limiter.name)
    stop = limiter.observe(metrics.observe)

    def off() -> None:
        stop()
        with _LOCK:
            was_watching = bool(metrics.watched)
            forget()
            if was_watching and not metrics.watched:
                metrics.close()
                registry.unregister(metrics)
                _COLLECTORS.pop(registry, None)

    return off


class Families:
    """The metrics that count; each has a series for each limiter."""

    def __init__(self) -> None:
        self.wait = Histogram(
            "asyncbucket_wait_seconds",
            "Seconds between asking and admission, by what bound the call.",
            ("limiter", "bound_by"),
            registry=None,
            buckets=BUCKETS,
        )
        self.requests = Counter(
            "asyncbucket_requests_total",
            "Calls by how they ended.",
            ("limiter", "outcome"),
            registry=None,
        )
        self.tokens = Counter(
            "asyncbucket_tokens_total",
            "Tokens reserved by admissions; used and refunded, as calls were settled.",
            ("limiter", "kind"),
            registry=None,
        )
        self.upstream_429 = Counter(
            "asyncbucket_upstream_429_total",
            "Calls that the provider refused for rate all the same.",
            ("limiter",),
            registry=None,
        )
        self.retries = Counter(
            "asyncbucket_retries_total",
            "Failed calls that are tried again.",
            ("limiter",),
            registry=None,
        )

    def __iter__(self) -> Iterator[Histogram | Counter]:
        return iter((self.wait, self.requests, self.tokens, self.upstream_429, self.retries))


class Series:
    """Count for one label. Its counters begin at 0, so that a rate sees the first refusal."""

    __slots__ = ("ended", "refunded", "reserved", "retries", "upstream_429", "used", "waited")

    def __init__(self, families: Families, label: str) -> None:
        # Bound methods of the metrics: looking them up takes longer than counting.
        requests, tokens = families.requests, families.tokens
        #: By what bound a call; made on demand.
        self.waited: dict[str | None, Callable[[float], None]] = {}
        self.ended = {outcome: requests.labels(label, outcome).inc for outcome in _OUTCOMES}
        self.reserved = tokens.labels(label, "reserved").inc
        self.used = tokens.labels(label, "used").inc
        self.refunded = tokens.labels(label, "refunded").inc
        self.upstream_429 = families.upstream_429.labels(label).inc
        self.retries = families.retries.labels(label).inc


class Metrics(Collector):
    """All metrics of one registry."""

    def __init__(self, max_limiters: int) -> None:
        self.watched = Watched(max_limiters)
        self._families = Families()
        self._gauges = gauges.make_gauges(self.watched)
        self._series: dict[str, Series] = {}
        self.observe = dispatch_by_type(
            {
                events.Admitted: self._admitted,
                events.Released: self._released,
                events.Settled: self._settled,
                events.Refused: self._refused,
                events.Cancelled: self._cancelled,
                events.Paused: self._paused,
                events.Retried: self._retried,
            }
        )

    def collect(self) -> Iterator[Metric]:
        for metric in self._families:
            yield from metric.collect()
        yield from self._gauges.collect()

    def describe(self) -> Iterator[Metric]:
        for metric in self._families:
            yield from metric.describe()
        yield from gauges.describe()

    def close(self) -> None:
        """End the background work."""
        self._gauges.close()

    def series(self, limiter: str) -> Series:
        """Return the counters of a limiter."""
        series = self._series.get(limiter)
        if series is None:
            label = self.watched.label(limiter)
            series = self._series.get(label)
            if series is None:
                series = self._series.setdefault(label, Series(self._families, label))
        return series

    def _admitted(self, event: events.Admitted) -> None:
        series = self._series.get(event.limiter) or self.series(event.limiter)
        waited = series.waited.get(event.bound_by)
        if waited is None:
            label, bound_by = self.watched.label(event.limiter), event.bound_by or "none"
            waited = self._families.wait.labels(label, bound_by).observe
            series.waited[event.bound_by] = waited
        waited(event.waited)
        tokens = event.cost.get("tokens")
        if tokens:
            series.reserved(tokens)

    def _released(self, event: events.Released) -> None:
        series = self._series.get(event.limiter) or self.series(event.limiter)
        series.ended[event.outcome]()

    def _settled(self, event: events.Settled) -> None:
        tokens = tokens_of(event)
        if tokens is not None:
            series = self.series(event.limiter)
            series.used(tokens[0])
            series.refunded(tokens[1])

    def _refused(self, event: events.Refused) -> None:
        self.series(event.limiter).ended[event.reason]()

    def _cancelled(self, event: events.Cancelled) -> None:
        self.series(event.limiter).ended["cancelled"]()

    def _paused(self, event: events.Paused) -> None:
        if event.reason == "429":
            self.series(event.limiter).upstream_429()

    def _retried(self, event: events.Retried) -> None:
        self.series(event.limiter).retries()


#: A registry refuses a name that it knows, so all limiters of one registry share what was
#: registered. It lives as long as the registry.
_COLLECTORS: Final["weakref.WeakKeyDictionary[CollectorRegistry, weakref.ref[Metrics]]"] = (
    weakref.WeakKeyDictionary()
)
_LOCK: Final = threading.Lock()
