"""A limiter whose limits are in a store: what stands between the core's pacer and the sessions.

The pacer still decides who goes next, including children and priorities, and books the limits below
the root. Then it hands the call over to the session of the loop where it waits, instead of letting
it go. There it waits, first come, first served, until the session has booked it at the store and
its start has come. Calls that wait in plain threads share one session, on a loop in the background.
"""

import asyncio
import collections
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Final

from asyncbucket.core.errors import AsyncBucketError, CostExceedsLimit, StoreError
from asyncbucket.core.events import LimitChanged
from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import NEVER, Meter
from asyncbucket.core.node import Meters, Node
from asyncbucket.core.pacer import Pacer
from asyncbucket.core.process import reset_after_fork
from asyncbucket.core.queue import AnyWaiter
from asyncbucket.core.seats import Seat
from asyncbucket.core.statistics import LimitUse
from asyncbucket.core.terms import OnOutage
from asyncbucket.core.wording import counted
from asyncbucket.stores import open_store
from asyncbucket.stores.pending import Leftover, PendingUpdates, Reservation
from asyncbucket.stores.session import Session
from asyncbucket.stores.store import Correction, LimitConfig, Store, check_membership

#: For how many seconds to gather what comes back after the limiter was closed.
_GATHER: Final = 0.05
_AUTO_REFUSED: Final = (
    "with a store, concurrency must be a number: one process alone cannot find it"
)


def open_place(
    node: Node, store: Any, *, on_outage: OnOutage = "share", slot_ttl: float = 30.0
) -> "StorePlace":
    """Return what keeps the limits of ``node``, a root, in ``store``.

    Args:
        node: whose limits; processes share them by its name.
        store: a URL, or a store made by the caller. That serves one event loop only, and stays open
            when the limiter is closed, because others may use it.
        on_outage: what to do while the store is gone: see `asyncbucket.stores.outage`.
        slot_ttl: seconds without a sign of life after which a process's slots come back.

    Raises:
        ValueError: no store accepts the name, the URL is not a store's, the limiter finds its
            concurrency by itself, or the store cannot count that far.
        TypeError: ``store`` is neither a URL nor a store.
        ImportError: the extra for this store is not installed.
    """
    check_membership(node.name, slot_ttl)
    if node.sizer is not None:
        raise ValueError(_AUTO_REFUSED)
    if isinstance(store, str) and store.lower().startswith("sqlite:"):
        store = open_store(store).url  # which is absolute: changing directories is harmless
    place = StorePlace(node, store, on_outage=on_outage, slot_ttl=slot_ttl)
    # A wrong URL is refused here, not at the first call, and so are limits that are too large.
    place.check((), None)
    return place


class StorePlace:
    """Know the sessions of a limiter, one for each loop; see `asyncbucket.core.place.Place`."""

    def __init__(self, node: Node, store: Any, *, on_outage: OnOutage, slot_ttl: float) -> None:
        self.name = node.name
        self.on_outage: OnOutage = on_outage
        self.slot_ttl = slot_ttl
        self._node = node
        self._pacer: Pacer = node.pacer
        self._given = store
        self.clock = self._pacer.clock
        self.emit = node.emit
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Start afresh in a child process: loops, and what they hold at the store, are the parent's."""
        self._sessions: dict[asyncio.AbstractEventLoop, Session] = {}
        self._background: asyncio.AbstractEventLoop | None = None
        #: Those that are about to leave the store.
        self.ending: set[Session] = set()
        #: What sessions that have ended left behind; the next one takes it over.
        self.leftovers: collections.deque[Leftover] = collections.deque()
        #: Limits and pauses that the store has to hear of.
        self.pending = PendingUpdates()
        #: By its lease's identity, the slot that each call in flight holds.
        self._slots: dict[int, Reservation] = {}
        #: The units that were left of each limit when a session ended.
        self._last_left: dict[Limit, int] = {}
        #: Why the store could not be opened, and the number of the last call that had come by then.
        self.failure: tuple[Exception, int] | None = None
        self._visit: asyncio.TimerHandle | None = None

    # --- what the pacer asks: see `asyncbucket.core.place.Place` ---

    def room(self, seat: Seat) -> bool:
        session = self._session(self._loop_of(seat))
        if not session.has_room():
            return False
        now = self.clock()
        for each in self._sessions.values():
            if not each.loop.is_closed():
                each.redate(now)
        return True

    def push(self, waiter: AnyWaiter, below: Meters, now: int) -> None:
        self._session(self._loop_of(waiter.seat)).push(waiter, (below, now))

    def leave(self, waiter: AnyWaiter) -> bool:
        return any(session.leave(waiter) for session in self._sessions.values())

    def ended(self, lease: Any) -> None:
        reservation = self._slots.pop(id(lease), None)
        if reservation is not None:
            self._report(reservation, None)

    def waiting(self) -> int:
        return sum(session.waiting() for session in self._running_first())

    def held_up(self) -> tuple[str, int] | None:
        return next(filter(None, (each.held_up for each in self._running_first())), None)

    def use(self) -> Iterator[LimitUse]:
        left = self._last_left
        for session in self._sessions.values():
            left = session.left or left
        for limit in self.config().limits:
            available = left.get(limit, limit.amount)
            yield LimitUse(limit, used=limit.amount - available, available=available)

    def options(self) -> dict[str, Any]:
        if not isinstance(self._given, str):
            return {}
        return {"store": self._given, "on_outage": self.on_outage, "slot_ttl": self.slot_ttl}

    def check(self, limits: Iterable[Limit], concurrency: Any) -> None:
        if not isinstance(concurrency, int | None):
            raise ValueError(_AUTO_REFUSED)  # noqa: TRY004 - "auto" is of the right type elsewhere
        self.make_store().check(self.config(limits, concurrency))

    def configure(self) -> None:
        self.pending.config = self.config()
        self._ring()

    def pause(self, span: int, *, gradually: bool) -> None:
        self.pending.pause(self.clock() + span, gradually=gradually)
        self._ring()

    async def aclose(self) -> None:
        """Give back what this process holds, and leave the store.

        It covers the running loop, loops that have ended, and threads without a loop if none waits.
        """
        loop, background = asyncio.get_running_loop(), self._background
        with self._pacer:
            self.drop_ended_sessions()
            session = self._sessions.get(loop)
            if session is None and self.leftovers:
                session = self._session(loop, is_visit=True)
        for each in (session, *self.ending):
            if each is not None and each.loop is loop:
                await each.aclose()
        others = self._sessions.get(background) if background is not None else None
        if background is not None and others is not None and not self._pacer.waiting:
            closing = asyncio.run_coroutine_threadsafe(others.aclose(), background)
            await asyncio.wrap_future(closing)

    # --- what the sessions ask ---

    @property
    def lock(self) -> Pacer:
        """The limiter's lock, a context manager."""
        return self._pacer

    def make_store(self) -> Store:
        """Return the store, not connected yet."""
        given = self._given
        store: Store = given if hasattr(given, "check") else open_store(given)
        return store

    async def close_store(self, store: Store) -> None:
        """Close a store that was made here; one that was given is closed by its maker."""
        if store is not self._given:
            await store.aclose()

    def config(self, changes: Iterable[Limit] = (), concurrency: int | None = None) -> LimitConfig:
        """Return the limits as they are, or as they would be after ``changes``."""
        node = self._node
        limits = {key: window.limit for key, window in node.limits.items()}
        limits |= {limit.key: limit for limit in changes}
        if concurrency is None and node.slots < NEVER:
            concurrency = node.slots
        return LimitConfig(limits=tuple(limits.values()), concurrency=concurrency)

    def adopt(self, config: LimitConfig) -> None:
        """Adopt limits that another process has set; limits that it does not name are removed."""
        node, pacer, before = self._node, self._pacer, self.config()
        named = {limit.key for limit in config.limits}
        with pacer:
            node.limits = {key: each for key, each in node.limits.items() if key in named}
            node.set_limits(config.limits, self.clock())
            node.slots = NEVER if config.concurrency is None else config.concurrency
            pacer.limits_changed_locked(node)
            for limit in config.limits:
                if limit not in before.limits:
                    pacer.notify_locked(node, LimitChanged, limit=str(limit))
            if config.concurrency not in {None, before.concurrency}:
                pacer.notify_locked(node, LimitChanged, limit=f"concurrency {config.concurrency}")

    def arrivals(self) -> int:
        """Return the number of the last call that has come."""
        return self._pacer.arrivals

    def fail(self, waiter: AnyWaiter, cause: Exception, why: str = "") -> None:
        """Make a call fail; with the lock held."""
        error = StoreError(why or str(cause) or repr(cause))
        error.__cause__ = cause
        self._pacer.fail_locked(waiter, error)

    def refuse(self, waiter: AnyWaiter, bound_by: str) -> None:
        """Make a call fail that exceeds a limit and can never pass; with the lock held."""
        error: AsyncBucketError = CostExceedsLimit(
            f"cost of {counted(waiter.amounts.get(bound_by, 0), bound_by)} exceeds the limit that "
            f"another process has set and can never pass; raise the limit or split the request"
        )
        try:
            self._node.check(waiter.amounts)
        except CostExceedsLimit as own_error:
            error = own_error
        self._pacer.fail_locked(waiter, error)

    def admit(self, waiter: AnyWaiter, reservation: Reservation, below: Meters, now: int) -> bool:
        """Let a booked call go, because its start has come; return whether it still waited."""
        # A call may use limited resources that it did not reserve.
        amounts = {**dict.fromkeys(self._node.resources(), 0), **waiter.amounts}
        booked = (
            (BookedMeter(self, reservation, resource, units), resource)
            for resource, units in amounts.items()
            if resource != "concurrency"
        )
        if not self._pacer.pass_on_locked(waiter, (*below, *booked), now, reservation.bound_by):
            return False
        if reservation.slot:
            self._slots[id(waiter.lease)] = reservation
        waiter.seat.ring(now)  # a thread has to look
        return True

    def ring_seats(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have those look whose calls wait at ``loop``: there may be room; with the lock held."""
        now = self.clock()
        for seat in list(self._pacer.seats.values()):
            if seat.waiting and self._loop_of(seat) is loop:
                seat.ring(now)

    def forget(self, session: Session, leftover: Leftover) -> None:
        """Note that a session has ended; with the lock held."""
        self._last_left = session.left or self._last_left
        if not session.loop.is_closed():
            self.ending.add(session)
        if self._sessions.get(session.loop) is session:
            del self._sessions[session.loop]
        if leftover.held or session.loop.is_closed():  # else it tells the store itself
            self.leftovers.append(leftover)

    def drop_ended_sessions(self) -> None:
        """Drop the sessions of loops that have ended, but keep what they left; with the lock held."""
        for loop, session in list(self._sessions.items()):
            if loop.is_closed():
                self.forget(session, session.end())

    # --- what comes back ---

    def correct(self, reservation: Reservation, correction: Correction) -> None:
        """Have a booking changed; with the lock held."""
        self._report(reservation, correction)

    def _report(self, reservation: Reservation, correction: Correction | None) -> None:
        """Report a correction, or a slot that comes back, by whoever keeps it by now."""
        self.drop_ended_sessions()
        holder: Session | Leftover = reservation.session
        while holder.successor is not None:
            holder = holder.successor
        if correction is None:
            holder.release()
        else:
            holder.correct(correction)
        if isinstance(holder, Leftover):
            if holder not in self.leftovers:
                self.leftovers.append(holder)
            self._take_over_soon()

    def _take_over_soon(self) -> None:
        """Have a session take over what is left: one that runs, or one opened for that."""
        if self._ring():
            return
        loop = asyncio._get_running_loop()  # noqa: SLF001 - None in a plain thread
        if loop is not None and (self._visit is None or self._visit.when() < loop.time()):
            # With a timer, which a loop that ends drops; it would warn of a task made at its end.
            self._visit = loop.call_later(_GATHER, self._visit_store, loop)

    def _visit_store(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._pacer:
            self._visit = None
            if self.leftovers:
                self._session(loop, is_visit=True)

    def _ring(self) -> bool:
        """Make one session tell the store, which tells the other processes; return whether there is one."""
        for session in self._running_first():
            session.ring()
            return True
        return False

    def _running_first(self) -> list[Session]:
        """Return the sessions, those of running loops first, newer ones before older ones.

        A loop that is not running hears nothing until it runs again.
        """
        youngest_first = reversed(list(self._sessions.values()))
        return sorted(youngest_first, key=lambda session: not session.loop.is_running())

    def _session(self, loop: asyncio.AbstractEventLoop, *, is_visit: bool = False) -> Session:
        """Return the session of a loop."""
        session = self._sessions.get(loop)
        if session is None:
            self.drop_ended_sessions()
            session = self._sessions[loop] = Session(self, loop, is_visit=is_visit)
        return session

    def _loop_of(self, seat: Seat) -> asyncio.AbstractEventLoop:
        """Return the loop whose session serves a seat: for threads, one in the background."""
        if seat.loop is not None:
            return seat.loop
        if self._background is None:
            loop = self._background = asyncio.new_event_loop()
            thread = threading.Thread(
                target=_run, args=(loop,), name="asyncbucket background", daemon=True
            )
            thread.start()
            weakref.finalize(self, loop.call_soon_threadsafe, loop.stop).atexit = False
        return self._background


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


class BookedMeter(Meter):
    """Stand for what one call has booked of one resource at a store; it reports what changes."""

    __slots__ = ("_parts", "_place", "_reservation", "_resource")

    bound_by: ClassVar[str | None] = None

    def __init__(
        self, place: StorePlace, reservation: Reservation, resource: str, units: int
    ) -> None:
        self._place = place
        self._reservation = reservation
        self._resource = resource
        #: What is booked, and when by the store's clock: first the reservation, then each debt.
        self._parts = [(units, reservation.booked_at)]

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - the store has its own dates
        """See `asyncbucket.core.meters.Meter.unbook`."""
        while amount > 0 and self._parts:
            units, start = self._parts.pop()
            back = min(units, amount)
            amount -= back
            if units > back:
                self._parts.append((units - back, start))
            self._report(start, booked=units, used=units - back)

    def owe(self, amount: int, when: int) -> None:
        """See `asyncbucket.core.meters.Meter.owe`."""
        # The store dates it on arrival, which is no sooner, so a refund errs on the safe side.
        booked_at = self._reservation.booked_at
        start = booked_at and booked_at + when - self._reservation.start
        self._parts.append((amount, start))
        self._report(start, booked=0, used=amount)

    def _report(self, start: int, *, booked: int, used: int) -> None:
        name = self._resource
        correction = Correction(start=start, booked={name: booked}, used={name: used})
        self._place.correct(self._reservation, correction)

    def redate(self, amount: int, when: int, now: int) -> None:
        """See `asyncbucket.core.meters.Meter.redate`: the store's dates stay."""

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:  # noqa: ARG002 - it is booked
        """See `asyncbucket.core.meters.Meter.earliest`."""
        return now

    def take(self, amount: int, now: int) -> bool:  # noqa: ARG002 - it is booked
        """See `asyncbucket.core.meters.Meter.take`."""
        return True

    def book(self, amount: int, when: int) -> None:
        """See `asyncbucket.core.meters.Meter.book`: it is booked."""

    def available(self, now: int) -> int:  # noqa: ARG002 - the store knows
        """See `asyncbucket.core.meters.Meter.available`."""
        return sum(units for units, _ in self._parts)
