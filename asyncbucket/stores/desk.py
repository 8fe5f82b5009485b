"""The desk between a worker's line of calls and the store: one round trip for all who wait.

The line decides who goes next. The desk sends as many of its heads as may start soon, with all
corrections and slots that came back since. One batch is in flight at a time; what comes up
meanwhile goes with the next. A call that was booked leaves the line, and is let go at its start.
The others stay where they are, so that a more urgent call may still pass them.

While the store is gone, calls pass as `asyncbucket.stores.lifeline` allows.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final, Generic

from asyncbucket.core.errors import StoreError
from asyncbucket.core.events import Event
from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import NEVER
from asyncbucket.core.pacer import NAP
from asyncbucket.core.terms import OnOutage
from asyncbucket.stores.lifeline import (
    Lifeline,
    cancel_and_wait,
    is_cancelling,
    run_guarded,
    wait_for_ring,
)
from asyncbucket.stores.orders import Orders
from asyncbucket.stores.returns import Leftover, Returns
from asyncbucket.stores.starts import Line, Reservation, Starts, W
from asyncbucket.stores.store import Booking, Correction, Ledger, Outcome, Receipt

#: The most calls in one batch.
_MAX_BATCH: Final = 512
#: How long (ns) before the last booked start to ask again at the latest, or two trips if they take
#: longer.
_MARGIN: Final = 10_000_000

_log: Final = logging.getLogger("asyncbucket")


class Desk(Generic[W]):
    """Serve one line of one event loop at one ledger.

    `ring`, `correct`, `release` and `cancel` are synchronous, for the loop's thread only.
    """

    def __init__(
        self,
        ledger: Ledger,
        line: Line[W],
        *,
        slot_ttl: float = 30.0,
        horizon: float = 0.05,
        on_outage: OnOutage = "share",
        clock: Callable[[], int] = time.monotonic_ns,
        emit: Callable[[Event], None] | None = None,
        orders: Orders | None = None,
    ) -> None:
        """Start serving; needs a running loop.

        Args:
            ledger: where the meters are.
            line: the calls that wait.
            slot_ttl: as the ledger was opened with.
            horizon: the most seconds between the starts of one batch; see `Batch.horizon`.
            on_outage: what to do while the store is gone: see `asyncbucket.stores.outage`.
            clock: monotonic integer nanoseconds.
            emit: called when the store is lost and when it is back.
            orders: what the store must be told before the next batch; ring when there is more.
        """
        self.ledger = ledger
        self._line = line
        self._horizon = round(horizon * 1_000_000_000)
        self._clock = clock
        self._orders = Orders() if orders is None else orders
        self._lifeline = Lifeline(
            ledger,
            slot_ttl=slot_ttl,
            on_outage=on_outage,
            clock=clock,
            emit=emit,
            on_change=self._start_afresh,
            on_terms=self._orders.adopt_terms,
            on_failure=self._fail,
        )
        self._returns = Returns()
        self._starts = Starts(line, clock, self._fail)
        #: Before this instant the line's heads are not sent, because they would not be booked.
        self._ask_at = 0
        #: The last start that was booked here.
        self._last_start = 0
        #: What the first unbooked call waits for, and until when at least.
        self.held_up: tuple[str, int] | None = None
        #: What each unbooked call waits for.
        self._bounds: dict[W, str] = {}
        #: Whether heads wait in one of the store's lines; if so, they go with every batch.
        self._in_line = False
        #: Whether it is the line for slots; whether another worker waits there.
        self._in_slot_line = self._crowded = False
        self._bell = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None
        self._has_failed = False
        self._task = self._start_task(self._serve, "asyncbucket desk")

    @property
    def is_store_gone(self) -> bool:
        """Whether the store is gone."""
        return self._lifeline.outage is not None

    @property
    def slots(self) -> frozenset[str]:
        """The slots of calls in flight, and of booked calls."""
        return frozenset(self._lifeline.slots)

    @property
    def left(self) -> dict[Limit, int]:
        """The units left of each limit, as last heard; the store sorts limits in its own order."""
        return dict(zip(self._lifeline.record.terms.limits, self._lifeline.left, strict=False))

    def look_after(self, slots: Iterable[str]) -> None:
        """Keep alive, and later give back, slots of calls that another desk admitted."""
        self._lifeline.slots.update(slots)

    def take_over(self, leftover: Leftover) -> None:
        """Look after what another desk left behind, and report to the store what that could not."""
        slots, unreported = leftover
        self.look_after((*slots, *unreported.released))
        for correction in unreported.corrections:
            self.correct(correction)
        for slot in unreported.released:
            self.release(slot)

    def leftover(self) -> Leftover:
        """Return the slots held by calls and what the store may not have heard: the loop has ended."""
        for waiter, reservation in self._starts.close():
            if reservation.booked_at:
                self._returns.correct(Correction.undo(waiter.amounts, reservation.booked_at))
            if reservation.slot is not None:
                self._lifeline.slots.discard(reservation.slot)
                self._returns.release(reservation.slot)
        return self.slots, self._returns.unreported()

    def ring(self) -> None:
        """Check the line, where somebody came or left, and the orders."""
        self._bell.set()

    def correct(self, correction: Correction) -> None:
        """Have a booking changed; it goes with the next batch.

        For a call that was admitted without the store (``start`` is 0) nothing comes back, but
        debts count.
        """
        if not correction.start:
            booked = correction.booked
            at_least_booked = {
                name: max(used, booked.get(name, 0)) for name, used in correction.used.items()
            }
            correction = Correction(start=0, booked=booked, used=at_least_booked)
        else:
            self._lifeline.record.correct(correction)
        self._returns.correct(correction)
        self._gather(awaited=self._in_line)

    def release(self, slot: str) -> None:
        """Give a slot back; it goes with the next batch."""
        if slot in self._lifeline.slots:
            self._lifeline.slots.discard(slot)
            self._returns.release(slot)
            self._gather(awaited=self._in_slot_line or self._crowded)

    def _gather(self, *, awaited: bool) -> None:
        busy_until = self._last_start - self._horizon
        self._returns.gather(self._clock(), awaited=awaited, busy_until=busy_until)
        self._bell.set()

    def cancel(self, waiter: W, reservation: Reservation) -> None:
        """Give back what was booked for a call that is gone, whether or not its start has come."""
        self._starts.discard(waiter)
        if reservation.booked_at:
            self.correct(Correction.undo(waiter.amounts, reservation.booked_at))
        if reservation.slot is not None:
            self.release(reservation.slot)

    async def aclose(self) -> None:
        """Stop serving. Bookings that have not started are given back; then the ledger closes."""
        await self._lifeline.aclose()
        await cancel_and_wait(self._task, self._listener)
        for waiter, reservation in self._starts.close():
            self.cancel(waiter, reservation)
        try:
            await self._orders.report(self.ledger, self._clock)
            if self._returns:
                await self.ledger.commit(self._returns.take())
        except StoreError:
            _log.debug("the store is gone: slots expire by themselves")
        await self.ledger.aclose()

    def _start_task(self, work: Callable[[], Awaitable[None]], name: str) -> asyncio.Task[None]:
        return asyncio.create_task(run_guarded(work, self._fail), name=name)

    def _fail(self, error: Exception) -> None:
        """Log, once, that the desk has failed, and abandon it."""
        if not self._has_failed:
            self._has_failed = True
            _log.error(
                "the desk of limiter %s has failed; calls that wait are told, later ones get another "
                "desk; please report this",
                self.ledger.name,
                exc_info=error,
            )
            self._line.abandon(error)

    async def _serve(self) -> None:
        while not is_cancelling():
            heads = self._line.heads(_MAX_BATCH)
            if self.is_store_gone:
                await self._sleep(self._admit_without_store(heads))
                continue
            if self._orders:
                await self._report_orders()
                continue
            heads, look_again_at = self._lifeline.within_share(heads, self._clock())
            if self._in_line and not heads:  # nobody waits any more: leave the store's line
                self._in_line = self._in_slot_line = False
                self._ask_at, self.held_up = 0, None
                await self._send_batch(())
                continue
            now = self._clock()
            due = heads and now >= self._ask_at
            report_at = self._returns.report_at
            if not due and now < report_at:
                await self._sleep(min(self._ask_at if heads else look_again_at, report_at))
                continue
            await self._send_batch(heads if due or self._in_line else ())

    async def _report_orders(self) -> None:
        try:
            await self._orders.report(self.ledger, self._clock)
        except StoreError as error:
            self._lifeline.begin_outage(error)

    async def _sleep(self, until: int) -> None:
        """Sleep until the bell rings or ``until`` has come."""
        left = (until - self._clock()) * 1e-9
        await wait_for_ring(self._bell, None if until >= NEVER else max(NAP, left))

    async def _send_batch(self, heads: Sequence[W]) -> None:
        calls = tuple(waiter.amounts for waiter in heads)
        batch = replace(self._returns.take(), calls=calls, horizon=self._horizon)
        asked_at = self._clock()
        try:
            receipt = await self.ledger.commit(batch)
        except StoreError as error:
            self._lifeline.begin_outage(error)
            return
        now = self._clock()
        self._lifeline.note_answer(receipt)
        self._crowded = receipt.crowded
        if heads:
            self._plan(receipt, now, trip=now - asked_at)
            self._answer_calls(heads, receipt, now)
        self._starts.admit_due()
        if self._in_line:
            self._listen()

    def _plan(self, receipt: Receipt, now: int, *, trip: int) -> None:
        """Decide when to send the next heads; ``trip`` is how long (ns) this batch took.

        Not before all but a horizon of the booked starts has passed: others get their turn, and
        more calls go with one trip. Nor before half of the time up to the last start has passed:
        others want the same units, and one that is late should not find them gone.
        """
        last = max((booking.start for booking in receipt.bookings), default=0)
        left = last - receipt.now
        others_first = receipt.now + min(left // 2, left - max(_MARGIN, 2 * trip))
        ask_at = max(receipt.ask_at, last - self._horizon, others_first)
        self._ask_at = now + max(0, ask_at - receipt.now)
        self._last_start = max(self._last_start, now + last - receipt.now)

    def _answer_calls(self, heads: Sequence[W], receipt: Receipt, now: int) -> None:
        """Answer the calls of a batch, and note what those wait for that were not booked."""
        offset, bounds, booked = now - receipt.now, self._bounds, False
        self._in_line = self._in_slot_line = False
        self._bounds, self.held_up = {}, None
        for waiter, booking in zip(heads, receipt.bookings, strict=True):
            if booking.outcome is Outcome.BOOKED:
                start, booked = max(now, booking.start + offset), True
                self._deliver(waiter, booking, start, booking.bound_by or bounds.get(waiter))
            elif booking.outcome is Outcome.NEVER:
                self._line.refuse(waiter, booking.bound_by or "")
            else:
                self._in_slot_line |= booking.outcome is Outcome.FULL
                self._in_line |= self._in_slot_line or not booked
                if booking.bound_by is not None:
                    self._bounds[waiter] = booking.bound_by
                    until = NEVER if booking.bound_by == "concurrency" else self._ask_at
                    self.held_up = self.held_up or (booking.bound_by, until)
        self._lifeline.record.book_all(heads, receipt.bookings)

    def _deliver(self, waiter: W, booking: Booking, start: int, bound_by: str | None) -> None:
        slot = booking.slot
        reservation = Reservation(
            booked_at=booking.start, start=start, slot=slot, bound_by=bound_by
        )
        if slot is not None:
            self._lifeline.slots.add(slot)
        self._starts.add(waiter, reservation)

    def _listen(self) -> None:
        """Ask again when the store notifies, or at the time that it named."""
        if self._listener is None or self._listener.done():
            self._listener = self._start_task(self._wait_for_turn, "asyncbucket slots")

    async def _wait_for_turn(self) -> None:
        while self._in_line and not self.is_store_gone and not is_cancelling():
            wait = max(0.01, (self._ask_at - self._clock()) * 1e-9)
            try:
                notified = await self.ledger.changed(timeout=wait)
            except StoreError as error:
                self._lifeline.begin_outage(error)
                return
            if not self._in_line:  # a batch in between was booked: the notification is answered
                return
            if notified or self._clock() >= self._ask_at:
                self._in_line, self._ask_at = False, 0
                self._bell.set()

    def _admit_without_store(self, heads: Sequence[W]) -> int:
        """Admit calls that the policy allows; return when to look again."""
        for waiter in heads:
            now = self._clock()
            when, slot = self._lifeline.admit(waiter.amounts, now)
            if when > now:
                return when
            reservation = Reservation(booked_at=0, start=now, slot=slot)
            self._line.book(waiter, reservation)
            self._line.admit(waiter, reservation)
        return self._clock() if heads else NEVER

    def _start_afresh(self, debts: Correction | None) -> None:
        """Start afresh, because the store is gone, or back."""
        self._in_line, self._in_slot_line, self._ask_at = False, False, 0
        if debts is not None:
            self._returns.correct(debts)
            self._returns.report_at = 0
        self._bell.set()
