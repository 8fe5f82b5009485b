"""The proxy as an ASGI application: a call from a caller to the provider, and back.

The transport prices a call by its body, and sends it again if it fails. So a body is read before
its call waits, as far as bodies may be held. One that is too large passes as a stream: it counts as
one request and as a call without text, and is sent once. Replies pass chunk by chunk, as fast as the
caller reads.

A task watches each connection. If the caller hangs up, its call is cancelled, whether it waits or
runs, and `asyncbucket.http` gives back what it took.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpx

from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.limiter import Limiter
from asyncbucket.proxy.caller_terms import CallerTerms
from asyncbucket.proxy.error_replies import CallerError, ErrorReply
from asyncbucket.proxy.headers import OWN, Headers, end_to_end, with_key
from asyncbucket.proxy.options import ProxyOptions
from asyncbucket.telemetry.stats import is_loopback

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

#: The most bytes that are held of one body, and of all together: a million tokens, and 64 million.
_HELD_BODY: Final = 4 * 1_048_576
_HELD: Final = 64 * _HELD_BODY
#: Seconds, as the SDKs have them; how many connections there are is the limiter's business.
_TIMEOUT: Final = {"connect": 5.0, "read": 600.0, "write": 600.0, "pool": None}
_STOPPING: Final = ErrorReply(status=503, message="the proxy stops: try again", retry_after=1.0)

_log: Final = logging.getLogger("asyncbucket.proxy")


class Proxy:
    """Pass calls on to a provider, paced by ``limiter``.

    Args:
        limiter: what admits the calls.
        options: where they go, with whose key, and who shares; may be replaced while calls are open.
    """

    def __init__(self, limiter: Limiter, options: ProxyOptions) -> None:
        self.options = options
        self._only_here = options.address.is_local
        self._transport = limiter.transport(profile=options.profile)
        self._terms = CallerTerms()
        self._held = 0

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        caller = _Caller(scope, receive, send)
        call = asyncio.ensure_future(self._answer(caller))
        leaving = asyncio.ensure_future(caller.left())
        try:
            await asyncio.wait((call, leaving), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            is_stopping = True
        else:
            is_stopping = False
        call.cancel()
        leaving.cancel()
        await asyncio.wait((call, leaving))
        if not call.cancelled():
            call.result()  # raises what nobody expected
        elif is_stopping and not caller.is_answered:
            await caller.refuse(_STOPPING)

    async def aclose(self) -> None:
        """Close the connections to the provider."""
        await self._transport.aclose()

    async def _answer(self, caller: "_Caller") -> None:
        options = self.options
        try:
            _check(caller, only_here=self._only_here)
            with self._terms.applied(caller.headers, tenants_by_key=options.tenants_by_key):
                request = await self._request(caller, options)
                await caller.get(await self._transport.handle_async_request(request))
        except _HungUpError:
            return
        except (AsyncBucketError, CallerError, httpx.HTTPError) as error:
            await caller.refuse(ErrorReply.of(error))
        finally:
            self._held -= caller.held

    async def _request(self, caller: "_Caller", options: ProxyOptions) -> httpx.Request:
        """Return the provider's request.

        Raises:
            CallerError: its path cannot be sent.
        """
        scope, headers = caller.scope, end_to_end(caller.headers, b"host", b"expect")
        headers = [(name, value) for name, value in headers if not name.startswith(OWN)]
        if options.key is not None:
            headers = with_key(headers, options.key, anthropic=caller.is_anthropic)
        try:
            url, path = _address(options.upstream, scope["raw_path"])
        except httpx.InvalidURL as error:
            raise CallerError("the path is too long, or is none that a URL may have") from error
        query = scope["query_string"]
        body = await self._body(caller)
        return httpx.Request(
            scope["method"],
            url,
            headers=headers,
            content=body or None,
            # As it came: httpx would rewrite what others percent-encode differently.
            extensions={"timeout": _TIMEOUT, "target": path + b"?" * bool(query) + query},
        )

    async def _body(self, caller: "_Caller") -> bytes | AsyncIterator[bytes]:
        """Return the whole body if it may be held, else a stream."""
        chunks, kept = caller.body(), deque[bytes]()
        if int(caller.header(b"content-length") or 0) > _HELD_BODY:
            return chunks
        async for chunk in chunks:
            kept.append(chunk)
            caller.held += len(chunk)
            self._held += len(chunk)
            if caller.held > _HELD_BODY or self._held > _HELD:
                return _joined(kept, chunks)
        return b"".join(kept)


@lru_cache(maxsize=256)
def _address(upstream: str, path: bytes) -> tuple[httpx.URL, bytes]:
    """Return a provider's URL for a caller's path, and the path that is sent, as it came."""
    url = httpx.URL(upstream)
    path = url.raw_path.rstrip(b"/") + path
    return url.copy_with(raw_path=path), path


class _HungUpError(Exception):
    """The caller went away before its request was complete."""


class _Caller:
    """The other end of a connection: what it sends and gets, and whether it is still there."""

    def __init__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        self.scope = scope
        self.headers: Headers = list(scope["headers"])
        #: Bytes of its body that are held.
        self.held = 0
        #: Whether its answer has begun.
        self.is_answered = False
        self._receive, self._send = receive, send
        self._is_read = asyncio.Event()

    @property
    def is_anthropic(self) -> bool:
        """Whether it speaks Anthropic's protocol."""
        by_header = any(name == b"anthropic-version" for name, _ in self.headers)
        return by_header or "/v1/messages" in self.scope["path"]

    def header(self, name: bytes) -> str | None:
        """Return the value of a header; None if it did not send it."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), None)

    async def body(self) -> AsyncGenerator[bytes]:
        """Yield its body.

        Raises:
            _HungUpError: it hung up before the end.
        """
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _HungUpError
            more = message.get("more_body", False)
            if message["body"]:
                yield message["body"]
        self._is_read.set()

    async def left(self) -> None:
        """Return when it has hung up; not before its body was read, which tells by itself."""
        await self._is_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def get(self, reply: Any) -> None:
        """Send it the provider's reply."""
        try:
            await self._begin(reply.status_code, end_to_end(reply.headers.raw))
            async for chunk in reply.stream:
                await self._go_on(chunk, more=True)
        except httpx.HTTPError as error:  # the server cuts the connection, as the provider did
            _log.warning("the provider broke off a reply (%s)", type(error).__name__)
        else:
            await self._go_on(b"", more=False)
        finally:
            await reply.aclose()

    async def refuse(self, error: ErrorReply) -> None:
        """Send it an error of the proxy."""
        headers, content = error.encoded(anthropic=self.is_anthropic)
        await self._begin(error.status, headers)
        await self._go_on(content, more=False)

    async def _begin(self, status: int, headers: Headers) -> None:
        self.is_answered = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _go_on(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


async def _joined(kept: deque[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while kept:
        yield kept.popleft()
    async for chunk in rest:
        yield chunk


def _check(caller: _Caller, *, only_here: bool) -> None:
    """Refuse what does not come from a program on this machine, and WebSockets.

    A browser that was directed here under a foreign name (DNS rebinding) shows that name in ``Host``;
    one that a foreign page has send something shows the page in ``Origin``.

    Raises:
        CallerError: the message says why.
    """
    host, origin = caller.header(b"host"), caller.header(b"origin")
    here = is_loopback(host or "") and (origin is None or is_loopback(urlsplit(origin).netloc))
    if only_here and not here:
        raise CallerError("this proxy serves only programs on its own machine", status=403)
    if (caller.header(b"upgrade") or "").lower() == "websocket":  # Java's client offers others
        raise CallerError("WebSockets cannot pass: use the provider's HTTP interface")
