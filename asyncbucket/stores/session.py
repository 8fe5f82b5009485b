"""What a process does at a store: calls, corrections and slots, one batch at a time.

The limiter's own order decides who goes next. The session sends as many of these calls as may start
soon, with all that came back since. One batch is in flight; what comes up meanwhile goes with the
next. A call that was booked is let go at its start; the others stay where they are, so that a more
urgent call may still pass them.

A batch is also the worker's sign of life: if there is nothing to say, an empty one is sent. While
the store is gone, calls pass as `asyncbucket.stores.outage` allows.

A session serves all loops and threads of a process. It lives on a loop that the sessions of all
limiters share (`asyncbucket.stores.loop`); only a store that was made by the user has it on the
user's loop. When the limiter is closed it ends as soon as no call waits or holds a slot. A tenant's
always does so.
"""

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from asyncbucket.engine.dispatchers import GRACE, NAP
from asyncbucket.engine.errors import StoreError
from asyncbucket.engine.meters import NEVER, Amounts
from asyncbucket.stores.outage import STEADY
from asyncbucket.stores.store import (
    SLOT,
    Batch,
    Correction,
    Ledger,
    Receipt,
)

if TYPE_CHECKING:
    import concurrent.futures

    from asyncbucket.stores.loop import SessionLoop
    from asyncbucket.stores.place import StorePlace

#: For how long (ns) to gather what comes back: while this worker's line waits for something else, for all
#: that is known while nobody waits for it, and while somebody waits.
_GATHER_LONG: Final = 3_000_000_000
_GATHER: Final = 50_000_000
_GATHER_BRIEFLY: Final = 1_000_000
#: A loop that was seen within this time (ns) is taken to run.
_FRESH: Final = 10_000_000
#: How long (ns) before the last of its starts a worker that does not stand in line books more.
_AHEAD: Final = 50_000_000
#: The most ns between signs of life.
_MAX_BEAT_INTERVAL: Final = 10_000_000_000
#: For how long (ns) a call that has given up may ask in another thread what it waited for, and a pool leaves a
#: store alone that held its call up.
_REMEMBER: Final = 1_000_000_000
_FAILED: Final = (
    "what asks the store for this call has failed, see the log: ask again, and report this error"
)

_log: Final = logging.getLogger("asyncbucket")


@dataclass(frozen=True, slots=True)
class Reservation:
    """Say what a call was given, besides a slot."""

    amounts: Amounts
    #: When it was booked, by the store's clock: the ``start`` of a `Correction`; 0 without the store.
    booked_at: int
    #: When it may go, by the worker's clock.
    start: int
    bound_by: str | None = None


class HeldUp(NamedTuple):
    """Say what the first call that is not booked waits for."""

    #: "" while the store is gone.
    resource: str
    #: Until when at least; `NEVER` if a slot has to be given back.
    until: int
    amounts: Amounts
    #: From when on it may start, whatever comes back.
    soonest: int = 0


class Session:
    """Serve the calls of one process; with the limiter's lock held unless said otherwise."""

    def __init__(self, place: "StorePlace", home: "SessionLoop") -> None:
        """Begin, on the loop of ``home``."""
        #: A limiter that nobody has any more ends its session.
        self._place: StorePlace = weakref.proxy(place, lambda _: self.ring())
        self._outbox = place.outbox
        self._clock = place.clock
        #: When a batch is sent though no call asks: to report what came back, or as a sign of life.
        self._report_at = 0
        #: Before this instant the line's heads are not sent, because they would not be booked.
        self._ask_at = 0
        #: What holds the first call up, and when that is forgotten.
        self.held_up: HeldUp | None = None
        self._forget_at = NEVER
        self._bell = asyncio.Event()
        #: Since when the next batch has waited for loops to show that they run; 0 if it does not.
        self._awaits_since = 0
        #: What tries to reach a store that is gone.
        self._probe: asyncio.Task[None] | None = None
        self._is_closing = False
        #: Who wants to know when the store has been told everything.
        self._closers: list[concurrent.futures.Future[None]] = []
        self._ledger: Ledger | None = None
        self.home = home
        home.serve(self._run)

    # --- what the limiter asks, from any thread ---

    def wake_for(self, waiter: Any) -> None:
        """Serve ``waiter``, which stands at the store now."""
        self._is_closing = self._is_closing and self._place.has_failed(waiter)
        self.ring()

    def note_running(self, dispatcher: Any) -> None:
        """Take in that ``dispatcher`` dispatches; calls are asked for again that were not, while it was late."""
        if dispatcher.is_late:
            self.ask_again()
        elif self._awaits_since or self._is_closing:
            self.ring()

    def ask_again(self) -> None:
        """Ask again: a call has gone, so the next one may be booked sooner, or the line be left."""
        self._ask_at = 0
        self.ring()

    def report(self, correction: Correction | None) -> None:
        """Report a correction, or else a slot that came back, with the next batch.

        Very soon if a call waits for it, here or elsewhere.
        """
        health = self._place.health
        is_awaited = health.heard.crowded
        if correction is not None:
            binds = self.held_up.resource if self.held_up else ""
            is_awaited = health.heard.in_line and binds in {*correction.used, ""}
            if correction.start:
                record = health.record
                record.correct(correction, record.last_start)
        now = self._clock()
        later = min(self._ask_at, now + _GATHER_LONG) if health.heard.in_line else 0
        if correction is not None and correction.dated:
            later = 0  # others must hear before the window has passed
        gathered = now + _GATHER_BRIEFLY if is_awaited else max(now + _GATHER, later)
        self._report_at = min(self._report_at, gathered)
        self.ring()

    def ring(self) -> None:
        """Make the session look, from any thread, with or without the lock."""
        self.home.errands.add(self._bell.set)

    def close(self, told: "concurrent.futures.Future[None]") -> None:
        """End when no call waits or holds a slot; ``told`` is set once no call waits and the store knows all."""
        self._closers.append(told)
        self._is_closing = True
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
                _log.exception(
                    "the session of limiter %s has failed; waiting calls fail, and later ones "
                    "get a new session; please report this",
                    self._place.name,
                )
            with self._place.lock():
                self._place.fail_all(StoreError(_FAILED))
                self._place.forget(self)
            if not isinstance(error, Exception):
                raise
        finally:
            await self.home.leave()
            self._answer_closers()

    async def _serve(self) -> bool:
        """Open the store, serve while it is wanted, and leave it; return whether that is all."""
        is_open = False
        try:
            if is_open := await self._open():
                while not self._is_over():
                    await self._step()
        finally:
            await self._leave()
        with self._place.lock():
            has_news = is_open and self._outbox.batch != Batch()  # since it has left
            is_last = not (has_news or self._place.heads())
            if is_last:
                self._place.forget(self)
            return is_last

    async def _open(self) -> bool:
        """Join the limiter at the store; if that fails, all calls that have come by then fail."""
        place = self._place
        with place.lock():
            if place.calls and not place.heads():  # they have failed, or given up
                return False
        try:
            store = self.home.store(place.make_store)
            config = place.config()
            is_news = not place.health.heard.now or self._outbox.batch.config
            # A tenant's limits go with its first calls; what the store has of them counts later.
            news = config if is_news and place.root is not None else None
            self._outbox.batch = replace(self._outbox.batch, config=news)
            self._ledger = await store.open(
                place.name, config, worker=place.worker, slot_ttl=place.slot_ttl
            )
        except Exception as error:  # noqa: BLE001 - such as a name that the store refuses
            with place.lock():
                place.fail_all(error)
            return False
        self._ledger.on_turn = self.ask_again
        place.health.record.configure(self._ledger.config, place.health.record.last_start)
        self._ask_at = self._report_at = 0
        return True

    def _is_over(self) -> bool:
        """Tell whether to leave the store: the limiter is closed, and no call stands here or holds a slot.

        A tenant leaves whenever it has nothing to do.
        """
        if self._place.root is not None and self._is_unused():
            return True
        if not self._is_closing:
            self._answer_closers()  # a call that came since has opened it again
            return False
        if self._place.health.is_gone:
            return True
        with self._place.lock():
            loops = [waiter.dispatcher.loop for waiter in self._place.calls]
            if self._outbox.batch.corrections or any(
                not loop or loop.is_running() for loop in loops
            ):
                return False
            if self._outbox.held:  # signs of life keep the slots of calls in flight
                self._answer_closers()
            return not self._outbox.held

    def _is_unused(self) -> bool:
        with self._place.lock():
            is_used = self._place.calls or self._outbox.held or self._place.health.is_gone
            return not is_used and self._outbox.batch == Batch()

    def _answer_closers(self) -> None:
        while self._closers:
            told = self._closers.pop()
            if told.set_running_or_notify_cancel():
                told.set_result(None)

    async def _step(self) -> None:
        """Do what is next, or wait for it."""
        if self._probe is not None and self._probe.done():
            self._probe.result()  # if it failed, so has the session
        health, now = self._place.health, self._clock()
        with self._place.lock():
            all_heads = self._place.heads()
            heads: Sequence[Any] = [
                each for each in all_heads if not self._place.is_late(each.dispatcher, now)
            ]
            is_urgent = self._outbox.batch.config is not None or self._outbox.batch.pause > 0
            if health.heard.in_line and self.held_up is not None and not is_urgent:
                self._place.fail_late(heads, self.held_up)
        if now >= self._forget_at:
            self._note_held_up(None)
        elif not heads and self.held_up is not None and self._forget_at >= NEVER:
            self._forget_at = now + _REMEMBER
        if health.is_gone:
            if now >= health.retry_at:
                health.retry_at = NEVER
                self._probe = asyncio.create_task(self._send(None), name="asyncbucket store probe")
                self._probe.add_done_callback(lambda _: self._bell.set())
            await self._sleep(min(self._admit_alone(heads), health.retry_at, self._forget_at))
            return
        in_line = health.heard.in_line
        if in_line and not heads:
            self._ask_at = 0  # leave the store's line; whoever comes next asks anew
        ask_at = max(self._ask_at, health.resume_at) if heads else self._forget_at
        is_due = now >= ask_at if heads else in_line
        if until := self._await_loops(heads if is_due and not is_urgent else ()):
            await self._sleep(min(until, self._report_at))
        elif is_due or is_urgent or now >= self._report_at:
            await self._send(heads if is_due or in_line else None)
        else:
            await self._sleep(min(ask_at, self._report_at))

    async def _send(self, heads: Sequence[Any] | None) -> None:
        """Send a batch, and do what the answer says."""
        assert self._ledger is not None
        asked_at, life = self._clock(), round(self._place.slot_ttl * 1e9)
        with self._place.lock():
            batch = self._place.batch(heads or ())
            self._report_at = asked_at + min(_MAX_BEAT_INTERVAL, life // 3)
            if heads:
                self._ask_at = NEVER
        try:
            receipt = await self._ledger.commit(batch)
        except StoreError as error:
            self._place.health.fail(error)
            self._ask_at = 0
            return
        config = self._ledger.config
        debts = self._place.health.note_answer(receipt, config)
        with self._place.lock():
            self._place.adopt(config)
            if debts:
                self._outbox.add(corrections=tuple(debts))
                self._report_at = 0
            elif receipt.steady < STEADY and self._place.root is None:
                # To know a share in an outage.
                self._report_at = min(self._report_at, asked_at + STEADY + STEADY // 8)
        if heads:
            self._answer_calls(heads, batch.calls, receipt, asked_at)
            with self._place.lock():
                self._place.ring_dispatchers()

    def _answer_calls(
        self, heads: Sequence[Any], calls: Sequence[Amounts], receipt: Receipt, asked_at: int
    ) -> None:
        """Answer the calls of a batch, and note what those wait for that were not booked.

        In line, the next are sent when the store says. Else they are not before most of the booked
        starts have passed: more calls go with one trip, and others find units.
        """
        now, record = self._clock(), self._place.health.record
        offset, before, booked = now - receipt.now, self.held_up, 0
        last = max((booking.start for booking in receipt.bookings), default=0)
        halfway = receipt.now + (last - receipt.now) // 2
        ask_at = receipt.ask_at if receipt.in_line else max(last - _AHEAD, halfway)
        if self._ask_at:  # else somebody wants to ask again, meanwhile
            self._ask_at = max(now, ask_at + offset)
        held_up = None
        with self._place.lock():
            for waiter, amounts, booking in zip(heads, calls, receipt.bookings, strict=True):
                if booking.start:
                    booked += 1
                    # It is earlier than the last if the store has lost its data.
                    record.book(amounts, max(record.last_start, booking.start))
                    bound_by = booking.bound_by or (before.resource if before else None)
                    start = max(now, booking.start + offset)
                    given = Reservation(amounts, booking.start, start, bound_by)
                    self._place.reserve(waiter, given)
                elif booking.exceeds:
                    self._place.refuse(waiter)
                elif held_up is None and booking.bound_by is not None:
                    soonest = receipt.soonest - receipt.now + asked_at  # or later, by up to a trip
                    until = NEVER if booking.bound_by == SLOT else max(self._ask_at, soonest)
                    held_up = HeldUp(booking.bound_by, until, amounts, soonest)
        self._place.adapt_room(len(heads), booked)
        self._note_held_up(held_up)

    def _note_held_up(self, held_up: HeldUp | None) -> None:
        """Note what the first unbooked call waits for; another tree may take it."""
        before, self.held_up, self._forget_at = self.held_up, held_up, NEVER
        if held_up != before:
            self._place.let_others_take()

    def _await_loops(self, heads: Sequence[Any]) -> int:
        """Ring the loops of ``heads`` that have not run of late; return until when to wait for them.

        Nothing is booked for a loop that is blocked: it would start too late.
        """
        now = self._clock()
        since = self._awaits_since or now
        with self._place.lock():
            dispatchers = {each.dispatcher for each in heads}
            elsewhere = [each for each in dispatchers if each.loop not in {None, self.home.loop}]
            silent = [each for each in elsewhere if each.ran_at < min(since, now - _FRESH)]
            for each in silent:
                each.ring(since)
        self._awaits_since = since if silent else 0
        return since + GRACE + 1 if silent else 0

    def _admit_alone(self, heads: Sequence[Any]) -> int:
        """Admit calls that the policy allows without the store; return when to try again."""
        now: int = self._clock()
        when = now
        with self._place.lock():
            for waiter in heads:
                when = self._place.health.earliest_alone(
                    waiter.amounts, now, held=self._outbox.held
                )
                if when > now:
                    break
                self._place.reserve(waiter, Reservation(waiter.amounts, 0, now))
            self._place.ring_dispatchers()
        if not heads:
            return NEVER
        self._note_held_up(HeldUp("", when, {}) if when > now else None)
        return when

    async def _sleep(self, until: int) -> None:
        """Sleep until the bell rings or ``until`` has come."""
        seconds = None if until >= NEVER else max(NAP, (until - self._clock()) * 1e-9)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._bell.wait()
        self._bell.clear()

    async def _leave(self) -> None:
        """Leave the limiter at the store."""
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            await ledger.aclose(self._outbox.take())
