"""Connections of its own for each event loop.

On another loop, a connection that is kept open sends a request into the void: its reply is lost.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple, Self

from asyncbucket.waiting import Lock


class _Entry(NamedTuple):
    #: A transport or a client, of httpx or httpx2.
    connections: Any
    #: What closes it when its loop ends; None if it is somebody else's.
    guard: AsyncGenerator[None] | None


class ByLoop:
    """Hold a transport or client for each event loop that asks, until it ends; thread-safe.

    Args:
        first: that of the loop that asks first, if there is one already.
        keep_first: whether ``first`` is somebody else's client, which stays open: only its
            connections are closed, once their loop has ended.
    """

    __slots__ = ("_by_loop", "_first", "_keep_first", "_lock")

    def __init__(self, first: Any = None, *, keep_first: bool = False) -> None:
        self._first = first
        self._keep_first = keep_first
        self._by_loop: dict[asyncio.AbstractEventLoop, _Entry] = {}
        self._lock = Lock()

    def current(self, make: Callable[[], Any]) -> Any:
        """Return that of the running loop; ``make()`` makes one if there is none yet."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._by_loop:
                self._forget_ended(loop)
                self._by_loop[loop] = self._next(make)
            return self._by_loop[loop].connections

    def _next(self, make: Callable[[], Any]) -> _Entry:
        first, self._first = self._first, None
        if first is not None and self._keep_first:
            return _Entry(first, None)
        connections = make() if first is None else first
        guard = _closed_with_loop(connections)
        with contextlib.suppress(StopIteration):  # it is open now
            guard.asend(None).send(None)
        return _Entry(connections, guard)

    def _forget_ended(self, loop: asyncio.AbstractEventLoop) -> None:
        """Forget the loops that have ended; ``loop`` closes what these may have left open."""
        for ended in [each for each in self._by_loop if each.is_closed()]:
            connections, guard = self._by_loop.pop(ended)
            closing = _close(_transports_of(connections) if guard is None else [connections])
            loop.create_task(closing)  # it never waits


async def _closed_with_loop(connections: Any) -> AsyncGenerator[None]:
    """Close ``connections`` in the end: a loop that ends closes all generators that are open."""
    try:
        yield
    finally:
        # Some loops are closed without that, as by nest_asyncio; then the collector comes here.
        with contextlib.suppress(RuntimeError):
            await connections.aclose()


async def _close(left_open: Sequence[Any]) -> None:
    """Close what was open when its loop was closed, as far as possible."""
    for connections in left_open:
        with contextlib.suppress(RuntimeError):  # they call their loop
            await connections.aclose()


def _transports_of(client: Any) -> list[Any]:
    """Return the transports of a client of httpx or httpx2, which go on after they were closed."""
    transports = (client._transport, *client._mounts.values())  # noqa: SLF001 - there is no public way
    return [transport for transport in transports if transport is not None]


class PerLoopTransport:
    """Send requests by transports that ``make()`` makes, one for each event loop.

    Args:
        make: makes a transport.
        first: one that is made already.
    """

    def __init__(self, make: Callable[[], Any], first: Any = None) -> None:
        self._make = make
        self._transports = ByLoop(first)

    def current(self) -> Any:
        """Return the transport of the running loop."""
        return self._transports.current(self._make)

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
