"""Where a loop's next calls wait until the store has booked them and they may start."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.core.errors import AsyncBucketError, CostExceedsLimit, StoreError
from asyncbucket.core.gates import Gates
from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import NEVER
from asyncbucket.core.parts import redate
from asyncbucket.core.queue import Passage, Waiter
from asyncbucket.core.wording import counted
from asyncbucket.stores.desk import Desk
from asyncbucket.stores.entry import Entry
from asyncbucket.stores.late import LateReturns
from asyncbucket.stores.lifeline import is_cancelling
from asyncbucket.stores.returns import Leftover
from asyncbucket.stores.starts import Reservation
from asyncbucket.stores.store import Batch, Correction, Store

if TYPE_CHECKING:
    from asyncbucket.stores.shared import Shared

#: The bounds of the counter's size.
_MIN_ROOM: Final = 8
_MAX_ROOM: Final = 512
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
        self._room = _MIN_ROOM
        self._sent = self._booked = 0
        #: Calls that are booked and wait for their start.
        self._reserved: dict[Waiter, tuple[Reservation, Passage]] = {}
        self._store: Store | None = None
        self._desk: Desk[Waiter] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening = False
        self._closing: asyncio.Task[None] | None = None
        #: Why the store could not be opened, and the number of the last call that had come by then.
        self._failure: tuple[Exception, int] | None = None
        self._late_returns = LateReturns(
            shared.make_store,
            shared.account.name,
            slot_ttl=shared.slot_ttl,
            spawn=self._spawn,
            close=shared.close,
        )

    def room(self) -> bool:
        """See `asyncbucket.core.queue.Outlet`."""
        return len(self._line) < self._room

    def push(self, waiter: Waiter, passage: Passage) -> None:
        """See `asyncbucket.core.queue.Outlet`."""
        self._line[waiter] = passage
        waiter.outlet = self
        if self._desk is not None:
            self._desk.ring()
        elif not self._opening:
            self._opening = True
            self._spawn(self._open())

    def redate(self, now: int) -> None:
        """See `asyncbucket.core.queue.Outlet`."""
        if self.room():
            self._shared.redate_locked(now)

    def redate_locked(self, now: int) -> None:
        """Date to ``now``, in the limits below the root, all calls that wait here."""
        for waiter, passage in self._line.items():
            self._line[waiter] = _redated(waiter, passage, now)
        for waiter, (reservation, passage) in self._reserved.items():
            self._reserved[waiter] = reservation, _redated(waiter, passage, now)

    def leave(self, waiter: Waiter) -> bool:
        """See `asyncbucket.core.queue.Outlet`."""
        if waiter in self._line:
            passage = self._line.pop(waiter)
            if self._desk is not None:  # its place in the store's line is free
                self.call_on_loop(self._desk.ring)
        else:
            reservation, passage = self._reserved.pop(waiter)
            if self._desk is not None:
                self.call_on_loop(self._desk.cancel, waiter, reservation)
        waiter.unbook(passage)
        return True

    def heads(self, most: int) -> Sequence[Waiter]:
        """See `asyncbucket.stores.starts.Line`."""
        self._take_over()
        with self._budget.lock:
            if self._sent:
                all_booked = self._booked == self._sent
                wanted = self._room * 5 // 4 if all_booked else 2 * self._booked
                self._room = min(max(wanted, _MIN_ROOM), _MAX_ROOM)
            most = min(most, self._room)  # there may be more calls than room by now
            waiting = (waiter for waiter in self._line if not waiter.done())
            heads = list(itertools.islice(waiting, most))
            self._sent, self._booked = len(heads), 0
            return heads

    def book(self, waiter: Waiter, reservation: Reservation) -> None:
        """See `asyncbucket.stores.starts.Line`."""
        with self._budget.lock:
            self._booked += 1
            if waiter.done():  # it gave up while the batch was in flight
                self._cancel(waiter, reservation)
                return
            self._reserved[waiter] = reservation, self._line.pop(waiter)
            pacer = waiter.line.pacer
            if waiter.deadline is not None and waiter.deadline < reservation.start:
                waiter.set_result(None)
                pacer.leave_locked(waiter)
            pacer.ring_locked()

    def admit(self, waiter: Waiter, reservation: Reservation) -> None:
        """See `asyncbucket.stores.starts.Line`."""
        with self._budget.lock:
            if waiter.done() or waiter not in self._reserved:
                return  # it gave up: its task gives the booking back, or has done so
            now = self._budget.clock()
            _, passage = self._reserved.pop(waiter)
            gates, _, bound_by = _redated(waiter, passage, now)
            # A call may use limited resources that it did not reserve.
            unreserved = dict.fromkeys(self._shared.account.resources(), 0)
            entry = Entry(self, reservation, {**unreserved, **waiter.amounts})
            gates = Gates((*gates.meters, *entry.meters()))
            waiter.line.pacer.admit_locked(
                waiter, Passage(gates, now, reservation.bound_by or bound_by)
            )

    def refuse(self, waiter: Waiter, bound_by: str) -> None:
        """See `asyncbucket.stores.starts.Line`."""
        error: AsyncBucketError = CostExceedsLimit(
            f"cost of {counted(waiter.amounts.get(bound_by, 0), bound_by)} exceeds the limit that "
            f"another process has set and can never pass; raise the limit or split the request"
        )
        with self._budget.lock:
            try:
                self._shared.account.check_locked(dict(waiter.amounts))
            except CostExceedsLimit as own_error:
                error = own_error
        waiter.line.pacer.fail(waiter, error)

    def abandon(self, error: Exception) -> None:
        """See `asyncbucket.stores.starts.Line`: calls that wait here fail, later ones get a new desk."""
        self._fail_calls(_FAILED, error)
        desk, self._desk = self._desk, None
        if desk is not None:
            self._spawn(self._close_desk(desk))

    def _cancel(self, waiter: Waiter, reservation: Reservation) -> None:
        if self._desk is not None:
            self._desk.cancel(waiter, reservation)

    def correct(self, correction: Correction) -> None:
        """Have a booking changed."""
        if not self.call_on_loop((self._desk or self._late_returns).correct, correction):
            self._shared.report_leftover((frozenset(), Batch(corrections=(correction,))))

    def release(self, slot: str) -> None:
        """Give a slot back."""
        if not self.call_on_loop((self._desk or self._late_returns).release, slot):
            self._shared.report_leftover((frozenset(), Batch(released=(slot,))))

    def call_on_loop(self, function: Callable[..., object], *args: object) -> bool:
        """Call the desk on its own loop's thread; return whether that loop is open."""
        if asyncio._get_running_loop() is self.loop:  # noqa: SLF001 - None in a plain thread
            function(*args)
            return True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(function, *args)
            return True
        return False

    def leftovers(self) -> Iterator[Leftover]:
        """Yield what is left here, now that the loop has ended."""
        if self._desk is not None:
            yield self._desk.leftover()
        yield self._late_returns.leftover()

    def take_over(self) -> bool:
        """Report soon to the store what was left behind elsewhere, if it is open here."""
        return self._desk is not None and self.call_on_loop(self._take_over)

    def _take_over(self) -> None:
        self._shared.drop_closed_loops()
        while self._desk is not None:
            try:
                leftover = self._shared.leftovers.popleft()
            except IndexError:  # there is none, or another thread was faster
                return
            self._desk.take_over(leftover)

    def left(self) -> dict[Limit, int]:
        """Return the units left of each limit, as last heard."""
        return {} if self._desk is None else self._desk.left

    def held_up(self) -> tuple[str, int] | None:
        """Return what the first unbooked call waits for, and until when at least."""
        return None if self._desk is None else self._desk.held_up

    def waiting(self) -> int:
        """Return how many calls wait here."""
        return sum(not waiter.done() for waiter in (*self._line, *self._reserved))

    def ring(self) -> bool:
        """Make the desk tell the store the limiter's orders soon, if it is open here."""
        return self._desk is not None and self.call_on_loop(self._desk.ring)

    async def _open(self) -> None:
        """Join the limiter at the store; if that fails, all calls that have come by then fail."""
        shared = self._shared
        account = shared.account
        try:
            if self._closing is not None:
                self._fail_calls(_CLOSED)
                return
            if self._failure is not None and self._fail_earlier_calls(*self._failure):
                return
            store = self._store = self._store or shared.make_store()
            ledger = await store.open(account.name, shared.terms(), slot_ttl=shared.slot_ttl)
        except Exception as error:  # noqa: BLE001 - such as a name that the store refuses
            self._failure = error, self._budget.arrivals
            self._fail_earlier_calls(*self._failure)
            return
        finally:
            self._opening = False
        self._failure = None
        if is_cancelling():  # the loop is ending, and would not cancel a task made now
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
        self._desk.look_after(self._late_returns.hand_over())
        self._take_over()
        self._desk.ring()

    def _fail_earlier_calls(self, failure: Exception, last: int) -> bool:
        """Fail the calls that came before the failure was known; return if no other waits here.

        More of them wait in the pacer's line than fit in here. Each of those would otherwise try
        the store anew, in vain: it may take seconds to notice that it is gone.
        """
        self._fail_calls(str(failure) or repr(failure), failure, last=last)
        return not self._line

    def _fail_calls(self, why: str, cause: Exception | None = None, *, last: int = NEVER) -> None:
        """Fail all calls that wait here, up to number ``last``."""
        for waiter in (*self._reserved, *self._line):
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
            await self._wait_for_tasks()
            self._fail_calls(_CLOSED)
            desk, self._desk = self._desk, None
            if desk is not None:
                await self._close_desk(desk)
            await self._wait_for_tasks()
            await self._late_returns.take_over(self._shared.leftovers)
        finally:  # even if the loop ends meanwhile
            store, self._store, self._closing = self._store, None, None
            if store is not None:
                await self._shared.close(store)

    async def _close_desk(self, desk: Desk[Waiter]) -> None:
        await desk.aclose()
        self._shared.last_left = desk.left
        self._late_returns.expect(desk.slots)

    async def _wait_for_tasks(self) -> None:
        """Wait for requests to the store that are already in progress."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def _redated(waiter: Waiter, passage: Passage, now: int) -> Passage:
    if not passage.gates.windows:  # slots have no dates
        return passage
    redate(passage.gates, waiter.amounts, passage.when, now)
    return passage._replace(when=now)
