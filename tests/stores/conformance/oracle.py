"""What a store must answer: the meters of `asyncbucket.core.meters`, asked in the same order.

The oracle is told what was asked and what the store answered, and computes what the answer had to
be at that instant of the store's clock. It then books what the store has booked, so that
differences of a grain never add up.
"""

from asyncbucket.core.meters import Amounts, Window
from asyncbucket.stores.store import FAR, GRACE, Batch, Booking, LimitConfig, Outcome, Receipt

#: Before this long (ns) nobody is asked to come again.
_SOON = 5_000_000


class Oracle:
    """Keep the meters that a store's limiter should have, without slots."""

    def __init__(self, config: LimitConfig, *, grain: int, far: int = FAR) -> None:
        self._grain = grain
        self._far = far
        self.windows = [Window(limit) for limit in config.limits]
        self.last_start = self._last_now = 0
        #: Workers whose next call could not start soon, in order of arrival: which call that is,
        #: since when it has been the first of all, and when the worker should ask again.
        self._waiting: dict[str, tuple[Amounts, int, int]] = {}

    def check(self, worker: str, batch: Batch, receipt: Receipt) -> None:
        """Assert that ``receipt`` is the right answer to ``batch``, and remember both."""
        now = receipt.now
        assert now >= self._last_now, f"the clock went back by {self._last_now - now:,} ns"
        self._last_now = now
        debts_at = max(now, self.last_start)
        for correction in batch.corrections:
            for window in self.windows:
                booked = correction.booked.get(window.limit.resource, 0)
                used = correction.used.get(window.limit.resource, booked)
                if used > booked:
                    window.owe(used - booked, debts_at)
                elif used < booked:
                    window.unbook(booked - used, correction.start, left=used)
        if worker in self._waiting:  # whenever it comes, it stands where it stood
            self._waiting[worker] = (*self._waiting[worker][:2], now)
        self._check_calls(worker, batch, receipt)
        for first in self._in_order(now)[:1]:  # it is called if something came back
            amounts, since, due = self._waiting[first]
            come = max(now, self._earliest(amounts, now, since=since) - self._far)
            if come < due - _SOON:
                self._waiting[first] = amounts, since, come

    def _in_order(self, now: int) -> list[str]:
        """Return those who wait, without those who missed their turn."""
        return [name for name, (*_, due) in self._waiting.items() if due >= now - GRACE]

    def _check_calls(self, worker: str, batch: Batch, receipt: Receipt) -> None:
        horizon_end: int | None = None
        later = False
        for call, booking in zip(batch.calls or (), receipt.bookings, strict=True):
            resources = {window.limit.resource for window in self.windows}
            amounts = {name: call.get(name, 0) for name in resources}
            exceeded = {
                window.limit.resource
                for window in self.windows
                if amounts.get(window.limit.resource, 0) > window.amount
            }
            if exceeded:
                assert booking.outcome is Outcome.NEVER, booking
                assert booking.bound_by in exceeded, booking
                continue
            start = self._earliest(amounts, receipt.now)
            if not later and horizon_end is None:
                start = self._earliest_in_turn(worker, amounts, receipt.now)
                later = self._must_wait(worker, amounts, start, receipt)
            elif not later and horizon_end is not None and start > horizon_end:
                later = True
                self._waiting.pop(worker, None)
                if self._waiting:  # it was served, and stands at the end again
                    assert receipt.in_line
                    self._waiting[worker] = (amounts, 0, receipt.ask_at)
                else:
                    assert receipt.now <= receipt.ask_at <= self.last_start, receipt.ask_at
            if later:
                assert booking.outcome is Outcome.LATER, (booking, start - receipt.now)
                continue
            self._check_booking(booking, start, receipt.now)
            horizon_end = booking.start + batch.horizon if horizon_end is None else horizon_end
            for window in self.windows:
                if amount := amounts.get(window.limit.resource):
                    window.book(amount, booking.start)
            self.last_start = booking.start
        if not later:
            self._waiting.pop(worker, None)

    def _earliest_in_turn(self, worker: str, amounts: Amounts, now: int) -> int:
        """Return when the worker's next call may start, including what it earned by being first."""
        waits_for, since, _ = self._waiting.get(worker, (None, 0, 0))
        return self._earliest(amounts, now, since=since if waits_for == amounts else 0)

    def _must_wait(self, worker: str, amounts: Amounts, start: int, receipt: Receipt) -> bool:
        """Return whether the worker's next call is too far ahead, or others come first."""
        now = receipt.now
        order = self._in_order(now)
        first = not order or order[0] == worker
        if first and start <= now + self._far:
            self._waiting.pop(worker, None)
            return False
        assert now < receipt.ask_at, receipt.ask_at
        waits_for, since, _ = self._waiting.get(worker, (None, 0, 0))
        if not first:
            since = 0
        elif not since or waits_for != amounts:
            since = max(now, self.last_start)
        self._waiting[worker] = (amounts, since, receipt.ask_at)
        return True

    def _earliest(self, amounts: Amounts, now: int, *, since: int = 0) -> int:
        floor = max(now, self.last_start)
        asked = [(window, amounts.get(window.limit.resource)) for window in self.windows]
        return max([floor, *(each.earliest(n, since or floor) for each, n in asked if n)])

    def _check_booking(self, booking: Booking, start: int, now: int) -> None:
        assert booking.outcome is Outcome.BOOKED, (booking, start - now)
        late = booking.start - start
        assert late >= 0, f"{-late:,} ns too early: {booking}"
        assert late <= self._grain, f"{late:,} ns too late, where {self._grain:,} are allowed"
        assert booking.bound_by is not None or booking.start <= now, booking
