"""What a process does at a store: calls, corrections and slots, one batch at a time.

The limiter's own order decides who goes next. The session sends as many of these calls as may start
soon, with all that came back since. One batch is in flight; what comes up meanwhile goes with the
next. A call that was booked is let go at its start; the others stay where they are, so that a more
urgent call may still pass them. The line here is kept about as long as what one batch books.

A batch is also the worker's sign of life: if there is nothing to say, an empty one is sent. While
the store is gone, calls pass as `asyncbucket.stores.outage` allows.

A session serves all loops and threads of a process. It lives on a loop of its own, in a thread that
ends with it; only a store that was made by the user has it on the user's loop. When the limiter is
closed it ends as soon as no call waits, no slot is held, and the store has been told everything.
"""

import asyncio
import contextlib
import contextvars
import itertools
import logging
import threading
import weakref
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from asyncbucket.core.errors import StoreError
from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.node import Meters
from asyncbucket.stores.outage import StoreHealth
from asyncbucket.stores.pending import Reservation
from asyncbucket.stores.store import SLOT, Booking, Correction, Ledger, Outcome, Receipt, Store

if TYPE_CHECKING:
    import concurrent.futures

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
#: For how long (ns) a call that has given up may ask in another thread what it waited for.
_REMEMBER: Final = 500_000_000
#: The shortest sleep (s).
_NAP: Final = 20e-6
_FAILED: Final = (
    "what asks the store for this call has failed, see the log: ask again, and report this error"
)

_log: Final = logging.getLogger("asyncbucket")

#: What a call has booked below the root, and when.
Below: TypeAlias = tuple[Meters, int]


def redated(waiter: Any, below: Below, now: int) -> Below:
    """Date to ``now`` what ``waiter`` has booked below the root."""
    meters, when = below
    for meter, resource in meters:
        if amount := waiter.amounts.get(resource):
            meter.redate(amount, when, now)
    return meters, now


class Session:
    """Serve the calls of one process; with the limiter's lock held unless said otherwise."""

    def __init__(
        self, place: "StorePlace", loop: asyncio.AbstractEventLoop | None, *, is_closing: bool
    ) -> None:
        """Begin, on ``loop`` or on one of its own; ``is_closing``: to tell what came back, and end."""
        #: A limiter that nobody has any more ends its session.
        self._place: StorePlace = weakref.proxy(place, lambda _: self.ring())
        self._pending = place.pending
        self._clock = place.clock
        #: Calls that wait to be booked, in order, with what they have booked below the root.
        self._line: dict[Any, Below] = {}
        self._room = _MIN_ROOM
        #: Calls that are booked and wait for their start, in that order.
        self._reserved: dict[Any, tuple[Reservation, Below]] = {}
        #: When what came back must be reported, even if no call goes, and when to give a sign of life.
        self._report_at = self._beat_at = NEVER
        #: Before this instant the line's heads are not sent, because they would not be booked.
        self._ask_at = self._last_start = 0
        #: What the first unbooked call waits for, until when at least, and when that is forgotten.
        self._held_up: tuple[str, int] | None = None
        self._forget_at = NEVER
        #: What the first unbooked call costs, and from when on it may start, whatever comes back.
        self._soonest: tuple[Amounts, int] = {}, 0
        #: Whether calls wait in the store's line, for slots among others; whether others wait there.
        self._in_line = self._awaits_slots = self._is_crowded = False
        self._bell = asyncio.Event()
        self._is_rung = False
        self._timer: asyncio.TimerHandle | None = None
        self._helpers: set[asyncio.Task[Any]] = set()
        self._error: Exception | None = None
        self._probe: asyncio.Task[Any] | None = None
        self._listener: asyncio.Task[Any] | None = None
        self._is_closing = is_closing
        #: Who wants to know when the store has been told everything.
        self._closers: list[concurrent.futures.Future[None]] = []
        self._store: Store | None = None
        self._ledger: Ledger | None = None
        self._health: StoreHealth | None = None
        self._task: asyncio.Task[None] | None = None
        self._owns_store = place.owns_store
        self.loop = asyncio.new_event_loop() if loop is None else loop
        if loop is None:
            name = "asyncbucket session"
            threading.Thread(target=self._run_in_thread, name=name, daemon=True).start()
        elif asyncio._get_running_loop() is loop:  # noqa: SLF001 - None in a plain thread
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

    def _run_in_thread(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._run())

    # --- what the limiter asks, from any thread ---

    def has_room(self) -> bool:
        """Return whether it takes another call; date to now what stands here below the root.

        Otherwise limits there would forget those that wait for long, and let too many leave at once.
        """
        if len(self._line) >= self._room:
            return False
        now = self._clock()
        for waiter, below in self._line.items():
            self._line[waiter] = redated(waiter, below, now)
        for waiter, (reservation, below) in self._reserved.items():
            self._reserved[waiter] = reservation, redated(waiter, below, now)
        return True

    def push(self, waiter: Any, below: Below) -> None:
        """Take over ``waiter``, which has booked ``below`` the root."""
        self._line[waiter] = below
        self._is_closing = self._is_closing and self._has_failed(waiter)
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

    def waiting(self) -> int:
        """Return how many calls wait here."""
        return sum(not waiter.done() for waiter in (*self._line, *self._reserved))

    def held_up(self) -> tuple[str, int] | None:
        """Return what the first unbooked call waits for, and until when at least."""
        return self._held_up if self._clock() < self._forget_at else None

    def held_back(self) -> list[Any]:
        """Return the calls, in order, that are not booked because the first one is held up."""
        return [] if self.held_up() is None else [each for each in self._line if not each.done()]

    def report(self, correction: Correction | None) -> None:
        """Report a correction, or else a slot that came back, with the next batch."""
        if correction is not None:
            if correction.start and self._health is not None:
                self._health.record.correct(correction)
            self._report_soon(is_awaited=self._in_line)
        else:
            is_awaited = self._awaits_slots or self._is_crowded
            is_soon = is_awaited or self._is_closing
            self._report_soon(is_awaited=is_awaited, late=_GATHER if is_soon else _GATHER_SLOTS)

    def ring(self) -> None:
        """Make the session look, from any thread, with or without the lock."""
        if asyncio._get_running_loop() is self.loop:  # noqa: SLF001 - None in a plain thread
            self._bell.set()
        elif not self._is_rung:
            self._is_rung = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self._bell.set)

    def close(self, told: "concurrent.futures.Future[None]") -> None:
        """End when no call waits and no slot is held; ``told`` is set once the store knows all."""
        self._closers.append(told)
        self._is_closing = True
        self._report_at = self._clock()
        self.ring()

    def give_back(self) -> None:
        """Give back what was booked for calls on the loop, which has ended."""
        for waiter, (reservation, _) in self._reserved.items():
            self._cancel(waiter.amounts, reservation)
        self._reserved.clear()

    def _cancel(self, amounts: Amounts, reservation: Reservation) -> None:
        """Give back what was booked for a call that is gone, whether or not its start has come."""
        if reservation.booked_at:
            self._place.correct(Correction.undo(amounts, reservation.booked_at))
        if reservation.slot:
            self._place.release()

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

    async def _run(self) -> None:
        try:
            while not await self._serve():
                pass
        except ReferenceError:  # nobody has the limiter any more
            pass
        except BaseException as error:  # whatever it is, those that wait must not wait on
            if isinstance(error, Exception):
                _log.error(
                    "the session of limiter %s has failed; waiting calls fail, and later ones "
                    "get a new session; please report this",
                    self._place.name,
                    exc_info=error,
                )
            with self._place.lock():
                self._place.fail_all(StoreError(_FAILED))
                self._fail_early_calls()
                self._place.forget(self)
            if not isinstance(error, Exception):
                raise
        finally:
            self._answer_closers()

    async def _serve(self) -> bool:
        """Open the store, serve while it is wanted, and leave it; return whether that is all."""
        try:
            if await self._open():
                while not self._is_over():
                    await self._step()
        finally:
            await self._leave()
        with self._place.lock():
            self._fail_early_calls()
            has_more = self._pending and self._health is not None and not self._health.is_gone
            is_last = not self._heads() and not has_more
            if is_last:
                self._place.forget(self)
            return is_last

    async def _open(self) -> bool:
        """Join the limiter at the store; if that fails, all calls that have come by then fail."""
        place, self._health = self._place, None
        with place.lock():
            if self._fail_early_calls() and not self._heads():
                return False
        try:
            self._store = place.make_store()
            config = place.config()
            if self._is_closing:  # what others have set meanwhile stays
                snapshot = await self._store.peek(place.name)
                config = config if snapshot is None else snapshot.config
            self._ledger = await self._store.open(
                place.name, config, worker=place.worker, slot_ttl=place.slot_ttl
            )
        except Exception as error:  # noqa: BLE001 - such as a name that the store refuses
            with place.lock():
                place.fail_all(error)
                self._fail_early_calls()
            return False
        self._health = StoreHealth(place, self._ledger.config)
        self._beat_at = 0
        return True

    def _is_over(self) -> bool:
        """Tell whether to leave the store; tell those who close the limiter when it knows all."""
        assert self._health is not None
        if not self._is_closing:
            return False
        with self._place.lock():
            self._fail_early_calls()
            loops = [waiter.seat.loop for waiter in (*self._line, *self._reserved)]
            is_busy = any(loop is None or loop.is_running() for loop in loops)
            if not self._health.is_gone and (is_busy or self._pending):
                return False
            if not self._health.is_gone and self._pending.held:
                self._answer_closers()
                return False
            return True

    def _answer_closers(self) -> None:
        while self._closers:
            told = self._closers.pop()
            if told.set_running_or_notify_cancel():
                told.set_result(None)

    def _has_failed(self, waiter: Any) -> bool:
        _, last = self._place.failure
        return bool(waiter.number <= last)

    def _fail_early_calls(self) -> bool:
        """Fail calls that had come when the store could not be opened, or the limiter was closed.

        Return whether there were any. More of them wait in the pacer's line than fit in here. Each of those would otherwise try
        the store anew, in vain: it may take seconds to notice that it is gone.
        """
        early = [each for each in (*self._line, *self._reserved) if self._has_failed(each)]
        for waiter in early:
            if waiter.seat.is_closed():
                self.leave(waiter)
            else:
                self._place.fail(waiter)
        return bool(early)

    async def _step(self) -> None:
        """Do what is next, or wait for it."""
        assert self._health is not None
        if self._error is not None:
            raise self._error
        with self._place.lock():
            heads = self._heads()
            held = self._pending.held
            if self._in_line and not self._pending.is_urgent():
                self._fail_late_calls(heads)
        now = self._clock()
        if self._health.is_gone:
            is_probing = self._probe is not None and not self._probe.done()
            if not is_probing and now >= self._health.retry_at:
                self._probe = self._spawn(self._commit(None))
                self._health.retry_at = NEVER
            await self._sleep(min(self._admit_alone(heads), self._health.retry_at))
            return
        number, look_again_at = self._health.within_share(heads, held=held)
        heads = heads[:number]
        if self._in_line and not heads:  # nobody waits any more: leave the store's line
            self._in_line = self._awaits_slots = False
            self._ask_at, self._forget_at = 0, now + _REMEMBER
            await self._send(())
            return
        now = self._clock()
        is_due = bool(heads) and now >= self._ask_at
        report_at = 0 if self._pending.is_urgent() else min(self._report_at, self._beat_at)
        if is_due or now >= report_at:
            await self._send(heads if is_due or self._in_line else None)
            return
        await self._sleep(min(self._ask_at if heads else NEVER, report_at, look_again_at))

    def _heads(self) -> Sequence[Any]:
        """Return the calls that go next; they stay in line."""
        waiting = (each for each in self._line if not (each.done() or self._has_failed(each)))
        return list(itertools.islice(waiting, self._room))

    def _fail_late_calls(self, heads: Sequence[Any]) -> None:
        """Fail those whose deadline comes before such a call can start, whatever comes back."""
        amounts, soonest = self._soonest
        for waiter in heads:
            if (
                waiter.deadline is not None
                and waiter.deadline < soonest
                and all(waiter.amounts.get(each, 0) >= amounts[each] for each in amounts)
            ):
                self._place.fail_late(waiter)

    def _adapt_room(self, sent: int, booked: int) -> None:
        wanted = self._room * 5 // 4 if booked == sent else 2 * booked
        self._room = min(max(wanted, _MIN_ROOM), _MAX_ROOM)

    async def _commit(self, calls: Sequence[Amounts] | None) -> Receipt:
        assert self._ledger is not None
        assert self._health is not None
        with self._place.lock():
            batch, heard = self._pending.batch(calls, self._clock(), _HORIZON)
            self._report_at = NEVER
        try:
            receipt = await self._ledger.commit(batch)
        except StoreError as error:
            self._health.fail(error)
            self._in_line, self._awaits_slots, self._ask_at = False, False, 0
            raise
        heard()
        self._beat_at = self._clock() + min(_MAX_BEAT_INTERVAL, round(self._place.slot_ttl * 3.3e8))
        self._is_crowded = receipt.crowded
        debts = self._health.recover()
        self._health.note_answer(receipt, self._ledger.config)
        if receipt.changed is not None and self._pending.config is None:
            self._place.adopt(receipt.changed)
        with self._place.lock():
            # The store sorts limits in its own order.
            self._place.left = dict(zip(self._ledger.config.limits, receipt.left, strict=False))
            if debts is not None:
                self._pending.corrections.append(debts)
            if debts is not None or self._pending.held != self._pending.reported:
                self._report_soon(is_awaited=True)
        return receipt

    async def _send(self, heads: Sequence[Any] | None) -> None:
        asked_at = self._clock()
        try:
            receipt = await self._commit(heads and [waiter.amounts for waiter in heads])
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
        offset, before, booked = now - receipt.now, self._held_up, 0
        self._in_line, self._awaits_slots = receipt.in_line, False
        self._held_up, self._forget_at = None, NEVER
        for waiter, booking in zip(heads, receipt.bookings, strict=True):
            if booking.outcome is Outcome.BOOKED:
                booked += 1
                start = max(now, booking.start + offset)
                bound_by = booking.bound_by or (None if before is None else before[0])
                self._reserve(waiter, booking, start, bound_by)
            elif booking.outcome is Outcome.NEVER:
                with self._place.lock():
                    self._place.refuse(waiter)
            else:
                self._awaits_slots |= booking.outcome is Outcome.FULL
                if self._held_up is None and booking.bound_by is not None:
                    soonest = receipt.soonest + offset
                    until = NEVER if booking.bound_by == SLOT else max(self._ask_at, soonest)
                    self._held_up = booking.bound_by, until
                    self._soonest = waiter.amounts, soonest
        self._health.record.book_all(heads, receipt.bookings)
        self._adapt_room(len(heads), booked)
        if self._held_up is not None:
            self._place.ring_pool()

    def _reserve(self, waiter: Any, booking: Booking, start: int, bound_by: str | None) -> None:
        reservation = Reservation(booking.start, start, booking.slot, bound_by)
        with self._place.lock():
            self._pending.held += booking.slot
            self._pending.reported += booking.slot
            # It may have given up while the batch was in flight.
            if waiter.done() or waiter not in self._line:
                self._cancel(waiter.amounts, reservation)
                return
            self._reserved[waiter] = reservation, self._line.pop(waiter)

    def _let_go(self) -> None:
        """Admit the calls of this loop whose start has come.

        The session's own loop also has the other loops do so, and sets the timer for the next call.
        """
        here = asyncio.get_running_loop()
        with self._place.lock():
            next_start, elsewhere = self._admit_due(here)
            if self.has_room():
                self._place.ring_seats()
        if here is not self.loop:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if next_start < NEVER:
            nap = max(_NAP, (next_start - self._clock()) * 1e-9)
            self._timer = self.loop.call_later(nap, self._on_timer)
        for loop in elsewhere:
            with contextlib.suppress(RuntimeError):  # it has just been closed
                loop.call_soon_threadsafe(self._on_timer, context=contextvars.Context())

    def _admit_due(
        self, here: asyncio.AbstractEventLoop
    ) -> tuple[int, set[asyncio.AbstractEventLoop]]:
        """Admit what is due ``here``; return when the next start is, and where else calls are due."""
        elsewhere: set[asyncio.AbstractEventLoop] = set()
        now = self._clock()
        for waiter, (reservation, below) in list(self._reserved.items()):
            loop = waiter.seat.loop or self.loop
            if reservation.start > now:
                return reservation.start, elsewhere
            if loop.is_closed():
                self.leave(waiter)
            elif loop is not here:
                elsewhere.add(loop)
            elif not waiter.done():  # else it gave up, and will leave
                meters, _ = redated(waiter, below, now)
                if self._place.admit(waiter, reservation, meters, now):
                    del self._reserved[waiter]
        return NEVER, elsewhere

    def _on_timer(self) -> None:
        try:
            self._let_go()
        except Exception as error:  # noqa: BLE001 - the loop would log it, and the others wait on
            self._error = error
            self.ring()

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
            when = self._health.earliest_alone(waiter.amounts, now, held=self._pending.held)
            if when > now:
                break
            slot = bool(waiter.amounts.get(SLOT))
            self._reserve(waiter, Booking(Outcome.BOOKED, 0, None, slot), now, None)
        self._let_go()
        return when if heads else NEVER

    async def _sleep(self, until: int) -> None:
        """Sleep until the bell rings or ``until`` has come."""
        seconds = None if until >= NEVER else max(_NAP, (until - self._clock()) * 1e-9)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._bell.wait()
        self._is_rung = False  # first: another thread may ring at once
        self._bell.clear()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
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

    async def _leave(self) -> None:
        """Leave the store, and close it."""
        if self._timer is not None:
            self._timer.cancel()
        for task in tuple(self._helpers):
            task.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)
        ledger, self._ledger, store, self._store = self._ledger, None, self._store, None
        if ledger is not None:
            await ledger.aclose()
        if store is not None and self._owns_store:
            await store.aclose()
