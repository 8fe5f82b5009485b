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

from asyncbucket.errors import StoreError
from asyncbucket.events import Event
from asyncbucket.limiter.terms import OnOutage
from asyncbucket.limits import Limit
from asyncbucket.meters import NEVER
from asyncbucket.pacer import NAP
from asyncbucket.stores.lifeline import Lifeline, end, guarded, leaving, rung
from asyncbucket.stores.orders import Orders
from asyncbucket.stores.returns import Left, Returns
from asyncbucket.stores.starts import Grant, Line, Starts, W
from asyncbucket.stores.store import Booking, Correction, Ledger, Outcome, Receipt

#: The most calls in one batch.
_BATCH: Final = 512
#: How long (ns) to let others ask first.
_TURN: Final = 5_000_000

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
            on_change=self._changed,
            on_terms=self._orders.hear,
            on_fall=self._fall,
        )
        self._returns = Returns()
        self._starts = Starts(line, clock, self._fall)
        #: Before this instant the line's heads are not sent, because they would not be booked.
        self._ask_at = 0
        #: The last start that was booked here.
        self._last_start = 0
        #: What the first unbooked call waits for, and until when at least.
        self.held_up: tuple[str, int] | None = None
        #: What each unbooked call waits for.
        self._bounds: dict[W, str] = {}
        #: Whether heads wait in one of the store's lines; if so, they go with every batch.
        self._waits = False
        #: Whether it is the line for slots; whether another worker waits there.
        self._slotless = self._crowded = False
        self._bell = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None
        self._fallen = False
        self._task = self._guard(self._serve, "asyncbucket desk")

    @property
    def alone(self) -> bool:
        """Whether the store is gone."""
        return self._lifeline.alone is not None

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

    def take_over(self, left: Left) -> None:
        """Look after what another desk left behind, and report to the store what that could not."""
        slots, untold = left
        self.look_after((*slots, *untold.released))
        for correction in untold.corrections:
            self.correct(correction)
        for slot in untold.released:
            self.release(slot)

    def left_behind(self) -> Left:
        """Return the slots held by calls and what the store may not have heard: the loop has ended."""
        for waiting, grant in self._starts.close():
            if grant.booked_at:
                self._returns.correct(Correction.undo(waiting.amounts, grant.booked_at))
            if grant.slot is not None:
                self._lifeline.slots.discard(grant.slot)
                self._returns.release(grant.slot)
        return self.slots, self._returns.untold()

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
            more = {name: max(used, booked.get(name, 0)) for name, used in correction.used.items()}
            correction = Correction(start=0, booked=booked, used=more)
        else:
            self._lifeline.record.correct(correction)
        self._returns.correct(correction)
        self._gather(awaited=self._waits)

    def release(self, slot: str) -> None:
        """Give a slot back; it goes with the next batch."""
        if slot in self._lifeline.slots:
            self._lifeline.slots.discard(slot)
            self._returns.release(slot)
            self._gather(awaited=self._slotless or self._crowded)

    def _gather(self, *, awaited: bool) -> None:
        busy_until = self._last_start - self._horizon
        self._returns.gather(self._clock(), awaited=awaited, busy_until=busy_until)
        self._bell.set()

    def cancel(self, waiting: W, grant: Grant) -> None:
        """Give back what was booked for a call that is gone, whether or not its start has come."""
        self._starts.discard(waiting)
        if grant.booked_at:
            self.correct(Correction.undo(waiting.amounts, grant.booked_at))
        if grant.slot is not None:
            self.release(grant.slot)

    async def aclose(self) -> None:
        """Stop serving. Bookings that have not started are given back; then the ledger closes."""
        await self._lifeline.aclose()
        await end(self._task, self._listener)
        for waiting, grant in self._starts.close():
            self.cancel(waiting, grant)
        try:
            await self._orders.tell(self.ledger, self._clock)
            if self._returns:
                await self.ledger.commit(self._returns.take())
        except StoreError:
            _log.debug("the store is gone: slots expire by themselves")
        await self.ledger.aclose()

    def _guard(self, work: Callable[[], Awaitable[None]], name: str) -> asyncio.Task[None]:
        return asyncio.create_task(guarded(work, self._fall), name=name)

    def _fall(self, error: Exception) -> None:
        """Log, once, that the desk has failed, and abandon it."""
        if not self._fallen:
            self._fallen = True
            _log.error(
                "the desk of limiter %s has failed; calls that wait are told, later ones get another "
                "desk; please report this",
                self.ledger.name,
                exc_info=error,
            )
            self._line.abandon(error)

    async def _serve(self) -> None:
        while not leaving():
            heads = self._line.heads(_BATCH)
            if self.alone:
                await self._sleep(self._admit_alone(heads))
                continue
            if self._orders:
                await self._obey()
                continue
            heads, more_at = self._lifeline.within_share(heads, self._clock())
            if self._waits and not heads:  # nobody waits any more: leave the store's line
                self._waits = self._slotless = False
                self._ask_at, self.held_up = 0, None
                await self._fly(())
                continue
            now = self._clock()
            due = heads and now >= self._ask_at
            tell_at = self._returns.tell_at
            if not due and now < tell_at:
                await self._sleep(min(self._ask_at if heads else more_at, tell_at))
                continue
            await self._fly(heads if due or self._waits else ())

    async def _obey(self) -> None:
        try:
            await self._orders.tell(self.ledger, self._clock)
        except StoreError as error:
            self._lifeline.lose(error)

    async def _sleep(self, until: int) -> None:
        """Sleep until the bell rings or ``until`` has come."""
        left = (until - self._clock()) * 1e-9
        await rung(self._bell, None if until >= NEVER else max(NAP, left))

    async def _fly(self, heads: Sequence[W]) -> None:
        calls = tuple(waiting.amounts for waiting in heads)
        batch = replace(self._returns.take(), calls=calls, horizon=self._horizon)
        try:
            receipt = await self.ledger.commit(batch)
        except StoreError as error:
            self._lifeline.lose(error)
            return
        now = self._clock()
        self._lifeline.hear(receipt)
        self._crowded = receipt.crowded
        if heads:
            self._plan(receipt, now)
            self._hand_out(heads, receipt, now)
        self._starts.let_go()
        if self._waits:
            self._listen()

    def _plan(self, receipt: Receipt, now: int) -> None:
        """Decide when to send the next heads.

        Not before all but a horizon of the booked starts has passed: others get their turn, and
        more calls go with one trip. Nor at once while there is time: others ask at the same moment,
        for the same units.
        """
        last = max((booking.start for booking in receipt.bookings), default=0)
        others_first = min(receipt.now + _TURN, last - 2 * _TURN)
        ask_at = max(receipt.ask_at, last - self._horizon, others_first)
        self._ask_at = now + max(0, ask_at - receipt.now)
        self._last_start = max(self._last_start, now + last - receipt.now)

    def _hand_out(self, heads: Sequence[W], receipt: Receipt, now: int) -> None:
        """Answer the calls of a batch, and note what those wait for that were not booked."""
        offset, bounds, booked = now - receipt.now, self._bounds, False
        self._waits = self._slotless = False
        self._bounds, self.held_up = {}, None
        for waiting, booking in zip(heads, receipt.bookings, strict=True):
            if booking.outcome is Outcome.BOOKED:
                start, booked = max(now, booking.start + offset), True
                self._deliver(waiting, booking, start, booking.bound_by or bounds.get(waiting))
            elif booking.outcome is Outcome.NEVER:
                self._line.refuse(waiting, booking.bound_by or "")
            else:
                self._slotless |= booking.outcome is Outcome.FULL
                self._waits |= self._slotless or not booked
                if booking.bound_by is not None:
                    self._bounds[waiting] = booking.bound_by
                    until = NEVER if booking.bound_by == "concurrency" else self._ask_at
                    self.held_up = self.held_up or (booking.bound_by, until)
        self._lifeline.record.book_all(heads, receipt.bookings)

    def _deliver(self, waiting: W, booking: Booking, start: int, bound_by: str | None) -> None:
        slot = booking.slot
        grant = Grant(booked_at=booking.start, start=start, slot=slot, bound_by=bound_by)
        if slot is not None:
            self._lifeline.slots.add(slot)
        self._starts.add(waiting, grant)

    def _listen(self) -> None:
        """Ask again when the store notifies, or at the time that it named."""
        if self._listener is None or self._listener.done():
            self._listener = self._guard(self._hark, "asyncbucket slots")

    async def _hark(self) -> None:
        while self._waits and not self.alone and not leaving():
            wait = max(0.01, (self._ask_at - self._clock()) * 1e-9)
            try:
                called = await self.ledger.changed(timeout=wait)
            except StoreError as error:
                self._lifeline.lose(error)
                return
            if not self._waits:  # a batch in between was booked: the notification is answered
                return
            if called or self._clock() >= self._ask_at:
                self._waits, self._ask_at = False, 0
                self._bell.set()

    def _admit_alone(self, heads: Sequence[W]) -> int:
        """Admit calls that the policy allows; return when to look again."""
        for waiting in heads:
            now = self._clock()
            when, slot = self._lifeline.admit(waiting.amounts, now)
            if when > now:
                return when
            grant = Grant(booked_at=0, start=now, slot=slot)
            self._line.book(waiting, grant)
            self._line.admit(waiting, grant)
        return self._clock() if heads else NEVER

    def _changed(self, debts: Correction | None) -> None:
        """Start afresh, because the store is gone, or back."""
        self._waits, self._slotless, self._ask_at = False, False, 0
        if debts is not None:
            self._returns.correct(debts)
            self._returns.tell_at = 0
        self._bell.set()
