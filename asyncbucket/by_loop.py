"""Connections of its own for each event loop.

On another loop, a connection that is kept open sends a request into the void: its reply is lost.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any, Self

from asyncbucket.waiting import Lock


async def _closed_with_loop(transport: Any) -> AsyncGenerator[None]:
    """Close ``transport`` in the end: a loop that ends closes all generators that are open."""
    try:
        yield
    finally:
        # Some loops are closed without that, as by nest_asyncio; then the collector comes here.
        await _close(transport)


async def _close(transport: Any) -> None:
    """Close ``transport``, as far as possible if its loop is closed."""
    with contextlib.suppress(RuntimeError):  # it calls its loop
        await transport.aclose()


class PerLoopTransport:
    """Send requests by transports that ``make()`` makes, one for each event loop; thread-safe.

    Args:
        make: makes a transport.
        first: that of the loop that asks first, if there is one already.
    """

    def __init__(self, make: Callable[[], Any], first: Any = None) -> None:
        self._make = make
        self._first = first
        #: The transport of each loop, and what closes it when the loop ends.
        self._by_loop: dict[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[None]]] = {}
        self._lock = Lock()

    def current(self) -> Any:
        """Return the transport of the running loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._by_loop:
                self._forget_ended(loop)
                self._by_loop[loop] = self._next()
            return self._by_loop[loop][0]

    def _next(self) -> tuple[Any, AsyncGenerator[None]]:
        first, self._first = self._first, None
        transport = self._make() if first is None else first
        guard = _closed_with_loop(transport)
        with contextlib.suppress(StopIteration):  # it is open now
            guard.asend(None).send(None)
        return transport, guard

    def _forget_ended(self, loop: asyncio.AbstractEventLoop) -> None:
        """Forget the loops that have ended; ``loop`` closes what these may have left open."""
        for ended in [each for each in self._by_loop if each.is_closed()]:
            transport, _ = self._by_loop.pop(ended)
            loop.create_task(_close(transport))  # it never waits

    def on_this_loop(self) -> Any:
        """Return the transport of the running loop, or this one if no loop runs."""
        running = asyncio._get_running_loop() is not None  # noqa: SLF001 - None outside
        return self.current() if running else self

    async def handle_async_request(self, request: Any) -> Any:
        """Send ``request``, and return the response."""
        return await self.current().handle_async_request(request)

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        await self.current().aclose()

    async def __aenter__(self) -> Self:
        await self.current().__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.current().__aexit__(*error)
