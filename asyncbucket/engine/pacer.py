"""When to look again: one lock and one order for a tree of limiters.

All limiters of a tree share one `Pacer`. A *look* is a plain function under its lock: it admits
every call that may go, in order, and finds out when the next may. Nothing else admits a call that
has waited. Each call that waits sits on a `Seat`: its event loop, or its own blocked thread. A seat
looks when its timer is due, and when the doorbell rings: whatever gives something back rings it
(`Pacer.ring`), all rings of one turn of the loop together. See `asyncbucket.engine.seats`.

Why? Nothing is booked before it is handed over, and nobody but the look books for those who wait,
so nobody is woken in vain and nobody barges. A call that is cancelled at the very instant of its
handover gives the booking back, and rings. The usual way, sleep and recheck, wakes all for one and
serves whoever is fastest; a timer for each waiter knows nothing of a refund.

All seats share one queue. A seat lets only its own calls go, so a call that is admitted runs in the
next turn of its loop, and is not booked long before it leaves. If the head sits elsewhere, that
seat is rung. If it does not come within a grace period, it is late: its calls stand aside until it
does, and come back in their places. So a loop that is blocked, or dead, holds up nobody for longer
than that.

The lock is never held across an await, and no code of a user runs under it. Work that must not wait
for it (a lease that is settled, released, or finalized by the garbage collector, which may
interrupt the very thread that holds it) is left to its holder: `Pacer.do`. Every release of the lock
runs what was left.
"""

import asyncio
import collections
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import InvalidStateError
from functools import partial
from typing import Any, Final

from asyncbucket.engine import seats
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.errors import AsyncBucketError, CostExceedsLimit
from asyncbucket.engine.events import Cancelled, Event
from asyncbucket.engine.meters import NEVER, Meters, admit, leeway, take
from asyncbucket.engine.node import Node, shown_name
from asyncbucket.engine.queue import AnyWaiter, Branch, Line, new_line, rouse
from asyncbucket.engine.seats import EMPTY, GRACE, NOWHERE, Place, Seat, Seats, reset_after_fork
from asyncbucket.engine.terms import read_clocks

#: The most admissions in one look, before other tasks of the loop get their turn.
BATCH: Final = 256
#: From so many calls that wait on, one timer serves several that come due in a row.
CROWD: Final = 64
#: A waiter may be cancelled between any two lines: by a signal handler.
_DONE: Final = (asyncio.InvalidStateError, InvalidStateError)

_log: Final = logging.getLogger("asyncbucket")


class Pacer:
    """Share a tree of limiters among all loops and threads; every method may be called anywhere.

    Methods whose names end in ``_locked`` are called with the lock held.
    """

    def __init__(
        self,
        clock: Callable[[], int],
        name: str,
        wall_clock: Callable[[], int] | None = None,
        root_type: type[Node] = Node,
    ) -> None:
        self.clock = clock
        #: What the wall clock shows at an instant of the clock.
        self.wall = read_clocks(clock, wall_clock)
        self.root = root_type(name, pacer=self)
        self.lock = threading.Lock()
        #: Work for whoever releases the lock; and what to tell observers and the log once it is
        #: released, unless by a finalizer.
        self.jobs: collections.deque[Callable[[], object]] = collections.deque()
        self.news: collections.deque[Callable[[], object]] = collections.deque()
        #: How many observers there are; while it is 0, no events are made.
        self.observed = 0
        #: Where all who wait compete: the priorities, above the root's own branches.
        self.top = Branch(self.root, None, 1.0)
        #: How many calls wait.
        self.waiting = 0
        #: What last held up the head.
        self.bound_by: str | None = None
        #: Since when nobody has passed of those who wait; and whether it was said already that slots
        #: do not come back.
        self.since = 0
        self.has_warned = False
        #: Calls that passed without a slot: see `override`.
        self.overridden = 0
        #: What keeps the root's limits, if they are not kept here.
        self.place: Place | None = None
        #: Whether nobody has to be told when a call ends: no limiter finds its number of slots, no
        #: store keeps them, and all open calls were made in this process.
        self.is_plain = True
        self.seats = Seats(self.look)
        #: The members of a pool, if this is its tree: `asyncbucket.members.Members`.
        self.pool: Any = None
        #: The trees that look together, because pools have calls wait at several of them: an
        #: `asyncbucket.members.Group`.
        self.group: Any = None
        reset_after_fork(self)

    # --- the lock ---

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        if self.jobs or self.news:
            self.catch_up()

    def do(self, job: Callable[..., object], *args: object) -> None:
        """Run ``job`` with the lock held: now, or when its holder is done; never wait for it."""
        if self.jobs or not self.lock.acquire(False):  # a keyword would take twice the time
            self.jobs.append(partial(job, *args))
        else:
            try:
                job(*args)
            finally:
                self.lock.release()
        if self.jobs:
            self.catch_up(tell=False)

    def do_and_tell(self, job: Callable[..., object], *args: object) -> None:
        """Do it, and tell the news: not for finalizers, which may run anywhere."""
        self.do(job, *args)
        if self.news:
            self.catch_up()

    def catch_up(self, *, tell: bool = True) -> None:
        """Run what was left to whoever releases the lock, in order, and tell the news."""
        while self.jobs and self.lock.acquire(False):  # a keyword would take twice the time
            try:
                self.run_jobs_locked()
            finally:
                self.lock.release()
        while tell and self.news:
            with contextlib.suppress(IndexError):  # another thread was faster
                self.news.popleft()()

    def run_jobs_locked(self) -> None:
        """Run what was left to the holder of the lock."""
        while self.jobs:
            self.jobs.popleft()()

    # --- events ---

    def count_observers(self, number: int) -> None:
        """Count ``number`` observers more; with the lock held."""
        for pacer in self.trees:
            pacer.observed += number

    @property
    def trees(self) -> "tuple[Pacer, ...]":
        """The trees that look together: this one alone, but for pools and their members."""
        return (self,) if self.group is None else tuple(self.group.pacers)

    def notify_locked(
        self, node: Node, event_type: type[Event], at: int | None = None, **fields: Any
    ) -> None:
        """Tell the observers of ``node`` and of those above when the lock is released."""
        if self.observed:
            when = (self.clock() if at is None else at) * 1e-9
            event = event_type(limiter=shown_name(node.name), at=when, **fields)
            self.news.append(partial(node.emit, event))

    def notify(self, node: Node, event_type: type[Event], **fields: Any) -> None:
        """Tell them now, in this thread; without the lock."""
        self.notify_locked(node, event_type, **fields)
        self.catch_up()

    # --- standing in line ---

    def join_locked(self, waiter: AnyWaiter, node: Node, now: int, priority: int = 0) -> None:
        """Let ``waiter`` stand in line at ``node``; it knows its seat, its amounts and its deadline."""
        seat, deadline = waiter.seat, waiter.deadline
        waiter.asked = now
        waiter.number = self.seats.arrivals = self.seats.arrivals + 1
        self.count_in(node, seat, 1)
        line: Line | None = node.lines.get(priority)
        if line is None:
            line = new_line(node, priority)
        line.join(waiter, now)
        if deadline is not None:
            seat.watch(waiter, deadline)
        end = EMPTY if deadline is None else deadline
        if self.waiting == 1 and self._joins_alone(line, waiter, end, now):
            return
        if line.living == 1 or seat.looks_at >= EMPTY or end < seat.looks_at:
            seat.ring(now)

    def _joins_alone(self, line: Line, waiter: AnyWaiter, end: int, now: int) -> bool:
        """Let a seat sleep whose call waits alone, without a look; return whether that will do."""
        seat, self.since = waiter.seat, now
        if self.place is not None or self.group is not None:
            return False
        due, bound_by = admit(line.node.route, waiter.amounts, now, now, book=False)
        self.bound_by = line.bound_by = bound_by
        if due <= now or (due == NEVER and not seat.leases):  # see `override`
            return False
        seat.sleep(min(seats.wait_for_slots(self, now) if due == NEVER else due, end), now)
        return True

    def gone_locked(self, waiter: AnyWaiter, now: int) -> None:
        """Count out ``waiter``, which is done but did not pass, and ring: another may be next now."""
        line = waiter.line
        place = line.node.pacer.place
        if place is not None and place.leave(waiter):
            for each in line.node.path:
                each.in_flight -= 1
            line.credit_flows(waiter.amounts)
        else:
            line.depart()
        self.count_in(line.waited_at, waiter.seat, -1)
        for account in waiter.lease.accounts if waiter.lease is not None else ():
            account.gave_up(waiter.lease)
        waiter.seat = NOWHERE
        self.ring_locked(line.node, now)

    def count_in(self, node: Node, seat: Seat, calls: int) -> None:
        """Count ``calls`` calls that wait at ``node`` from now on; fewer than none, no longer."""
        pacer = node.pacer
        if pacer.pool is None:
            pacer.waiting += calls
        else:
            pacer.pool.count_in(calls)
        seat.waiting += calls
        for each in node.path:
            each.waiting += calls

    def withdraw_locked(self, waiter: AnyWaiter) -> None:
        """Take a call that gives up out of the line, or give back what it was just handed."""
        seat, node, now = waiter.seat, waiter.line.node, self.clock()
        if seat.look is None and seat is not NOWHERE:  # it waited in the parent process
            return
        for each in node.path:
            each.cancelled += 1
        if self.observed:
            cost, waited = Cost.of(waiter.amounts), (now - waiter.asked) * 1e-9
            self.notify_locked(node, Cancelled, cost=cost, waited=waited)
        if seat is NOWHERE:  # its time was up, it failed, or its loop was closed
            return
        if waiter.done() and not waiter.cancelled():
            if waiter.lease is None:
                node.unbook(node.route.meters, waiter.amounts, waiter.asked)
            else:
                waiter.lease._hand_back_locked()  # noqa: SLF001 - no user is to see it
            waiter.line.credit_flows(waiter.amounts)
            self.ring_locked(node, now)
        else:
            if not waiter.cancelled():
                with contextlib.suppress(RuntimeError):  # on a closed loop, it is marked
                    waiter.cancel()
            self.gone_locked(waiter, now)
            if not seat.waiting:  # its task ends; else it might outlive the limiter
                seat.ring(now)

    def fail_locked(self, waiter: AnyWaiter, error: AsyncBucketError) -> None:
        """Make ``waiter`` fail, because it can never pass; from any thread."""
        loop = waiter.seat.loop
        if loop is None or asyncio._get_running_loop() is loop:  # noqa: SLF001
            self._fail(waiter, error)
        else:
            with contextlib.suppress(RuntimeError):  # closed: nobody waits there any more
                loop.call_soon_threadsafe(self._fail_here, waiter, error)

    def _fail_here(self, waiter: AnyWaiter, error: AsyncBucketError) -> None:
        with self:  # `do` might leave it to another thread, and futures are not for those
            self._fail(waiter, error)

    def _fail(self, waiter: AnyWaiter, error: AsyncBucketError) -> None:
        if not waiter.done() and waiter.seat is not NOWHERE:  # else its loop was closed just now
            waiter.set_exception(error)
            seat, now = waiter.seat, self.clock()
            self.gone_locked(waiter, now)
            seat.ring(now)

    def is_free_locked(self, node: Node, now: int) -> bool:
        """Tell whether a newcomer at ``node`` would overtake nobody that may go now or next."""
        for line in node.lines.values():  # `any` of a generator takes three times as long
            if line.living:
                return False
        for each in node.queue_path:
            if each.waiting:
                return False
        if self.group is not None:
            self.group.rouse(self)
        while True:
            head, _ = self.top.head(now)
            if head is None:
                return True
            if not seats.is_late(self, head.seat, now):
                return False

    def next_look_locked(self, now: int) -> int:
        """Return when the first of those who wait will be looked at: then a place is free."""
        looks = (seat.looks_at for seat in self.seats.values() if seat.waiting)
        return max(now, min(looks, default=now))

    # --- the bell ---

    def ring_locked(self, node: Node, now: int | None = None) -> None:
        """Have all look again, because something has changed at ``node`` or above."""
        if not self.waiting and self.group is None:  # of a pool, others may wait at its members
            return
        rouse(node)
        now = self.clock() if now is None else now
        for seat in self.seats.values():
            if seat.waiting and not seat.ring(now):
                seats.bury(self, seat)

    def limits_changed_locked(self, node: Node) -> None:
        """Send newcomers and those who wait through the meters of ``node`` as they are now."""
        node.forget()
        for pool in self.group.pools if self.group is not None else ():
            pool.root.forget()  # a member of theirs has changed
        if self.waiting:
            aside = (waiter for seat in self.seats.values() for waiter in seat.set_aside)
            for waiter in [*self.top.waiters(), *aside]:
                try:
                    waiter.line.node.check(waiter.amounts)
                except CostExceedsLimit as error:
                    self.fail_locked(waiter, error)
            self.ring_locked(node)

    # --- looking ---

    def look(self, seat: Seat) -> None:
        """Admit the calls of ``seat`` that may go, end those whose time is up, sleep until the next."""
        with self:
            now = self.clock()
            if seat.is_late or seat.set_aside:
                seats.return_set_aside(seat)
            if self.group is not None:
                due = self.group.admit(seat, now)
            else:
                due = self.dispatch(seat, now) if self.waiting else EMPTY
            end, _ = seat.first_deadline()
            if end <= now < due:  # else the head may still pass
                end = self._end_waits(seat, now)
            seat.sleep(max(now, min(due, end)) if seat.waiting else EMPTY, now)

    def _end_waits(self, seat: Seat, now: int) -> int:
        """Resolve the waiters whose deadline has come; return when the next one does."""
        end, waiter = seat.first_deadline()
        while end <= now:
            with contextlib.suppress(*_DONE):
                waiter.set_result(False)
                self.gone_locked(waiter, now)
            end, waiter = seat.first_deadline()
        return end

    def dispatch(self, seat: Seat, now: int) -> int:
        """Let all go that may; return when this seat must look again."""
        passed, place = 0, self.place
        while self.waiting and (place is None or place.room(seat)):
            waiter, due = self.top.head(now)
            if waiter is None:
                return due if due != NEVER else self.override(seat, now)
            line, is_ours = waiter.line, waiter.seat is seat
            if self.group is not None and line.node.path[-1] is not self.root:
                return EMPTY  # a pool's, which chooses among its members
            if is_ours and passed >= BATCH:
                return now
            book = is_ours and place is None
            due, bound_by = admit(line.node.route, waiter.amounts, line.since, now, book=book)
            if due > now:
                self.bound_by = line.bound_by = bound_by
            if not is_ours:
                if seats.is_late(self, waiter.seat, now):
                    continue
                return self.leave_to(waiter.seat, due, now)
            if due > now:
                return self._when_to_look(waiter, due, now)
            passed += self.serve(waiter, line, (line,), now)
        return NEVER if self.waiting else EMPTY

    def _when_to_look(self, waiter: AnyWaiter, due: int, now: int) -> int:
        """Return when to look again for the head, which is due then."""
        if due >= NEVER:
            return self.override(waiter.seat, now)
        if waiter.seat.waiting < CROWD:
            return due
        return due + leeway(waiter.line.node.route, waiter.amounts)

    def leave_to(self, other: Seat, due: int, now: int) -> int:
        """Let another seat admit the head, due at ``due``; return when to see whether it has."""
        if other.looks_at > max(due, now):
            other.ring(now)
        return max(min(due, other.looks_at), now) + GRACE

    def serve(self, waiter: AnyWaiter, here: Line, unpaid: Iterable[Line], now: int) -> int:
        """Let the head of a line go, which is booked; return 1 if it still waited, else 0.

        It has left its line for ``here``, and the lines ``unpaid`` pay for it.
        """
        line, amounts, asked = waiter.line, waiter.amounts, waiter.asked
        bound_by = line.bound_by or line.node.pacer.bound_by
        line.calls.popleft()
        waiter.line = here
        if self.place is not None:
            self._push(waiter, self.place, now)
        elif self.let_go(waiter, now, bound_by):
            if bound_by is not None:
                here.node.count_waits(1, now - asked, bound_by)
            self.count_in(line.node, waiter.seat, -1)
        else:
            here.node.unbook(here.node.route.meters, amounts, now)
            waiter.line = line
            return 0
        for each in unpaid:
            each.node.pacer.top.charge(each, amounts)
        self.since = line.since = now
        line.depart()
        if len(line.node.path) > 2:  # noqa: PLR2004 - a limiter above may sleep because of another call
            rouse(line.node)
        return 1

    def let_go(
        self, waiter: AnyWaiter, now: int, bound_by: str | None, meters: Meters | None = None
    ) -> bool:
        """Resolve ``waiter`` and make its lease hold; return whether it still waited."""
        try:
            waiter.set_result(True)
        except _DONE:  # cancelled since it was looked at, in a signal handler
            return False
        if waiter.lease is not None:
            waiter.lease._hold_locked(now, waiter, bound_by, meters)  # noqa: SLF001 - as above
        else:
            waiter.asked = now  # from now on when it passed
        return True

    def _push(self, waiter: AnyWaiter, place: Place, now: int) -> None:
        """Hand ``waiter`` over to the store, booked below the root."""
        path = waiter.line.node.path
        below = tuple(pair for each in path[:-1] for pair in each.own.meters)
        for meter, resource in below:
            amount = waiter.amounts.get(resource)
            if amount:
                meter.book(amount, now)
        for each in path:
            each.in_flight += 1
        place.push(waiter, below, now)

    def pass_on_locked(
        self, waiter: AnyWaiter, meters: Meters, now: int, bound_by: str | None
    ) -> bool:
        """Let a call go that the store has booked in ``meters``; return whether it still waited."""
        if not self.let_go(waiter, now, bound_by, meters):  # its task gives back what it took
            return False
        node = waiter.line.node
        for each in node.path:
            each.admitted += 1
        if bound_by is not None:
            node.count_waits(1, now - waiter.asked, bound_by)
        self.count_in(waiter.line.waited_at, waiter.seat, -1)
        self.ring_locked(node, now)
        return True

    def override(self, seat: Seat, now: int) -> int:
        """Let one call pass without a slot if all are held where nothing runs; return when to look again."""
        waiter, due = seats.beyond_slots(self, seat, now)
        pool = None if waiter is None else waiter.line.waited_at.pacer.pool
        if pool is not None:
            member = next(each for each in pool.members if each.pacer is self)
            pool.serve(waiter, member, now)
        elif waiter is not None:
            take(waiter.line.node.route, waiter.amounts, now)
            self.serve(waiter, waiter.line, (waiter.line,), now)
        return due

    def after_fork(self) -> None:
        """Start afresh in a child process: the parent's loops, waiters and leases are not here."""
        self.is_plain = False
        self.seats.after_fork()
        self.lock = threading.Lock()
        self.jobs.clear()
        self.news.clear()
        self.waiting = 0
        self.top = Branch(self.root, None, 1.0)
        self.root.after_fork()
        if self.pool is not None:
            self.pool.after_fork()
        if self.group is not None:
            self.group.share(self)
