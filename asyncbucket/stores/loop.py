"""The event loop that serves the sessions of a process, and how other threads reach it.

The limiters of a process at one URL share a thread with a loop, and one store. So five hundred
limiters have one connection for their batches and one on which they are called. A store that was made
by the user is served on the user's loop.

To wake another thread takes a system call and a switch, and on a busy machine many milliseconds. So a loop
is woken once for all that it is asked to do until it comes.
"""

import asyncio
import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final

from asyncbucket.engine.dispatchers import Lock
from asyncbucket.stores.store import Store


class Errands:
    """Have a loop do what other threads ask, each in an empty context, and wake it once for all of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop: asyncio.AbstractEventLoop = weakref.proxy(loop)
        self._todo: set[Callable[[], object]] = set()
        self._is_woken = False

    def add(self, work: Callable[[], object]) -> None:
        """Have ``work`` done soon, once however often it is asked, unless the loop is closed; from any thread."""
        self._todo.add(work)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError, ReferenceError):  # the loop is closed, or gone
                self._loop.call_soon_threadsafe(self._begin, context=contextvars.Context())

    def _begin(self) -> None:
        self._is_woken = False  # first: another thread may add something at once
        while self._todo:
            self._loop.call_soon(self._todo.pop())


class SessionLoop:
    """Serve sessions: on a loop and a thread of its own until the last one has left, or on the user's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, key: tuple[int, str] | None = None) -> None:
        self.loop = loop
        #: What sessions are asked from other threads.
        self.errands = Errands(loop)
        self._key = key
        #: How many sessions there are.
        self._sessions = 0
        self._store: Store | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over = asyncio.Event()

    @classmethod
    def join(cls, url: str) -> "SessionLoop":
        """Return the one of this process for ``url``, for one session more."""
        with _LOCK:
            key = os.getpid(), url
            shared = _SHARED.get(key)
            if shared is None:
                shared = _SHARED[key] = cls(asyncio.new_event_loop(), key)
                name = "asyncbucket session"
                threading.Thread(target=shared._run, name=name, daemon=True).start()
            shared._sessions += 1
            return shared

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._is_over.wait())

    def serve(self, session: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have ``session`` run on the loop; from any thread."""

        def begin() -> None:
            task = asyncio.create_task(session(), name="asyncbucket store session")
            self._tasks.add(task)  # the loop itself keeps none
            task.add_done_callback(self._tasks.discard)

        self.errands.add(begin)

    def store(self, make: Callable[[], Store]) -> Store:
        """Return the store of all sessions; on the loop."""
        self._store = self._store or make()
        return self._store

    async def leave(self) -> None:
        """Count a session out; the last one closes the store, and ends the thread."""
        if self._key is None:  # both are the user's
            return
        with _LOCK:
            self._sessions -= 1
            if self._sessions:
                return
            del _SHARED[self._key]
        try:
            if self._store is not None:
                await self._store.aclose()
        finally:
            self._is_over.set()


#: By process and URL: a child that was forked has none of its parent's.
_SHARED: Final[dict[tuple[int, str], SessionLoop]] = {}
_LOCK: Final = Lock()
