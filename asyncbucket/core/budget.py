"""What all loops and threads share: the meters, under one lock, and one order of arrival."""

import asyncio
import collections
import contextlib
import threading
from collections.abc import Callable
from typing import Final

from asyncbucket.core.errors import CostExceedsLimit
from asyncbucket.core.gates import Gates
from asyncbucket.core.holders import BlockedLoops
from asyncbucket.core.loops import Background, reset_after_fork, thread_switches_only_at_calls
from asyncbucket.core.meters import Amounts
from asyncbucket.core.node import Node
from asyncbucket.core.pacer import Pacer
from asyncbucket.core.queue import Outlet, Passage, Waiter

#: An amount that no caller can pass.
NONE_AT_ALL: Final[object] = object()
#: What `Budget.lock_free_amount` is while nobody waits.
_LOCK_FREE: Final[object] = 1 if thread_switches_only_at_calls else NONE_AT_ALL


class Budget:
    """Share a tree of meters among all loops and threads; every method may be called anywhere.

    Methods whose names end in ``_locked`` are called with ``lock`` held, which is never held across
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
        #: Held while a limiter is made, so that two threads never make it twice, and while one is
        #: steered, so that no thread puts it to rest meanwhile; taken before `lock`.
        self.lifecycle_lock = threading.RLock()
        #: Calls that wait, on all loops. While it is 0, newcomers pass if the meters allow it.
        self.waiting = 0
        #: The amount that lock-free callers may book (see `TokenBucket.acquire`): 1, or none.
        self.lock_free_amount: object = NONE_AT_ALL
        #: Whether the queues are trees, because children or priorities wait.
        self.fair = False
        #: How many observers there are; while it is 0, no events are made.
        self.observed = 0
        #: Makes each loop's outlet, if the root's limits are kept elsewhere.
        self.outlet_for: Callable[[asyncio.AbstractEventLoop], Outlet] | None = None
        self.pacers: dict[asyncio.AbstractEventLoop, Pacer] = {}
        #: After a fork, a number above all of the parent's arrivals; 0 before. Waiters up to it,
        #: and leases of another epoch, are the parent's.
        self.epoch = 0
        self.blocked = BlockedLoops()
        self.background = Background()
        #: How many calls have ever stood in line; each gets its number.
        self.arrivals = 0
        self._postponed: collections.deque[Callable[[], object]] = collections.deque()
        self.update_lock_free_locked()
        reset_after_fork(self)

    def take_locked(self, node: Node, amounts: Amounts, now: int) -> Gates | None:
        """Book ``amounts`` now if nobody has to wait longer for it; return the gates they passed."""
        if self._postponed:
            self.run_postponed_locked()
        if self.outlet_for is not None or (self.waiting and not self._free_locked(node, now)):
            return None
        gates = node.cached_path_gates or node.path_gates  # the property takes three times as long
        return gates if gates.take(amounts, now) else None

    def _free_locked(self, node: Node, now: int) -> bool:
        """Tell whether a newcomer at ``node`` overtakes nobody, on any loop."""
        pacers = tuple(self.pacers.values())
        return all(pacer.queue.is_free_for(node, now) or pacer.reap_locked() for pacer in pacers)

    def earliest_locked(self, node: Node, amounts: Amounts, now: int) -> tuple[int, str | None]:
        """Return when a newcomer could pass, at the earliest, and what binds; None if others wait."""
        due, bound_by = node.path_gates.earliest(amounts, now)
        if bound_by is None and self.pacers:  # a place is free when the head has gone
            due = max(now, min(pacer.due for pacer in self.pacers.values()))
        return due, bound_by

    def join_locked(
        self, node: Node, amounts: Amounts, now: int, deadline: int | None, priority: int = 0
    ) -> Waiter:
        """Stand in line on the running loop; await the returned waiter, withdraw it on failure."""
        loop = asyncio.get_running_loop()
        pacer = self.pacers.get(loop)
        if pacer is None:
            pacer = self.pacers[loop] = Pacer(self, loop, now)
            # A call admitted before the pacer's first look has been held up, too.
            pacer.bound_by = node.path_gates.earliest(amounts, now)[1]
        if not self.fair and (priority or node is not self.root):
            self.fair = True
            for each in self.pacers.values():
                each.switch_to_tree_locked()
        waiter = Waiter(loop=loop)
        waiter.amounts = amounts
        waiter.deadline = deadline
        waiter.number = self.arrivals = self.arrivals + 1
        self.waiting += 1
        self.lock_free_amount = NONE_AT_ALL
        pacer.waiting += 1
        pacer.queue.join(waiter, now, node, priority)
        if deadline is not None:
            pacer.watch_locked(waiter, deadline)
        return waiter

    def withdraw_locked(self, waiter: Waiter) -> bool:
        """Remove a cancelled waiter from its line, or give back what it was just handed.

        Return whether it was this process's: a child process leaves alone what stood in line in its
        parent, or was handed over there.
        """
        if waiter.number <= self.epoch:
            return False
        cancelled = waiter.cancelled()
        if cancelled or not waiter.done():
            line = waiter.line
            if line.pacer.loop.is_closed():
                if cancelled:  # `reap_locked` counts out all others
                    line.pacer.count_out_locked(waiter)
                return True
            waiter.cancel()
            if line.pacer.leave_locked(waiter):
                self.ring_locked(line.node)
        elif waiter.exception() is None and (passage := waiter.result()) is not None:
            self.give_back_locked(waiter, passage)
        return True

    def give_back_locked(self, waiter: Waiter, passage: Passage) -> None:
        """Undo the booking of a waiter that got it but is gone, and ring."""
        self.lock_free_amount = NONE_AT_ALL
        waiter.unbook(passage)
        self.update_lock_free_locked()
        self.ring_locked(waiter.node)

    def ring_locked(self, node: Node) -> None:
        """Make every pacer look again, because something has changed at ``node`` or above."""
        self.rouse_locked(node)
        for pacer in tuple(self.pacers.values()):
            pacer.ring_locked()

    def rouse_locked(self, node: Node) -> None:
        """Have every pacer ask the flows at ``node`` and above anew when it next looks.

        A limiter may be asleep because of a costly call of a child. If that child is held up by its
        own limits, another call goes next there, perhaps sooner.
        """
        for pacer in self.pacers.values():
            pacer.queue.rouse(node)

    def recheck_waiters_locked(self, check: Callable[[Waiter], object]) -> None:
        """Make all waiters face new limits; ``check`` raises for those that can never pass."""
        for pacer in tuple(self.pacers.values()):
            pacer.ring_locked()  # which notices if its loop is closed
            pacer.queue.rouse_all()
            for waiter in pacer.queue.waiters():
                try:
                    check(waiter)
                except CostExceedsLimit as error:
                    pacer.fail_locked(waiter, error)

    def run_or_postpone(self, job: Callable[[], object]) -> bool:
        """Run ``job`` with the lock held: now if it is free, else when its holder is done.

        It never waits, because the garbage collector may interrupt the very thread that holds the
        lock, to finalize a lease or a waiting coroutine. Return whether the job has been run.
        """
        self._postponed.append(job)
        if self.lock.acquire(False):  # a keyword argument would take twice the time
            try:
                self.run_postponed_locked()
            finally:
                self.lock.release()
            return True
        for pacer in tuple(self.pacers.values()):  # the holder may have run them already
            with contextlib.suppress(RuntimeError):  # its loop is closed
                pacer.loop.call_soon_threadsafe(pacer.ring)
        return False

    def run_postponed_locked(self) -> None:
        """Run postponed jobs in order: of two `settle` of one lease, the later one counts."""
        while self._postponed:
            self._postponed.popleft()()

    def update_lock_free_locked(self) -> None:
        """Let lock-free callers pass again if nobody waits."""
        self.lock_free_amount = NONE_AT_ALL if self.waiting else _LOCK_FREE

    def after_fork(self) -> None:
        """Start afresh in a child process: the parent's tasks, locks and slots do not exist here."""
        self.lock = threading.Lock()
        self.lifecycle_lock = threading.RLock()
        self.pacers.clear()
        self._postponed.clear()
        self.blocked = BlockedLoops()
        self.background = Background()
        self.waiting = 0
        self.fair = False
        self.epoch = self.arrivals = self.arrivals + 1
        self.root.after_fork()
        self.update_lock_free_locked()
