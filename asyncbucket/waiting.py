"""Event loops and threads: one implementation for both, and connections for each loop.

An ``async def`` that does everything that may wait through an ``io`` object serves both. Given
`ASYNC`, it is awaited as usual. Given `SYNC`, whose methods never suspend, it runs to its end in one
step, which `run` makes. (That costs 10.7 µs a call where a plain function costs 9.9.)

A `StopIteration` cannot leave such a function: Python turns it into a `RuntimeError`.

`PerLoopTransport` gives each event loop connections of its own: on another loop, a connection that
is kept open sends a request whose reply is lost.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, Final, Self, TypeAlias, TypeVar

from asyncbucket.engine.dispatchers import Lock
from asyncbucket.engine.lease import Lease
from asyncbucket.levels import admit_here

T = TypeVar("T")


class AsyncIO:
    """Wait on the running event loop."""

    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """Call an async function."""
        result: Awaitable[Any] = fn(*args, **kwargs)
        return result

    def awaiting(self, fn: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """Return ``fn`` as a function to await: itself."""
        return fn

    def admit(self, lease: Lease) -> Awaitable[Lease]:
        """Wait for the admission of ``lease``."""
        return lease

    async def wait(self, future: Future[Any], timeout: float) -> None:
        """Wait until ``future`` is done, at most for ``timeout`` seconds."""
        here = asyncio.wrap_future(future)
        try:
            await asyncio.wait([here], timeout=timeout)
        finally:
            here.cancel()

    def next_item(self, iterator: Any, end: Any) -> Awaitable[Any]:
        """Return the next item of an async iterator, or ``end``."""
        item: Awaitable[Any] = anext(iterator, end)
        return item

    def iterator(self, items: Any) -> Any:
        """Return an async iterator over ``items``."""
        return aiter(items)

    async def close(self, resource: Any) -> None:
        """Close what has an ``aclose``."""
        await resource.aclose()

    def function(self, fn: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Any]:
        """Return ``fn`` as callers of this kind call it."""
        return fn


class SyncIO:
    """Block this thread; no method suspends."""

    async def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a plain function."""
        return fn(*args, **kwargs)

    def awaiting(self, fn: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """Return ``fn`` as a function to await."""
        return functools.partial(self.call, fn)

    async def admit(self, lease: Lease) -> Lease:
        """Wait for the admission of ``lease``."""
        return admit_here(lease)

    async def wait(self, future: Future[Any], timeout: float) -> None:
        """Wait until ``future`` is done, at most for ``timeout`` seconds."""
        wait([future], timeout)

    async def next_item(self, iterator: Any, end: Any) -> Any:
        """Return the next item of an iterator, or ``end``."""
        return next(iterator, end)

    def iterator(self, items: Any) -> Any:
        """Return an iterator over ``items``."""
        return iter(items)

    async def close(self, resource: Any) -> None:
        """Close what has a ``close``."""
        resource.close()

    def function(self, fn: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Any]:
        """Return ``fn`` as callers of this kind call it: as a plain function."""

        @functools.wraps(fn)
        def plain(*args: Any, **kwargs: Any) -> T:
            return run(fn(*args, **kwargs))

        return plain


IO: TypeAlias = AsyncIO | SyncIO
ASYNC: Final = AsyncIO()
SYNC: Final = SyncIO()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine``, which waits by `SYNC` alone, and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    name = getattr(coroutine, "__qualname__", repr(coroutine))
    raise RuntimeError(f"{name} was to block, but suspended: it must wait by its io object alone")


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
