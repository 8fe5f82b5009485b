"""A limiter's bookings, to disk and back: so that a restart does not burst over the limit.

What was admitted within a window still counts in it when the process that admitted it is gone. The
dates go by the wall clock on disk, for no other clock outlives a process, and are turned back by how
long ago they were; one that lies in the future, because the clock was set back, counts as now.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from asyncbucket.limiter import Limiter

# A limiter has no public door for this yet; these two functions are the only ones that reach in.
# ruff: noqa: SLF001


class Admission(NamedTuple):
    """One call that was admitted: when, in nanoseconds since 1970, and what it cost."""

    at: int
    cost: Mapping[str, int]


def snapshot(limiter: Limiter) -> dict[str, Any]:
    """Return all that is booked within the windows of ``limiter``, as JSON can hold it."""
    account = limiter._account
    with limiter._budget.lock:
        now = limiter._clock()
        wall = time.time_ns()
        windows, buckets = [], []
        for (resource, per), (_, window, bucket) in account.limits.items():
            window.available(now)  # forgets what has passed
            dates = [*window._dates, window._last] if window._closes else [*window._dates]
            units = [*window._units, window._recent] if window._closes else [*window._units]
            entries = [[wall - (now - date), n] for date, n in zip(dates, units, strict=True) if n]
            windows.append([resource, per, entries])
            if bucket is not None and bucket.missing(now) > 0:
                buckets.append([resource, per, wall, bucket.missing(now)])
    return {"windows": windows, "buckets": buckets}


def restore(
    limiter: Limiter, admissions: Iterable[Admission], *, saved: Mapping[str, Any] | None = None
) -> None:
    """Book again what was admitted before.

    Args:
        limiter: a fresh one.
        admissions: calls in the order of their admission, later than ``saved``.
        saved: what `snapshot` returned.
    """
    limits = limiter._account.limits
    with limiter._budget.lock:
        now, wall = limiter._clock(), time.time_ns()

        def date(at: int) -> int:
            return max(1, now - max(0, wall - at))

        for resource, per, entries in (saved or {}).get("windows", ()):
            for at, units in entries if (resource, per) in limits else ():
                _book(limits[resource, per][1], units, date(at))
        for resource, per, at, missing in (saved or {}).get("buckets", ()):
            bucket = limits[resource, per][2] if (resource, per) in limits else None
            if bucket is not None:
                bucket.owe(missing, date(at))
        for at, cost in admissions:
            _book_cost(limits, cost, date(at))


def _book_cost(limits: Mapping[Any, Any], cost: Mapping[str, int], when: int) -> None:
    for (resource, _), (_, window, bucket) in limits.items():
        units = cost.get(resource, 0)
        if units:
            _book(window, units, when)
            if bucket is not None:
                bucket.owe(units, when)


def _book(window: Any, units: int, when: int) -> None:
    window.book(units, when)
    window.lent -= units  # whoever borrowed it is gone, and gives nothing back
