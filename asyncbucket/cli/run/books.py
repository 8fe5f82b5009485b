"""A limiter's bookings, to disk and back, so that a restart does not burst over the limit.

What was admitted within a window still counts in it when the process that admitted it is gone. The
file says how long ago each booking was, and when it was written by the wall clock, because no other
clock outlives a process. If that is in the future, because the clock was set back, it counts as
now.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from asyncbucket.core.bookings import Booked, bookings, rebook, rebook_call
from asyncbucket.core.limiter import Limiter


class Admission(NamedTuple):
    """One call that was admitted: when, in nanoseconds since 1970, and what it cost."""

    at: int
    cost: Mapping[str, int]


def snapshot(limiter: Limiter) -> dict[str, Any]:
    """Return all that is booked within the windows of ``limiter``, in values that JSON can hold."""
    booked = [[each.resource, each.per, each.entries, each.missing] for each in bookings(limiter)]
    return {"at": time.time_ns(), "limits": booked}


def restore(
    limiter: Limiter, admissions: Iterable[Admission], *, saved: Mapping[str, Any] | None = None
) -> None:
    """Book again what was admitted before.

    Args:
        limiter: a fresh one.
        admissions: calls in the order of their admission, later than ``saved``.
        saved: what `snapshot` returned.
    """
    if saved is not None:
        rebook(limiter, (Booked(*each) for each in saved["limits"]), ago=_since(saved["at"]))
    for at, cost in admissions:
        rebook_call(limiter, cost, ago=_since(at))


def _since(at: int) -> int:
    return max(0, time.time_ns() - at)
