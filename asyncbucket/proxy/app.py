"""The proxy as an ASGI application: a call from a caller to the provider, and back.

The transport prices a call by its body, and sends it again if it fails. So a body is read before
its call waits, as far as bodies may be held. One that is too large passes as a stream: it counts as
one request and as a call without text, and is sent once. Replies pass chunk by chunk, as fast as the
caller reads.

A task watches each connection. If the caller hangs up, its call is cancelled, whether it waits or
runs, and `asyncbucket.http` gives back what it took.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, Final

import httpx
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.limiter import Limiter
from asyncbucket.http.endpoints import Endpoints, Sites
from asyncbucket.http.transport import PacedTransport
from asyncbucket.proxy.caller_terms import OWN, CallerTerms, Headers, with_key
from asyncbucket.proxy.error_replies import ProxyError, error_response, protocol_of
from asyncbucket.proxy.options import ProxyOptions

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

#: RFC 9110, 7.6.1, with those that older software sends.
_HOP_BY_HOP: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
        *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)
#: The most bytes that are held of one body, and of all together: a million tokens, and 64 million.
_HELD_BODY: Final = 4 * 1_048_576
_HELD: Final = 64 * _HELD_BODY
#: Seconds, as the SDKs have them; how many connections there are is the limiter's business.
_TIMEOUT: Final = {"connect": 5.0, "read": 600.0, "write": 600.0, "pool": None}
#: A caller that sends nothing of its body for so many seconds holds memory, or a slot, in vain.
_STALLED: Final = 60.0

_log: Final = logging.getLogger("asyncbucket.proxy")


class Proxy:
    """Pass calls on to a provider, paced by ``limiter``.

    Args:
        limiter: what admits the calls.
        options: where they go, with whose key, and who shares; may be replaced while calls are open.
        endpoints: if the limiter is a pool, where its members are.
    """

    def __init__(
        self, limiter: Limiter, options: ProxyOptions, endpoints: Endpoints | None = None
    ) -> None:
        self.options = options
        self._transport = PacedTransport(limiter, profile=options.profile, endpoints=endpoints)
        #: A pool's calls are made for its first member, and rewritten for whichever takes them.
        self._pooled_at = None if endpoints is None else Sites(limiter, endpoints).base_url
        self._terms = CallerTerms()
        self._held = 0

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        caller = _Caller(scope, receive, send)
        call = asyncio.ensure_future(self._answer(caller))
        leaving = asyncio.ensure_future(caller.left())
        is_stopping = True
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((call, leaving), return_when=asyncio.FIRST_COMPLETED)
            is_stopping = False
        call.cancel()
        leaving.cancel()
        await asyncio.wait((call, leaving))
        if not call.cancelled():
            call.result()  # raises what nobody expected
        elif is_stopping and not caller.is_answered:
            stopping = ProxyError("the proxy stops: try again", status=503, retry_after=1.0)
            await error_response(stopping, scope)(scope, receive, send)

    async def aclose(self) -> None:
        """Close the connections to the provider."""
        await self._transport.aclose()

    async def _answer(self, caller: "_Caller") -> None:
        scope, options = caller.scope, self.options
        try:
            with self._terms.applied(scope["headers"], tenants_by_key=options.tenants_by_key):
                request = await self._request(caller, options)
                reply = await self._transport.handle_async_request(request)
                await _pass_on(reply, caller.send)
        except ClientDisconnect:
            return
        except (AsyncBucketError, ProxyError, httpx.HTTPError) as error:
            await error_response(error, scope)(scope, caller.receive, caller.send)
        finally:
            self._held -= caller.held

    async def _request(self, caller: "_Caller", options: ProxyOptions) -> httpx.Request:
        """Return the provider's request.

        Raises:
            ProxyError: it is for a WebSocket, its path cannot be sent, or it does not come.
        """
        scope = caller.scope
        upgrade = dict(scope["headers"]).get(b"upgrade", b"")
        if upgrade.lower() == b"websocket":  # Java's client offers others, and can do without
            raise ProxyError("WebSockets cannot pass: use the provider's HTTP interface")
        headers = _end_to_end(scope["headers"], b"host", b"expect")
        headers = [(name, value) for name, value in headers if not name.startswith(OWN)]
        if options.key is not None:
            headers = with_key(headers, options.key, protocol_of(scope))
        path, query = scope["raw_path"], scope["query_string"]
        if self._pooled_at is not None and path.startswith(b"/v1/"):
            path = path.removeprefix(b"/v1")  # instead of which each member has a base URL
        url, target = _address(self._pooled_at or str(options.upstream), path)
        extensions: dict[str, Any] = {"timeout": _TIMEOUT}
        if self._pooled_at is not None:
            url = url.copy_with(query=query or None)
        else:  # as it came: httpx would rewrite what others percent-encode differently
            extensions["target"] = target + b"?" * bool(query) + query
        return httpx.Request(
            scope["method"],
            url,
            headers=headers,
            content=await self._body(caller) or None,
            extensions=extensions,
        )

    async def _body(self, caller: "_Caller") -> bytes | AsyncIterator[bytes]:
        """Return the whole body if it may be held, else a stream."""
        chunks, kept = caller.body(), deque[bytes]()
        async for chunk in chunks:
            kept.append(chunk)
            caller.held += len(chunk)
            self._held += len(chunk)
            if caller.held > _HELD_BODY or self._held > _HELD:
                return _joined(kept, chunks)
        return b"".join(kept)


def _address(upstream: str, path: bytes) -> tuple[httpx.URL, bytes]:
    """Return a provider's URL for a caller's path, and the path that is sent, as it came.

    Raises:
        ProxyError: it is no path (``OPTIONS *``, ``CONNECT``, a whole URL), or too long.
    """
    url = httpx.URL(upstream)
    target = url.raw_path.rstrip(b"/") + path
    with contextlib.suppress(httpx.InvalidURL):
        if path.startswith(b"/"):
            return url.copy_with(raw_path=target), target
    raise ProxyError(
        "the path is too long, or does not begin with a slash: call the proxy as a base URL, not as "
        "an HTTP proxy"
    )


def _end_to_end(headers: Iterable[tuple[bytes, bytes]], *left_out: bytes) -> Headers:
    """Return ``headers`` in their order, without those that concern one connection, and ``left_out``."""
    given = [(name, name.lower(), value) for name, value in headers]
    hop_by_hop = {*_HOP_BY_HOP, *left_out}
    for _, lower, value in given:
        if lower == b"connection":
            hop_by_hop |= {each.strip().lower() for each in value.split(b",")}
        elif lower == b"transfer-encoding":  # which overrides it; both together smuggle requests
            hop_by_hop.add(b"content-length")
    return [(name, value) for name, lower, value in given if lower not in hop_by_hop]


async def _pass_on(reply: Any, send: "Send") -> None:
    """Send a caller the provider's reply."""
    response = StreamingResponse(reply.stream, reply.status_code)
    response.raw_headers = _end_to_end(reply.headers.raw)
    try:
        await response.stream_response(send)
    except httpx.HTTPError as error:  # the server cuts the connection, as the provider did
        _log.warning("the provider broke off a reply (%s)", type(error).__name__)
    finally:
        await reply.aclose()


class _Caller:
    """The other end of a connection: what it sends, and whether it is still there."""

    def __init__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        self.scope, self.receive = scope, receive
        #: Bytes of its body that are held.
        self.held = 0
        #: Whether its answer has begun.
        self.is_answered = False
        self._send = send
        self._is_read = asyncio.Event()

    async def body(self) -> AsyncGenerator[bytes]:
        """Yield its body.

        Raises:
            ClientDisconnect: it hung up before the end.
            ProxyError: it sent nothing for a while.
        """
        more = True
        while more:
            try:
                async with asyncio.timeout(_STALLED):
                    message = await self.receive()
            except TimeoutError:
                stalled = f"nothing of the body came for {_STALLED:g} s"
                raise ProxyError(stalled, status=408) from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            more = message.get("more_body", False)
            if message["body"]:
                yield message["body"]
        self._is_read.set()

    async def left(self) -> None:
        """Return when it has hung up; not before its body was read, which tells by itself."""
        await self._is_read.wait()
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def send(self, message: "Message") -> None:
        """Send it a part of its answer."""
        self.is_answered = True
        await self._send(message)


async def _joined(kept: deque[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while kept:
        yield kept.popleft()
    async for chunk in rest:
        yield chunk
