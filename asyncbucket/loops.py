"""Loops and threads: a loop for callers without one, loops that are blocked, and forks."""

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

from asyncbucket.meters import NEVER

T = TypeVar("T")

#: How long (ns) the loops that hold all slots may leave a question unanswered.
_PATIENCE: Final = 1_000_000_000
#: For how long (ns) nobody passes until the collector is called; twice as long when it found nothing.
_STALL: Final = 10_000_000_000
_LONGEST_STALL: Final = 64 * _STALL

_log: Final = logging.getLogger("asyncbucket")

#: CPython under its global lock switches threads at calls and backward jumps alone, so that a
#: straight run of loads, arithmetic and stores is atomic.
thread_switches_only_at_calls: Final[bool] = (
    sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
)


class Holder:
    """Count the leases held on one event loop or, where ``loop`` is None, by plain threads."""

    __slots__ = ("leases", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.leases = 0


class BlockedLoops:
    """Tell whether every slot is held on loops that do not run.

    Synchronous code on an event loop's thread may wait for a call on another loop (LlamaIndex's
    ``VectorStoreIndex(use_async=True)`` does), while tasks of the blocked loop hold all slots. They
    can be given back only after that wait: a deadlock, unless the call passes without a slot.

    Or nobody uses them any more: a reply of an SDK that was dropped unread refers to itself, and a
    program that does nothing but wait makes no garbage, so that the collector never comes to free its
    slot. If nobody has passed for a while, and the collector has not come by, it is called.
    """

    def __init__(self) -> None:
        #: Plain threads, all of them.
        self.threads = Holder(None)
        self._holders = [self.threads]
        self._here: dict[int, Holder] = {}
        #: Calls that passed without a slot, because each slot's holder was blocked.
        self.overridden = 0
        self._asked: int | None = None
        self._silent: set[asyncio.AbstractEventLoop | None] = set()
        #: When one of those who wait passed last.
        self.passed = 0
        #: The same when it was last looked at; how long to be patient from then on, and how often the
        #: collector had come by then.
        self._stall = (-1, 0, 0)
        self._stall_span = _STALL

    def here(self) -> Holder:
        """Return the holder for the loop that runs in this thread; called under a lock.

        asyncio answers that by a system call (it looks out for forks), so an answer is kept for as
        long as its loop runs.
        """
        thread = threading.get_ident()
        holder = self._here.get(thread)
        if holder is None or holder.loop is None or not holder.loop.is_running():
            loop = asyncio._get_running_loop()  # noqa: SLF001 - None in a plain thread
            if loop is None:
                return self.threads
            holder = self._here[thread] = Holder(loop)
            self._holders = [each for each in self._holders if each.leases or not each.loop]
            self._holders.append(holder)
        return holder

    @property
    def leases(self) -> int:
        """How many leases are held; all of them on blocked loops, where `check` says so."""
        return sum(holder.leases for holder in self._holders)

    def check(self, mine: asyncio.AbstractEventLoop, now: int) -> int:
        """Return ``now`` if all holders are blocked, else when to check again, or `NEVER`."""
        holders = {holder.loop for holder in self._holders if holder.leases}
        if not holders or mine in holders or None in holders:
            return self._stalled(mine, now)
        if self._asked is not None and now - self._asked < _PATIENCE:
            return self._asked + _PATIENCE
        if self._asked is not None and self._silent.issuperset(holders):
            return now
        self._asked = now
        self._silent = holders.copy()
        for loop in holders:
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._silent.discard, loop)
        return now + _PATIENCE

    def override(self, mine: asyncio.AbstractEventLoop) -> None:
        """Count a call that passes without a slot, and warn of the first."""
        self.overridden += 1
        if self.overridden == 1:
            mine.call_soon(
                _log.warning,
                "a call passed without a slot: every slot is held on an event loop that has been "
                "blocked for over 1 s; await on that loop instead of blocking it",
            )

    def _stalled(self, mine: asyncio.AbstractEventLoop, now: int) -> int:
        """Call the collector if it is time for it; return when that will be, or `NEVER`."""
        if abs(time.monotonic_ns() - now) > _STALL:  # on virtual time nobody really waits
            return NEVER
        since, end, visits = self._stall
        if since != self.passed:
            end, visits = now + self._stall_span, _visits()
            self._stall = self.passed, end, visits
        if now < end:
            return end
        if visits == _visits():
            mine.call_soon(self._collect)  # not with the lock held
        return NEVER

    def _collect(self) -> None:
        before = self.leases
        gc.collect()
        found = self.leases < before
        self._stall_span = _STALL if found else min(2 * self._stall_span, _LONGEST_STALL)


def _visits() -> int:
    """Return how often the collector has looked at everything."""
    visits: int = gc.get_stats()[-1]["collections"]
    return visits


class Background:
    """Run coroutines for threads without a loop, on one loop in a daemon thread, made on demand."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, start: Callable[[], Coroutine[Any, Any, T]], undo: Callable[[T], None]) -> T:
        """Return the result of ``start()``; if this thread is interrupted, cancel or undo it."""
        loop = self._running()
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        task: concurrent.futures.Future[None] = asyncio.run_coroutine_threadsafe(
            _answer(start, answer, undo), loop
        )
        try:
            return answer.result()
        except BaseException:
            if answer.cancel():
                task.cancel()
            elif answer.exception() is None:
                undo(answer.result())
            raise

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_run, args=(loop,), name="asyncbucket background", daemon=True
                ).start()
                weakref.finalize(self, loop.call_soon_threadsafe, loop.stop).atexit = False
            return self._loop


async def _answer(
    start: Callable[[], Coroutine[Any, Any, T]],
    answer: "concurrent.futures.Future[T]",
    undo: Callable[[T], None],
) -> None:
    try:
        result = await start()
    except BaseException as error:
        if answer.set_running_or_notify_cancel():
            answer.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        if answer.set_running_or_notify_cancel():
            answer.set_result(result)
        else:
            undo(result)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


class _Forkable(Protocol):
    def after_fork(self) -> None: ...


#: The one piece of module state: ``os.register_at_fork`` cannot be undone, so it is called once
#: for all, and must not keep them alive.
_FORKABLE: Final["weakref.WeakSet[_Forkable]"] = weakref.WeakSet()


def reset_after_fork(each: _Forkable) -> None:
    """Have ``each.after_fork()`` called in a child process, while ``each`` lives."""
    _FORKABLE.add(each)


def _after_fork() -> None:
    for each in tuple(_FORKABLE):
        each.after_fork()


with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork)
