"""What belongs to one event loop: each loop gets its own connections.

On another loop, a connection that is kept open sends a request into the void: its reply is lost.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar


class _Connections(Protocol):
    """A transport or a client, of httpx or httpx2."""

    async def aclose(self) -> None: ...


C = TypeVar("C", bound=_Connections)


class ByLoop(Generic[C]):
    """Hold a transport or client for each event loop that asks; thread-safe.

    Args:
        first: the one of the loop that asks first, if there is one already.
    """

    __slots__ = ("_by_loop", "_first", "_lock")

    def __init__(self, first: C | None = None) -> None:
        self._first = first
        self._by_loop: dict[asyncio.AbstractEventLoop, C] = {}
        self._lock = threading.Lock()

    def current(self, make: Callable[[], C]) -> C:
        """Return that of the running loop; ``make()`` makes one if there is none yet."""
        loop = asyncio.get_running_loop()
        with self._lock:
            known = self._by_loop.get(loop)
            if known is None:
                for ended in [each for each in self._by_loop if each.is_closed()]:
                    closing = _discard(self._by_loop.pop(ended))
                    loop.create_task(closing)  # noqa: RUF006 - it never waits
                known, self._first = self._first, None
                known = self._by_loop[loop] = make() if known is None else known
            return known


async def _discard(connections: _Connections) -> None:
    """Close connections after their loop, as far as possible: they are not left to the collector."""
    with contextlib.suppress(RuntimeError):  # they call their loop
        await connections.aclose()


class PerLoopTransport:
    """Send requests by transports that ``make()`` makes, one for each event loop."""

    def __init__(self, make: Callable[[], Any], first: Any = None) -> None:
        self._make = make
        self._transports: ByLoop[Any] = ByLoop(first)

    def current(self) -> Any:
        """Return the transport of the running loop."""
        return self._transports.current(self._make)

    async def handle_async_request(self, request: Any) -> Any:
        """Send ``request``, and return the response."""
        return await self.current().handle_async_request(request)

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        await self.current().aclose()

    async def __aenter__(self) -> Self:
        await self.current().__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.current().__aexit__(exc_type, exc, traceback)
