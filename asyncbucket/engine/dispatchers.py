"""Where calls wait: on an event loop, or in a blocked thread; and what belongs to one process.

A dispatcher has the queue served (`asyncbucket.engine.pacer.Pacer.dispatch`) when the next call may
go, and when its doorbell rings. The doorbell of a loop is an `asyncio.Condition` on which one task sleeps. It is
rung by synchronous code such as ``lease.release()``, which cannot await the Condition's lock. Within
a loop's thread there is nothing to lock out: between two awaits the task runs alone. So the
Condition has a lock that always says it is held, and ringing is one ``notify``. Only that task waits
on the Condition, so no notification is lost to a waiter that is being cancelled (CPython
gh-112202), and nobody is woken in vain. The task is there while several calls wait. For a lone one,
and when the timer is due, the loop dispatches itself, without the detour of waking a task: so a slot
that changes hands all the time costs no task.

A dispatcher whose loop is blocked misses its turn. Then its calls are parked, so that it holds up nobody,
until it dispatches again; those of a closed loop are counted out for good. If every slot is held on loops
that are blocked, one call at a time passes without a slot, because what blocks a loop may be waiting
for that very call. All of this is called by the `asyncbucket.engine.pacer.Pacer`, with its lock held.
"""

import asyncio
import collections
import contextlib
import contextvars
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Final, Literal, NoReturn, Protocol, Self, TypeAlias

from asyncbucket.engine.meters import NEVER, admit
from asyncbucket.engine.node import shown_name
from asyncbucket.engine.queue import AnyWaiter, Branch, Dispatch, Dispatcher

#: CPython with the GIL switches threads only at calls and backward jumps, so a straight run of
#: loads, arithmetic and stores is atomic.
ATOMIC: Final[bool] = (
    sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
)
#: The shortest sleep (s), because timers may fire early; the longest that every loop accepts.
NAP: Final = 20e-6
_LONGEST: Final = 86_400.0

#: How late (ns) a dispatcher may be for its turn before others go first; before it counts as blocked.
GRACE: Final = 50_000_000
_PATIENCE: Final = 1_000_000_000
#: After this time (ns) without an admission, slots may have been forgotten.
_STALL: Final = 5_000_000_000


_log: Final = logging.getLogger("asyncbucket")

#: What is left to be done, in order.
News: TypeAlias = collections.deque[Callable[[], object]]


class LoopDispatcher(Dispatcher):
    """An event loop on which calls wait."""

    def __init__(self, dispatch: Dispatch, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(dispatch)
        self.loop: asyncio.AbstractEventLoop = loop  # pyright: ignore[reportIncompatibleVariableOverride]
        self._bell = asyncio.Condition(_AlwaysHeldLock())
        #: The task that sleeps on the bell while several calls wait; and whether it sleeps.
        self._task: asyncio.Task[None] | None = None
        self._is_asleep = False
        self._timer: asyncio.Handle | None = None
        self._rings_at = 0
        #: Whether the bell has rung and the loop has not come to dispatch yet.
        self._rung = False
        #: It dispatches for everyone, not in the context of the call that happened to come first.
        self._context = contextvars.Context()

    def ring(self, now: int) -> bool:
        if now < self.wakes_at:  # noqa: PLR1730 - `min` would be a call
            self.wakes_at = now
        if self._rung:
            return True
        self._rung = True  # first: the other thread may come to dispatch at once
        if self._runs_here():
            self._wake()
        else:
            try:
                # No task: this may be the last iteration of a loop that is about to be closed.
                self.loop.call_soon_threadsafe(self._tick, context=self._context)
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
        """Have it dispatch in the loop's next iteration."""
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
        """Dispatch whenever the bell rings, as long as somebody waits here."""
        try:
            self._dispatch()
            while self.waiting:
                self._is_asleep = True
                await self._bell.wait()
                self._is_asleep = False
                self._dispatch()
        finally:
            self._is_asleep = False
            self._task = None

    def _tick(self) -> None:
        """Dispatch without the detour of waking the task."""
        try:
            self._dispatch()
        finally:
            if self._is_asleep and not self.waiting:  # it has nothing more to do
                self._bell.notify()

    def _time_up(self) -> None:
        self._timer = None
        self._tick()

    def _dispatch(self) -> None:
        self._rung = False
        if self.dispatch is not None:  # pragma: no branch - None in a forked process
            self.dispatch(self)

    def sleep(self, until: int, now: int) -> None:
        self.wakes_at = until
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


class _AlwaysHeldLock(asyncio.Lock):
    """The lock of the bell: see above. It costs nothing to take or to give back."""

    def locked(self) -> bool:
        return True

    async def acquire(self) -> Literal[True]:
        return True

    def release(self) -> None:
        """Do nothing."""


class ThreadDispatcher(Dispatcher):
    """A blocked thread whose one call waits; it dispatches by itself."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__(dispatch)
        self._bell = threading.Event()

    def ring(self, now: int) -> bool:
        self.wakes_at = min(self.wakes_at, now)
        self._bell.set()
        return True

    def sleep(self, until: int, now: int) -> None:  # noqa: ARG002 - as a loop's
        self.wakes_at = until

    def block(self, done: Callable[[], bool], clock: Callable[[], int]) -> None:
        """Block this thread, dispatching when it is time, until ``done``."""
        while not done():
            seconds = (self.wakes_at - clock()) * 1e-9
            self._bell.wait(min(max(seconds, NAP), _LONGEST))
            self._bell.clear()
            if self.dispatch is not None:  # pragma: no branch - as above
                self.dispatch(self)


class Dispatchers(dict[object, Dispatcher]):
    """All dispatchers of a tree of limiters: of loops, by loop, and of threads that are blocked, by themselves."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__()
        self._dispatch = dispatch
        #: How many calls have ever waited here, and how often one has left where it stood.
        self.arrivals = self.departures = 0
        #: Where plain threads hold their leases; and the loop that ran last in a thread.
        self.threads = Dispatcher(dispatch)
        self.by_thread: dict[int, LoopDispatcher] = {}

    def here(self) -> Dispatcher:
        """Return the dispatcher of the running loop; that of plain threads if none runs.

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
        dispatcher = self.get(loop)
        if not isinstance(dispatcher, LoopDispatcher):
            for key, each in list(self.items()):
                if each.is_closed() and not (each.leases or each.waiting):
                    del self[key]
            here = self.by_thread
            self.by_thread = {key: here[key] for key in here if not here[key].is_closed()}
            dispatcher = self[loop] = LoopDispatcher(self._dispatch, loop)
        self.by_thread[thread] = dispatcher
        return dispatcher

    def after_fork(self) -> None:
        """Start afresh in a child process: what waits or is held belongs to the parent's."""
        for dispatcher in (self.threads, *self.values()):
            dispatcher.dispatch = None
        self.clear()
        self.by_thread.clear()
        self.threads = Dispatcher(self._dispatch)


class Stalls:
    """Notice when nobody passes because the slots of a tree do not come back."""

    def __init__(
        self, top: Branch, all_: Dispatchers, clock: Callable[[], int], news: News
    ) -> None:
        self._top, self._all, self._clock, self._news = top, all_, clock, news
        #: Since when nobody has passed of those who wait.
        self.since = 0
        self._has_warned = False

    def beyond_slots(self, dispatcher: Dispatcher, now: int) -> tuple[AnyWaiter | None, int]:
        """Return a call that is to pass without a slot, because loops that do not run hold all; else when to dispatch again.

        Code may block its loop while it waits for a call on another loop (LlamaIndex's
        ``VectorStoreIndex(use_async=True)`` does), while tasks of the blocked loop hold all slots.
        """
        holders = [each for each in self._all.values() if each.leases]
        if not holders or dispatcher.leases or self._all.threads.leases:
            return None, self.wait_for_slots(now)
        for each in holders:
            each.ring(now)
        heard = max(each.wakes_at for each in holders)
        if now < heard + _PATIENCE:
            return None, heard + _PATIENCE
        back = sum(each.leases for each in holders)
        waiter, due = self._top.head(now, back)
        if waiter is None or waiter.dispatcher is not dispatcher:
            return None, due
        route, since = waiter.line.node.route, waiter.line.since
        due, _ = admit(route, waiter.amounts, since, now, book=False, back=back)
        if due > now:
            return None, due
        root = self._top.node
        root.count("overridden")
        if root.tally.counts["overridden"] == 1:
            says = (
                "a call passed without a slot: every slot is held on an event loop that has been "
                "blocked for over 1 s; await on that loop instead of blocking it"
            )
            self._news.append(partial(_log.warning, says))
        return waiter, now

    def wait_for_slots(self, now: int) -> int:
        """Return when to dispatch again while slots have to come back; warn once if none does.

        A lease that is dropped gives its slot back; one that something still holds does not.
        """
        if self._has_warned or self._clock is not time.monotonic_ns:
            return NEVER
        if now < self.since + _STALL:
            return (self.since // _STALL + 2) * _STALL  # seldom another: so the timer can stay
        self._has_warned = True
        held = {
            f"{node.slots.in_flight} of {node.slots.most} slots of {shown_name(node.name)!r}"
            for line in self._top.lines()
            for node in line.node.path
            if node.slots in line.node.route.bounded and node.slots.in_flight >= node.slots.most
        }
        says = (
            "no call has passed for %.0f s: open leases hold %s; if those calls are over, release their "
            "leases (`async with` does); if they wait for calls inside, give those a limiter of their own"
        )
        seconds = (now - self.since) * 1e-9
        self._news.append(partial(_log.warning, says, seconds, ", ".join(sorted(held))))
        return NEVER


# --- processes ---


class OfThisProcess:
    """Belong to one process: a copy is the object itself, and it cannot be pickled.

    A real copy of something that holds a slot, or counts what passes, would do so twice.
    """

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and cannot be pickled: make one in each "
            f"process; limiters share limits by store=..."
        )


#: Module state, because ``os.register_at_fork`` cannot be undone: so it is called once, and holds
#: only weak references.
_FORKABLE: Final["weakref.WeakSet[Forkable]"] = weakref.WeakSet()


class Forkable(Protocol):
    """Have something to do in a child process."""

    def after_fork(self) -> None:
        """Replace locks, which the parent may have held, and forget what is the parent's."""


def reset_after_fork(obj: Forkable) -> None:
    """Have ``obj.after_fork()`` called in a child process, for as long as ``obj`` lives."""
    _FORKABLE.add(obj)


def _after_fork() -> None:
    for obj in tuple(_FORKABLE):
        obj.after_fork()


with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork)


class Lock:
    """Lock as `threading.RLock` does; a child process finds it open, whoever held it at the fork.

    It is reentrant, because the collector may end a dropped call on a thread that holds it. Nobody
    awaits while it holds one, so event loops and threads share it.
    """

    __slots__ = ("__weakref__", "_lock")  # pyright: ignore[reportUninitializedInstanceVariable]

    def __init__(self) -> None:
        self._lock = threading.RLock()
        reset_after_fork(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def after_fork(self) -> None:
        """Replace the lock, which the parent may have held."""
        self._lock = threading.RLock()


class DeferringLock:
    """Lock as `threading.Lock` does; the holder also does what could not wait for the lock.

    That is what finalizers and synchronous methods leave to it (`do`), and what observers and the log
    are to be told once the lock is released. Only `with` does so by itself, in twice the time.
    """

    def __init__(self) -> None:
        #: Work for whoever releases the lock; and what to tell then, unless by a finalizer.
        self.jobs: News = collections.deque()
        self.news: News = collections.deque()
        self.after_fork()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
        if self.jobs or self.news:
            self.catch_up()

    def do(self, job: Callable[..., object], *args: object) -> None:
        """Run ``job`` with the lock held: now, or when its holder is done; never wait for it."""
        if self.jobs or not self.acquire(False):  # a keyword would take twice the time
            self.jobs.append(partial(job, *args))
        else:
            try:
                job(*args)
            finally:
                self.release()
        if self.jobs:
            self.catch_up(tell=False)

    def do_and_tell(self, job: Callable[..., object], *args: object) -> None:
        """Do it, and tell the news: not for finalizers, which may run anywhere."""
        self.do(job, *args)
        if self.news:
            self.catch_up()

    def catch_up(self, *, tell: bool = True) -> None:
        """Run what was left to whoever releases the lock, in order, and tell the news."""
        while self.jobs and self.acquire(False):  # as above
            try:
                self.run_jobs_locked()
            finally:
                self.release()
        while tell and self.news:
            with contextlib.suppress(IndexError):  # another thread was faster
                self.news.popleft()()

    def run_jobs_locked(self) -> None:
        """Run what was left to the holder of the lock."""
        while self.jobs:
            self.jobs.popleft()()

    def after_fork(self) -> None:
        """Replace the lock, which the parent may have held, and forget what the parent is to do."""
        lock = threading.Lock()
        self.acquire, self.release = lock.acquire, lock.release
        self.jobs.clear()
        self.news.clear()
