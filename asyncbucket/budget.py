"""What the loops and threads of a process share: meters under one lock, and one order of arrival."""

import asyncio
import collections
import contextlib
import threading
from collections.abc import Callable
from typing import Final

from asyncbucket.errors import CostExceedsLimit
from asyncbucket.gates import Gates
from asyncbucket.holders import BlockedLoops
from asyncbucket.loops import Background, reset_after_fork, thread_switches_only_at_calls
from asyncbucket.meters import Amounts
from asyncbucket.node import Node
from asyncbucket.pacer import Pacer
from asyncbucket.queue import Outlet, Passage, Waiter

#: An amount that no caller can name.
NONE_AT_ALL: Final[object] = object()
#: What `Budget.easy` is while nobody waits.
_EASY: Final[object] = 1 if thread_switches_only_at_calls else NONE_AT_ALL


class Budget:
    """Share a tree of meters among all loops and threads; every method may be called anywhere.

    Methods whose name ends in ``_locked`` are called with ``lock`` held, which is never held across
    an await. Each loop has a pacer of its own while somebody waits on it.
    """

    def __init__(self, clock: Callable[[], int], root: Node) -> None:
        if not callable(clock) or not isinstance(clock(), int):
            raise TypeError(
                f"clock must be a callable that returns integer nanoseconds, such as "
                f"time.monotonic_ns, not {clock!r}"
            )
        self.clock = clock
        self.root = root
        self.lock = threading.Lock()
        #: Held while a limiter is made, so that two threads never make it twice, and while one is steered,
        #: so that none puts it to rest meanwhile; the outer of both.
        self.making = threading.RLock()
        #: Calls that wait, over all loops. While this is 0 newcomers pass if the meters allow it.
        self.waiting = 0
        #: The amount that lock-free callers may book (see `TokenBucket.acquire`): 1, or none.
        self.easy: object = NONE_AT_ALL
        #: Whether those who wait do so in a tree: there are children or priorities among them.
        self.fair = False
        #: How many watch what happens; while this is 0 no events are made.
        self.observed = 0
        #: Where the root's limits are kept elsewhere: what each loop hands those over to who go next.
        self.outlet_for: Callable[[asyncio.AbstractEventLoop], Outlet] | None = None
        self.pacers: dict[asyncio.AbstractEventLoop, Pacer] = {}
        #: The number of the last arrival before this process was forked, else 0: waiters up to it, and
        #: leases of another epoch, are the parent's.
        self.epoch = 0
        self.blocked = BlockedLoops()
        self.background = Background()
        #: How many calls have stood in line so far; each has its number.
        self.arrivals = 0
        self._postponed: collections.deque[Callable[[], object]] = collections.deque()
        self.settle_down_locked()
        reset_after_fork(self)

    def take_locked(self, node: Node, amounts: Amounts, now: int) -> Gates | None:
        """Book ``amounts`` now if that lets nobody wait longer; return the gates they passed."""
        if self._postponed:
            self.run_postponed_locked()
        if self.outlet_for is not None or (self.waiting and not self._free_locked(node, now)):
            return None
        gates = node.known_through or node.through  # a property would take thrice the time
        return gates if gates.take(amounts, now) else None

    def _free_locked(self, node: Node, now: int) -> bool:
        """Tell whether a newcomer at ``node`` overtakes nobody, on any loop."""
        pacers = tuple(self.pacers.values())
        return all(each.queue.free_for(node, now) or each.bury_locked() for each in pacers)

    def earliest_locked(self, node: Node, amounts: Amounts, now: int) -> tuple[int, str | None]:
        """Return when a newcomer could pass at the soonest, and what binds; None if others wait."""
        due, bound_by = node.through.earliest(amounts, now)
        if bound_by is None and self.pacers:  # a place in line is free when the head has gone
            due = max(now, min(pacer.due for pacer in self.pacers.values()))
        return due, bound_by

    def join_locked(
        self, node: Node, amounts: Amounts, now: int, deadline: int | None, priority: int = 0
    ) -> Waiter:
        """Stand in line on the running loop; await what is returned, withdraw it on failure."""
        loop = asyncio.get_running_loop()
        pacer = self.pacers.get(loop)
        if pacer is None:
            pacer = self.pacers[loop] = Pacer(self, loop, now)
            # Who is let go before it looks for the first time has been held up, too.
            pacer.bound_by = node.through.earliest(amounts, now)[1]
        if not self.fair and (priority or node is not self.root):
            self.fair = True
            for each in self.pacers.values():
                each.plant_locked()
        waiter = Waiter(loop=loop)
        waiter.amounts = amounts
        waiter.deadline = deadline
        waiter.number = self.arrivals = self.arrivals + 1
        self.waiting += 1
        self.easy = NONE_AT_ALL
        pacer.push_locked(waiter, node, priority, now)
        return waiter

    def withdraw_locked(self, waiter: Waiter) -> bool:
        """Take a cancelled waiter out of the line, or give back what it was handed just then.

        Return whether it stood here: what a parent process let stand in line or handed over is none of a
        child's business.
        """
        if waiter.number <= self.epoch:
            return False
        cancelled = waiter.cancelled()
        if cancelled or not waiter.done():
            line = waiter.line
            if line.pacer.loop.is_closed():
                if cancelled:  # `bury_locked` counts out all others
                    line.pacer.count_out_locked(waiter)
                return True
            waiter.cancel()
            if line.pacer.leave_locked(waiter):
                self.ring_locked(line.node)
        elif waiter.exception() is None and (passage := waiter.result()) is not None:
            self.give_back_locked(waiter, passage)
        return True

    def give_back_locked(self, waiter: Waiter, passage: Passage) -> None:
        """Undo the booking of a waiter that was handed it and is gone, and ring."""
        self.easy = NONE_AT_ALL
        waiter.unbook(passage)
        self.settle_down_locked()
        self.ring_locked(waiter.node)

    def ring_locked(self, node: Node) -> None:
        """Make every pacer look again, for something has changed at ``node`` or above."""
        self.rouse_locked(node)
        for pacer in tuple(self.pacers.values()):
            pacer.ring_locked()

    def rouse_locked(self, node: Node) -> None:
        """Have every pacer ask those at ``node`` and above anew when next it looks.

        A limiter may sleep for the sake of a costly call of a child. When that child is out of its
        own limits, another call goes next there, and maybe sooner.
        """
        for pacer in self.pacers.values():
            pacer.queue.rouse(node)

    def changed_locked(self, check: Callable[[Waiter], object]) -> None:
        """Have all who wait look at new limits; whoever can never pass them is told by ``check``."""
        for pacer in tuple(self.pacers.values()):
            pacer.ring_locked()  # which finds out if its loop is closed
            pacer.queue.rouse_all()
            for waiter in pacer.queue.waiters():
                try:
                    check(waiter)
                except CostExceedsLimit as error:
                    pacer.fail_locked(waiter, error)

    def run_or_postpone(self, job: Callable[[], object]) -> bool:
        """Run ``job`` with the lock held: now if it is free, else as soon as its holder is done.

        It never waits: the collector may interrupt the very thread that holds the lock, to finalize
        a lease or a coroutine that waits. Return whether the job has been run.
        """
        self._postponed.append(job)
        if self.lock.acquire(False):  # by keyword it would take twice the time
            try:
                self.run_postponed_locked()
            finally:
                self.lock.release()
            return True
        for pacer in tuple(self.pacers.values()):  # the holder may have looked already
            with contextlib.suppress(RuntimeError):  # its loop is closed
                pacer.loop.call_soon_threadsafe(pacer.ring)
        return False

    def run_postponed_locked(self) -> None:
        """Run what was postponed, in order: of two `settle` of one lease the later one counts."""
        while self._postponed:
            self._postponed.popleft()()

    def settle_down_locked(self) -> None:
        """Let lock-free callers pass again if nobody waits."""
        self.easy = NONE_AT_ALL if self.waiting else _EASY

    def after_fork(self) -> None:
        """Begin anew in a child process: none of the parent's tasks, locks and slots live here."""
        self.lock = threading.Lock()
        self.making = threading.RLock()
        self.pacers.clear()
        self._postponed.clear()
        self.blocked = BlockedLoops()
        self.background = Background()
        self.waiting = 0
        self.fair = False
        self.epoch = self.arrivals = self.arrivals + 1
        self.root.after_fork()
        self.settle_down_locked()
