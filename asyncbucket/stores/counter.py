"""Where a loop's next calls wait until the store has booked them and they may start."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.errors import AsyncBucketError, CostExceedsLimit, StoreError
from asyncbucket.gates import Gates
from asyncbucket.limiter.parts import redate
from asyncbucket.limits import Limit
from asyncbucket.meters import NEVER
from asyncbucket.queue import Passage, Waiter
from asyncbucket.stores.desk import Desk
from asyncbucket.stores.entry import Entry
from asyncbucket.stores.late import Latecomers
from asyncbucket.stores.lifeline import leaving
from asyncbucket.stores.returns import Left
from asyncbucket.stores.starts import Grant
from asyncbucket.stores.store import Batch, Correction, Store
from asyncbucket.wording import counted

if TYPE_CHECKING:
    from asyncbucket.stores.shared import Shared

#: The bounds of the counter's size.
_LEAST: Final = 8
_MOST: Final = 512
_CLOSED: Final = "the limiter was closed while this call waited: close it when all calls have ended"
_FAILED: Final = (
    "what asks the store for this call has failed, see the log: ask again, and report this error"
)


class Counter:
    """Hold a loop's next calls until the store has booked them and they may start."""

    def __init__(self, shared: "Shared", loop: asyncio.AbstractEventLoop) -> None:
        self._shared = shared
        self._budget = shared.account.budget
        self.loop = loop
        #: Calls that wait to be booked, in order.
        self._line: dict[Waiter, Passage] = {}
        self._room = _LEAST
        self._sent = self._booked = 0
        #: Calls that are booked and wait for their start.
        self._grants: dict[Waiter, tuple[Grant, Passage]] = {}
        self._store: Store | None = None
        self._desk: Desk[Waiter] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening = False
        self._closing: asyncio.Task[None] | None = None
        #: Why the store could not be opened, and the number of the last call that had come by then.
        self._failure: tuple[Exception, int] | None = None
        self._latecomers = Latecomers(
            shared.make,
            shared.account.name,
            slot_ttl=shared.slot_ttl,
            spawn=self._spawn,
            close=shared.close,
        )

    def room(self) -> bool:
        """See `asyncbucket.queue.Outlet`."""
        return len(self._line) < self._room

    def push(self, waiter: Waiter, passage: Passage) -> None:
        """See `asyncbucket.queue.Outlet`."""
        self._line[waiter] = passage
        waiter.outlet = self
        if self._desk is not None:
            self._desk.ring()
        elif not self._opening:
            self._opening = True
            self._spawn(self._open())

    def redate(self, now: int) -> None:
        """See `asyncbucket.queue.Outlet`."""
        if self.room():
            self._shared.put_off_locked(now)

    def put_off_locked(self, now: int) -> None:
        """Date to ``now``, in the limits below the root, all calls that wait here."""
        for waiter, passage in self._line.items():
            self._line[waiter] = _put_off(waiter, passage, now)
        for waiter, (grant, passage) in self._grants.items():
            self._grants[waiter] = grant, _put_off(waiter, passage, now)

    def leave(self, waiter: Waiter) -> bool:
        """See `asyncbucket.queue.Outlet`."""
        if waiter in self._line:
            passage = self._line.pop(waiter)
            if self._desk is not None:  # its place in the store's line is free
                self.on_loop(self._desk.ring)
        else:
            grant, passage = self._grants.pop(waiter)
            if self._desk is not None:
                self.on_loop(self._desk.cancel, waiter, grant)
        waiter.unbook(passage)
        return True

    def heads(self, most: int) -> Sequence[Waiter]:
        """See `asyncbucket.stores.starts.Line`."""
        self._take_over()
        with self._budget.lock:
            if self._sent:
                all_went = self._booked == self._sent
                wanted = self._room * 5 // 4 if all_went else 2 * self._booked
                self._room = min(max(wanted, _LEAST), _MOST)
            most = min(most, self._room)  # there may be more calls than room by now
            living = (waiter for waiter in self._line if not waiter.done())
            heads = list(itertools.islice(living, most))
            self._sent, self._booked = len(heads), 0
            return heads

    def book(self, waiting: Waiter, grant: Grant) -> None:
        """See `asyncbucket.stores.starts.Line`."""
        with self._budget.lock:
            self._booked += 1
            if waiting.done():  # it gave up while the batch was in flight
                self._cancel(waiting, grant)
                return
            self._grants[waiting] = grant, self._line.pop(waiting)
            pacer = waiting.line.pacer
            if waiting.deadline is not None and waiting.deadline < grant.start:
                waiting.set_result(None)
                pacer.leave_locked(waiting)
            pacer.ring_locked()

    def admit(self, waiting: Waiter, grant: Grant) -> None:
        """See `asyncbucket.stores.starts.Line`."""
        with self._budget.lock:
            if waiting.done() or waiting not in self._grants:
                return  # it gave up: its task gives the booking back, or has done so
            now = self._budget.clock()
            _, passage = self._grants.pop(waiting)
            gates, _, bound_by = _put_off(waiting, passage, now)
            # A call may use limited resources that it did not reserve.
            unreserved = dict.fromkeys(self._shared.account.resources(), 0)
            entry = Entry(self, grant, {**unreserved, **waiting.amounts})
            gates = Gates((*gates.meters, *entry.meters()))
            waiting.line.pacer.admit_locked(
                waiting, Passage(gates, now, grant.bound_by or bound_by)
            )

    def refuse(self, waiting: Waiter, bound_by: str) -> None:
        """See `asyncbucket.stores.starts.Line`."""
        error: AsyncBucketError = CostExceedsLimit(
            f"cost of {counted(waiting.amounts.get(bound_by, 0), bound_by)} exceeds the limit that "
            f"another process has set and can never pass; raise the limit or split the request"
        )
        with self._budget.lock:
            try:
                self._shared.account.check_locked(dict(waiting.amounts))
            except CostExceedsLimit as told:
                error = told
        waiting.line.pacer.fail(waiting, error)

    def abandon(self, error: Exception) -> None:
        """See `asyncbucket.stores.starts.Line`: calls that wait here fail, later ones get a new desk."""
        self._turn_away(_FAILED, error)
        desk, self._desk = self._desk, None
        if desk is not None:
            self._spawn(self._part_with(desk))

    def _cancel(self, waiting: Waiter, grant: Grant) -> None:
        if self._desk is not None:
            self._desk.cancel(waiting, grant)

    def correct(self, correction: Correction) -> None:
        """Have a booking changed."""
        if not self.on_loop((self._desk or self._latecomers).correct, correction):
            self._shared.inherit((frozenset(), Batch(corrections=(correction,))))

    def release(self, slot: str) -> None:
        """Give a slot back."""
        if not self.on_loop((self._desk or self._latecomers).release, slot):
            self._shared.inherit((frozenset(), Batch(released=(slot,))))

    def on_loop(self, do: Callable[..., object], *args: object) -> bool:
        """Call the desk on its own loop's thread; return whether that loop is open."""
        if asyncio._get_running_loop() is self.loop:  # noqa: SLF001 - None in a plain thread
            do(*args)
            return True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(do, *args)
            return True
        return False

    def left_behind(self) -> Iterator[Left]:
        """Yield what is left here, now that the loop has ended."""
        if self._desk is not None:
            yield self._desk.left_behind()
        yield self._latecomers.left_behind()

    def take_over(self) -> bool:
        """Report soon to the store what was left behind elsewhere, if it is open here."""
        return self._desk is not None and self.on_loop(self._take_over)

    def _take_over(self) -> None:
        self._shared.bury()
        while self._desk is not None:
            try:
                left = self._shared.estate.popleft()
            except IndexError:  # there is none, or another thread was faster
                return
            self._desk.take_over(left)

    def left(self) -> dict[Limit, int]:
        """Return the units left of each limit, as last heard."""
        return {} if self._desk is None else self._desk.left

    def held_up(self) -> tuple[str, int] | None:
        """Return what the first unbooked call waits for, and until when at least."""
        return None if self._desk is None else self._desk.held_up

    def waiting(self) -> int:
        """Return how many calls wait here."""
        return sum(not waiter.done() for waiter in (*self._line, *self._grants))

    def ring(self) -> bool:
        """Make the desk tell the store the limiter's orders soon, if it is open here."""
        return self._desk is not None and self.on_loop(self._desk.ring)

    async def _open(self) -> None:
        """Join the limiter at the store; if that fails, all calls that have come by then fail."""
        shared = self._shared
        account = shared.account
        try:
            if self._closing is not None:
                self._turn_away(_CLOSED)
                return
            if self._failure is not None and self._is_told_of(*self._failure):
                return
            store = self._store = self._store or shared.make()
            ledger = await store.open(account.name, shared.terms(), slot_ttl=shared.slot_ttl)
        except Exception as error:  # noqa: BLE001 - such as a name that the store refuses
            self._failure = error, self._budget.arrivals
            self._is_told_of(*self._failure)
            return
        finally:
            self._opening = False
        self._failure = None
        if leaving():  # the loop is ending, and would not cancel a task made now
            return
        self._desk = Desk(
            ledger,
            self,
            slot_ttl=shared.slot_ttl,
            on_outage=shared.on_outage,
            clock=self._budget.clock,
            emit=account.emit,
            orders=shared.orders,
        )
        self._desk.look_after(self._latecomers.hand_over())
        self._take_over()
        self._desk.ring()

    def _is_told_of(self, failure: Exception, last: int) -> bool:
        """Fail the calls that came before the failure was known; return if no other waits here.

        More of them wait in the pacer's line than fit in here. Each of those would otherwise try
        the store anew, in vain: it may take seconds to notice that it is gone.
        """
        self._turn_away(str(failure) or repr(failure), failure, last=last)
        return not self._line

    def _turn_away(self, why: str, cause: Exception | None = None, *, last: int = NEVER) -> None:
        """Fail all calls that wait here, up to number ``last``."""
        for waiter in (*self._grants, *self._line):
            if waiter.number <= last:
                error = StoreError(why)
                error.__cause__ = cause
                waiter.line.pacer.fail(waiter, error)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine, name="asyncbucket store")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Give back what was booked and has not started, and close the store.

        Waiting calls fail; later calls open it again. Cancelling this method does not stop it.
        """
        if self._closing is None:
            self._closing = self.loop.create_task(self._close(), name="asyncbucket store")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await self._settle()
            self._turn_away(_CLOSED)
            desk, self._desk = self._desk, None
            if desk is not None:
                await self._part_with(desk)
            await self._settle()
            await self._latecomers.take_over(self._shared.estate)
        finally:  # even if the loop ends meanwhile
            store, self._store, self._closing = self._store, None, None
            if store is not None:
                await self._shared.close(store)

    async def _part_with(self, desk: Desk[Waiter]) -> None:
        await desk.aclose()
        self._shared.last_left = desk.left
        self._latecomers.expect(desk.slots)

    async def _settle(self) -> None:
        """Wait for requests to the store that are already in progress."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def _put_off(waiter: Waiter, passage: Passage, now: int) -> Passage:
    if not passage.gates.windows:  # slots have no dates
        return passage
    redate(passage.gates, waiter.amounts, passage.when, now)
    return passage._replace(when=now)
