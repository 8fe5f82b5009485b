"""Going on alone while the store is gone: what a worker may admit by itself.

``"share"`` gives each worker its part of every limit: with N units and w workers, as the
store last said, N / w, rounded down. But a window does not begin anew when the store goes: what all
workers took before still counts. So each worker keeps a record of its own calls. Until a window has
passed, it may only take as much as leaves the window in its own record, plus its part of what the
store was last known to have left, and never more than its share. Summed over all workers, what was
taken before, minus what has left the window, grows by at most that and by what was left, and so
never exceeds N. After a window, everything that counts was taken alone, and the shares add up to N
again.

A worker that finds the store again must not take more than its share at once either: the store
learns what the others took alone only when they have found it, too (`RECOVERY_TIME`).

What remains is what others took since this worker last heard from the store: by that much an outage
may exceed a limit. ``"closed"`` admits nobody, ``"open"`` everybody.
"""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Final, Protocol

from asyncbucket.core.gates import Gates
from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import NEVER, Amounts, Bucket, Meter, Slots, Window
from asyncbucket.core.terms import OnOutage
from asyncbucket.stores.store import Booking, Correction, Terms

#: The most seconds between attempts to reach a store that is gone; and after which all workers have
#: found it again and reported what they took, which costs one trip that fails and one that does
#: not.
MAX_RETRY_INTERVAL: Final = 2.0
RECOVERY_TIME: Final = MAX_RETRY_INTERVAL + 0.5


class PricedCall(Protocol):
    """A call."""

    @property
    def amounts(self) -> Amounts:
        """What it costs."""
        ...


class Record:
    """Remember what this worker took of every limit; instants are ns of the store's clock."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.last = 0
        self._windows: dict[tuple[str, int], Window] = {}
        self.adopt(terms)

    def adopt(self, terms: Terms) -> None:
        """Follow other terms; the records of limits that stay are kept."""
        self.terms = terms
        known = self._windows
        self._windows = {
            (limit.resource, limit.window): known.get((limit.resource, limit.window))
            or Window(amount=limit.amount, window=limit.window, began=self.last)
            for limit in terms.limits
        }

    def window(self, limit: Limit) -> Window:
        """Return the record of ``limit``."""
        return self._windows[limit.resource, limit.window]

    def book(self, amounts: Amounts, start: int) -> None:
        """Remember a call; if a store with another clock dates it earlier, it counts as the last."""
        self.last = max(self.last, start)
        for (resource, _), window in self._windows.items():
            if amounts.get(resource):
                window.book(amounts[resource], self.last)

    def book_all(self, calls: Sequence[PricedCall], bookings: Sequence[Booking]) -> None:
        """Remember the calls of a batch that were booked; those with one start together."""
        total: dict[str, int] = {}
        start = 0
        for call, booking in zip(calls, bookings, strict=True):
            if not booking.start:
                continue
            if booking.start != start and total:
                self.book(total, start)
                total = {}
            start = booking.start
            for resource, amount in call.amounts.items():
                total[resource] = total.get(resource, 0) + amount
        if total:
            self.book(total, start)

    def correct(self, correction: Correction) -> None:
        """Change the record of a call to what it really used."""
        for (resource, _), window in self._windows.items():
            booked = correction.booked.get(resource, 0)
            more = correction.used.get(resource, booked) - booked
            if more > 0:
                window.book(more, self.last)
            elif more < 0:
                window.unbook(-more, correction.start)


class Outage:
    """Admit without the store; instants are ns of the store's clock, as last known."""

    def __init__(
        self, policy: OnOutage, record: Record, *, workers: int, left: Sequence[int], now: int
    ) -> None:
        """Begin an outage at ``now``.

        Args:
            policy: what a worker may do.
            record: what the worker took; it is kept up.
            workers: how many workers there are.
            left: what the store had left of each limit when last heard; nothing if empty.
            now: when the outage began.
        """
        self.policy = policy
        #: Units admitted alone, by resource; they are reported to the store afterwards.
        self.admitted: dict[str, int] = {}
        self._record = record
        self._slots: Slots | None = None
        self._gates = Gates(self._meters(workers, left, now) if policy == "share" else ())

    def _meters(self, workers: int, left: Sequence[int], now: int) -> list[tuple[Meter, str]]:
        meters: list[tuple[Meter, str]] = []
        date = self._record.last = max(now, self._record.last)
        for number, limit in enumerate(self._record.terms.limits):
            window = self._record.window(limit)
            share = limit.amount // workers
            window.reshape(amount=share)
            known = left[number] if number < len(left) else 0
            own = share - window.available(date)
            window.book(max(0, share - own - max(0, known) // workers), date)
            meters.append((window, limit.resource))
            if limit.burst is not None and limit.burst != limit.amount:
                rate = Fraction(limit.amount * 1_000_000_000, limit.window * workers)
                bucket = Bucket(rate=rate, burst=max(1, limit.burst // workers))
                bucket.book(bucket.burst, date)
                meters.append((bucket, limit.resource))
        concurrency = self._record.terms.concurrency
        if concurrency is not None:
            self._slots = Slots(size=concurrency // workers)
            meters.append((self._slots, "concurrency"))
        return meters

    def earliest(self, amounts: Amounts, now: int, *, held: int) -> int:
        """Return from when on ``amounts`` may pass, if this worker holds ``held`` slots.

        `NEVER` means that it depends on the store, or on a slot being given back.
        """
        if self.policy == "open":
            return now
        if self.policy == "closed":
            return NEVER
        if self._slots is not None:
            self._slots.used = held
        return self._gates.earliest(amounts, max(now, self._record.last))[0]

    def fitting(self, calls: Sequence[PricedCall], now: int, *, held: int) -> tuple[int, int]:
        """Return how many of ``calls``, in order, may pass now, and from when on the next one may."""
        total: Counter[str] = Counter()
        for number, call in enumerate(calls):
            total.update(call.amounts)
            when = self.earliest(total, now, held=held)
            if when > max(now, self._record.last):
                return number, when
        return len(calls), NEVER

    def book(self, amounts: Amounts, now: int) -> None:
        """Count an admission that `earliest` allowed."""
        for meter, resource in self._gates.meters:
            if isinstance(meter, Bucket) and amounts.get(resource):
                meter.book(amounts[resource], now)
        self._record.book(amounts, now)
        for name, amount in amounts.items():
            if amount and name != "concurrency":
                self.admitted[name] = self.admitted.get(name, 0) + amount
