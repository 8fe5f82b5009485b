"""What one event loop does at a store: calls, corrections and slots, one batch at a time.

The limiter's own order decides who goes next. The session sends as many of these calls as may start
soon, with all that came back since. One batch is in flight; what comes up meanwhile goes with the
next. A call that was booked is let go at its start; the others stay where they are, so that a more
urgent call may still pass them. The line here is kept about as long as what one batch books.

A batch is also the worker's sign of life: if there is nothing to say, an empty one is sent. While
the store is gone, calls pass as `asyncbucket.stores.outage` allows.
"""

import asyncio
import contextlib
import contextvars
import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.core.errors import StoreError
from asyncbucket.core.meters import NEVER
from asyncbucket.stores.outage import StoreHealth
from asyncbucket.stores.pending import Below, Leftover, Reservation, redated
from asyncbucket.stores.store import (
    SLOT,
    Batch,
    Booking,
    Correction,
    Ledger,
    Outcome,
    Receipt,
    Store,
)

if TYPE_CHECKING:
    from asyncbucket.stores.place import StorePlace

#: How long after its first start (ns) the others of a batch may start.
_HORIZON: Final = 50_000_000
#: How long (ns) before the last booked start to ask again at the latest, or two trips if they take
#: longer.
_MARGIN: Final = 10_000_000
#: For how long (ns) to gather what comes back while nobody is known to wait for it, and while somebody
#: waits: less than a round trip takes, so what comes back in between goes with it.
_GATHER: Final = 50_000_000
_GATHER_SLOTS: Final = 1_000_000_000
_GATHER_BRIEFLY: Final = 500_000
#: The most ns between signs of life.
_MAX_BEAT_INTERVAL: Final = 10_000_000_000
#: The bounds of the number of calls that wait here.
_MIN_ROOM: Final = 8
_MAX_ROOM: Final = 512
#: The shortest sleep (s).
_NAP: Final = 20e-6
_CLOSED: Final = "the limiter was closed while this call waited: close it when all calls have ended"
_FAILED: Final = (
    "what asks the store for this call has failed, see the log: ask again, and report this error"
)

_log: Final = logging.getLogger("asyncbucket")


class Session:
    """Serve the calls of one event loop; with the limiter's lock held unless said otherwise."""

    def __init__(
        self, place: "StorePlace", loop: asyncio.AbstractEventLoop, *, is_visit: bool = False
    ) -> None:
        """Begin; ``is_visit``: only to tell the store what came back, if no calls come."""
        self.loop = loop
        self.successor: Leftover | None = None
        self._place = place
        self._clock = place.clock
        #: Calls that wait to be booked, in order, with what they have booked below the root.
        self._line: dict[Any, Below] = {}
        self._room = _MIN_ROOM
        #: Calls that are booked and wait for their start, in that order.
        self._reserved: dict[Any, tuple[Reservation, Below]] = {}
        #: Slots of calls in flight, and of booked calls; and as many as the store knows of.
        self.held = self._reported = 0
        self._corrections: list[Correction] = []
        self._gone: list[Leftover] = []
        #: When what came back must be reported, even if no call goes, and when to give a sign of life.
        self._report_at = self._beat_at = NEVER
        #: Before this instant the line's heads are not sent, because they would not be booked.
        self._ask_at = self._last_start = 0
        #: What the first unbooked call waits for, and until when at least.
        self.held_up: tuple[str, int] | None = None
        #: What each unbooked call waits for.
        self._bounds: dict[Any, str] = {}
        #: Whether calls wait in the store's line, for slots among others; whether others wait there.
        self._in_line = self._awaits_slots = self._is_crowded = False
        self._bell = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._helpers: set[asyncio.Task[Any]] = set()
        self._error: Exception | None = None
        self._probe: asyncio.Task[Receipt] | None = None
        self._listener: asyncio.Task[None] | None = None
        self._is_visit = is_visit
        self._is_closing = False
        self._store: Store | None = None
        self._ledger: Ledger | None = None
        self._health: StoreHealth | None = None
        self._task: asyncio.Task[None] | None = None
        if asyncio._get_running_loop() is loop:  # noqa: SLF001 - None in a plain thread
            self._start()
        else:
            loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        # Not loop.create_task: an eager factory would run it at once, with the lock held. The
        # context is empty: it serves everyone, not the call that happened to come first.
        self._task = asyncio.Task(
            self._run(),
            loop=self.loop,
            name="asyncbucket store session",
            context=contextvars.Context(),
        )

    # --- what the limiter asks, from any thread ---

    def has_room(self) -> bool:
        """Return whether it takes another call."""
        return len(self._line) < self._room

    def push(self, waiter: Any, below: "Below") -> None:
        """Take over ``waiter``, which has booked ``below`` the root."""
        self._line[waiter] = below
        self._is_visit = False
        self.ring()

    def leave(self, waiter: Any) -> bool:
        """Give back all that ``waiter``, which gave up, has booked; return whether it stood here."""
        reservation = None
        if waiter in self._line:
            if next(iter(self._line)) is waiter:  # the next one may be booked sooner
                self._ask_at = 0
            below, when = self._line.pop(waiter)
            self.ring()  # its place in the store's line is free
        elif waiter in self._reserved:
            reservation, (below, when) = self._reserved.pop(waiter)
        else:
            return False
        for meter, resource in below:
            if amount := waiter.amounts.get(resource):
                meter.unbook(amount, when)
        if reservation is not None:
            self._cancel(waiter.amounts, reservation)
        return True

    def redate(self, now: int) -> None:
        """Date to ``now`` what the calls here have booked below the root.

        Otherwise limits there would forget those that wait for long, and let too many leave at once.
        """
        for waiter, below in self._line.items():
            self._line[waiter] = redated(waiter, below, now)
        for waiter, (reservation, below) in self._reserved.items():
            self._reserved[waiter] = reservation, redated(waiter, below, now)

    def waiting(self) -> int:
        """Return how many calls wait here."""
        return sum(not waiter.done() for waiter in (*self._line, *self._reserved))

    @property
    def left(self) -> dict[Any, int]:
        """The units left of each limit, as last heard; the store sorts limits in its own order."""
        if self._health is None:
            return {}
        return dict(zip(self._health.record.config.limits, self._health.left, strict=False))

    def correct(self, correction: Correction) -> None:
        """Have a booking changed; it goes with the next batch.

        For a call that was admitted without the store (``start`` is 0) nothing comes back, but
        debts count.
        """
        if not correction.start:
            booked, used = correction.booked, correction.used
            more = {name: max(amount, booked.get(name, 0)) for name, amount in used.items()}
            correction = Correction(start=0, booked=booked, used=more)
        elif self._health is not None:
            self._health.record.correct(correction)
        self._corrections.append(correction)
        self._report_soon(is_awaited=self._in_line)

    def release(self) -> None:
        """Give a slot back; it goes with the next batch."""
        self.held -= 1
        is_awaited = self._awaits_slots or self._is_crowded
        self._report_soon(is_awaited=is_awaited, late=_GATHER if is_awaited else _GATHER_SLOTS)

    def ring(self) -> None:
        """Make the session look, from any thread."""
        if asyncio._get_running_loop() is self.loop:  # noqa: SLF001 - None in a plain thread
            self._bell.set()
        else:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self._bell.set)

    def end(self) -> Leftover:
        """Let nobody go any more; return what is left: the loop has ended, or the session closes."""
        for waiter, (reservation, _) in self._reserved.items():
            self._cancel(waiter.amounts, reservation)
        self._reserved.clear()
        worker = "" if self._ledger is None else self._ledger.worker
        self.successor = Leftover(worker, self.held, self._corrections)
        if self.loop.is_closed():  # perhaps the store has not heard of them
            self._place.leftovers.extend(Leftover(each.worker) for each in self._gone)
        return self.successor

    def _cancel(self, amounts: Any, reservation: Reservation) -> None:
        """Give back what was booked for a call that is gone, whether or not its start has come."""
        if reservation.booked_at:
            self.correct(Correction.undo(amounts, reservation.booked_at))
        if reservation.slot:
            self.release()

    def _report_soon(self, *, is_awaited: bool, late: int = _GATHER) -> None:
        """Report what came back: very soon if a call waits for it, here or elsewhere, else soon.

        While starts lie ahead there is more time: no call that gets it would start before them.
        """
        now = self._clock()
        soon, late = now + _GATHER_BRIEFLY, now + late
        due = min(late, max(soon, self._last_start - _HORIZON)) if is_awaited else late
        self._report_at = min(self._report_at, due)
        self.ring()

    # --- on the loop, without the lock ---

    async def aclose(self) -> None:
        """End the session: bookings that have not started are given back, waiting calls fail."""
        self._is_closing = True
        self.ring()
        while self._task is None:  # noqa: ASYNC110 - it is about to start
            await asyncio.sleep(0)
        await asyncio.wait((self._task,))  # cancelling this does not stop it

    async def _run(self) -> None:
        error: Exception | None = None
        try:
            if await self._open():
                while not self._is_closing and not (self._is_visit and self._is_idle()):
                    await self._step()
        except Exception as failure:  # noqa: BLE001 - whatever it is, those that wait must not wait on
            error = failure
            _log.error(
                "the session of limiter %s has failed; calls that wait are told, later ones get "
                "another; please report this",
                self._place.name,
                exc_info=error,
            )
        await self._close(_CLOSED if error is None else _FAILED, error)

    def _is_idle(self) -> bool:
        with self._place.lock:
            is_told = not self._corrections and not self._gone and self.held == self._reported
            return is_told and not self._place.leftovers

    async def _open(self) -> bool:
        """Join the limiter at the store; if that fails, all calls that have come by then fail."""
        place = self._place
        if self._fail_earlier_calls() and not self._line and not self._is_visit:
            return False
        try:
            self._store = place.make_store()
            config = place.config()
            if self._is_visit:  # what others have set meanwhile stays
                snapshot = await self._store.peek(place.name)
                config = config if snapshot is None else snapshot.config
            self._ledger = await self._store.open(place.name, config, slot_ttl=place.slot_ttl)
        except Exception as error:  # noqa: BLE001 - such as a name that the store refuses
            place.failure = error, place.arrivals()
            self._fail_earlier_calls()
            return False
        place.failure = None
        self._health = StoreHealth(place, self._ledger.config)
        self._beat_at = 0
        return True

    def _fail_earlier_calls(self) -> bool:
        """Fail calls that had come when the store could not be opened; return whether it could not.

        More of them wait in the pacer's line than fit in here. Each of those would otherwise try
        the store anew, in vain: it may take seconds to notice that it is gone.
        """
        if self._place.failure is None:
            return False
        error, last = self._place.failure
        with self._place.lock:
            for waiter in [waiter for waiter in self._line if waiter.number <= last]:
                self._place.fail(waiter, error)
        return True

    async def _step(self) -> None:
        """Do what is next, or wait for it."""
        assert self._health is not None
        if self._error is not None:
            raise self._error
        with self._place.lock:
            self._take_over()
            heads = self._heads()
        now = self._clock()
        if self._health.outage is not None:
            is_probing = self._probe is not None and not self._probe.done()
            if not is_probing and now >= self._health.retry_at:
                self._probe = self._spawn(self._commit(self._batch(None)))
                self._health.retry_at = NEVER
            await self._sleep(min(self._admit_alone(heads), self._health.retry_at))
            return
        number, look_again_at = self._health.within_share(heads, held=self.held)
        heads = heads[:number]
        if self._in_line and not heads:  # nobody waits any more: leave the store's line
            self._in_line = self._awaits_slots = False
            self._ask_at, self.held_up = 0, None
            await self._send(())
            return
        now = self._clock()
        is_due = bool(heads) and now >= self._ask_at
        report_at = 0 if self._place.pending else min(self._report_at, self._beat_at)
        if is_due or now >= report_at:
            await self._send(heads if is_due or self._in_line else None)
            return
        await self._sleep(min(self._ask_at if heads else NEVER, report_at, look_again_at))

    def _take_over(self) -> None:
        self._place.drop_ended_sessions()
        while self._place.leftovers:
            leftover = self._place.leftovers.popleft()
            leftover.successor = self
            self.held += leftover.held
            self._corrections += leftover.corrections
            if leftover.worker:
                self._gone.append(leftover)
            self._report_at = 0

    def _heads(self) -> Sequence[Any]:
        """Return the calls that go next; they stay in line."""
        waiting = (waiter for waiter in self._line if not waiter.done())
        return list(itertools.islice(waiting, self._room))

    def _adapt_room(self, sent: int, booked: int) -> None:
        wanted = self._room * 5 // 4 if booked == sent else 2 * booked
        self._room = min(max(wanted, _MIN_ROOM), _MAX_ROOM)

    def _batch(self, heads: Sequence[Any] | None) -> Batch:
        calls = None if heads is None else tuple(waiter.amounts for waiter in heads)
        with self._place.lock:
            corrections, self._corrections = tuple(self._corrections), []
            self._reported = self.held
            self._report_at = NEVER
        gone = tuple(leftover.worker for leftover in self._gone)
        return Batch(
            gone=gone, corrections=corrections, held=self.held, calls=calls, horizon=_HORIZON
        )

    async def _commit(self, batch: Batch) -> Receipt:
        assert self._ledger is not None
        assert self._health is not None
        batch, heard = self._place.pending.add_to(batch, self._clock())
        try:
            receipt = await self._ledger.commit(batch)
        except StoreError as error:
            self._health.fail(error)
            self._in_line, self._awaits_slots, self._ask_at = False, False, 0
            raise
        heard()
        self._gone = self._gone[len(batch.gone) :]
        self._beat_at = self._clock() + min(_MAX_BEAT_INTERVAL, round(self._place.slot_ttl * 3.3e8))
        self._is_crowded = receipt.crowded
        debts = self._health.recover()
        self._health.note_answer(receipt, self._ledger.config)
        if receipt.changed is not None and self._place.pending.config is None:
            self._place.adopt(receipt.changed)
        with self._place.lock:
            if debts is not None:
                self._corrections.append(debts)
            if debts is not None or self.held != self._reported:
                self._report_soon(is_awaited=True)
        return receipt

    async def _send(self, heads: Sequence[Any] | None) -> None:
        asked_at = self._clock()
        try:
            receipt = await self._commit(self._batch(heads))
        except StoreError:
            return
        now = self._clock()
        if heads:
            self._plan(receipt, now, trip=now - asked_at)
            self._answer_calls(heads, receipt, now)
        self._let_go()
        if self._in_line and (self._listener is None or self._listener.done()):
            self._listener = self._spawn(self._listen())

    def _plan(self, receipt: Receipt, now: int, *, trip: int) -> None:
        """Decide when to send the next heads; ``trip`` is how long (ns) this batch took.

        Not before all but a horizon of the booked starts has passed: others get their turn, and
        more calls go with one trip. Nor before half of the time up to the last start has passed:
        others want the same units, and one that is late should not find them gone.
        """
        last = max((booking.start for booking in receipt.bookings), default=0)
        left = last - receipt.now
        others_first = receipt.now + min(left // 2, left - max(_MARGIN, 2 * trip))
        ask_at = max(receipt.ask_at, last - _HORIZON, others_first)
        self._ask_at = now + max(0, ask_at - receipt.now)
        self._last_start = max(self._last_start, now + last - receipt.now)

    def _answer_calls(self, heads: Sequence[Any], receipt: Receipt, now: int) -> None:
        """Answer the calls of a batch, and note what those wait for that were not booked."""
        assert self._health is not None
        offset, bounds, booked = now - receipt.now, self._bounds, 0
        self._in_line, self._awaits_slots = receipt.in_line, False
        self._bounds, self.held_up = {}, None
        for waiter, booking in zip(heads, receipt.bookings, strict=True):
            if booking.outcome is Outcome.BOOKED:
                booked += 1
                start = max(now, booking.start + offset)
                self._reserve(waiter, booking, start, booking.bound_by or bounds.get(waiter))
            elif booking.outcome is Outcome.NEVER:
                with self._place.lock:
                    self._place.refuse(waiter, booking.bound_by or "")
            else:
                self._awaits_slots |= booking.outcome is Outcome.FULL
                if booking.bound_by is not None:
                    self._bounds[waiter] = booking.bound_by
                    until = NEVER if booking.bound_by == SLOT else self._ask_at
                    self.held_up = self.held_up or (booking.bound_by, until)
        self._health.record.book_all(heads, receipt.bookings)
        self._adapt_room(len(heads), booked)

    def _reserve(self, waiter: Any, booking: Booking, start: int, bound_by: str | None) -> None:
        reservation = Reservation(self, booking.start, start, booking.slot, bound_by)
        with self._place.lock:
            self.held += booking.slot
            self._reported += booking.slot
            # It may have given up while the batch was in flight.
            if waiter.done() or waiter not in self._line:
                self._cancel(waiter.amounts, reservation)
                return
            self._reserved[waiter] = reservation, self._line.pop(waiter)

    def _let_go(self) -> None:
        """Admit the calls whose start has come, and set the timer for the next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._place.lock:
            now = self._clock()
            for waiter, (reservation, below) in list(self._reserved.items()):
                if reservation.start > now:
                    nap = (reservation.start - now) * 1e-9
                    self._timer = self.loop.call_later(max(_NAP, nap), self._on_timer)
                    break
                if not waiter.done():  # else it gave up, and will leave
                    meters, _ = redated(waiter, below, now)
                    if self._place.admit(waiter, reservation, meters, now):
                        del self._reserved[waiter]
            if self.has_room():
                self._place.ring_seats(self.loop)

    def _on_timer(self) -> None:
        try:
            self._let_go()
        except Exception as error:  # noqa: BLE001 - the loop would log it, and the others wait on
            self._error = error
            self._bell.set()

    async def _listen(self) -> None:
        """Ask again when the store notifies, or at the time that it named."""
        assert self._ledger is not None
        while self._in_line:
            wait = max(0.01, (self._ask_at - self._clock()) * 1e-9)
            try:
                is_called = await self._ledger.changed(timeout=wait)
            except StoreError:
                is_called = True  # the next batch finds out
            if is_called or self._clock() >= self._ask_at:
                self._ask_at = 0
                self._bell.set()
                return

    def _admit_alone(self, heads: Sequence[Any]) -> int:
        """Admit calls that the policy allows without the store; return when to look again."""
        assert self._health is not None
        assert self._ledger is not None
        when = now = self._clock()
        for waiter in heads:
            when = self._health.earliest_alone(waiter.amounts, now, held=self.held)
            if when > now:
                break
            slot = self._ledger.config.concurrency is not None and bool(waiter.amounts.get(SLOT))
            self._reserve(waiter, Booking(Outcome.BOOKED, 0, None, slot), now, None)
        self._let_go()
        return when if heads else NEVER

    async def _sleep(self, until: int) -> None:
        """Sleep until the bell rings or ``until`` has come."""
        seconds = None if until >= NEVER else max(_NAP, (until - self._clock()) * 1e-9)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._bell.wait()
        self._bell.clear()

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work, name="asyncbucket store")
        self._helpers.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: "asyncio.Task[Any]") -> None:
        """Look again when a helper has ended; if it failed, so has the session."""
        self._helpers.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception) and not isinstance(error, StoreError):
            self._error = error
        self._bell.set()

    async def _close(self, why: str, error: Exception | None) -> None:
        """Fail the calls that wait, tell the store what came back, and leave it."""
        place = self._place
        if self._timer is not None:
            self._timer.cancel()
        for task in tuple(self._helpers):
            task.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)
        with place.lock:
            waiting = [*self._line, *self._reserved]
            for waiter in waiting:
                place.fail(waiter, error or StoreError(why), why)
            if self._is_closing and not self._is_visit:  # those that stand in the pacer's line, too
                place.failure = StoreError(why), place.arrivals()
            if self._ledger is not None:
                self._take_over()
            leftover = self.end()
            leftover.corrections, corrections = [], leftover.corrections
            place.forget(self, leftover)
        if self._ledger is not None:
            await self._say_good_bye(self._ledger, leftover, corrections)
        if self._store is not None:
            await place.close_store(self._store)
        place.ending.discard(self)

    async def _say_good_bye(
        self, ledger: Ledger, leftover: Leftover, corrections: list[Correction]
    ) -> None:
        gone = tuple(each.worker for each in self._gone)
        batch = Batch(gone=gone, corrections=tuple(corrections), held=leftover.held)
        batch, heard = self._place.pending.add_to(batch, self._clock())
        try:
            await ledger.commit(batch)
            heard()
        except Exception as error:  # noqa: BLE001 - nobody awaits it
            _log.debug("the store is gone, and slots expire by themselves: %s", error)
        await ledger.aclose()
