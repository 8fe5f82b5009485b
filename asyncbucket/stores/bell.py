"""The bell of a waiting worker: what its server tells it, and when."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from asyncbucket.core.errors import StoreError
from asyncbucket.stores.lifeline import cancel_and_wait, is_cancelling
from asyncbucket.stores.servers import FAILURES, Server

#: Seconds before listening is tried again.
_RETRY_DELAY: Final = 0.5


class Bell:
    """Listen on channels whose messages say in how many microseconds to ring.

    A ring between two waits is remembered.
    """

    def __init__(
        self, server: Server, channels: tuple[str, ...], missed_ring: Callable[[], Awaitable[int]]
    ) -> None:
        self._server = server
        self._channels = channels
        #: Returns what was missed while nobody listened, or -1.
        self._missed_ring = missed_ring
        self._rung = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def reset(self) -> None:
        """Forget earlier rings: the state is being checked anew."""
        self._rung.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def wait(self, timeout: float) -> bool:
        """Wait until it rings, for ``timeout`` seconds at most; return whether it rang."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen(), name="asyncbucket store's bell")
        try:
            async with asyncio.timeout(timeout):
                await self._rung.wait()
        except TimeoutError:
            return False
        self.reset()
        return True

    async def _listen(self) -> None:
        while not is_cancelling():
            with contextlib.suppress(*FAILURES, StoreError):
                await self._receive()
            if not is_cancelling():
                await asyncio.sleep(_RETRY_DELAY)

    async def _receive(self) -> None:
        async with self._server.pubsub() as pubsub:
            await pubsub.subscribe(*self._channels)
            for _ in self._channels:
                if not is_cancelling():
                    await pubsub.get_message(timeout=None)
            self._ring(await self._missed_ring())
            while not is_cancelling():
                message = await pubsub.get_message(timeout=None)
                if message is not None and message["type"] == "message":
                    self._ring(int(message["data"]))

    def _ring(self, delay: int) -> None:
        """Ring in ``delay`` microseconds; this replaces earlier rings."""
        if delay < 0:
            return
        self.reset()
        if delay == 0:
            self._rung.set()
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(delay * 1e-6, self._rung.set)

    async def aclose(self) -> None:
        """Stop listening."""
        self.reset()
        await cancel_and_wait(self._task)
