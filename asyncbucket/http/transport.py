"""Transports that pace every HTTP attempt, under httpx and httpx2.

A transport is the lowest layer of a client. Redirects, authentication and an SDK's retries are
above it, so each of their attempts comes through here and waits its turn, before the client's
time-outs begin to count. It has no base class, because httpx and httpx2 need none. It returns its
inner transport's own response, whose stream is replaced by one that watches the chunks pass. That
stream must be of the library's own kind (the client checks), so its class is derived from that of
the original stream.

A call that is already paced by the same limiter, by a wrapped model above or by a paced transport
beneath, is charged once: the transport lets it pass, reads the headers, and logs what to change. An
SDK's own retries above do not break the limits, since each attempt is admitted; but they wait
twice, in the SDK's back-off and in line, so they are mentioned once in the log.
"""

import importlib
import logging
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Final, Literal, Self

from asyncbucket.by_loop import PerLoopTransport
from asyncbucket.core.levels import is_under
from asyncbucket.core.limiter import Limiter
from asyncbucket.http.attempt import Attempt
from asyncbucket.http.lane import acquire_keywords
from asyncbucket.http.layers import Layers
from asyncbucket.http.reading import RequestReader, has_method
from asyncbucket.http.routes import Routing
from asyncbucket.http.streams import reply_body_class, request_body
from asyncbucket.nesting import give_up_slots
from asyncbucket.providers.errors import FIRST_ERROR
from asyncbucket.providers.profiles import Profile

Family = Literal["auto", "httpx", "httpx2"]

FAMILIES: Final = ("httpx", "httpx2")
#: The SDKs' pool size; the limiter decides how many calls are in flight.
POOL: Final = {"max_connections": 1_000, "max_keepalive_connections": 100}

_log: Final = logging.getLogger("asyncbucket")


def transport(
    limiter: Limiter,
    inner: Any = None,
    *,
    family: Family = "auto",
    profile: Profile | str | None = None,
    learn: bool = True,
    routes: Routing | None = None,
) -> "PacedTransport":
    """Return an async transport that paces every request by ``limiter``.

    A client that is given a transport ignores its own ``http2=``, ``verify=``, ``limits=`` and the
    proxies of the environment. For those, pass ``inner=httpx.AsyncHTTPTransport(http2=True)``, or
    use `asyncbucket.http.clients.http_client`, which keeps them.

    Args:
        limiter: what admits the requests.
        inner: the transport that sends them; it is closed with this one. By default the library's
            own, with the SDKs' pool of 1,000 connections; each event loop gets one of its own.
        family: the library of the default ``inner``; ``"auto"`` takes that of the first request.
        profile: a provider's name or a profile; by default it is found by the host of each request.
        learn: read what headers say is left; a limiter without limits adopts those that they
            announce.
        routes: which child a request is for, by its path and model, with wildcards:
            ``{"/v1/embeddings": "embeddings", "gpt-4o*": "big"}``; see `asyncbucket.http.routes`.
            A refusal then pauses that child.

    Raises:
        ValueError: ``family``, ``profile`` or a route cannot be understood.
        TypeError: ``inner`` is not an async transport, or a route's target is not a child or a
            name.
        ImportError: the library that ``family`` names is not installed.
    """
    return PacedTransport(
        limiter, inner, family=family, profile=profile, learn=learn, routes=routes
    )


def transport_sync(
    limiter: Limiter,
    inner: Any = None,
    *,
    family: Family = "auto",
    profile: Profile | str | None = None,
    learn: bool = True,
    routes: Routing | None = None,
) -> "PacedTransportSync":
    """Return a transport for synchronous clients; see `transport`. Waiting blocks the thread."""
    return PacedTransportSync(
        limiter, inner, family=family, profile=profile, learn=learn, routes=routes
    )


class _BaseTransport(ABC):
    """What both kinds of transport share."""

    #: The inner transport's method that sends a request.
    _method = ""

    def __init__(
        self,
        limiter: Limiter,
        inner: Any,
        *,
        family: Family,
        profile: Profile | str | None,
        learn: bool,
        routes: Routing | None,
    ) -> None:
        check_family(family)
        self.limiter: Limiter = limiter
        if isinstance(inner, _BaseTransport):
            inner = self._sending_transport(inner)
        if inner is not None and not has_method(inner, self._method):
            what = inner if isinstance(inner, type) else type(inner).__name__
            raise TypeError(f"inner must be a transport with {self._method}(), not {what}")
        if inner is None and family != "auto":
            inner = self._make(family)
        #: What sends the requests; None until the first request shows which library it is.
        self.inner: Any = inner
        self._opening = threading.Lock()
        self._reader = RequestReader(limiter, profile=profile, learn=learn, routes=routes)
        self._layers = Layers(limiter)

    @property
    def ignored_headers(self) -> int:
        """How many headers about limits held no number."""
        return self._reader.ignored_headers

    def __repr__(self) -> str:
        inner = "transport" if self.inner is None else type(self.inner).__name__
        return f"<{type(self).__name__} of {self.limiter.name!r} above {inner}>"

    def _sending_transport(self, inner: "_BaseTransport") -> Any:
        """Return the transport that will send the requests, if ``inner`` is a paced one."""
        ours, theirs = self.limiter, inner.limiter
        if is_under(ours, theirs):
            _log.warning(
                "a transport of limiter %r is put above one of %r: calls are charged once; "
                "give the inner transport itself",
                *(ours.name, theirs.name),
            )
            return inner.inner
        if is_under(theirs, ours):
            raise ValueError(
                f"a transport of limiter {ours.name!r} above one of its child {theirs.name!r} would "
                f"charge calls twice; give the child's transport to the client"
            )
        return inner

    def _open(self, request: Any) -> Any:
        """Make an inner transport of the library of ``request``."""
        with self._opening:  # the first requests may come on several threads
            if self.inner is None:
                self.inner = self._make(family_of(request))
        return self.inner

    @abstractmethod
    def _make(self, family: str) -> Any:
        """Return a transport of that library, with the SDKs' pool."""

    def _watch(self, attempt: Attempt, reply: Any, body_class: type[Any] | None) -> Any:
        """Return ``reply`` with a stream that watches the body."""
        attempt.headers_received(reply)
        if reply.status_code >= FIRST_ERROR:
            self._layers.seen_failure = True
        if body_class is None or reply.is_closed:
            if reply.is_closed:  # it came with its body, as in tests
                attempt.chunk_received(reply.content)
            attempt.body_ended(complete=True)
        else:
            reply.stream = body_class(reply.stream, attempt)
        return reply


class PacedTransport(_BaseTransport):
    """Pace an async client's requests; made by `transport`."""

    _method = "handle_async_request"

    async def handle_async_request(self, request: Any) -> Any:
        """Send ``request`` when it is its turn, and return the inner transport's response."""
        inner = self.inner or self._open(request)
        lane, call, profile, cost = self._reader.read(request)
        limiter = lane.limiter
        self._layers.check(request)
        if cost is None or self._layers.have_paid(limiter):
            sent_at = limiter.now()
            reply = await inner.handle_async_request(request)
            ok = reply.status_code < FIRST_ERROR
            lane.header_reader.read(reply.headers, profile, since=sent_at, ok=ok)
            return reply
        give_up_slots(limiter)
        lease = await limiter.acquire(**acquire_keywords(cost))
        attempt = lane.attempt(lease, call, profile)
        body = paced_body = request.stream
        try:
            request.stream = paced_body = request_body(body, attempt, "AsyncByteStream")
            reply = await inner.handle_async_request(request)
            return self._watch(attempt, reply, reply_body_class(reply.stream, "AsyncByteStream"))
        except BaseException as error:
            self._layers.seen_failure = True
            attempt.failed(error)
            raise
        finally:
            if request.stream is paced_body:  # else its reader has put a body there to resend
                request.stream = body

    def _make(self, family: str) -> Any:
        library = library_named(family)
        limits = library.Limits(**POOL)
        return PerLoopTransport(lambda: library.AsyncHTTPTransport(limits=limits))

    async def aclose(self) -> None:
        """Close the inner transport."""
        if self.inner is not None:
            await self.inner.aclose()

    async def __aenter__(self) -> Self:
        if self.inner is not None:
            await self.inner.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if self.inner is not None:
            await self.inner.__aexit__(exc_type, exc, traceback)


class PacedTransportSync(_BaseTransport):
    """Pace a synchronous client's requests; made by `transport_sync`."""

    _method = "handle_request"

    def handle_request(self, request: Any) -> Any:
        """Send ``request`` when it is its turn, and return the inner transport's response."""
        inner = self.inner or self._open(request)
        lane, call, profile, cost = self._reader.read(request)
        limiter = lane.limiter
        self._layers.check(request)
        if cost is None or self._layers.have_paid(limiter):
            sent_at = limiter.now()
            reply = inner.handle_request(request)
            ok = reply.status_code < FIRST_ERROR
            lane.header_reader.read(reply.headers, profile, since=sent_at, ok=ok)
            return reply
        give_up_slots(limiter)
        lease = limiter.acquire_sync(**acquire_keywords(cost))
        attempt = lane.attempt(lease, call, profile)
        body = paced_body = request.stream
        try:
            request.stream = paced_body = request_body(body, attempt, "SyncByteStream")
            reply = inner.handle_request(request)
            return self._watch(attempt, reply, reply_body_class(reply.stream, "SyncByteStream"))
        except BaseException as error:
            self._layers.seen_failure = True
            attempt.failed(error)
            raise
        finally:
            if request.stream is paced_body:  # else its reader has put a body there to resend
                request.stream = body

    def _make(self, family: str) -> Any:
        library = library_named(family)
        return library.HTTPTransport(limits=library.Limits(**POOL))

    def close(self) -> None:
        """Close the inner transport."""
        if self.inner is not None:
            self.inner.close()

    def __enter__(self) -> Self:
        if self.inner is not None:
            self.inner.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if self.inner is not None:
            self.inner.__exit__(exc_type, exc, traceback)


def check_family(family: str) -> None:
    """Raise a `ValueError` unless ``family`` is a library, or ``"auto"``."""
    if family != "auto" and family not in FAMILIES:
        raise ValueError(f"family must be auto, httpx or httpx2, not {family!r}")


def library_named(family: str) -> Any:
    """Return the library of that name.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(family)
    except ModuleNotFoundError as error:
        raise ImportError(f"{family} is not installed: pip install {family}") from error


def family_of(request: Any) -> str:
    """Return the library that made a request.

    Raises:
        TypeError: it is made by neither.
    """
    for cls in type(request).__mro__:
        family = cls.__module__.partition(".")[0]
        if family in FAMILIES:
            return family
    raise TypeError(f"a transport sends requests of httpx or httpx2, not {type(request).__name__}")
