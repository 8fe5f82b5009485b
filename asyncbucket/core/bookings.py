"""What a limiter has booked, with ages instead of dates, so that a later limiter can rebook it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from asyncbucket.core.limiter import Limiter


@dataclass(frozen=True, slots=True)
class Booked:
    """Hold what one limit has booked."""

    resource: str
    #: The limit's window, in seconds.
    per: float
    #: In the window: how many nanoseconds ago, and how many units; oldest first.
    entries: tuple[tuple[int, int], ...]
    #: Units missing in the bucket that paces it.
    missing: int


def bookings(limiter: Limiter) -> tuple[Booked, ...]:
    """Return what each limit of ``limiter`` has booked; limiters above it are not included."""
    account = limiter._account  # noqa: SLF001 - its own kind
    with account.budget.lock:
        now = account.budget.clock()
        return tuple(
            Booked(
                resource,
                per,
                tuple((now - date, units) for date, units in window.entries(now)),
                0 if bucket is None else max(0, bucket.missing(now)),
            )
            for (resource, per), (_, window, bucket) in account.limits.items()
        )


def rebook(limiter: Limiter, booked: Iterable[Booked], *, ago: int) -> None:
    """Book again what was reported ``ago`` nanoseconds ago; limits that no longer exist are skipped."""
    account = limiter._account  # noqa: SLF001 - its own kind
    with account.budget.lock:
        now = account.budget.clock()
        for booking in booked:
            if (booking.resource, booking.per) not in account.limits:
                continue
            _, window, bucket = account.limits[booking.resource, booking.per]
            for age, units in booking.entries:
                window.remember(units, max(1, now - ago - age))
            if bucket is not None and booking.missing:
                bucket.remember(booking.missing, max(1, now - ago))


def rebook_call(limiter: Limiter, cost: Mapping[str, int], *, ago: int) -> None:
    """Book again one call that was admitted ``ago`` nanoseconds ago."""
    account = limiter._account  # noqa: SLF001 - its own kind
    with account.budget.lock:
        when = max(1, account.budget.clock() - ago)
        for (resource, _), (_, window, bucket) in account.limits.items():
            units = cost.get(resource, 0)
            if units:
                window.remember(units, when)
                if bucket is not None:
                    bucket.remember(units, when)
