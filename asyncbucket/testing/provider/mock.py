"""The provider without a server: a MockTransport of httpx or httpx2 answered by the application.

Nothing listens and nothing is sent, so it works with virtual time. It behaves like a real server
where a client can tell: a streamed reply arrives chunk by chunk, one that is cut off raises, and a
client that goes away early is noticed.
"""

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import unquote

from starlette.types import ASGIApp, Message

Family: TypeAlias = Literal["httpx", "httpx2"]

_INCOMPLETE_BODY: str = (
    "peer closed connection without sending complete message body (incomplete chunked read)"
)


def mock_transport(app: ASGIApp, *, family: Family = "httpx", sync: bool = False) -> Any:
    """Return a ``MockTransport`` with which ``app`` answers every request, at any address.

    Args:
        app: The application, such as `RateLimitedProvider.app`.
        family: The library whose clients take it.
        sync: For ``Client`` instead of ``AsyncClient``; each reply is then sent whole.

    Raises:
        ImportError: The library isn't installed.
        ValueError: ``family`` is neither of the two.
    """
    if family not in get_args(Family):
        raise ValueError(f"family must be httpx or httpx2, not {family!r}")
    try:
        library = importlib.import_module(family)
    except ModuleNotFoundError as exc:
        raise ImportError(f"{family} isn't installed: pip install {family}") from exc
    body = type("Body", (_Body, library.AsyncByteStream), {})

    async def answer(request: Any) -> Any:
        cycle = _RequestCycle(
            app, request, await request.aread(), disconnect_error=library.RemoteProtocolError
        )
        status, headers = await cycle.begin()
        return library.Response(status, headers=headers, stream=body(cycle))

    async def answer_whole(request: Any) -> Any:
        cycle = _RequestCycle(
            app, request, request.content, disconnect_error=library.RemoteProtocolError
        )
        status, headers = await cycle.begin()
        content = b"".join([chunk async for chunk in cycle.chunks()])
        return library.Response(status, headers=headers, content=content)

    def answer_sync(request: Any) -> Any:
        request.read()
        with ThreadPoolExecutor(1) as thread:  # a loop may be running in this one
            return thread.submit(asyncio.run, answer_whole(request)).result()

    return library.MockTransport(answer_sync if sync else answer)


class _Body:
    """The body of a streamed reply; closing it early is how a client goes away."""

    def __init__(self, cycle: "_RequestCycle") -> None:
        self._cycle = cycle

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._cycle.chunks()

    async def aclose(self) -> None:
        """See `_RequestCycle.end`."""
        await self._cycle.end()


class _RequestCycle:
    """One request and its reply, between a client and an ASGI application."""

    def __init__(
        self, app: ASGIApp, request: Any, content: bytes, *, disconnect_error: type[Exception]
    ) -> None:
        self._disconnect_error = disconnect_error
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._disconnected = asyncio.Event()
        self._content: bytes | None = content
        self._app_task = asyncio.create_task(self._run(app, _scope(request)))

    async def begin(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Return the status and the headers of the reply, once they are known."""
        try:
            start = await self._messages.get()
        except BaseException:
            await self.end()
            raise
        if start is None:
            await self._app_task  # re-raises what it raised
            raise self._disconnect_error("Server disconnected without sending a response.")
        return start["status"], list(start["headers"])

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the reply's chunks as they come."""
        more = True
        while more:
            message = await self._messages.get()
            if message is None:
                await self._app_task
                raise self._disconnect_error(_INCOMPLETE_BODY)
            more = message.get("more_body", False)
            if message.get("body"):
                yield message["body"]
        await self.end()

    async def end(self) -> None:
        """Go away, and wait until the application has noticed."""
        self._disconnected.set()
        with contextlib.suppress(Exception):  # `begin` and `chunks` raise what matters
            await self._app_task

    async def _run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._messages.put)
        finally:
            self._messages.put_nowait(None)

    async def _receive(self) -> Message:
        if self._content is not None:
            content, self._content = self._content, None
            return {"type": "http.request", "body": content, "more_body": False}
        await self._disconnected.wait()
        return {"type": "http.disconnect"}


def _scope(request: Any) -> dict[str, Any]:
    url = request.url
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": url.scheme,
        "path": unquote(url.path),
        "raw_path": url.raw_path.partition(b"?")[0],
        "query_string": url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": ("127.0.0.1", 123),
        "server": (url.host, url.port),
    }
