"""Where calls wait: on an event loop, or in a blocked thread.

A seat looks at the queue (`asyncbucket.core.pacer.Pacer.look`) when the next call may go, and when
its doorbell rings. The doorbell of a loop is an `asyncio.Condition` on which one task sleeps. It is
rung by synchronous code such as ``lease.release()``, which cannot await the Condition's lock. Within
a loop's thread there is nothing to lock out: between two awaits the task runs alone. So the
Condition has a lock that always says it is held, and ringing is one ``notify``. Only that task waits
on the Condition, so no notification is lost to a waiter that is being cancelled (CPython
gh-112202), and nobody is woken in vain. The task is there while several calls wait. For a lone one,
and when the timer is due, the loop looks itself, without the detour of waking a task: so a slot
that changes hands all the time costs no task.
"""

import asyncio
import contextvars
import heapq
import threading
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

from asyncbucket.core.meters import NEVER

#: "Nobody is left": later even than `NEVER`, which may still end when something is given back.
EMPTY: Final = NEVER << 1
#: Sweeping pays from this many done entries on.
SWEEP: Final = 64
#: The shortest sleep (s), because timers may fire early; the longest that every loop accepts.
NAP: Final = 20e-6
_LONGEST: Final = 86_400.0

#: Looks at the queue for a seat, and lets it sleep until it must look again.
Look: TypeAlias = Callable[["Seat"], None]


class Seat:
    """Where calls wait; by itself, only where leases are held: in plain threads."""

    #: Its event loop, if it is one.
    loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, look: Look | None = None) -> None:
        #: None once its calls count nowhere any more: its process was forked.
        self.look = look
        #: Where the leases of its calls count: those of a waiting thread belong to the loop that it
        #: blocks, or to all threads.
        self.home: Seat = self
        #: Open leases of calls made here, and calls that wait here.
        self.leases = self.waiting = 0
        #: When it will look again.
        self.looks_at = EMPTY
        #: Whether it missed its turn; then its calls stand aside until it looks.
        self.is_late = False
        self.set_aside: list[Any] = []
        self._deadlines: list[tuple[int, Any]] = []

    def ring(self, now: int) -> bool:
        """Make it look soon; from any thread, with the lock held. Return whether it can be rung."""
        raise NotImplementedError

    def sleep(self, until: int, now: int) -> None:
        """Have it look at ``until``, if the bell does not ring before."""

    def is_closed(self) -> bool:
        """Tell whether nothing can run here any more."""
        return False

    def watch(self, waiter: Any, deadline: int) -> None:
        """Note that the time of ``waiter`` is up at ``deadline``."""
        heapq.heappush(self._deadlines, (deadline, waiter))
        if len(self._deadlines) > 2 * self.waiting + SWEEP:
            self._deadlines = [each for each in self._deadlines if not each[1].done()]
            heapq.heapify(self._deadlines)

    def first_deadline(self) -> tuple[int, Any]:
        """Return the first deadline of those that still wait, and who has it."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][1].done():
            heapq.heappop(deadlines)
        return deadlines[0] if deadlines else (EMPTY, None)


class LoopSeat(Seat):
    """An event loop on which calls wait."""

    def __init__(self, look: Look, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(look)
        self.loop: asyncio.AbstractEventLoop = loop  # pyright: ignore[reportIncompatibleVariableOverride]
        self._bell = asyncio.Condition(_AlwaysHeldLock())
        #: The task that sleeps on the bell while several calls wait; and whether it sleeps.
        self._task: asyncio.Task[None] | None = None
        self._is_asleep = False
        self._timer: asyncio.Handle | None = None
        self._rings_at = 0
        #: Whether the bell has rung and the loop has not come to look yet.
        self._rung = False
        #: Looks are made for everyone, not in the context of the call that happened to come first.
        self._context = contextvars.Context()

    def ring(self, now: int) -> bool:
        self.looks_at = min(self.looks_at, now)
        if self._rung:
            return True
        self._rung = True  # first: the other thread may come to look at once
        if self._runs_here():
            self._wake()
        else:
            try:
                self.loop.call_soon_threadsafe(self._wake, context=self._context)
            except RuntimeError:  # it is closed
                self._rung = False
                return False
        return True

    def _runs_here(self) -> bool:
        """Tell whether its loop runs in this thread; asyncio makes a system call for each answer."""
        thread = getattr(self.loop, "_thread_id", None)
        if thread is None:  # not running, or a loop of another kind
            return asyncio._get_running_loop() is self.loop  # noqa: SLF001 - None in a plain thread
        return bool(thread == threading.get_ident())

    def _wake(self) -> None:
        """Have it look in the loop's next iteration."""
        if self._is_asleep:
            self._bell.notify()
        elif self._task is None and self.waiting > 1:
            # Not loop.create_task: an eager factory would run it at once, with the lock held.
            self._task = asyncio.Task(
                self._serve(), loop=self.loop, name="asyncbucket pacer", context=self._context
            )
        else:
            self.loop.call_soon(self._tick, context=self._context)

    async def _serve(self) -> None:
        """Look whenever the bell rings, as long as somebody waits here."""
        try:
            self._look()
            while self.waiting:
                self._is_asleep = True
                await self._bell.wait()
                self._is_asleep = False
                self._look()
        finally:
            self._is_asleep = False
            self._task = None

    def _tick(self) -> None:
        """Look without the detour of waking the task."""
        try:
            self._look()
        finally:
            if self._is_asleep and not self.waiting:  # it has nothing more to do
                self._bell.notify()

    def _time_up(self) -> None:
        self._timer = None
        self._tick()

    def _look(self) -> None:
        self._rung = False
        if self.look is not None:  # pragma: no branch - None in a forked process
            self.look(self)

    def sleep(self, until: int, now: int) -> None:
        self.looks_at = until
        if self._timer is not None:
            if until == self._rings_at:
                return
            self._timer.cancel()
            self._timer = None
        self._rings_at = until
        if until <= now:  # in the loop's next iteration
            self._timer = self.loop.call_soon(self._time_up, context=self._context)
        elif until < NEVER:
            delay = min(max((until - now) * 1e-9, NAP), _LONGEST)
            self._timer = self.loop.call_later(delay, self._time_up, context=self._context)

    def is_closed(self) -> bool:
        return self.loop.is_closed()


class _AlwaysHeldLock(asyncio.Lock):
    """The lock of the bell: see above. It costs nothing to take or to give back."""

    def locked(self) -> bool:
        return True

    async def acquire(self) -> Literal[True]:
        return True

    def release(self) -> None:
        """Do nothing."""


class ThreadSeat(Seat):
    """A blocked thread whose one call waits; it looks by itself."""

    def __init__(self, look: Look) -> None:
        super().__init__(look)
        self._bell = threading.Event()

    def ring(self, now: int) -> bool:
        self.looks_at = min(self.looks_at, now)
        self._bell.set()
        return True

    def sleep(self, until: int, now: int) -> None:  # noqa: ARG002 - as a loop's
        self.looks_at = until

    def block(self, done: Callable[[], bool], clock: Callable[[], int]) -> None:
        """Block this thread, looking when it is time, until ``done``."""
        while not done():
            seconds = (self.looks_at - clock()) * 1e-9
            self._bell.wait(min(max(seconds, NAP), _LONGEST))
            self._bell.clear()
            if self.look is not None:  # pragma: no branch - as above
                self.look(self)


#: The seat of calls that waited on a loop that was closed.
NOWHERE: Final = Seat()


class Seats(dict[object, Seat]):
    """All seats of a tree of limiters: of loops, by loop, and of threads that are blocked, by themselves."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self._look = look
        #: How many calls have ever waited here.
        self.arrivals = 0
        #: Where plain threads hold their leases; and the loop that ran last in a thread.
        self.threads = Seat(look)
        self.by_thread: dict[int, LoopSeat] = {}

    def here(self) -> Seat:
        """Return the seat of the running loop; that of plain threads if none runs.

        asyncio makes a system call for each answer (to detect forks), so the answer is kept while
        that loop runs.
        """
        thread = threading.get_ident()
        known = self.by_thread.get(thread)
        if known is not None and known.loop.is_running():
            return known
        loop = asyncio._get_running_loop()  # noqa: SLF001 - None in a plain thread
        if loop is None:
            return self.threads
        seat = self.get(loop)
        if not isinstance(seat, LoopSeat):
            for key, each in list(self.items()):
                if each.is_closed() and not (each.leases or each.waiting):
                    del self[key]
            here = self.by_thread
            self.by_thread = {key: here[key] for key in here if not here[key].is_closed()}
            seat = self[loop] = LoopSeat(self._look, loop)
        self.by_thread[thread] = seat
        return seat

    def after_fork(self) -> None:
        """Start afresh in a child process: what waits or is held belongs to the parent's."""
        for seat in (self.threads, *self.values()):
            seat.look = None
        self.clear()
        self.by_thread.clear()
        self.threads = Seat(self._look)
