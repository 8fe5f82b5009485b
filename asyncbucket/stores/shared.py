"""A limiter whose limits lie in a store: between the core's pacer and the desk.

The pacer still decides who goes next, children and priorities included, and books what lies below
the root; then it hands the call over to the loop's `Counter` instead of letting it go. There it
stands in a line of its own, first come, first served, until the desk has booked it at the store and
its start has come. That line is kept short, about as long as what one trip books, so that an urgent
call is never behind many that wait for the store.
"""

import asyncio
import functools
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Final

from asyncbucket.errors import AsyncBucketError, CostExceedsLimit, StoreError
from asyncbucket.feedback.adaptive import Concurrency
from asyncbucket.gates import Gates
from asyncbucket.limiter.account import Account
from asyncbucket.limiter.remote import Remote
from asyncbucket.limiter.statistics import LimitUse
from asyncbucket.limits import Limit
from asyncbucket.meters import NEVER, Meter, Slots
from asyncbucket.queue import Line, Waiter
from asyncbucket.stores import open_store
from asyncbucket.stores.desk import Desk, Grant
from asyncbucket.stores.late import Latecomers
from asyncbucket.stores.lifeline import leaving
from asyncbucket.stores.outage import POLICIES, OnOutage
from asyncbucket.stores.store import Correction, Ledger, Store, Terms

#: The bounds of how many stand at the counter.
_LEAST: Final = 8
_MOST: Final = 512
_ALONE: Final = "with a store, concurrency must be a number: nobody can find it alone"
_CLOSED: Final = "the limiter was closed while this call waited: close it when all calls have ended"
_FAILED: Final = (
    "what asks the store for this call has failed, see the log: ask again, and report this error"
)


def share(
    account: Account, store: str | Store, *, on_outage: OnOutage = "share", slot_ttl: float = 30.0
) -> "Shared":
    """Keep the limits of ``account``, a root, in ``store`` from now on.

    Args:
        account: whose limits; its name is what processes share them by.
        store: a URL, or a store made by the caller, which serves one event loop then.
        on_outage: what to do while the store is gone: see `asyncbucket.stores.outage`.
        slot_ttl: seconds without a sign of life after which a process's slots come back.

    Raises:
        ValueError: ``on_outage`` or ``slot_ttl`` is none, the URL is no store's, the limiter finds
            its concurrency by itself, or the store cannot count that far.
        ImportError: the extra that serves such a store is not installed.
    """
    if on_outage not in POLICIES:
        raise ValueError(f"on_outage must be one of {', '.join(POLICIES)}, not {on_outage!r}")
    number = isinstance(slot_ttl, (int, float)) and not isinstance(slot_ttl, bool)
    if not number or not 0.1 <= slot_ttl < math.inf:  # noqa: PLR2004 - a heartbeat must fit in
        raise ValueError(f"slot_ttl must be a number of seconds from 0.1 on, not {slot_ttl!r}")
    if account.adaptive is not None:
        raise ValueError(_ALONE)
    make = functools.partial(_made, store)
    shared = Shared(account, make, on_outage=on_outage, slot_ttl=slot_ttl)
    # A URL that is none is refused here, not at the first call, and so is what cannot be counted.
    shared.check((), None)
    with account.budget.lock:
        account.remote = shared
        account.budget.outlet_for = shared.counter
        account.changed_locked()
    return shared


def _made(store: str | Store) -> Store:
    return open_store(store) if isinstance(store, str) else store


class Shared(Remote):
    """Know the counters of a limiter, one for each loop."""

    def __init__(
        self,
        account: Account,
        make: functools.partial[Store],
        *,
        on_outage: OnOutage,
        slot_ttl: float,
    ) -> None:
        self.account = account
        self.make = make
        self.on_outage: OnOutage = on_outage
        self.slot_ttl = slot_ttl
        self._counters: dict[asyncio.AbstractEventLoop, Counter] = {}

    def counter(self, loop: asyncio.AbstractEventLoop) -> "Counter":
        """Return the counter of a loop."""
        counter = self._counters.get(loop)
        if counter is None:
            for other in [each for each in self._counters if each.is_closed()]:
                del self._counters[other]
            counter = self._counters[loop] = Counter(self, loop)
        return counter

    def terms(self, changes: Iterable[Limit] = (), concurrency: int | None = None) -> Terms:
        """Return the limits as they are now, or as they would be after ``changes``."""
        slots = self.account.slots
        limits = {key: limit for key, (limit, _, _) in self.account.limits.items()}
        limits |= {(limit.resource, limit.per): limit for limit in changes}
        if concurrency is None and slots is not None:
            concurrency = slots.size
        return Terms(limits=tuple(limits.values()), concurrency=concurrency)

    def use(self) -> Iterator[LimitUse]:
        """See `asyncbucket.limiter.remote.Remote`: as the last reply of the store told."""
        left: tuple[int, ...] = ()
        for counter in self._counters.values():
            left = counter.left() or left
        for index, limit in enumerate(self.terms().limits):
            available = left[index] if index < len(left) else limit.amount
            yield LimitUse(limit, used=limit.amount - available, available=available)

    def held_up(self) -> tuple[str, int] | None:
        """See `asyncbucket.limiter.remote.Remote`."""
        known = (counter.held_up() for counter in self._counters.values())
        return next(filter(None, known), None)

    def pause(self, span: int, *, gradually: bool) -> None:
        """See `asyncbucket.limiter.remote.Remote`."""
        self._ask(lambda ledger: ledger.pause(span, gradually=gradually))

    def options(self) -> dict[str, Any]:
        """See `asyncbucket.limiter.remote.Remote`: by a URL another process comes to the same."""
        (store,) = self.make.args
        if not isinstance(store, str):
            return {}
        return {"store": store, "on_outage": self.on_outage, "slot_ttl": self.slot_ttl}

    def check(self, changes: Iterable[Limit], concurrency: Concurrency | None) -> None:
        """See `asyncbucket.limiter.remote.Remote`."""
        if not isinstance(concurrency, int | None):
            raise ValueError(_ALONE)  # noqa: TRY004 - "auto" is of the right type elsewhere
        self.make().check(self.terms(changes, concurrency))

    def configure(self) -> None:
        """See `asyncbucket.limiter.remote.Remote`."""
        terms = self.terms()
        self._ask(lambda ledger: ledger.configure(terms))

    def _ask(self, what: Callable[[Ledger], Coroutine[Any, Any, None]]) -> None:
        """Have one ledger do something: the store tells the others."""
        any(counter.ask(what) for counter in self._counters.values())

    def hear(self, terms: Terms) -> None:
        """Take over limits that another process has set."""
        self.account.set_limits(list(terms.limits), terms.concurrency)

    async def aclose(self) -> None:
        """See `asyncbucket.limiter.remote.Remote`; of the running loop."""
        counter = self._counters.get(asyncio.get_running_loop())
        if counter is not None:
            await counter.aclose()


class Counter:
    """Hold a loop's calls that go next until the store has booked them and they may start."""

    def __init__(self, shared: Shared, loop: asyncio.AbstractEventLoop) -> None:
        self._shared = shared
        self._budget = shared.account.budget
        self._loop = loop
        self._line = Line()
        self._room = _LEAST
        self._sent = self._booked = 0
        #: Calls that are booked, and wait for their start.
        self._grants: dict[Waiter, Grant] = {}
        self._store: Store | None = None
        self._desk: Desk[Waiter] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening = self._closing = False
        self._latecomers = Latecomers(
            shared.make, shared.account.name, slot_ttl=shared.slot_ttl, spawn=self._spawn
        )

    # -- for the pacer -----------------------------------------------------------------------------

    def room(self) -> bool:
        """See `asyncbucket.queue.Outlet`."""
        return len(self._line) < self._room

    def push(self, waiter: Waiter) -> None:
        """See `asyncbucket.queue.Outlet`."""
        self._line.push(waiter)
        waiter.outlet = self
        if self._desk is not None:
            self._desk.ring()
        elif not self._opening:
            self._opening = True
            self._spawn(self._open())

    def leave(self, waiter: Waiter) -> bool:
        """See `asyncbucket.queue.Outlet`."""
        grant = self._grants.pop(waiter, None)
        if grant is None:
            self._line.leave(waiter)
            if self._desk is not None:  # its place in the store's line is free
                self.on_loop(self._desk.ring)
        elif self._desk is not None:
            self.on_loop(self._desk.cancel, waiter, grant)
        waiter.gates.unbook(waiter.amounts, waiter.taken)
        return True

    # -- for the desk ------------------------------------------------------------------------------

    def heads(self, most: int) -> Sequence[Waiter]:
        """See `asyncbucket.stores.desk.Line`."""
        with self._budget.lock:
            if self._sent:
                all_went = self._booked == self._sent
                wanted = self._room * 5 // 4 if all_went else 2 * self._booked
                self._room = min(max(wanted, _LEAST), _MOST)
            most = min(most, self._room)  # more may stand here than there is room for by now
            heads = [each for each, _ in zip(self._line.waiters(), range(most), strict=False)]
            self._sent, self._booked = len(heads), 0
            return heads

    def book(self, waiting: Waiter, grant: Grant) -> None:
        """See `asyncbucket.stores.desk.Line`."""
        with self._budget.lock:
            self._booked += 1
            if waiting.done():  # it gave up while the batch was under way
                self._cancel(waiting, grant)
                return
            assert self._line.head() is waiting
            self._line.served(waiting, grant.start)
            self._grants[waiting] = grant
            if waiting.deadline is not None and waiting.deadline < grant.start:
                waiting.bound_by = grant.bound_by
                waiting.set_result(NEVER)
                waiting.pacer.leave_locked(waiting)
            waiting.pacer.ring_locked()

    def admit(self, waiting: Waiter, grant: Grant) -> None:
        """See `asyncbucket.stores.desk.Line`."""
        with self._budget.lock:
            if waiting.done() or self._grants.pop(waiting, None) is None:
                return  # it gave up: it was given back, or will be when its task comes to know
            entry = _Entry(self, grant, waiting)
            waiting.gates = Gates((*waiting.gates.meters, *entry.meters()))
            waiting.bound_by = grant.bound_by or waiting.bound_by
            waiting.pacer.admit_locked(waiting, self._budget.clock())

    def refuse(self, waiting: Waiter, bound_by: str) -> None:
        """See `asyncbucket.stores.desk.Line`."""
        error: AsyncBucketError = CostExceedsLimit(
            f"a call exceeds the limit of {bound_by} that another process has set, and can never "
            f"pass; raise the limit or split the request"
        )
        with self._budget.lock:
            try:
                self._shared.account.check_locked(dict(waiting.amounts))
            except CostExceedsLimit as told:
                error = told
        self._fail(waiting, error)

    def abandon(self, error: Exception) -> None:
        """See `asyncbucket.stores.desk.Line`: those who wait here are told, others get a new one."""
        self._turn_away(_FAILED, error)
        desk, self._desk = self._desk, None
        if desk is not None:
            self._spawn(self._part_with(desk))

    def _cancel(self, waiting: Waiter, grant: Grant) -> None:
        if self._desk is not None:
            self._desk.cancel(waiting, grant)

    def _fail(self, waiting: Waiter, error: AsyncBucketError) -> None:
        with self._budget.lock:
            if not waiting.done():
                waiting.set_exception(error)
                waiting.pacer.leave_locked(waiting)
                waiting.pacer.ring_locked()

    # -- for leases --------------------------------------------------------------------------------

    def correct(self, correction: Correction) -> None:
        """Have a booking changed."""
        self.on_loop((self._desk or self._latecomers).correct, correction)

    def release(self, slot: str) -> None:
        """Give a slot back."""
        self.on_loop((self._desk or self._latecomers).release, slot)

    def on_loop(self, do: Callable[..., object], *args: object) -> None:
        """Call the desk in the thread where it lives."""
        if asyncio._get_running_loop() is self._loop:  # noqa: SLF001 - None in a plain thread
            do(*args)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(do, *args)

    # -- the store ---------------------------------------------------------------------------------

    def left(self) -> tuple[int, ...]:
        """Return the units left of each limit, as last heard."""
        return () if self._desk is None else self._desk.left

    def held_up(self) -> tuple[str, int] | None:
        """Return what the first who is not booked waits for, and until when at least."""
        return None if self._desk is None else self._desk.held_up

    def ask(self, what: Callable[[Ledger], Coroutine[Any, Any, None]]) -> bool:
        """Have the ledger do something soon, if it is open; a store that is gone hears it never."""
        desk = self._desk
        if desk is None or self._loop.is_closed():
            return False
        self.on_loop(lambda: self._spawn(_quietly(what(desk.ledger))))
        return True

    async def _open(self) -> None:
        """Join the limiter at the store; if that fails, those who wait are told."""
        shared = self._shared
        account = shared.account
        try:
            if self._closing:
                self._turn_away(_CLOSED)
                return
            store = self._store = self._store or shared.make()
            ledger = await store.open(account.name, shared.terms(), slot_ttl=shared.slot_ttl)
        except Exception as error:  # noqa: BLE001 - such as a name that the store does not take
            self._turn_away(str(error) or repr(error), error)
            return
        finally:
            self._opening = False
        if leaving():  # the loop ends, and cancels no task that is made now
            return
        self._desk = Desk(
            ledger,
            self,
            slot_ttl=shared.slot_ttl,
            on_outage=shared.on_outage,
            clock=self._budget.clock,
            emit=account.emit,
            on_terms=shared.hear,
        )
        self._desk.look_after(self._latecomers.hand_over())
        self._desk.ring()

    def _turn_away(self, why: str, cause: Exception | None = None) -> None:
        """Fail all who wait here."""
        for waiter in (*self._grants, *self._line.waiters()):
            error = StoreError(why)
            error.__cause__ = cause
            self._fail(waiter, error)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine, name="asyncbucket store")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Give back what was booked and has not started, and close the store.

        Those who wait are told; later calls open it again.
        """
        self._closing = True
        await self._settle()
        self._turn_away(_CLOSED)
        desk, self._desk = self._desk, None
        store, self._store = self._store, None
        if desk is not None:
            await self._part_with(desk)
        if store is not None:
            await store.aclose()
        await self._settle()
        self._closing = False

    async def _part_with(self, desk: Desk[Waiter]) -> None:
        await desk.aclose()
        self._latecomers.expect(desk.slots)

    async def _settle(self) -> None:
        """Wait for what is asked of the store already."""
        while self._tasks:
            await asyncio.wait(self._tasks)


class _Entry:
    """Stand for what one call has booked at the store."""

    def __init__(self, counter: Counter, grant: Grant, waiter: Waiter) -> None:
        self.counter = counter
        self.grant = grant
        self._amounts = waiter.amounts

    def meters(self) -> Iterator[tuple[Meter, str]]:
        """Yield a meter for each resource, and one for the slot."""
        for resource, amount in self._amounts.items():
            if resource != "concurrency":
                yield _Booked(self, resource, amount), resource
        if self.grant.slot is not None:
            yield _Slot(self), "concurrency"


class _Booked:
    """Be the meter of what one call has booked of one resource."""

    __slots__ = ("_entry", "_resource", "_units")

    bound_by: ClassVar[str | None] = None
    remote: ClassVar[bool] = True

    def __init__(self, entry: _Entry, resource: str, units: int) -> None:
        self._entry = entry
        self._resource = resource
        self._units = units

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - the store has its own date
        """See `asyncbucket.meters.Meter.unbook`."""
        self._change(self._units - amount)

    def owe(self, amount: int, now: int) -> None:  # noqa: ARG002 - the store has its own date
        """See `asyncbucket.meters.Meter.owe`."""
        self._change(self._units + amount)

    def _change(self, units: int) -> None:
        start, name = self._entry.grant.booked_at, self._resource
        before, self._units = self._units, units
        if before != units:
            self._entry.counter.correct(
                Correction(start=start, booked={name: before}, used={name: units})
            )

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:  # noqa: ARG002 - it is booked
        """See `asyncbucket.meters.Meter.earliest`."""
        return now

    def take(self, amount: int, now: int) -> bool:  # noqa: ARG002 - it is booked
        """See `asyncbucket.meters.Meter.take`."""
        return True

    def book(self, amount: int, when: int) -> None:
        """See `asyncbucket.meters.Meter.book`: it is booked."""

    def available(self, now: int) -> int:  # noqa: ARG002 - the store knows
        """See `asyncbucket.meters.Meter.available`."""
        return self._units


class _Slot(Slots):
    """Be the slot that one call holds."""

    __slots__ = ("_entry",)

    remote: ClassVar[bool] = True

    def __init__(self, entry: _Entry) -> None:
        super().__init__(size=1)
        self._entry = entry

    def give_back(self) -> None:
        slot = self._entry.grant.slot
        assert slot is not None
        self._entry.counter.release(slot)

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None:  # noqa: ARG002 - it is one
        self.give_back()


async def _quietly(asked: Coroutine[Any, Any, None]) -> None:
    try:
        await asked
    except StoreError:
        return  # the desk has said that the store is gone
