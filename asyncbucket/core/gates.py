"""All meters that a call passes, side by side: its limiter's and those of the limiters above."""

from collections.abc import Iterable
from typing import Final, Self

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import NEVER, Amounts, Bucket, Meter, Slots, Window

#: Meters that count units, and nothing else.
_SIMPLE: Final = (Bucket, Window, Slots)


class Gates:
    """Put meters side by side: a call passes all of them at once, each with its own resource."""

    __slots__ = ("_simple", "_takes", "given_back", "limits", "meters", "slots", "windows")

    def __init__(self, meters: Iterable[tuple[Meter, str]], limits: tuple[Limit, ...] = ()) -> None:
        #: Each meter with the resource that it counts.
        self.meters = tuple(meters)
        #: The limits that these meters, or others elsewhere, keep.
        self.limits = limits
        #: Slots given back before the call ended (`limiter.lending`), no longer among the meters.
        self.given_back: tuple[Slots, ...] = ()
        self._takes = tuple((meter.take, resource) for meter, resource in self.meters)
        self.windows = tuple(
            (meter, resource) for meter, resource in self.meters if isinstance(meter, Window)
        )
        self.slots = tuple(meter for meter, _ in self.meters if isinstance(meter, Slots))
        #: Whether several calls at one instant count in all of them like one call of their total.
        self._simple = all(isinstance(meter, _SIMPLE) for meter, _ in self.meters)

    def plus(self, others: Self) -> "Gates":
        """Return these gates and ``others`` in one."""
        return Gates(self.meters + others.meters, self.limits + others.limits)

    def slotless(self, back: int) -> "Gates":
        """Return these gates without slots that would suffice if ``back`` of them were given back."""
        free = {slots for slots in self.slots if slots.available(0) + back > 0}
        return Gates(pair for pair in self.meters if pair[0] not in free)

    def take(self, amounts: Amounts, now: int) -> bool:
        """Book ``amounts`` in all meters if all allow it now, else in none."""
        for take, resource in self._takes:
            amount = amounts.get(resource)
            if amount and not take(amount, now):
                for earlier, taken in self.meters[: self._takes.index((take, resource))]:
                    earlier.unbook(amounts.get(taken, 0), now)
                return False
        return True

    def earliest(self, amounts: Amounts, since: int) -> tuple[int, str | None]:
        """Return the first instant that suits all meters, and what binds."""
        when, bound_by = since, None
        for meter, resource in self.meters:
            amount = amounts.get(resource)
            if amount:
                earliest = meter.earliest(amount, since)
                if earliest > when:
                    when, bound_by = earliest, meter.bound_by or resource
        return when, bound_by

    def soonest(self, amounts: Amounts, now: int, *, since: int) -> int:
        """Return a lower bound of `earliest`: its answer if open calls gave back all they may.

        A bucket gets back no more than the window right before it; the next call may have earned
        units of it by being first in line since ``since``. Calls that pass only some of these gates
        hold nothing of the others.
        """
        lent: dict[str, int] = {}
        soonest, on_loan = now, NEVER
        for meter, resource in self.meters:
            if isinstance(meter, Window):
                on_loan = meter.lent
                lent[resource] = max(on_loan, lent.get(resource, 0))
            amount = amounts.get(resource)
            if amount:
                back = on_loan if isinstance(meter, (Window, Bucket)) else lent.get(resource, NEVER)
                start = since if isinstance(meter, Bucket) else now
                soonest = max(soonest, meter.earliest(amount, start, back=back))
        return soonest

    def room(self, amounts: Amounts, now: int, *, most: int) -> int:
        """Return how many calls of ``amounts`` are sure to pass now, one after the other."""
        if not self._simple:
            return 1 if self.earliest(amounts, now)[0] <= now and most else 0
        for meter, resource in self.meters:
            amount = amounts.get(resource)
            if amount:
                room = meter.available(now) // amount
                if room < most:  # noqa: PLR1730 - `min` would be a call
                    most = room
        return most

    def full_at(self, since: int) -> int:
        """Return when the first bucket that is not full becomes full; from then on inflow is lost."""
        buckets = (meter for meter, _ in self.meters if isinstance(meter, Bucket))
        when = (bucket.earliest(bucket.burst, since - 1) for bucket in buckets)
        return min((instant for instant in when if instant >= since), default=since)

    def book(self, amounts: Amounts, when: int, *, calls: int = 1) -> None:
        """Book ``calls`` calls of ``amounts`` in all meters at ``when``."""
        for meter, resource in self.meters:
            amount = amounts.get(resource)
            if amount:
                meter.book(amount * calls, when)

    def unbook(self, amounts: Amounts, when: int) -> None:
        """Undo a booking of ``amounts`` at ``when``."""
        for meter, resource in self.meters:
            meter.unbook(amounts.get(resource, 0), when)

    def close(self, booked: Amounts) -> bool:
        """End a call: its slots come back, the rest stays; return if someone may wait for one."""
        for window, resource in self.windows:
            window.lent -= booked.get(resource, 0)
        awaited = False  # while slots are left, nobody waits for one
        for slots in self.slots:
            awaited = awaited or slots.used >= slots.size or slots.remote
            slots.give_back()
        return awaited
