"""A limiter whose limits are in a store: what stands between the core's pacer and the session.

The pacer still decides who goes next, including children and priorities, and books the limits below
the root. Then it hands the call over to the session instead of letting it go. There it waits, first
come, first served, until the session has booked it at the store and its start has come. What it has
booked below the root, a child's limits for instance, is dated anew while it waits.

Tenants are many, and seldom used. A tenant with limits has a place of its own, with a session while it has calls; the
store knows it by a hash. A call stands at its tenant's place first, and is handed over to
the root's with what it was given there: so it books nothing at the root while its tenant holds it
up. What it was given is moved while it waits for the root. The pacer stops handing calls over while
as many as fit are on their way to the root; those that their tenants hold up don't count.

A process has one session for each limiter, on one thread for all of them, for the calls of all its loops. So a
loop that is blocked, or ends without closing the limiter, holds up nothing at the store. A store that
was made by the user belongs to the user's loop, and so does its session.
"""

import asyncio
import concurrent.futures
import contextlib
import copy
import os
import re
import secrets
import weakref
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

from asyncbucket.engine.dispatchers import reset_after_fork
from asyncbucket.engine.errors import CostExceedsLimit, StoreError
from asyncbucket.engine.events import Event, LimitChanged, Outcome
from asyncbucket.engine.interfaces import Place
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import NEVER, Amounts, Meters
from asyncbucket.engine.node import Node
from asyncbucket.engine.queue import AnyWaiter, Dispatcher, Line
from asyncbucket.engine.report import too_late_locked
from asyncbucket.engine.statistics import LimitUse
from asyncbucket.engine.terms import OnOutage
from asyncbucket.stores import open_store
from asyncbucket.stores.loop import SessionLoop
from asyncbucket.stores.outage import StoreHealth
from asyncbucket.stores.session import HeldUp, Reservation, Session
from asyncbucket.stores.store import SLOT, Batch, Correction, LimitConfig, Store

# It touches the private parts of leases, and of the places above and below.
# ruff: noqa: SLF001

#: The bounds of the number of calls that wait to be booked.
_MIN_ROOM: Final = 4
_MAX_ROOM: Final = 512
#: A start may be late by this part of the window; if it is later, the booking is moved.
TOLERANCE: Final = 128
#: While a call waits for the root, what its tenant has booked is moved each time this part of the window has passed.
_WAITING: Final = 8
#: A name is part of keys on a server, in braces.
_NAME: Final = re.compile(r"[^{}]{1,200}")
_AUTO_REFUSED: Final = (
    "with a store, concurrency must be a number: one process cannot find it alone"
)
_CLOSED: Final = "the limiter was closed while this call waited: close it when all calls have ended"


class BookedMeter:
    """Stand for what one call has booked of one resource at a store; it reports what changes.

    It is as much of a `asyncbucket.engine.meters.Meter` as a lease needs that holds the call.
    """

    __slots__ = ("_parts", "_place", "_reservation", "_resource")

    #: Replies teach nothing here: see `Meter.learns`.
    learns: ClassVar[bool] = False

    def __init__(
        self, place: "StorePlace", reservation: Reservation, resource: str, units: int
    ) -> None:
        self._place = place
        self._reservation = reservation
        self._resource = resource
        #: What is booked, and when by the store's clock: first the reservation, then each debt.
        self._parts = [(units, reservation.booked_at)]

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - the store has its own dates
        """See `asyncbucket.engine.meters.Meter.unbook`."""
        while amount > 0 and self._parts:
            units, start = self._parts.pop()
            back = min(units, amount)
            amount -= back
            if units > back:
                self._parts.append((units - back, start))
            self._report(start, booked=units, used=units - back)

    def owe(self, amount: int, when: int) -> None:
        """See `asyncbucket.engine.meters.Meter.owe`."""
        # The store dates it on arrival, which is no sooner, so a refund errs on the safe side.
        booked_at = self._reservation.booked_at
        start = booked_at and booked_at + when - self._reservation.start
        self._parts.append((amount, start))
        self._report(start, booked=0, used=amount)

    def _report(self, start: int, *, booked: int, used: int) -> None:
        name = self._resource
        self._place.correct(Correction(start=start, booked={name: booked}, used={name: used}))

    def redate(self, amount: int, when: int, now: int) -> None:
        """See `asyncbucket.engine.meters.Meter.redate`: the store's dates stay."""


@dataclass(slots=True)
class Outbox:
    """Keep what goes with the next batch; the session has it, too, if nobody has the limiter any more."""

    #: What came back, the latest limits, and the longest pause.
    batch: Batch = field(default_factory=Batch)
    #: Slots of calls in flight, and of booked calls.
    held: int = 0

    def add(self, **fields: Any) -> None:
        """Add ``fields`` of a batch."""
        self.batch = self.batch.then(Batch(**fields))

    def take(self, calls: Iterable[Amounts] = (), waiting: int = 1) -> Batch:
        """Return the next batch; from now on the ledger keeps what is in it."""
        batch, self.batch = self.batch, Batch()
        return replace(batch, held=self.held, calls=tuple(calls), waiting=max(1, waiting))


@dataclass(slots=True)
class _Standing:
    """Keep where a call came from, what it has booked below the root, when, and what the store gave it."""

    line: Line
    below: Meters
    when: int
    #: What each place has booked.
    given: "dict[StorePlace, Reservation]" = field(default_factory=dict)

    def redate(self, waiter: Any, now: int) -> None:
        """Date to ``now`` what ``waiter`` has booked below the root."""
        for meter, resource in self.below:
            if amount := waiter.amounts.get(resource):
                meter.redate(amount, self.when, now)
        self.when = now

    def move(self, now: int, part: int) -> int:
        """Move to ``now`` what was booked longer than that part of its window ago; return when to look again."""
        look_at = NEVER
        for place, each in self.given.items():
            span, start = place.span(each), each.start
            if span // part < now - start and not place.is_stale(each, now):
                self.given[place], start = place.move(each, now), now
            look_at = min(look_at, max(start, now) + span // part + 1)
        return look_at

    def cancel(self) -> None:
        """Give back what was booked, whether or not its start has come."""
        for place, each in self.given.items():
            place.cancel(each)
        self.given.clear()


class StorePlace(Place):
    """Keep what a process has to do with the store; see `asyncbucket.engine.interfaces.Place`."""

    def __init__(self, node: Node, store: Any, *, on_outage: OnOutage, slot_ttl: float) -> None:
        """Keep the limits of ``node``, a root, in ``store``; processes share them by its name.

        Args:
            node: whose limits.
            store: a URL, or a store made by the caller. That serves one event loop only, and stays
                open when the limiter is closed, because others may use it.
            on_outage: what to do while the store is gone: see `asyncbucket.stores.outage`.
            slot_ttl: seconds without a sign of life after which a process's slots come back.

        Raises:
            ValueError: no store accepts the name, the URL is not a store's, the limiter finds its
                concurrency by itself, or the store cannot count that far.
            TypeError: ``store`` is neither a URL nor a store.
            ImportError: the extra for this store is not installed.
        """
        if not (_NAME.fullmatch(node.name) and node.name.isprintable()):
            raise ValueError(
                f"a limiter's name in a store has 1 to 200 printable characters and no braces, not "
                f"{node.name[:201]!r}"
            )
        #: Whether the session makes the store, and closes it.
        self.owns_store = isinstance(store, str)
        if self.owns_store and store.lower().startswith("sqlite:"):
            store = open_store(store).url  # which is absolute: changing directories is harmless
        self._given = store
        #: What keeps the root's limits, if these are a tenant's.
        self.root: StorePlace | None = None
        self.name = node.name
        self.on_outage: OnOutage = on_outage
        self.slot_ttl = slot_ttl
        self._node = node
        self._pacer = node.pacer
        self.clock = self._pacer.clock
        self.make_store()  # a wrong URL is refused here, not at the first call
        self.check((), None)
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Start afresh in a child process: what the parent holds at the store is the parent's."""
        #: Its name at the store: sessions follow one another under the same one.
        self.worker = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._session: Session | None = None
        self.outbox = Outbox()
        #: The calls that wait here, those that are booked first.
        self.calls: dict[AnyWaiter, _Standing] = {}
        #: The places of tenants that were used; and those whose calls may soon stand here.
        self._below: weakref.WeakSet[StorePlace] = weakref.WeakSet()
        self._coming: set[StorePlace] = set()
        #: How many of them may wait to be booked.
        self._room = _MIN_ROOM
        #: Why no call waits any more that had come before, and the number of the last one of them.
        self._failure: tuple[Exception, int] = (StoreError(), 0)
        #: By its lease's identity, each call in flight that holds a slot.
        self._slots: set[int] = set()
        self.health = StoreHealth(weakref.proxy(self), LimitConfig())

    # --- what the pacer asks: see `asyncbucket.engine.interfaces.Place` ---

    def below(self, node: Node) -> "StorePlace":
        place = copy.copy(self)
        place.root, place.name, place._node = self, node.name, node
        place.after_fork()
        reset_after_fork(place)
        return place

    def is_idle(self) -> bool:
        return self._session is None and self.outbox.batch == Batch()

    def room(self, dispatcher: Dispatcher) -> bool:
        if self.root is None:
            self._open_session(dispatcher.loop)
        return self.has_room(self.clock())

    def let_go(self, dispatcher: Dispatcher, now: int) -> int:
        self._discard()
        if self._session is not None:
            self._session.note_running(dispatcher)
        next_start = NEVER
        for waiter, standing in list(self.calls.items()):
            given = standing.given
            if waiter.dispatcher is not dispatcher or waiter.done():  # it gave up, and will leave
                continue
            if self not in given:
                next_start = min(next_start, standing.move(now, _WAITING))
            elif (start := max(each.start for each in given.values())) > now:
                next_start = min(next_start, start)
            else:
                standing.redate(waiter, now)
                self._admit(waiter, standing, now)
        return next_start

    def push(self, waiter: AnyWaiter, below: Meters, now: int) -> None:
        self._stand(waiter, _Standing(waiter.line, below, now))

    def _stand(self, waiter: AnyWaiter, standing: _Standing) -> None:
        if self.root is not None:
            self.root._below.add(self)
            self.root._coming.add(self)
        self.calls[waiter] = standing
        self._open_session(waiter.dispatcher.loop).wake_for(waiter)

    def leave(self, waiter: AnyWaiter) -> Line | None:
        places = (self, *_places_of(waiter.line.node))
        place = next((each for each in places if waiter in each.calls), None)
        if place is None:
            return None
        standing: _Standing = place.calls.pop(waiter)
        for meter, resource in standing.below:
            if amount := waiter.amounts.get(resource):
                meter.unbook(amount, standing.when)
        standing.cancel()
        if place._session is not None:
            place._session.ask_again()
        return standing.line

    def ended(self, lease: Any, outcome: Outcome) -> None:  # noqa: ARG002 - it is free either way
        if id(lease) in self._slots:
            self._slots.remove(id(lease))
            self._release()

    def held_up(self) -> tuple[str, int] | None:
        known = None if self._session is None else self._session.held_up
        return None if known is None else (known.resource, known.until)

    def held_back(self) -> list[AnyWaiter]:
        return self._unbooked() if self.held_up() else []

    def use(self) -> Iterator[LimitUse]:
        left = self.health.left()
        for limit in (window.limit for window in self._node.limits.values()):
            available = left.get(limit, limit.units)
            yield LimitUse(limit, used=limit.units - available, available=available)

    def options(self) -> dict[str, Any]:
        if not self.owns_store:
            return {}
        return {"store": self._given, "on_outage": self.on_outage, "slot_ttl": self.slot_ttl}

    def check(self, limits: Iterable[Limit], concurrency: Any) -> None:
        if self._node.sizer is not None or not isinstance(concurrency, int | None):
            raise ValueError(_AUTO_REFUSED)
        self.config(limits, concurrency)  # which refuses what no store counts

    def configure(self) -> None:
        self.outbox.add(config=self.config())
        self._ring()

    def pause(self, span: int, *, gradually: bool) -> None:  # noqa: ARG002 - the limits hold afterwards
        self.outbox.add(pause=span)
        self._ring()

    async def aclose(self) -> None:
        """Fail the calls that wait, give back what was booked for them, and leave the store.

        Calls in flight keep their slots; the last one to give its slot back disconnects.
        """
        closing: list[concurrent.futures.Future[None]] = []
        with self._pacer.lock:
            for place in (*self._below, self):
                place.fail_all(StoreError(_CLOSED))
                session = place._session
                if session is not None and (self.owns_store or session.home.loop.is_running()):
                    closing.append(concurrent.futures.Future())
                    session.close(closing[-1])
        for each in closing:
            await asyncio.wrap_future(each)

    # --- what the session asks ---

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Hold the limiter's lock; observers are told on a loop of theirs afterwards."""
        pacer = self._pacer
        pacer.lock.acquire()  # `with` would tell them here
        try:
            yield
        finally:
            pacer.lock.release()
        pacer.lock.catch_up(tell=False)
        loops = [each.loop for each in list(pacer.dispatchers.values())] if pacer.lock.news else []
        running = [loop for loop in loops if loop is not None and loop.is_running()]
        here = asyncio._get_running_loop()  # None in a plain thread
        if running and here not in running:
            running[0].call_soon_threadsafe(pacer.lock.catch_up)
        else:
            pacer.lock.catch_up()

    def notify(self, event_type: type[Event], **fields: Any) -> None:
        """Tell observers; without the lock."""
        with self.lock():
            self._pacer.notify_locked(self._node, event_type, **fields)

    def make_store(self) -> Store:
        """Return the store, not connected yet."""
        store: Store = self._given if hasattr(self._given, "peek") else open_store(self._given)
        return store

    def config(self, changes: Iterable[Limit] = (), concurrency: int | None = None) -> LimitConfig:
        """Return the limits as they are, or as they would be after ``changes``."""
        node = self._node
        limits = {key: window.limit for key, window in node.limits.items()}
        limits |= {limit.key: limit for limit in changes}
        if concurrency is None and node.slots.most < NEVER:
            concurrency = node.slots.most
        windows = [node.limits.get(key) for key in limits]
        learned = bool(limits) and all(each and not each.refuses for each in windows)
        return LimitConfig(limits=tuple(limits.values()), concurrency=concurrency, learned=learned)

    # --- with the lock held ---

    def adopt(self, config: LimitConfig) -> None:
        """Adopt the limits at the store, unless others wait to be sent; limits that they do not name are removed.

        If the store has lost limits that were given, it is told of them again.
        """
        node, pacer, before = self._node, self._pacer, self.config()
        if self.outbox.batch.config is not None or config == before:
            return
        if config.after(before) != config:
            self.configure()
            return
        named = {limit.key for limit in config.limits}
        node.limits = {key: each for key, each in node.limits.items() if key in named}
        node.set_limits(config.limits, self.clock(), learned=config.learned)
        node.slots.most = NEVER if config.concurrency is None else config.concurrency
        pacer.limits_changed_locked(node)
        for limit in config.limits:
            if limit not in before.limits:
                pacer.notify_locked(node, LimitChanged, limit=str(limit))
        if config.concurrency not in {None, before.concurrency}:
            pacer.notify_locked(node, LimitChanged, limit=f"concurrency {config.concurrency}")

    def has_room(self, now: int) -> bool:
        """Return whether another call may come; date to now what stands here below the root.

        Otherwise limits there would forget those that wait for long, and let too many leave at once.
        """
        self._coming = {each for each in self._coming if each.calls and not each.held_up()}
        coming = sum(len(each.calls) for each in self._coming)
        if coming + sum(self not in each.given for each in self.calls.values()) >= self._room:
            return False
        for waiter, standing in self.calls.items():
            standing.redate(waiter, now)
        return True

    def adapt_room(self, sent: int, booked: int) -> None:
        """Have as many calls wait here as a batch books."""
        wanted = self._room * 5 // 4 if booked == sent else 2 * booked
        self._room = min(max(wanted, _MIN_ROOM), _MAX_ROOM)

    def heads(self) -> list[AnyWaiter]:
        """Return the calls that go next, in order; they stay here. Those that have failed are told."""
        self._discard()
        self._tell_failed()
        return [each for each in self._unbooked() if not self.has_failed(each)][: self._room]

    def batch(self, heads: Iterable[AnyWaiter]) -> Batch:
        """Return what to send, with what ``heads`` cost; its weight are all calls that wait, booked or not."""
        return self.outbox.take(map(self._to_ask, heads), self._node.standing.waiting)

    def _unbooked(self) -> list[AnyWaiter]:
        return [
            waiter
            for waiter, standing in self.calls.items()
            if self not in standing.given and not waiter.done()
        ]

    def _discard(self) -> None:
        """Count out the calls whose loop was closed."""
        for waiter in list(self.calls):
            if waiter.dispatcher.is_closed():
                self._pacer.gone_locked(waiter, self.clock())

    def fail_all(self, cause: Exception) -> None:
        """Make all calls fail that have come by now.

        More of them wait in the pacer's line than fit in here. Each of those would otherwise try the
        store anew, in vain: it may take seconds to notice that it is gone.
        """
        self._failure = cause, self._pacer.dispatchers.arrivals
        self._tell_failed()
        self._ring()

    def has_failed(self, waiter: AnyWaiter) -> bool:
        """Tell whether a call came too early: see `fail_all`."""
        return waiter.number <= self._failure[1]

    def _tell_failed(self) -> None:
        cause = self._failure[0]
        for waiter in list(self.calls):
            if self.has_failed(waiter):
                error = StoreError(str(cause) or repr(cause))
                error.__cause__ = None if isinstance(cause, StoreError) else cause
                self._pacer.fail_locked(waiter, error)

    def fail_late(self, heads: Iterable[AnyWaiter], held_up: HeldUp) -> None:
        """Make those calls fail whose deadline comes before the first one that is held up can start.

        None that cost less, nor any that may wait in other trees: one of them may take them.
        """
        needs = held_up.amounts.items()
        for waiter in heads if len(self._pacer.trees) == 1 else ():
            is_less = any(waiter.amounts.get(each, 0) < units for each, units in needs)
            if waiter.deadline is not None and waiter.deadline < held_up.soonest and not is_less:
                line, deadline = waiter.line, waiter.deadline
                error = too_late_locked(
                    line.node, waiter.amounts, line.priority, waiter.asked, deadline
                )
                self._pacer.fail_locked(waiter, error)

    def refuse(self, waiter: AnyWaiter) -> None:
        """Make a call fail that exceeds a limit and can never pass.

        If own limits allow it, the store has not heard of them: the call is asked for again.
        """
        try:
            self._node.check(waiter.amounts)
        except CostExceedsLimit as error:
            self._pacer.fail_locked(waiter, error)

    def _to_ask(self, waiter: AnyWaiter) -> Amounts:
        """Return what a call asks of the store: of a learned limit all at most; the rest is a debt."""
        amounts: Amounts = waiter.amounts
        for window in self._node.limits.values():
            resource, most = window.limit.resource, window.amount
            if not window.refuses and amounts.get(resource, 0) > most:
                amounts = {**amounts, resource: most}
        return amounts

    def reserve(self, waiter: AnyWaiter, reservation: Reservation) -> None:
        """Keep what a call was given until it starts; it may have given up meanwhile.

        A tenant's goes on to the place above.
        """
        self.outbox.held += 1
        if waiter not in self.calls:
            self.cancel(reservation)
            return
        self.calls[waiter].given[self] = reservation
        if self.root is None:
            self._pacer.leave_lines(waiter)  # it is bound to this store now
        else:
            above = next(place for place in _places_of(self._node) if place is not self)
            above._stand(waiter, self.calls.pop(waiter))

    def cancel(self, reservation: Reservation) -> None:
        """Give back a booking, unless others may have got it by now."""
        if self.root is None or not self.is_stale(reservation, self.clock()):
            self.correct(Correction.undo(reservation.amounts, reservation.booked_at))
        self._release()

    def _admit(self, waiter: AnyWaiter, standing: _Standing, now: int) -> None:
        """Let a booked call go, because its start has come, unless it gives up in this moment."""
        if any(place.is_stale(each, now) for place, each in standing.given.items()):
            standing.cancel()
            first = next(_places_of(standing.line.node))
            if first is not self:
                del self.calls[waiter]
            first._stand(waiter, standing)
            return
        # One of several starts is always later than it was booked for.
        standing.move(now, TOLERANCE if len(standing.given) == 1 else 4 * TOLERANCE)
        given, bound_by = standing.given.items(), None
        booked: list[tuple[Any, str, int]] = []
        for place, each in given:
            # A call may use limited resources that it did not reserve.
            amounts = {**dict.fromkeys(place._node.resources(), 0), **each.amounts}
            booked += [
                (BookedMeter(place, each, resource, units), resource, units)
                for resource, units in amounts.items()
                if resource != SLOT
            ]
            bound_by = each.bound_by or bound_by
        meters = (*standing.below, *((meter, resource) for meter, resource, _ in booked))
        del self.calls[waiter]
        waiter.line = standing.line
        if not self._pacer.pass_on_locked(waiter, meters, now, bound_by):
            self.calls[waiter] = standing
            return
        for meter, resource, units in booked:
            if debt := waiter.amounts.get(resource, 0) - units:
                meter.owe(debt, now)
        for place in standing.given:
            place._slots.add(id(waiter.lease))

    def is_stale(self, reservation: Reservation, now: int) -> bool:
        """Tell whether the store may have forgotten a booking."""
        return now - reservation.start > self.span(reservation) // 4

    def span(self, reservation: Reservation) -> int:
        """Return the shortest window in which a booking counts."""
        windows = self._node.limits.values() if reservation.booked_at else ()
        return min((window.limit.window for window in windows), default=NEVER)

    def move(self, reservation: Reservation, now: int) -> Reservation:
        """Return the booking of a call that starts later than it was booked for, moved to now."""
        late = now - reservation.start
        moved = replace(reservation, booked_at=reservation.booked_at + late, start=now)
        self.correct(Correction.undo(reservation.amounts, reservation.booked_at))
        again = Correction(start=moved.booked_at, booked={}, used=reservation.amounts, dated=True)
        self.correct(again)
        return moved

    def let_others_take(self) -> None:
        """Have the calls that the store holds up seek another way, if they have any."""
        if len(self._pacer.trees) > 1:
            with self.lock():
                places = [tree.place for tree in self._pacer.trees if tree.place is not None]
                for waiter in [waiter for place in places for waiter in place.held_back()]:
                    waiter.lease._seek_locked(waiter, self.clock())
                self.ring_dispatchers()

    def ring_dispatchers(self) -> None:
        """Have those dispatch whose calls wait: some may be booked, and there may be room; with the lock held."""
        self._pacer.ring_locked(self._node)

    def is_late(self, dispatcher: Dispatcher, now: int) -> bool:
        """Tell whether ``dispatcher`` was rung, and does not come."""
        is_late: bool = self._pacer.is_late(dispatcher, now)
        return is_late

    def forget(self, session: Session) -> None:
        """Note that a session has ended."""
        if self._session is session:
            self._session = None

    # --- what comes back; with the lock held ---

    def correct(self, correction: Correction) -> None:
        """Have a booking changed."""
        self.outbox.add(corrections=(correction,))
        if session := self._rejoin():
            session.report(correction)

    def _release(self) -> None:
        """Give a slot back."""
        self.outbox.held -= 1
        if self._session is not None:
            self._session.report(None)

    def _ring(self) -> None:
        if session := self._rejoin():
            session.ring()

    def _rejoin(self) -> Session | None:
        """Return the session, opened again if it is a tenant's, who has something to say after a while."""
        above = None if self.root is None else self.root._session
        return self._session if above is None else self._open_session(above.home.loop)

    def _open_session(self, loop: asyncio.AbstractEventLoop | None) -> Session:
        """Return the session; if there is none, open it, on ``loop`` if the store is the user's."""
        if self._session is not None and self._session.home.loop.is_closed():
            self._session = None
            self._discard()
        if self._session is None:
            home = (
                SessionLoop.join(self._given)
                if loop is None or self.owns_store
                else SessionLoop(loop)
            )
            self._session = Session(self, home)
        return self._session


def _places_of(node: Node) -> Iterator[StorePlace]:
    """Yield what keeps limits and slots in a store at ``node`` and above."""
    return (place for place in node.places if isinstance(place, StorePlace))
