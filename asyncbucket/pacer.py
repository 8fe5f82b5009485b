"""When to look again: the only one that waits.

Every call that cannot pass at once stands in its loop's `Queue` and awaits a future of its own.
One task a loop, the pacer, serves that queue: it asks the meters from when on the head may pass,
sleeps on an `asyncio.Condition` until then or until the doorbell rings (something was given back,
limits have changed, the head has gone), admits in one pass everyone who is admissible, and hands
each admission over by resolving a future. It lives only while someone waits. (When the timer falls
due the pass is made right there, without the detour of waking the task; only the bell wakes it.)

Why so? Nobody but the pacer waits on the Condition, so that a notification cannot be lost to a
waiter that is being cancelled (CPython gh-112202), nobody is woken in vain, and nobody barges.
Nothing is booked before it is handed over; what was handed to a waiter cancelled in the same
instant is given back by that waiter, which rings. Sleep-and-recheck, the usual way, wakes all for
one and serves whoever is fastest; a timer for each waiter cannot give back what a refund brings.

The doorbell is rung by synchronous code (`Lease.release`), which cannot await the Condition's
lock. Within a loop's thread there is nothing to lock out: between two awaits the pacer runs alone.
So the Condition sits on a lock that says it is held (`_TheLoop`), and ringing is one notify.

Several loops and threads share one `Budget`: its meters, under a plain lock that is never held
across an await, and one order of arrival. Each loop has its own pacer. The head of a loop lets an
older head of another loop go first, unless that loop is late for its own turn by more than a
grace: a loop that is blocked, or dead, holds up nobody.
"""

import asyncio
import contextlib
import contextvars
import logging
import math
import threading
from collections.abc import Callable
from typing import Final, Literal

from asyncbucket.errors import CostExceedsLimit
from asyncbucket.loops import (
    Background,
    BlockedLoops,
    reset_after_fork,
    thread_switches_only_at_calls,
)
from asyncbucket.meters import NEVER, Amounts, Gates
from asyncbucket.queue import Queue, Waiter

#: Admissions in one pass, before other tasks of the loop get their turn.
_BATCH: Final = 256
#: How late (ns) another loop may be for its turn before a younger call of this one goes first.
_GRACE: Final = 50_000_000
#: The shortest sleep (s): a timer may fire early, and must not spin when it does.
_NAP: Final = 20e-6
#: The longest sleep (s) that every event loop's timers take.
_LONGEST: Final = 86_400.0

#: What `Budget.easy` is while nobody waits.
_EASY: Final[Literal[0, 1]] = 1 if thread_switches_only_at_calls else 0

_log: Final = logging.getLogger("asyncbucket")


class Budget:
    """Share meters among all loops and threads of a process; every method may be called anywhere.

    Methods whose name ends in ``_locked`` are called with ``lock`` held.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        #: Calls that wait, over all loops. Newcomers pass at once only while this is 0.
        self.waiting = 0
        #: 1 while lock-free callers may book (see `TokenBucket.acquire`), else 0.
        self.easy: Literal[0, 1] = 0
        #: Nobody passes before this instant.
        self.paused_until = 0
        #: The slow start after a pause, while it lasts.
        self.ramp: Ramp | None = None
        self.pacers: dict[asyncio.AbstractEventLoop, Pacer] = {}
        #: Counts the forks: what was taken in a parent process is not given back by its child.
        self.epoch = 0
        self.blocked = BlockedLoops()
        self.background = Background()
        self._arrivals = 0
        self._dropped: list[Callable[[], object]] = []
        self.settle_down_locked()
        reset_after_fork(self)

    def take_locked(self, gates: Gates, amounts: Amounts, now: int) -> bool:
        """Book ``amounts`` now if that lets nobody wait longer; return whether it did."""
        if self._dropped:
            self.collect_locked()
        if self.waiting or self.paused_until > now:
            return False
        self.easy = 0
        taken = gates.take(amounts, now)
        self.easy = _EASY
        if taken and self.ramp is not None:
            self.climb_locked()
        return taken

    def pause_locked(self, until: int, now: int, *, gradually: bool) -> None:
        """Let nobody pass before ``until``, and then, if so wished, few at first."""
        if until > self.paused_until:
            self.paused_until = until
            self.ramp = Ramp(until, pause=until - now) if gradually else None
        self.ring_locked()

    def climb_locked(self) -> None:
        """Count an admission of a slow start: the next has its own instant."""
        ramp = self.ramp
        if ramp is not None and not ramp.over:
            self.paused_until = ramp.climb()
        else:
            self.ramp = None

    def look_locked(self, gates: Gates, amounts: Amounts, since: int) -> tuple[int, str | None]:
        """Return from when on the first in line since ``since`` may pass, and what binds."""
        when, bound_by = gates.earliest(amounts, since)
        if self.paused_until > when:
            return self.paused_until, "paused"
        return when, bound_by

    def join_locked(self, gates: Gates, amounts: Amounts, now: int, deadline: int | None) -> Waiter:
        """Stand in line on the running loop; await what is returned, withdraw it on failure."""
        loop = asyncio.get_running_loop()
        pacer = self.pacers.get(loop)
        if pacer is None:
            pacer = self.pacers[loop] = Pacer(self, loop, now)
        waiter = Waiter(loop=loop)
        waiter.gates = gates
        waiter.amounts = amounts
        waiter.number = self._arrivals = self._arrivals + 1
        waiter.arrived = now
        waiter.deadline = deadline
        waiter.bound_by = None
        self.waiting += 1
        self.easy = 0
        pacer.queue.push(waiter)
        if deadline is not None and deadline < pacer.due:
            pacer.ring_locked()
        return waiter

    def withdraw_locked(self, waiter: Waiter) -> bool:
        """Take a cancelled waiter out of the line, or give back what it was handed just then.

        Return whether it gave up by itself, rather than being refused.
        """
        if not waiter.done() or waiter.cancelled():
            if waiter.get_loop().is_closed():
                return True  # whoever rings next finds out, and counts the whole queue out
            waiter.cancel()
            self.waiting -= 1
            if waiter.queue.leave(waiter):
                self.ring_locked()
        elif waiter.exception() is not None:
            return False
        elif waiter.result() != NEVER:
            self.give_back_locked(waiter)
        return True

    def give_back_locked(self, waiter: Waiter) -> None:
        """Undo the booking of a waiter that was handed it and is gone, and ring."""
        self.easy = 0
        waiter.gates.unbook(waiter.amounts, waiter.result())
        self.settle_down_locked()
        self.ring_locked()

    def ring_locked(self) -> None:
        """Make every pacer look again."""
        for pacer in tuple(self.pacers.values()):
            pacer.ring_locked()

    def drop(self, release: Callable[[], object]) -> None:
        """Run ``release`` with the lock held, now or soon: a finalizer may interrupt its holder.

        The collector closes coroutines that wait and leases that nobody holds, whenever it likes.
        """
        self._dropped.append(release)
        if self.lock.acquire(blocking=False):
            try:
                self.collect_locked()
            finally:
                self.lock.release()
        else:  # the holder may have looked already
            for pacer in tuple(self.pacers.values()):
                with contextlib.suppress(RuntimeError):  # its loop is closed
                    pacer.loop.call_soon_threadsafe(pacer.ring)

    def collect_locked(self) -> None:
        """Release what was dropped while the lock was held."""
        while self._dropped:
            self._dropped.pop()()

    def settle_down_locked(self) -> None:
        """Let newcomers pass at once again if nobody waits."""
        self.easy = 0 if self.waiting else _EASY

    def after_fork(self) -> None:
        """Begin anew in a child process: none of the parent's tasks, locks and slots live here."""
        self.lock = threading.Lock()
        self.pacers.clear()
        self._dropped.clear()
        self.blocked = BlockedLoops()
        self.background = Background()
        self.waiting = 0
        self.epoch += 1
        self.settle_down_locked()


class Pacer:
    """Serve one loop's queue: one task, asleep until the head may pass or the bell rings."""

    def __init__(self, budget: Budget, loop: asyncio.AbstractEventLoop, now: int) -> None:
        self._budget = budget
        self.loop = loop
        self._bell = asyncio.Condition(_TheLoop())
        self._timer: asyncio.TimerHandle | None = None
        #: Since when the head of the queue is first in line.
        self._since = 0
        self._bound_by: str | None = None
        #: Another thread has rung, and the loop has not heard it yet.
        self._rung = False
        self.queue = Queue()
        #: When this pacer means to look again; other loops tell by it whether it is late.
        self.due = now
        self._start()

    def ring(self) -> None:
        """Make the pacer look again, from its own loop."""
        self._rung = False
        self._bell.notify()

    def ring_locked(self) -> None:
        """Make the pacer look again, from whichever thread."""
        self.due = min(self.due, self._budget.clock())
        if asyncio._get_running_loop() is self.loop:  # noqa: SLF001 - None in a plain thread
            self._bell.notify()
            return
        if self._rung:  # a loop that is blocked gathers no more than one
            return
        self._rung = True
        try:
            self.loop.call_soon_threadsafe(self.ring)
        except RuntimeError:  # closed with calls still waiting: nobody will ever serve them
            self._budget.waiting -= len(self.queue)
            self.queue = Queue()
            self._retire_locked()

    def regate_locked(self, check: Callable[[Amounts], Gates]) -> None:
        """Send all who wait through other gates; those who can never pass them are told so."""
        for waiter in self.queue:
            try:
                waiter.gates = check(waiter.amounts)
            except CostExceedsLimit as error:
                self.loop.call_soon_threadsafe(self._fail, waiter, error)

    def _fail(self, waiter: Waiter, error: CostExceedsLimit) -> None:
        with self._budget.lock:
            if not waiter.done():
                waiter.set_exception(error)
                self._budget.waiting -= 1
                self.queue.leave(waiter)
                self._budget.ring_locked()

    def _start(self) -> None:
        # Not loop.create_task: an eager factory would run it at once, with the lock held. An
        # empty context, for the pacer serves everyone, not the call that happened to come first.
        self._task = asyncio.Task(
            self._serve(), loop=self.loop, name="asyncbucket pacer", context=contextvars.Context()
        )

    async def _serve(self) -> None:
        try:
            async with self._bell:
                while self._look():
                    await self._bell.wait()
        except GeneratorExit:  # destroyed with its loop: whoever rings next finds out
            raise
        except BaseException:
            self._rest()
            raise
        self._rest()

    def _look(self) -> bool:
        """Admit all who may pass, and set the timer; return whether somebody still waits."""
        due = self._pass()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is None:
            return False
        if due < NEVER:
            nap = (due - self._budget.clock()) * 1e-9
            self._timer = self.loop.call_later(min(max(nap, _NAP), _LONGEST), self._tick)
        return True

    def _tick(self) -> None:
        """Look again, now that it is time, without the detour over the task.

        Waking it would take one more turn of the loop, which costs more than most passes do. Only
        when there is nothing left to do it is woken, and ends.
        """
        self._timer = None
        more = False
        try:
            more = self._look()
        finally:
            if not more:
                self._bell.notify()

    def _pass(self) -> int | None:
        """Admit all who may pass, in order; return when to look again, None if nobody is left."""
        budget, queue = self._budget, self.queue
        with budget.lock:
            budget.collect_locked()
            now = budget.clock()
            admitted, due = 0, NEVER
            # No pause and no other loop: nobody but the meters has a say.
            alone = budget.paused_until <= now and budget.ramp is None and len(budget.pacers) == 1
            while (head := queue.head()) is not None:
                full = admitted == _BATCH
                if full or not alone or not head.gates.take(head.amounts, now):
                    due = self._due_locked(head, now)
                    if head.deadline is not None and now >= head.deadline < due:
                        self._expire_locked(head)
                        continue
                    if full or due > now:
                        break
                    head.gates.book(head.amounts, now)
                if budget.ramp is not None:
                    budget.climb_locked()
                head.bound_by = self._bound_by
                head.set_result(now)
                self._since = now
                admitted += 1
            budget.waiting -= admitted
            queue.passed(admitted)
            if queue.next_deadline() <= now and admitted < _BATCH:
                for waiter in queue.expired(now):
                    self._expire_locked(waiter)
            if admitted and len(budget.pacers) > 1:
                budget.ring_locked()
            self.due = max(now, min(due, queue.next_deadline()))
            return None if head is None else self.due

    def _expire_locked(self, waiter: Waiter) -> None:
        waiter.bound_by = self._bound_by
        waiter.set_result(NEVER)
        self.queue.leave(waiter)
        self._budget.waiting -= 1

    def _due_locked(self, head: Waiter, now: int) -> int:
        """Return from when on ``head`` may pass, other loops considered."""
        budget = self._budget
        since = max(self._since, head.arrived)
        due, bound_by = budget.look_locked(head.gates, head.amounts, since)
        if due > now:
            self._bound_by = bound_by
        slotless = due >= NEVER and bound_by == "concurrency"
        if slotless:
            due = budget.blocked.check(self.loop, now)
            if due <= now:
                amounts = {name: n for name, n in head.amounts.items() if name != "concurrency"}
                due, _ = budget.look_locked(head.gates, amounts, since)
        for other in budget.pacers.values():
            elder = None if other is self else other.queue.head()
            if elder is not None and elder.number < head.number and now < other.due + _GRACE:
                due = max(due, other.due + _GRACE)
        if slotless and due <= now:
            budget.blocked.overridden += 1
            self.loop.call_soon(_warn_of_blocked_loops, budget.blocked.overridden)
        return due

    def _rest(self) -> None:
        """End, unless a stranger cancelled the task while calls wait."""
        with self._budget.lock:
            if self.queue.head() is not None and not self.loop.is_closed():
                self._start()
            else:
                self._retire_locked()

    def _retire_locked(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._budget.pacers.pop(self.loop, None)
        self._budget.settle_down_locked()


class Ramp:
    """Let calls in gradually after a pause: at first one, and twice as many in each step.

    The n-th call of the slow start may pass log2(n) steps after the end of the pause. A step is a
    16th of the pause, at most a quarter of a second; after 256 calls only the limits count.
    """

    __slots__ = ("_calls", "_start", "_step")

    def __init__(self, start: int, *, pause: int) -> None:
        self._start = start
        self._step = min(pause // 16, 250_000_000)
        self._calls = 1

    @property
    def over(self) -> bool:
        """Whether so many have passed that the rest may follow."""
        return self._calls >= 256  # noqa: PLR2004 - eight doublings

    def climb(self) -> int:
        """Count a call that passes, and return from when on the next one may."""
        self._calls += 1
        return self._start + int(self._step * math.log2(self._calls))


class _TheLoop(asyncio.Lock):
    """Be the lock that a loop's thread holds by running: always held, never contended."""

    def locked(self) -> bool:
        return True

    async def acquire(self) -> Literal[True]:
        return True

    def release(self) -> None:
        pass


def _warn_of_blocked_loops(overridden: int) -> None:
    if overridden == 1:
        _log.warning(
            "a call passed without a slot: every slot is held on an event loop that has been "
            "blocked for over 1 s; await on that loop instead of blocking it"
        )


def deadline_of(
    now: int, *, timeout: float | None = None, deadline: float | None = None
) -> int | None:
    """Return the earlier of ``timeout`` seconds from ``now`` and ``deadline``, in nanoseconds.

    Raises:
        ValueError: one of them is NaN or no number, or the timeout is negative.
    """
    ends: list[int] = []
    for name, seconds, start in (("timeout", timeout, now), ("deadline", deadline, 0)):
        if seconds is None:
            continue
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if not number or (isinstance(seconds, float) and math.isnan(seconds)):
            raise ValueError(f"{name} must be a number of seconds, not {seconds!r}")
        if name == "timeout" and seconds < 0:
            raise ValueError(f"timeout must be at least 0 s, not {seconds!r}; None waits for ever")
        if seconds < NEVER * 1e-9:
            ends.append(start + round(seconds * 1_000_000_000))
    return min(ends, default=None)
