"""A limit in force, with the meters that count for it."""

from fractions import Fraction
from typing import NamedTuple

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Bucket, Window


class Kept(NamedTuple):
    """Keep a limit: its window, and the bucket that paces it if it has a burst."""

    limit: Limit
    window: Window
    bucket: Bucket | None


def keep(limit: Limit, before: Kept | None, now: int, *, began: int = -1) -> Kept:
    """Put ``limit`` in force, with all that was booked ``before`` under one of the same window.

    Without one before, calls admitted up to ``began`` give nothing back in it.
    """
    if before is None:
        window = Window(amount=limit.amount, window=limit.window, began=began)
        return Kept(limit, window, _pacing_bucket(limit, None, now))
    before.window.reshape(amount=limit.amount)
    return Kept(limit, before.window, _pacing_bucket(limit, before.bucket, now))


def _pacing_bucket(limit: Limit, before: Bucket | None, now: int) -> Bucket | None:
    """Return the bucket that paces ``limit`` from now on, or None if nothing paces it."""
    if limit.burst is None or limit.burst == limit.amount:
        return None
    rate = Fraction(limit.amount * 1_000_000_000, limit.window)
    if before is None:
        return Bucket(rate=rate, burst=limit.burst)
    before.reshape(rate=rate, burst=limit.burst, now=now)
    return before
