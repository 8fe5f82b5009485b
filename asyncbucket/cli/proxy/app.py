"""The proxy at work: an ASGI application that passes calls on, and what serves it.

The transport prices a call by its body, and sends it again if it fails. So a body is read before
its call waits, as far as bodies may be held. One that is too large passes as a stream: it counts as
one request and as a call without text, and is sent once. Replies pass chunk by chunk, as fast as the
caller reads. A task watches each connection. If the caller hangs up, its call is cancelled, whether
it waits or runs, and `asyncbucket.http` gives back what it took.

Calls and status pages have addresses of their own. So every path of a provider can be called, also
its ``/metrics``; and in a pod, calls may stay on loopback while probes and scrapes come from outside.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import httpx
import uvicorn
from prometheus_client import CollectorRegistry, make_asgi_app
from starlette.datastructures import Headers as ReadHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from asyncbucket.cli.proxy.callers import (
    OWN,
    CallerTerms,
    Headers,
    ProxyError,
    error_response,
    protocol_of,
    with_key,
)
from asyncbucket.engine.errors import AsyncBucketError
from asyncbucket.http.endpoints import Endpoints, read_pool
from asyncbucket.http.transport import PacedTransport
from asyncbucket.http_server import configured, listen
from asyncbucket.limiter import Limiter
from asyncbucket.providers.prefixes import read_mode
from asyncbucket.telemetry import prometheus, report
from asyncbucket.telemetry.stats import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from asyncbucket.cli.proxy import ProxyOptions

#: RFC 9110, 7.6.1, with those that older software sends.
_HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)
#: The most bytes that are held of one body, and of all together: a million tokens, and 64 million.
_HELD_BODY: Final = 4 * 1_048_576
_HELD: Final = 64 * _HELD_BODY
#: Seconds, as the SDKs have them; how many connections there are is the limiter's business.
_TIMEOUT: Final = {"connect": 5.0, "read": 600.0, "write": 600.0, "pool": None}
#: A caller that sends nothing of its body for so many seconds holds memory, or a slot, in vain; and
#: one that takes as long for a request's head, a connection.
_STALLED: Final = 60.0
#: The most bytes of a request's headers.
_HEAD: Final = 65_536
#: How often a path may be percent-encoded.
_CODINGS: Final = 4
_HEAD_IS_LATE: Final = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)
#: Seconds that open calls get when the proxy is stopped: Kubernetes kills after 30.
_GRACE: Final = 25
#: A caller takes two descriptors, one on each side; many systems allow 1,024.
_DESCRIPTORS: Final = 65_536

_log: Final = logging.getLogger("asyncbucket.proxy")


class Proxy:
    """A proxy that is about to serve: it listens already.

    Args:
        options: what it is made of.

    Raises:
        ValueError: an address is taken or not available, or an argument of the limiter is wrong.
    """

    def __init__(self, options: "ProxyOptions") -> None:
        #: Where calls go, with whose key, and who shares; replaced while calls are open.
        self._options = options
        endpoints: Endpoints | None = None
        self.limiter: Limiter
        if options.pool is None:
            self.limiter = Limiter(*options.limits, **options.terms)
        else:
            self.limiter, endpoints = read_pool(options.pool)
        self._transport = PacedTransport(
            self.limiter,
            profile=options.profile,
            retries=options.retries,
            endpoints=endpoints,
            learn=options.learn is not False,
            cache=read_mode(options.cache or "count"),
        )
        #: A pool's calls are made for its first member, and rewritten for whichever takes them.
        self._pooled_at = self._transport.base_url or None
        self._terms = CallerTerms()
        #: Bytes of all bodies that are held.
        self._held = 0
        registry = CollectorRegistry()
        prometheus(self.limiter, registry=registry)
        self._metrics: ASGIApp = make_asgi_app(registry)
        try:
            self.sockets = [listen(*address) for address in options.addresses]
        except OSError as error:
            raise ValueError(f"{error.strerror}: change listen or status") from error
        #: Where calls come in, and where the status pages are.
        self.address, self.status_address = map(_address_of, self.sockets)

    def run(self, reread: Callable[[], "ProxyOptions"] | None = None) -> None:
        """Serve until SIGINT or SIGTERM; then finish what is open, or drop it after a while.

        Args:
            reread: returns new options on SIGHUP; by default that signal is not taken.
        """
        _allow_many_connections()
        asyncio.run(self._run(reread))

    async def _run(self, reread: Callable[[], "ProxyOptions"] | None) -> None:
        server, loop = _Server(self), asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # Windows, where Ctrl-C ends it at once
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, server.handle_exit, number, None)
            if reread is not None:
                loop.add_signal_handler(signal.SIGHUP, self.reload, reread)
        try:
            await server.serve(self.sockets)
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close the connections to the provider and to the store."""
        await self._transport.aclose()
        await self.limiter.aclose()

    def reload(self, reread: Callable[[], "ProxyOptions"]) -> None:
        """Put new options in force; open calls go on. What cannot be read changes nothing."""
        try:
            options = reread()
            if options.pool != self._options.pool:
                raise ValueError("only a restart can change pool")  # noqa: TRY301
            if options.pool is None:
                concurrency = options.terms.get("concurrency")
                self.limiter.reconfigure(*options.limits, concurrency=concurrency)
        except (OSError, TypeError, ValueError) as error:
            _log.error("the settings stay as they are: %s", error)
            return
        self._options = options
        _log.info("new settings are in force (limits, upstream, keys); a restart changes the rest")

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a request at either address; at one on loopback, only programs on this machine."""
        is_call = not self.status_address.endswith(f":{scope['server'][1]}")
        address = self.address if is_call else self.status_address
        if is_loopback(address) and not _is_from_here(ReadHeaders(scope=scope)):
            error = ProxyError("this proxy serves only programs on its own machine", status=403)
            await error_response(error, scope)(scope, receive, send)
        elif is_call:
            await self._serve(_Caller(scope, receive, send))
        else:
            await self._status_page(scope["path"])(scope, receive, send)

    def _status_page(self, path: str) -> "ASGIApp":
        match path:
            case "/healthz":
                return PlainTextResponse("ok")
            case "/" | "/stats":
                return JSONResponse(report([self.limiter]))
            case "/metrics":
                return self._metrics
            case _:
                return PlainTextResponse("try /stats, /metrics or /healthz", 404)

    async def _serve(self, caller: "_Caller") -> None:
        """Answer a call, unless its caller leaves or the server stops."""
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
            stopping = ProxyError(
                "the proxy is shutting down: try again", status=503, retry_after=1.0
            )
            await caller.refuse(stopping)

    async def _answer(self, caller: "_Caller") -> None:
        options, headers = self._options, caller.scope["headers"]
        try:
            whom = {
                "tenants_by_key": options.tenants_by_key,
                "trust_priority": options.trust_priority,
            }
            with self._terms.applied(headers, **whom):
                request = await self._request(caller, options)
                reply = await self._transport.send(request)
                await _pass_on(reply, caller.send)
        except ClientDisconnect:
            return
        except (AsyncBucketError, ProxyError, httpx.HTTPError) as error:
            await caller.refuse(error)
        finally:
            self._held -= caller.held

    async def _request(self, caller: "_Caller", options: "ProxyOptions") -> httpx.Request:
        """Return the provider's request.

        Raises:
            ProxyError: its path cannot be sent, or it does not come.
        """
        scope = caller.scope
        _check(scope["raw_path"], scope["headers"])
        headers = _end_to_end(scope["headers"], b"host", b"expect")
        headers = [(name, value) for name, value in headers if not name.startswith(OWN)]
        if options.key is not None:
            headers = with_key(headers, options.key, protocol_of(scope))
        path, query = scope["raw_path"], scope["query_string"]
        url = httpx.URL(self._pooled_at or str(options.upstream))
        base = url.raw_path.rstrip(b"/")
        if (self._pooled_at is not None or base.endswith(b"/v1")) and path.startswith(b"/v1/"):
            path = path.removeprefix(b"/v1")  # which a base URL has, if the provider's paths do
        target = base + path + b"?" * bool(query) + query
        try:
            url = url.copy_with(raw_path=target)
        except httpx.InvalidURL:
            raise ProxyError("the path is too long, or has a #") from None
        content = await self._body(caller) or None
        return httpx.Request(
            scope["method"], url, headers=headers, content=content, extensions={"timeout": _TIMEOUT}
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


def _end_to_end(headers: Iterable[tuple[bytes, bytes]], *left_out: bytes) -> Headers:
    """Return ``headers`` in their order, without those that concern one connection, and ``left_out``."""
    given = [(name, name.lower(), value) for name, value in headers]
    hop_by_hop = {*_HOP_BY_HOP, *left_out}
    for _, lower, value in given:
        if lower == b"connection":
            hop_by_hop |= {each.strip().lower() for each in value.split(b",")}
    return [(name, value) for name, lower, value in given if lower not in hop_by_hop]


def _check(path: bytes, headers: Headers) -> None:
    """Refuse what servers read in different ways, and what no SDK sends.

    Raises:
        ProxyError: the message says what.
    """
    if not path.startswith(b"/"):  # ``OPTIONS *``, ``CONNECT``, or a whole URL
        raise ProxyError("call the proxy as a base URL, not as an HTTP proxy")
    if _has_dot_segment(path):  # which somebody may resolve, and leave the path of the base URL
        raise ProxyError("a path with . or .. as a segment is refused, however it is encoded")
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        raise ProxyError("send Content-Length or Transfer-Encoding, not both")
    if sum(len(name) + len(value) for name, value in headers) > _HEAD:
        raise ProxyError(f"the headers have more than {_HEAD:,} bytes", status=431)


def _has_dot_segment(path: bytes) -> bool:
    """Tell whether a path has ``.`` or ``..`` as a segment, as any server may read it.

    Servers decode a path before they split it, some of them twice; some drop what follows a semicolon,
    and some take a backslash for a slash.
    """
    text, coded = path.decode("latin-1"), ""
    for _ in range(_CODINGS):
        text, coded = unquote(text, "latin-1"), text
    segments = text.replace("\\", "/").split("/")
    return text != coded or any(each.partition(";")[0] in {".", ".."} for each in segments)


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
                raise ProxyError("no part of the body arrived for a minute", status=408) from None
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

    async def refuse(self, error: Exception) -> None:
        """Tell it of an error."""
        await error_response(error, self.scope)(self.scope, self.receive, self.send)


async def _joined(kept: deque[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while kept:
        yield kept.popleft()
    async for chunk in rest:
        yield chunk


_HTTP: Any = AutoHTTPProtocol  # by h11 or httptools


class _Connection(_HTTP):  # type: ignore[misc]
    """uvicorn's, with one deadline for the head of a request, however slowly it comes."""

    cycle: Any
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._late is None and self._is_idle():  # a further request has begun
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_head(self) -> None:
        self._late = self.loop.call_later(_STALLED, self._head_is_late)

    def _head_is_late(self) -> None:
        self._late = None
        if self._is_idle() and not self.transport.is_closing():
            self.transport.write(_HEAD_IS_LATE)
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to us, and says nothing of its own."""

    def __init__(self, app: Any) -> None:
        # It would warn of each upgrade that is offered, and Java's client always offers one.
        super().__init__(
            configured(app, http=_Connection, log_level="error", timeout_graceful_shutdown=_GRACE)
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.server_state.tasks:  # they are told that the proxy stops
            await asyncio.wait(self.server_state.tasks)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _address_of(listener: socket.socket) -> str:
    host, port, *_ = listener.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_from_here(headers: ReadHeaders) -> bool:
    """Tell whether a request comes from a program on this machine.

    A browser that was directed here under a foreign name (DNS rebinding) shows that name in ``Host``;
    one that a foreign page has send something shows the page in ``Origin``.
    """
    origin = headers.get("origin")
    is_own = origin is None or is_loopback(origin.partition("://")[2])
    return is_own and is_loopback(headers.get("host", ""))


def _allow_many_connections() -> None:
    """Raise this process's bound on open descriptors as far as it may."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such bound
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
