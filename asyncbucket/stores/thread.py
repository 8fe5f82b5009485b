"""What the limiters of a process have in common at one URL: a thread, an event loop, and one store.

So five hundred limiters have one connection for their batches and one on which they are called.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Final

from asyncbucket.engine.dispatchers import Lock
from asyncbucket.stores.store import Store


class StoreThread:
    """Serve sessions on a loop of its own until the last one has left."""

    def __init__(self, key: tuple[int, str]) -> None:
        self._key = key
        #: How many sessions there are.
        self._sessions = 0
        self._store: Store | None = None
        self._is_over = asyncio.Event()
        self.loop = asyncio.new_event_loop()

    @classmethod
    def join(cls, url: str) -> "StoreThread":
        """Return the thread of this process for ``url``, for one session more."""
        with _LOCK:
            key = os.getpid(), url
            thread = _THREADS.get(key)
            if thread is None:
                thread = _THREADS[key] = cls(key)
                name = "asyncbucket session"
                threading.Thread(target=thread._run, name=name, daemon=True).start()
            thread._sessions += 1
            return thread

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._is_over.wait())

    def store(self, make: Callable[[], Store]) -> Store:
        """Return the store of all sessions; on the loop."""
        self._store = self._store or make()
        return self._store

    async def leave(self) -> None:
        """Count a session out; the last one closes the store, and ends the thread."""
        with _LOCK:
            self._sessions -= 1
            if self._sessions:
                return
            del _THREADS[self._key]
        try:
            if self._store is not None:
                await self._store.aclose()
        finally:
            self._is_over.set()


#: By process and URL: a child that was forked has none of its parent's.
_THREADS: Final[dict[tuple[int, str], StoreThread]] = {}
_LOCK: Final = Lock()
