"""When to look again: the only task that waits for limits.

Every call that cannot pass at once stands in its loop's queue (a `Line`, or a `Tree` of lines once
children or priorities wait) and awaits a future of its own. One task per loop, the pacer, serves
that queue. It asks the meters from when on the head may pass, and sleeps on an `asyncio.Condition`
until then or until the doorbell rings (something was given back, limits have changed, the head has
gone). In one pass it admits every call that may go, and hands each admission over by resolving a
future. It lives only while someone waits. (The timer's callback makes the pass itself, without the
detour of waking the task; only the bell wakes the task.)

Why? Only the pacer waits on the Condition. So no notification is lost to a waiter that is being
cancelled (CPython gh-112202), nobody is woken in vain, and nobody barges. Nothing is booked before
it is handed over. A waiter that is cancelled at the instant of its handover gives the booking back,
and rings. The usual way, sleep and recheck, wakes all for one and serves whoever is fastest; a
timer for each waiter knows nothing of a refund.

The doorbell is rung by synchronous code (`Lease.release`), which cannot await the Condition's lock.
Within a loop's thread there is nothing to lock out: between two awaits the pacer runs alone. So the
Condition has a lock that always says it is held (`_AlwaysHeldLock`), and ringing is one notify.

Several loops and threads share one `Budget`: its meters, under a plain lock that is never held
across an await, and one order of arrival. Each loop has its own pacer. The head of a loop lets an
older head of another loop go first, unless that loop is late for its own turn by more than a grace
period. So a loop that is blocked, or dead, holds up nobody beyond the turn of its head.
"""

import asyncio
import contextlib
import contextvars
from typing import TYPE_CHECKING, Final, Literal

from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.queue import EMPTY, Deadlines, Line, Passage, Waiter
from asyncbucket.core.tree import Tree

if TYPE_CHECKING:
    from asyncbucket.core.budget import Budget

#: The most admissions in one pass, before other tasks of the loop get their turn.
_BATCH: Final = 256
#: Calls that become due within this time (ns) go together: waking up takes longer than admitting.
_TIMER_SLACK: Final = 2_000_000
#: How late (ns) another loop may be for its turn before a younger call of this one goes first.
_GRACE: Final = 50_000_000
#: The shortest sleep (s): timers may fire early, which must not make the pacer spin.
NAP: Final = 20e-6
#: The longest sleep (s) that the timers of every event loop accept.
_LONGEST: Final = 86_400.0


class Pacer:
    """Serve one loop's queue: one task, asleep until the head may pass or the bell rings."""

    def __init__(self, budget: "Budget", loop: asyncio.AbstractEventLoop, now: int) -> None:
        self._budget = budget
        self.loop = loop
        self._bell = asyncio.Condition(_AlwaysHeldLock())
        self._timer: asyncio.Handle | None = None
        #: What last held up the head.
        self.bound_by: str | None = None
        #: Whether another thread has rung and the loop has not noticed yet.
        self._rung = False
        self.queue: Line | Tree = Line(budget.root, self)
        if budget.fair:
            self.switch_to_tree_locked()
        self._deadlines = Deadlines()
        self._outlet = None if budget.outlet_for is None else budget.outlet_for(loop)
        #: Calls that wait on this loop.
        self.waiting = 0
        #: When this pacer will look again; by it, other loops tell whether it is late.
        self.due = now
        self._start()

    def switch_to_tree_locked(self) -> None:
        """Make the line part of a tree, because not all waiters are alike any more."""
        assert isinstance(self.queue, Line)
        self.queue = Tree(self._budget.root, self.queue, self._budget.rouse_locked)

    def watch_locked(self, waiter: Waiter, deadline: int) -> None:
        """Resolve ``waiter`` when its deadline comes."""
        self._deadlines.push(waiter, deadline)
        self._deadlines.sweep(self.waiting)
        if deadline < self.due:
            self.ring_locked()

    def leave_locked(self, waiter: Waiter) -> bool:
        """Count ``waiter``, which is done, out of its line; return whether it was the head."""
        self.count_out_locked(waiter)
        self._deadlines.sweep(self.waiting)
        return (waiter.outlet or waiter.line).leave(waiter)

    def admit_locked(self, waiter: Waiter, passage: Passage) -> None:
        """Let ``waiter`` go, which the outlet had taken over; on the loop's own thread."""
        waiter.set_result(passage)
        self.count_out_locked(waiter)
        self.ring_locked()

    def count_out_locked(self, waiter: Waiter) -> None:
        """Count ``waiter``, done, out everywhere; at the root `reap_locked` may have been first."""
        if self.waiting:
            self.waiting -= 1
            self._budget.waiting -= 1
        for node in waiter.line.node.below_root:
            node.waiting_below_root -= 1

    def ring(self) -> None:
        """Make the pacer look again, from its own loop."""
        self._rung = False
        self._bell.notify()

    def ring_locked(self) -> None:
        """Make the pacer look again, from any thread."""
        self.due = min(self.due, self._budget.clock())
        if asyncio._get_running_loop() is self.loop:  # noqa: SLF001 - None in a plain thread
            self._bell.notify()
        elif not (self.reap_locked() or self._rung):  # a blocked loop needs only one
            self._rung = True
            with contextlib.suppress(RuntimeError):  # just closed: the next ring finds out
                self.loop.call_soon_threadsafe(self.ring)

    def reap_locked(self) -> bool:
        """Return whether the loop is closed; if so, count out all who wait on it, for good."""
        if not self.loop.is_closed():
            return False
        nowhere = Line(self._budget.root, self)
        for waiter in self.queue.waiters():
            self.count_out_locked(waiter)
            waiter.line = nowhere  # a later cancel does not count it out again
        self._budget.waiting -= self.waiting  # those that were cancelled, but never ran again
        self.waiting = 0
        self._retire_locked()
        self.queue = nowhere
        return True

    def fail_locked(self, waiter: Waiter, error: AsyncBucketError) -> None:
        """Make ``waiter`` fail, because it can never pass; from any thread."""
        with contextlib.suppress(RuntimeError):  # just closed: nobody waits there any more
            self.loop.call_soon_threadsafe(self.fail, waiter, error)

    def fail(self, waiter: Waiter, error: AsyncBucketError) -> None:
        """Make ``waiter`` fail, unless it is done; on the loop's own thread."""
        budget = self._budget
        with budget.lock:
            if not waiter.done():
                waiter.set_exception(error)
                self.leave_locked(waiter)
                budget.ring_locked(waiter.node)

    def _start(self) -> None:
        # Not loop.create_task: an eager factory would run it at once, with the lock held. The
        # context is empty: the pacer serves everyone, not the call that happened to come first.
        self._task = asyncio.Task(
            self._serve(), loop=self.loop, name="asyncbucket pacer", context=contextvars.Context()
        )

    async def _serve(self) -> None:
        try:
            async with self._bell:
                while self._look():
                    await self._bell.wait()
        except GeneratorExit:  # destroyed with its loop: the next ring finds out
            raise
        except BaseException:
            self._end()
            raise
        self._end()

    def _look(self) -> bool:
        """Admit all calls that may pass, and set the timer; return whether anyone still waits."""
        due = self._pass()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is None:
            return False
        if due < NEVER:
            delay = (due - self._budget.clock()) * 1e-9
            if delay > 0:
                self._timer = self.loop.call_later(min(max(delay, NAP), _LONGEST), self._tick)
            else:  # in the next iteration of the loop
                self._timer = self.loop.call_soon(self._tick)
        return True

    def _tick(self) -> None:
        """Look again when the timer fires, without the detour of waking the task.

        Waking it would take another iteration of the loop, which costs more than most passes. The
        task is woken only when nothing is left to do, and ends.
        """
        self._timer = None
        more = False
        try:
            more = self._look()
        finally:
            if not more:
                self._bell.notify()

    def _pass(self) -> int | None:
        """Admit all that may pass, in order; return when to look again, None if nobody is left."""
        budget, outlet = self._budget, self._outlet
        with budget.lock:
            budget.run_postponed_locked()
            now = budget.clock()
            passed, due = self._admit_locked(now)
            if passed:
                budget.blocked.stall.last_passed = now
                if outlet is None:
                    budget.waiting -= passed
                    self.waiting -= passed
                if len(budget.pacers) > 1:
                    budget.ring_locked(budget.root)
            end = self._deadlines.first()
            if end <= now < due:  # else the head may still pass, in the next pass
                if self._expire_locked(now):
                    due = now  # the next in line may pass at once, here or on another loop
                    budget.ring_locked(budget.root)
                end = self._deadlines.first()
            nobody = due == EMPTY
            wake = self._wake_or_override_locked(now) if nobody else self.queue.wake
            if wake < due or end < due:  # `min` of three would be a call
                due = min(wake, end)
            self.due = max(now, due)
            gone = nobody and wake >= EMPTY and (outlet is None or not self.waiting)
            return None if gone else self.due

    def _admit_locked(self, now: int) -> tuple[int, int]:
        """Admit all that may pass; return how many did, and when the next may, or `EMPTY`."""
        queue, outlet = self.queue, self._outlet
        alone = len(self._budget.pacers) == 1  # then only the meters decide
        if alone and outlet is None and isinstance(queue, Line):
            return self._admit_line_locked(queue, now)
        passed = 0
        if outlet is not None:
            outlet.redate(now)
        queue.begin_pass()
        while (head := queue.head(now)) is not None:
            if outlet is not None and not outlet.room():
                return passed, NEVER
            line = head.line
            gates = line.node.path_gates
            # An outlet decides itself when it has no room.
            stop = (passed == _BATCH and outlet is None) or queue.expects_caller
            if stop or not alone or not gates.take(head.amounts, now):
                due = self._due_locked(head, now)
                if stop or due > now:  # if it is now, the loop's next iteration goes on
                    return passed, due
                gates.book(head.amounts, now)
            passage = Passage(gates, now, line.bound_by or queue.held_by or self.bound_by)
            passed += 1
            if outlet is not None:
                outlet.push(head, passage)
            else:
                head.set_result(passage)
                for below in line.node.below_root:
                    below.waiting_below_root -= 1
            queue.served(head, now)
        return passed, EMPTY

    def _admit_line_locked(self, line: Line, now: int) -> tuple[int, int]:
        """As `_admit_locked`, for one line on the only loop; equal calls are booked together."""
        gates, passed, room = self._budget.root.path_gates, 0, 0
        amounts: Amounts = {}
        while (head := line.head()) is not None:
            if head.amounts is not amounts:
                amounts = head.amounts
                room = gates.room(amounts, now, most=_BATCH - passed)
            if room < 1:
                due = self._due_locked(head, now)
                if due > now or passed == _BATCH:
                    return passed, due
                room = 1  # above a burst, which `Gates.room` does not know of
            alike = line.serve_alike(amounts, room, now)
            gates.book(amounts, now, calls=len(alike))
            passage = Passage(gates, now, self.bound_by)
            for waiter in alike:
                waiter.set_result(passage)
            passed += len(alike)
            room -= len(alike)
        return passed, EMPTY

    def _expire_locked(self, now: int) -> bool:
        """Resolve the waiters whose deadline has come; return whether one was the head of its line."""
        first = False
        for waiter in self._deadlines.expired(now):
            waiter.set_result(None)
            first |= self.leave_locked(waiter)
            self.queue.rouse(waiter.node)
        return first

    def _due_locked(self, head: Waiter, now: int) -> int:
        """Return from when on ``head`` may pass, taking other loops into account."""
        budget, line = self._budget, head.line
        gates, since = line.node.path_gates, line.since
        due, bound_by = gates.earliest(head.amounts, since)
        if due > now:
            self.bound_by = line.bound_by = bound_by
        slotless = due >= NEVER and bound_by == "concurrency"
        if slotless:
            due = budget.blocked.check(self.loop, now)
            if due <= now:
                due, _ = gates.slotless(budget.blocked.leases).earliest(head.amounts, since)
        if len(budget.pacers) > 1:
            due = max(due, self._turn_locked(head, now))
        elif now < due < now + _TIMER_SLACK < self.queue.calm_until and len(self.queue) > 1:
            # Wait for more calls to become due: nothing is lost.
            due = min(now + _TIMER_SLACK, due + (gates.full_at(due) - due) // 8)
        if slotless and due <= now:
            budget.blocked.override(self.loop)
        return due

    def _turn_locked(self, head: Waiter, now: int) -> int:
        """Return from when on ``head`` need not let another loop's head go first."""
        turn, first = (self.queue.turn, head.number), self
        for other in tuple(self._budget.pacers.values()):
            if other is not self and now < other.due + _GRACE and not other.reap_locked():
                elder = other.queue.head(now)
                if elder is not None and (other.queue.turn, elder.number) < turn:
                    turn, first, head = (other.queue.turn, elder.number), other, elder
        if first is self:
            return now
        self.bound_by = self.bound_by or first.bound_by
        due, _ = head.node.path_gates.earliest(head.amounts, head.line.since)
        if first.due > max(now, due):  # that loop sleeps for a head whose turn it is no more
            first.ring_locked()
        return first.due + _GRACE

    def _wake_or_override_locked(self, now: int) -> int:
        """Return when to look again if all who wait are held up by limits below the root.

        If they wait only for slots, and the holders of all slots are blocked, let one pass without.
        """
        budget, queue = self._budget, self.queue
        if queue.wake != NEVER:
            return queue.wake
        due = budget.blocked.check(self.loop, now)
        head = queue.head(now, slotless=budget.blocked.leases) if due <= now else None
        if head is None:
            return due if due > now else queue.wake
        gates = head.node.path_gates
        gates.book(head.amounts, now)
        head.set_result(Passage(gates, now, head.line.bound_by))
        queue.served(head, now)
        self.count_out_locked(head)
        budget.blocked.override(self.loop)
        return now

    def _end(self) -> None:
        """End, unless something else cancelled the task while calls wait."""
        with self._budget.lock:
            if next(self.queue.waiters(), None) is not None and not self.loop.is_closed():
                self._start()
            else:
                self._retire_locked()

    def _retire_locked(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.queue.disband()
        budget = self._budget
        budget.pacers.pop(self.loop, None)
        budget.fair = budget.fair and bool(budget.pacers)
        budget.update_lock_free_locked()


class _AlwaysHeldLock(asyncio.Lock):
    """A lock that is always held, by the loop's thread while it runs, and never contended."""

    def locked(self) -> bool:
        return True

    async def acquire(self) -> Literal[True]:
        return True

    def release(self) -> None:
        pass
