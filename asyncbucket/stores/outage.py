"""Going on alone while the store is gone, and coming back to it.

``"share"`` gives each worker its part of every limit: with N units and w workers, as the store
last said, N / w, rounded down. But a window does not begin anew when the store goes: what all
workers took before still counts. So each worker keeps a record of its own calls. Until a window has
passed, it may only take as much as leaves the window in its own record, plus its part of what the
store was last known to have left, and never more than its share. Summed over all workers, what was
taken before, minus what has left the window, grows by at most that and by what was left, and so
never exceeds N. After a window, everything that counts was taken alone, and the shares add up to N
again.

A worker that finds the store again tells it what it took, as debts. It must not take more than its
share at once either: the store learns what the others took alone only when they have found it, too
(`RECOVERY_TIME`).

What remains is what others took since this worker last heard from the store: by that much an outage
may exceed a limit. ``"closed"`` admits nobody, ``"open"`` everybody.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.core.errors import StoreError
from asyncbucket.core.events import StoreLost, StoreRecovered
from asyncbucket.core.meters import NEVER, Amounts, Bucket, Meter, Window
from asyncbucket.core.terms import OnOutage
from asyncbucket.core.wording import in_seconds
from asyncbucket.stores.store import SLOT, Booking, Correction, LimitConfig, Receipt

if TYPE_CHECKING:
    from asyncbucket.stores.place import StorePlace

#: The first and the longest wait (ns) between attempts to reach a store that is gone.
_RETRY_INTERVAL: Final = 100_000_000
_MAX_RETRY_INTERVAL: Final = 2_000_000_000
#: After this long (ns) all workers have found the store again and reported what they took, which
#: costs one trip that fails and one that does not.
RECOVERY_TIME: Final = _MAX_RETRY_INTERVAL + 500_000_000

_log: Final = logging.getLogger("asyncbucket")


class Record:
    """Remember what this worker took of every limit; instants are ns of the store's clock."""

    def __init__(self, config: LimitConfig) -> None:
        self.last = 0
        self.windows: dict[tuple[str, float], Window] = {}
        self.adopt(config)

    def adopt(self, config: LimitConfig) -> None:
        """Follow other limits; the records of limits that stay are kept."""
        self.config = config
        known = self.windows
        self.windows = {
            limit.key: known.get(limit.key)
            or Window(replace(limit, burst=limit.amount), began=self.last)
            for limit in config.limits
        }

    def book(self, amounts: Amounts, start: int) -> None:
        """Remember a call; if a store with another clock dates it earlier, it counts as the last."""
        self.last = max(self.last, start)
        for window in self.windows.values():
            if amount := amounts.get(window.limit.resource):
                window.book(amount, self.last)

    def book_all(self, calls: Sequence[Any], bookings: Sequence[Booking]) -> None:
        """Remember the calls of a batch that were booked; those with one start together."""
        totals: dict[int, Counter[str]] = {}
        for call, booking in zip(calls, bookings, strict=True):
            if booking.start:
                totals.setdefault(booking.start, Counter()).update(call.amounts)
        for start, total in totals.items():
            self.book(total, start)

    def correct(self, correction: Correction) -> None:
        """Change the record of a call to what it really used."""
        for window in self.windows.values():
            booked = correction.booked.get(window.limit.resource, 0)
            more = correction.used.get(window.limit.resource, booked) - booked
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
        self.admitted: Counter[str] = Counter()
        self._record = record
        self._buckets: list[tuple[Bucket, str]] = []
        self._meters: list[tuple[Meter, str]] = []
        slots = record.config.concurrency
        self._slots = NEVER if slots is None else slots // workers
        if policy == "share":
            self._share_limits(workers, left, now)

    def _share_limits(self, workers: int, left: Sequence[int], now: int) -> None:
        date = self._record.last = max(now, self._record.last)
        for number, limit in enumerate(self._record.config.limits):
            window = self._record.windows[limit.key]
            window.amount = share = limit.amount // workers
            known = left[number] if number < len(left) else 0
            own = share - window.available(date)
            window.book(max(0, share - own - max(0, known) // workers), date)
            self._meters.append((window, limit.resource))
            if limit.burst is not None and limit.burst != limit.amount:
                rate = Fraction(limit.amount * 1_000_000_000, limit.window * workers)
                bucket = Bucket(rate=rate, burst=max(1, limit.burst // workers))
                bucket.book(bucket.burst, date)
                self._buckets.append((bucket, limit.resource))

    def earliest(self, amounts: Amounts, now: int, *, held: int) -> int:
        """Return from when on ``amounts`` may pass, if this worker holds ``held`` slots.

        `NEVER` means that it depends on the store, or on a slot being given back.
        """
        if self.policy == "open":
            return now
        if self.policy == "closed" or held + amounts.get(SLOT, 0) > self._slots:
            return NEVER
        due = max(now, self._record.last)
        for meter, resource in (*self._meters, *self._buckets):
            if amount := amounts.get(resource):
                due = max(due, meter.earliest(amount, max(now, self._record.last)))
        return due

    def fitting(self, calls: Sequence[Any], now: int, *, held: int) -> tuple[int, int]:
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
        for bucket, resource in self._buckets:
            if amounts.get(resource):
                bucket.book(amounts[resource], now)
        self._record.book(amounts, now)
        self.admitted.update({n: amount for n, amount in amounts.items() if amount and n != SLOT})


class StoreHealth:
    """Know whether the store of a limiter answers, and what may pass while it does not.

    Instants are ns of the worker's own clock.
    """

    def __init__(self, place: "StorePlace", config: LimitConfig) -> None:
        self.record = Record(config)
        self.outage: Outage | None = None
        #: The worker's share, while others may still have to report what they admitted alone.
        self._share: Outage | None = None
        self._share_until = 0
        #: When to try a store again that is gone.
        self.retry_at = NEVER
        self._retry_interval = 0
        self.workers = 1
        #: What the store has left of each limit, as last heard.
        self.left: tuple[int, ...] = ()
        self._place = place
        self._clock = place.clock
        #: The store's clock minus this one.
        self._offset = 0
        self._lost_at = 0

    def note_answer(self, receipt: Receipt, config: LimitConfig) -> None:
        """Note what an answer says; ``config`` is in force."""
        now = self._clock()
        self._offset = receipt.now - now
        self.left = receipt.left
        # Soon after an outage, or after a loss of data, some workers are still away.
        soon = now < self._share_until or receipt.lost
        self.workers = max(self.workers, receipt.workers) if soon else receipt.workers
        if self.record.config != config:
            self.record.adopt(config)

    def fail(self, error: StoreError) -> None:
        """Note that the store did not answer: go on alone from now on, and try again later."""
        now = self._clock()
        if self.outage is not None:
            self._retry_interval = min(_MAX_RETRY_INTERVAL, 2 * self._retry_interval)
            self.retry_at = now + self._retry_interval
            return
        self._lost_at, self._share = now, None
        self._retry_interval = _RETRY_INTERVAL
        self.retry_at = now + _RETRY_INTERVAL
        self.outage = Outage(
            self._place.on_outage,
            self.record,
            workers=self.workers,
            left=self.left,
            now=now + self._offset,
        )
        manner = {
            "share": f"with its share, 1 of {self.workers}",
            "open": "admitting everybody",
            "closed": "admitting nobody",
        }[self._place.on_outage]
        _log.warning("%s; limiter %s goes on %s", error, self._place.name, manner)
        self._place.emit(StoreLost(limiter=self._place.name, at=now * 1e-9, reason=str(error)))

    def earliest_alone(self, amounts: Amounts, now: int, *, held: int) -> int:
        """Book a call without the store if it may pass now; return when it may."""
        assert self.outage is not None
        due = self.outage.earliest(amounts, now + self._offset, held=held)
        if due > max(now + self._offset, self.record.last):
            return due - self._offset
        self.outage.book(amounts, due)
        return now

    def within_share(self, calls: Sequence[Any], *, held: int) -> tuple[int, int]:
        """Return how many of ``calls`` the store may be asked for, and when to look for more."""
        now = self._clock()
        if self._share is None or now >= self._share_until:
            self._share = None
            return len(calls), NEVER
        number, due = self._share.fitting(calls, now + self._offset, held=held)
        return number, min(due - self._offset, self._share_until)

    def recover(self) -> Correction | None:
        """Go on with the store; return what was admitted without it, as a debt."""
        if self.outage is None:
            return None
        now, outage, self.outage = self._clock(), self.outage, None
        self.retry_at = NEVER
        if outage.policy == "share":
            self._share, self._share_until = outage, now + RECOVERY_TIME
        seconds = (now - self._lost_at) * 1e-9
        _log.warning(
            "the store of limiter %s is back after %s; admitted without it: %s",
            self._place.name,
            in_seconds(seconds),
            ", ".join(f"{n:,} {name}" for name, n in outage.admitted.items()) or "nothing",
        )
        self._place.emit(StoreRecovered(limiter=self._place.name, at=now * 1e-9, seconds=seconds))
        if not outage.admitted.total():
            return None
        return Correction(start=0, booked={}, used=dict(outage.admitted))
