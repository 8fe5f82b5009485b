"""What a process does at a store: calls, corrections and slots, one batch at a time.

The limiter's own order decides who goes next. The session sends as many of these calls as may start
soon, with all that came back since. One batch is in flight; what comes up meanwhile goes with the
next. A call that was booked is let go at its start; the others stay where they are, so that a more
urgent call may still pass them.

A batch is also the worker's sign of life: if there is nothing to say, an empty one is sent. While
the store is gone, calls pass as `asyncbucket.stores.outage` allows.

A session serves all loops and threads of a process. It lives on a loop of its own, in a thread that
ends with it; only a store that was made by the user has it on the user's loop. When the limiter is
closed it ends as soon as no call waits, no slot is held, and the store has been told everything.
"""

import asyncio
import contextlib
import contextvars
import logging
import threading
import weakref
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.core.errors import StoreError
from asyncbucket.core.meters import NEVER, Amounts
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
#: For how long (ns) a call that has given up may ask in another thread what it waited for; and for how
#: long at most a pool leaves a store alone that held its call up.
_REMEMBER: Final = 500_000_000
_LEAVE_ALONE: Final = 2_000_000_000
#: The shortest sleep (s).
_NAP: Final = 20e-6
_FAILED: Final = (
    "what asks the store for this call has failed, see the log: ask again, and report this error"
)

_log: Final = logging.getLogger("asyncbucket")


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
        #: When what came back must be reported, even if no call goes, and when to give a sign of life.
        self._report_at = self._beat_at = NEVER
        #: Before this instant the line's heads are not sent, because they would not be booked.
        self._ask_at = self._last_start = 0
        #: What the first unbooked call waits for, until when at least, and when that is forgotten.
        self._held_up: tuple[str, int] | None = None
        self._forget_at = NEVER
        #: Whether, while the store is gone, the first unbooked call has to wait; forgotten likewise.
        self._is_stuck = False
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

    def wake_for(self, waiter: Any) -> None:
        """Serve ``waiter``, which stands at the store now."""
        self._is_closing = self._is_closing and self._place.calls.has_failed(waiter)
        self.ring()

    def ask_again(self, *, is_first: bool) -> None:
        """Look again: a call has gone, so its place in the store's line is free.

        If it was the first, the next one may be booked sooner.
        """
        if is_first:
            self._ask_at = 0
        self.ring()

    def held_up(self) -> tuple[str, int] | None:
        """Return what the first unbooked call waits for, and until when at least."""
        return self._held_up

    def holds_up(self) -> bool:
        """Tell whether the first unbooked call has to wait, as a pool may have another member take it."""
        return self._is_stuck or self._held_up is not None

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
            has_more = self._pending and self._health is not None and not self._health.is_gone
            is_last = not self._place.calls.heads() and not has_more
            if is_last:
                self._place.forget(self)
            return is_last

    async def _open(self) -> bool:
        """Join the limiter at the store; if that fails, all calls that have come by then fail."""
        place, self._health = self._place, None
        with place.lock():
            if any(place.calls) and not place.calls.heads():  # they have failed, or given up
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
            return False
        self._health = StoreHealth(place, self._ledger.config)
        self._beat_at = 0
        return True

    def _is_over(self) -> bool:
        """Tell whether to leave the store; tell those who close the limiter when it knows all."""
        assert self._health is not None
        if not self._is_closing:
            self._answer_closers()  # a call that came since has opened it again
            return False
        with self._place.lock():
            loops = [waiter.seat.loop for waiter in self._place.calls]
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

    async def _step(self) -> None:
        """Do what is next, or wait for it."""
        assert self._health is not None
        if self._error is not None:
            raise self._error
        with self._place.lock():
            heads: Sequence[Any] = self._place.calls.heads()
            held = self._pending.held
            if self._in_line and not self._pending.is_urgent():
                self._fail_late_calls(heads)
        now = self._clock()
        if now >= self._forget_at:
            self._held_up, self._is_stuck, self._forget_at = None, False, NEVER
            self._place.ring_pool()
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
            _, until = self._held_up or ("", 0)
            self._ask_at = 0
            self._forget_at = now + max(_REMEMBER, min(until - now, _LEAVE_ALONE))
            await self._send(())
            return
        now = self._clock()
        is_due = bool(heads) and now >= self._ask_at
        report_at = 0 if self._pending.is_urgent() else min(self._report_at, self._beat_at)
        if is_due or now >= report_at:
            await self._send(heads if is_due or self._in_line else None)
            return
        ask_at = self._ask_at if heads else self._forget_at
        await self._sleep(min(ask_at, report_at, look_again_at))

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
        if self._is_stuck:
            self._is_stuck = False
            self._place.ring_pool()
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
            self._answer_calls(heads, receipt, asked_at, now)
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

    def _answer_calls(
        self, heads: Sequence[Any], receipt: Receipt, asked_at: int, now: int
    ) -> None:
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
                    soonest = receipt.soonest - receipt.now + asked_at  # or later, by up to a trip
                    until = NEVER if booking.bound_by == SLOT else max(self._ask_at, soonest)
                    self._held_up = booking.bound_by, until
                    self._soonest = waiter.amounts, soonest
        self._health.record.book_all(heads, receipt.bookings)
        self._place.calls.adapt_room(len(heads), booked)
        if self._held_up is not None:
            self._place.ring_pool()

    def _reserve(self, waiter: Any, booking: Booking, start: int, bound_by: str | None) -> None:
        reservation = Reservation(booking.start, start, booking.slot, bound_by)
        with self._place.lock():
            self._pending.held += booking.slot
            self._pending.reported += booking.slot
            self._place.calls.reserve(waiter, reservation)

    def _let_go(self) -> None:
        """Admit the calls of this loop whose start has come.

        The session's own loop also has the other loops do so, and sets the timer for the next call.
        """
        here = asyncio.get_running_loop()
        with self._place.lock():
            now = self._clock()
            next_start, elsewhere = self._place.calls.admit_due(here, self.loop, now)
            if self._place.calls.has_room(now):
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
        if heads:
            was_stuck, self._is_stuck, self._forget_at = self._is_stuck, when > now, NEVER
            if self._is_stuck and not was_stuck:
                self._place.ring_pool()
        elif self._is_stuck and self._forget_at >= NEVER:
            self._forget_at = now + _LEAVE_ALONE
        return when if heads else self._forget_at

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
