"""Gauges in Prometheus: read at each scrape, or written regularly for another process to read.

In multiprocess mode a scrape does not ask this process: its values must be in its files by then.
Counters are there anyway; gauges are written once a second by a thread.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Final

from prometheus_client import Gauge, Metric
from prometheus_client.core import GaugeMetricFamily

from asyncbucket.core.process import reset_after_fork
from asyncbucket.telemetry.watched import Reading, Watched

#: Seconds between two writes in multiprocess mode.
_WRITE_INTERVAL: Final = 1.0
#: Held while gauges are written, and while the process forks: a child that inherited one of
#: prometheus_client's locks during a write would wait for it for ever.
_WRITE_LOCK: Final = threading.RLock()

_QUEUED: Final = ("asyncbucket_queued_requests", "Calls that wait for their admission now.")
_IN_FLIGHT: Final = ("asyncbucket_in_flight_requests", "Calls admitted and not yet over.")
_USED: Final = (
    "asyncbucket_limit_used_ratio",
    "Share of a limit that is used now, 1 for all of it.",
)


def make_gauges(watched: Watched) -> "Scraped | Pushed":
    """Return the kind of gauges that this process needs."""
    return Pushed(watched) if _is_multiprocess() else Scraped(watched)


def describe() -> Iterator[Metric]:
    """Yield their names."""
    for name, text in (_QUEUED, _IN_FLIGHT, _USED):
        yield GaugeMetricFamily(name, text)


class Scraped:
    """Read the gauges at each scrape."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily(*_QUEUED, labels=("limiter",))
        in_flight = GaugeMetricFamily(*_IN_FLIGHT, labels=("limiter",))
        used = GaugeMetricFamily(*_USED, labels=("limiter", "limit"))
        for label, reading in self._watched.read().items():
            queued.add_metric((label,), reading.queued)
            in_flight.add_metric((label,), reading.in_flight)
            for limit, share in reading.used.items():
                used.add_metric((label, limit), share)
        yield from (queued, in_flight, used)

    def close(self) -> None:
        pass


class Pushed:
    """Write the gauges into this process's files regularly, and in its forked children, too."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        limiter_labels, limit_labels = ("limiter",), ("limiter", "limit")
        self._queued = Gauge(*_QUEUED, limiter_labels, registry=None, multiprocess_mode="livesum")
        self._in_flight = Gauge(
            *_IN_FLIGHT, limiter_labels, registry=None, multiprocess_mode="livesum"
        )
        self._used = Gauge(*_USED, limit_labels, registry=None, multiprocess_mode="livemax")
        #: What was last written; labels that are gone are written as 0.
        self._last: dict[str, Reading] = {}
        self._closed = threading.Event()
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Write from a thread of this process: the parent's threads do not exist here."""
        if not self._closed.is_set():
            self._closed = threading.Event()
            name = "asyncbucket gauges"
            threading.Thread(
                target=_push, args=(weakref.ref(self), self._closed), name=name, daemon=True
            ).start()

    def push(self) -> None:
        with _WRITE_LOCK:
            readings = dict(self._watched.read())
            gone = {
                label: Reading(used=dict.fromkeys(last.used, 0.0))
                for label, last in self._last.items()
            }
            for label, reading in (gone | readings).items():
                self._queued.labels(label).set(reading.queued)
                self._in_flight.labels(label).set(reading.in_flight)
                for limit, share in reading.used.items():
                    self._used.labels(label, limit).set(share)
            self._last = readings

    def collect(self) -> Iterator[Metric]:
        self.push()
        for gauge in (self._queued, self._in_flight, self._used):
            yield from gauge.collect()

    def close(self) -> None:
        self._closed.set()
        self.push()


def _push(pushed: "weakref.ref[Pushed]", closed: threading.Event) -> None:
    """Write until the gauges are closed or garbage-collected."""
    while not closed.wait(_WRITE_INTERVAL):
        alive = pushed()
        if alive is None:
            return
        alive.push()
        del alive


def _is_multiprocess() -> bool:
    """Tell whether prometheus_client writes files that another process reads."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ or "prometheus_multiproc_dir" in os.environ


with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(
        before=_WRITE_LOCK.acquire,
        after_in_parent=_WRITE_LOCK.release,
        after_in_child=_WRITE_LOCK.release,
    )
