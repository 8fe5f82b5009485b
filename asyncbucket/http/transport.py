"""Transports that pace every HTTP attempt, under httpx and httpx2.

A transport is the lowest layer of a client. Redirects, authentication and an SDK's retries are
above it, so each of their attempts comes through here and waits its turn, before the client's
time-outs begin to count. It has no base class, because httpx and httpx2 need none, and serves
async and synchronous clients alike. It returns its inner transport's own response, whose stream is
replaced by one that watches the chunks pass.

A call that is already paced by the same limiter, by a wrapped model or another transport above, is
charged once: the transport lets it pass, reads the headers, and logs what to change. A transport
says in the extensions of what it sends that it has paid, so another one beneath it knows even if a
foreign transport between them copies the request or sends it from another task.

Under a pool, each attempt is rewritten for the member that admitted it: see `endpoints`. What headers
and refusals say concerns that member alone: see `lanes`.

Clients copy the extensions of a request to those that follow its redirects. So they also say which
host was asked in the first place: what the headers of another host say is not learned.
"""

import copy
import functools
import logging
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypedDict

from asyncbucket.attempt import Attempt, paying, retried
from asyncbucket.engine.errors import AsyncBucketError
from asyncbucket.engine.limiter import Limiter
from asyncbucket.http.endpoints import Endpoints, Sites
from asyncbucket.http.exchange import Exchange, library_of, request_body
from asyncbucket.http.lanes import Lanes, ReadRequest, Routing
from asyncbucket.levels import amounts_of, counts_at, is_in_shadow, on_one_path
from asyncbucket.pools import Pool
from asyncbucket.providers.errors import RefusedReply
from asyncbucket.providers.prefixes import CacheMode, read_mode
from asyncbucket.providers.profiles import Profile
from asyncbucket.retry import Retry
from asyncbucket.waiting import ASYNC, IO, SYNC, PerLoopTransport, run

if TYPE_CHECKING:
    import httpx
    import httpx2

    class _AnyTransport(
        httpx.AsyncBaseTransport,
        httpx.BaseTransport,
        httpx2.AsyncBaseTransport,
        httpx2.BaseTransport,
    ):
        """A transport for any client, to type checkers; the libraries themselves ask for no base."""

        async def handle_async_request(self, request: Any) -> Any: ...
        def handle_request(self, request: Any) -> Any: ...

else:
    _AnyTransport = object

#: The SDKs' pool size; the limiter decides how many calls are in flight.
POOL: Final = {"max_connections": 1_000, "max_keepalive_connections": 100}

#: The methods by which async and synchronous clients send a request.
_METHODS: Final = ("handle_async_request", "handle_request")
#: In a request's extensions: the limiter that has paid for what is being sent, and the host that was
#: asked first, which a redirect inherits.
_PAYER: Final = "asyncbucket.payer"
_FIRST_HOST: Final = "asyncbucket.first_host"
#: By which an SDK that Stainless made is known.
_SDK: Final = "x-stainless-lang"
_RETRY_COUNT: Final = "x-stainless-retry-count"
#: Where it says in a reply why no other member of a pool was tried.
_NOTE_HEADER: Final = "x-asyncbucket-note"

_log: Final = logging.getLogger("asyncbucket")


class TransportOptions(TypedDict, total=False):
    """What `Limiter.transport` takes by keyword."""

    profile: Profile | str | None
    learn: bool
    routes: Routing | None
    retries: Retry | int | None
    cache: CacheMode


class PacedTransport(_AnyTransport):
    """Pace every request of a client, async or synchronous, by ``limiter``; retry what is worth it.

    A synchronous client blocks its thread while it waits. A client that is given a transport ignores
    its own ``http2=``, ``verify=``, ``limits=`` and the proxies of the environment; and with its own
    ``proxy=`` or ``mounts=``, requests don't come here. For those, pass
    ``inner=httpx.AsyncHTTPTransport(http2=True)``, or use `asyncbucket.http.clients.http_client`,
    which keeps them.

    Args:
        limiter: what admits the requests.
        inner: the transport that sends them; it is closed with this one. By default that of the
            first request's library, with the SDKs' pool of 1,000 connections; each event loop gets
            one of its own.
        profile: a provider's name or a profile; by default it is found by the host of each request.
        learn: read what headers say is left; a limiter without limits adopts those that they
            announce.
        routes: which child a request is for, by its path and model, with wildcards:
            ``{"/v1/embeddings": "embeddings", "gpt-4o*": "big"}``; see `asyncbucket.http.lanes`.
            A refusal then pauses that child.
        retries: how often a failed request is sent again, or a `Retry`: 4 times by default, 0 for
            never. A streamed body is not sent again, and if a layer above retries, this one does
            not.
        endpoints: if the limiter is a pool, where each member is; see `asyncbucket.http.endpoints`.
        cache: ``"lead"`` has one of the calls with the same prompt prefix go first, as long as the
            provider does not have it in its cache; the others wait until its reply begins, at most 5 s.
            By default, ``"count"``, all go, and each is charged as the provider will charge it; see
            `asyncbucket.providers.prefixes`.

    Raises:
        ValueError: ``profile``, ``retries``, ``cache``, a route or an endpoint cannot be understood.
        TypeError: ``inner`` is not a transport, or a route's target is not a child or a name; or
            endpoints are missing, or given for what is no pool.
        ImportError: stamina, which retries, is not installed.
    """

    def __init__(
        self,
        limiter: Limiter,
        inner: Any = None,
        *,
        profile: Profile | str | None = None,
        learn: bool = True,
        routes: Routing | None = None,
        retries: Retry | int | None = None,
        endpoints: Endpoints | None = None,
        cache: CacheMode = "count",
    ) -> None:
        sends = any(callable(getattr(inner, method, None)) for method in _METHODS)
        if inner is not None and (isinstance(inner, type) or not sends):
            what = inner if isinstance(inner, type) else type(inner).__name__
            raise TypeError(
                f"inner must be a transport with handle_async_request() or handle_request(), not {what}"
            )
        self.limiter: Limiter = limiter
        #: What sends: what was given, or else what is made for each method and library.
        self._given = inner
        self._made: dict[tuple[str, str], Any] = {}
        #: Where the members of a pool are.
        self._sites = None
        if isinstance(limiter, Pool) or endpoints is not None:
            self._sites = Sites(limiter, {} if endpoints is None else endpoints)
        hosts = {} if self._sites is None else self._sites.hosts
        retry = Retry.times(retries)
        self._lanes = Lanes(limiter, profile, learn, retry, routes, hosts, read_mode(cache))
        self._warned: set[str] = set()

    @property
    def inner(self) -> Any:
        """The transport that sends the requests; None if none was given and none was needed yet.

        SDKs and tools that look at a client's transport, its class, its pool or its proxy, find
        them here. On an event loop that is the transport with this loop's connections.
        """
        senders = [sender for method in _METHODS for sender in self._senders(method)]
        inner = next(iter(senders), None)
        return inner.on_this_loop() if isinstance(inner, PerLoopTransport) else inner

    @property
    def base_url(self) -> str:
        """What a client's ``base_url`` may be: that of a pool's first member; else nothing."""
        return "" if self._sites is None else self._sites.base_url

    def above(self, inner: Any) -> Self:
        """Return a copy above another inner transport, such as one that a client mounts for a proxy."""
        transport = copy.copy(self)
        transport._given = inner  # noqa: SLF001 - its own
        return transport

    def __repr__(self) -> str:
        inner = self.inner
        what = "transport" if inner is None else type(inner).__name__
        return f"<{type(self).__name__} of {self.limiter.name!r} above {what}>"

    async def handle_async_request(self, request: Any) -> Any:
        """Send ``request`` when it is its turn, and return the inner transport's response."""
        try:
            return await self.send(request)
        except AsyncBucketError as error:
            return _refused(request, error)

    def handle_request(self, request: Any) -> Any:
        """Send ``request`` when it is its turn, and return the inner transport's response."""
        try:
            return run(self.send(request, SYNC))
        except AsyncBucketError as error:
            return _refused(request, error)

    async def send(self, request: Any, io: IO = ASYNC) -> Any:
        """Send ``request`` when it is its turn; what the limiter refuses raises, whoever asks.

        Raises:
            AsyncBucketError: the limiter refuses it.
        """
        method = _METHODS[io is SYNC]
        inner = self._make(method, request) if self._given is None else self._given
        send = getattr(inner, method, None)
        if send is None:
            raise TypeError(
                f"the inner transport {type(inner).__name__} has no {method}(): it is for the other "
                f"kind of client"
            )
        if self._sites is not None and self._sites.owner(request.url) is None:
            raise ValueError(
                f"a request to {request.url.host!r} is for no member of pool {self.limiter.name!r}: "
                f"make the client with the base_url of one of them; redirects elsewhere are not "
                f"followed"
            )
        first_host = request.extensions.get(_FIRST_HOST)
        is_first = first_host is None or request.url.host == first_host
        read = self._lanes.read(request, teaches=self._sites is not None or is_first)
        is_sdk_retry = self._is_sdk_retry(request)
        if read.cost is None or self._is_paid(read.lane.limiter, request.extensions.get(_PAYER)):
            return await self._send_paid(request, read, io, send)
        above, retrier = retried(), read.lane.retrier
        send_once = functools.partial(self._send_once, request, read, io, send)
        if (
            above is not None
            or is_sdk_retry
            or retrier is None
            or is_in_shadow(read.lane.limiter)
            or not _can_be_resent(request, read)
        ):
            sent = None if above is None else above.sent
            return await send_once(Attempt(read.lane.limiter, sent=sent))
        try:
            return await retrier.call(send_once, io=io, tried=getattr(self, method))
        except RefusedReply as refused:
            if self._sites is not None:  # the client makes its own error, so the notes go there
                refused.reply.headers[_NOTE_HEADER] = _notes_on(refused)
            return refused.reply

    async def _send_paid(self, request: Any, read: ReadRequest, io: IO, send: Any) -> Any:
        """Send a request that needs no admission, or has one already."""
        held, member = paying(read.lane.limiter), None
        lease = None if held is None else held.lease
        if self._sites is not None:  # it goes to the member that was paid, if one was
            paid = (each for each in self._sites.hosts if lease and counts_at(lease, each))
            member = next(paid, self._sites.owner(request.url))
        (provider, profile), sent_at = read.at(member), read.lane.limiter.now()
        reply = await io.call(send, self._routed(request, read, member))
        if read.teaches:
            own = None if lease is None else amounts_of(lease)
            provider.headers.read(reply.headers, profile, since=sent_at, own=own)
        return reply

    async def _send_once(
        self, request: Any, read: ReadRequest, io: IO, send: Any, attempt: Attempt
    ) -> Any:
        """Send ``request`` once, and return the reply.

        Raises:
            RefusedReply: its status is an error, and whoever retries has to know what it means.
        """
        lease = await attempt.admit(
            io, prompt=read.prompt, conversation=read.conversation, cost=read.cost
        )
        exchange = Exchange(read, attempt, lease)
        request.extensions = {_FIRST_HOST: read.call.host, **request.extensions}
        routed = self._routed(request, read, attempt.member)
        stream, extensions = routed.stream, {**routed.extensions, _PAYER: attempt.limiter}
        # What is sent is a copy: a client may send the same request several times at once.
        sent = object.__new__(type(routed))
        vars(sent).update(
            vars(routed), stream=request_body(stream, exchange), extensions=extensions
        )
        try:
            reply = await (send(sent) if io is ASYNC else io.call(send, sent))
            verdict = await exchange.replied(reply, sent, io)
        except BaseException as error:
            exchange.failed(error)
            raise
        if verdict is not None and attempt.is_retried:
            raise RefusedReply(reply, verdict)
        return reply

    def _routed(self, request: Any, read: ReadRequest, member: Limiter | None) -> Any:
        """Return what is sent: in a pool, the request as it is for ``member``."""
        if self._sites is None or member is None:
            return request
        return self._sites.rewritten(request, read.call.body, member)

    def _make(self, method: str, request: Any) -> Any:
        """Return a transport of the library of ``request``, with the SDKs' pool."""
        library = library_of(request)
        key = method, library.__name__
        if key not in self._made:
            limits = library.Limits(**POOL)
            made = PerLoopTransport(lambda: library.AsyncHTTPTransport(limits=limits))
            if method == "handle_request":
                made = library.HTTPTransport(limits=limits)
            self._made.setdefault(key, made)  # the first may come on several threads
        return self._made[key]

    def _senders(self, method: str) -> list[Any]:
        """Return what sends by ``method``, so far."""
        if self._given is not None:
            return [self._given] if hasattr(self._given, method) else []
        return [made for key, made in self._made.items() if key[0] == method]

    def _is_paid(self, limiter: Limiter, payer: Limiter | None) -> bool:
        """Tell whether a layer above has already paid for the request, and warn once.

        That is a model, or the ``payer`` of another transport.
        """
        held, layer = paying(limiter), "another transport"
        if held is not None:
            payer, layer = held.limiter, "a model"
        elif payer is None or not on_one_path(payer, limiter):
            return False
        self._warn_once(
            limiter.name,
            "calls that %s has paid for by limiter %r come through a transport of %r, too: they "
            "count once, at the first; pace only one of the two",
            *(layer, payer.name, limiter.name),
        )
        return True

    def _is_sdk_retry(self, request: Any) -> bool:
        """Tell whether an SDK above sends a request again, though this retries; warn once."""
        if request.headers.get(_RETRY_COUNT, "0") == "0" or is_in_shadow(self.limiter):
            return False
        self._warn_once(
            _RETRY_COUNT,
            "the SDK above the transport of limiter %r retries failed calls, too: each of its "
            "retries is one more attempt, after the SDK's own back-off; pass max_retries=0 to the SDK",
            self.limiter.name,
        )
        return True

    def _warn_once(self, topic: str, message: str, *args: object) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            _log.warning(message, *args)

    async def aclose(self) -> None:
        """Close the inner transport."""
        for inner in self._senders("handle_async_request"):
            await inner.aclose()

    def close(self) -> None:
        """Close the inner transport."""
        for inner in self._senders("handle_request"):
            inner.close()

    async def __aenter__(self) -> Self:
        for inner in self._senders("handle_async_request"):
            await inner.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        for inner in self._senders("handle_request"):
            inner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Refused:
    """Raise the limiter's error as soon as an SDK asks whether the call succeeded.

    What a transport raises, SDKs made by Stainless (OpenAI's, Anthropic's, Groq's and others) turn
    into an error of their own, after they have tried it again. What they meet when they look at a
    reply passes as it is.
    """

    refusal: AsyncBucketError  # pyright: ignore[reportUninitializedInstanceVariable]

    @property
    def is_success(self) -> bool:
        raise self.refusal

    def raise_for_status(self) -> NoReturn:
        raise self.refusal


@functools.cache
def _refused_class(library: Any) -> Any:
    return type("RefusedResponse", (_Refused, library.Response), {})


def _refused(request: Any, error: AsyncBucketError) -> Any:
    """Return a reply that raises ``error``, if an SDK would wrap what is raised here; else raise it."""
    if _SDK not in request.headers or _PAYER in request.extensions:
        raise error
    headers = {"x-should-retry": "false"}
    reply = _refused_class(library_of(request))(429, headers=headers, text=str(error))
    reply.refusal = error
    return reply


def _can_be_resent(request: Any, read: ReadRequest) -> bool:
    """Tell whether a request's body can be sent once more: it is in memory, or a form with files."""
    if read.in_memory:
        return True
    is_form = type(request.stream).__name__ == "MultipartStream"
    return (
        is_form and "content-length" in request.headers
    )  # a file of unknown length cannot be rewound


def _notes_on(refused: RefusedReply) -> str:
    """Return the notes on a failed call in ASCII, for a header."""
    notes = "; ".join(getattr(refused, "__notes__", ()))
    return notes.encode("ascii", "backslashreplace").decode()
