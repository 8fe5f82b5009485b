"""One HTTP exchange, from its admission to the end of its reply, and the bodies that tell it so.

The lease is given back by whatever happens first: the body is read to its end, it is closed, the
exchange fails, or the reply is dropped. With it the lease is dropped, which then releases itself. A
refusal is read and judged at once, and the call is over, whether or not anybody looks at the reply;
and a GET for a stream of events, which may stay open as long as the program runs, is over with its
headers.

A client insists on its own library's kind of stream, so a body's class is derived from the bases of
the request's or the reply's stream, whichever library that is from. A reply's body holds the
exchange; if it is dropped, the exchange's slot is given back. A request's body refers to it weakly,
because a connection pool keeps the request while its connection is in use, and a reply that is
dropped unread never ends that use.
"""

import asyncio
import contextlib
import functools
import importlib
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from asyncbucket.attempt import Attempt, answered, end_failed, end_refused, take_refusal
from asyncbucket.engine.lease import Lease
from asyncbucket.http.lanes import ReadRequest
from asyncbucket.levels import amounts_of, calls_with_room, sent
from asyncbucket.providers.errors import FIRST_ERROR, Verdict, judge_reply, never_sent
from asyncbucket.providers.prefixes import Prompt, count_use
from asyncbucket.providers.request import any_json, is_input_only, reports_own_usage
from asyncbucket.providers.usage import Usage, find_usage, is_complete, unpacked
from asyncbucket.waiting import ASYNC, IO

FAMILIES: Final = ("httpx", "httpx2")
#: How long (s) a refusal's body may take after its headers; twice that if a thread reads it.
_LONGEST_REFUSAL: Final = 5.0
#: How much of a reply's end is kept, in bytes: more than what follows the usage.
_TAIL_BYTES: Final = 65_536
#: How much of a compressed reply is kept (it must be complete to be decoded), and decoded.
_ENCODED_TAIL_BYTES: Final = 1_048_576
_MAX_DECODED_BYTES: Final = 8 * 1_048_576
#: The first bytes of a stream: Anthropic's first event has the tokens of the prompt.
_HEAD_BYTES: Final = 4_096


class Exchange:
    """Hold a lease until a call is over, and note the usage that passes.

    Args:
        read: the request.
        attempt: the attempt that was admitted.
        lease: what it holds.
    """

    def __init__(self, read: ReadRequest, attempt: Attempt, lease: Lease) -> None:
        if lease.waited:  # the loop may have been busy since the admission
            sent(lease)
        self._read = read
        self._provider, self._profile = read.at(attempt.member)
        self._lease = lease
        self._noted = attempt.sent
        assert self._noted.at is not None
        self._sent_at = self._noted.at
        self._tail: _Tail | None = None
        #: What is sent, until a reply says what of it was in the provider's cache.
        self._prompt = read.prompt
        #: What the first event of a stream says of its prompt.
        self._early: Usage | None = None
        #: What is left at the provider is compared with what was charged, so the headers of a call that
        #: relies on the cache are read once that is settled.
        self._learn: Callable[[], None] | None = None

    def failed(self, error: BaseException) -> None:
        """End without a reply; a request that never left costs nothing."""
        self._no_usage()
        end_failed(self._lease, error, unsent=never_sent(error))

    def request_sent(self) -> None:
        """Note that the request leaves only now."""
        self._sent_at = self._noted.at = self._read.lane.limiter.now()
        sent(self._lease)

    async def replied(self, reply: Any, request: Any, io: IO) -> Verdict | None:
        """Take in a reply to ``request``; return what it means if its status is an error."""
        read, headers = self._read, self._provider.headers
        ok = reply.status_code < FIRST_ERROR
        if read.teaches and (not ok or headers.is_due(self._sent_at)):
            learn = functools.partial(
                headers.read,
                reply.headers,
                self._profile,
                since=self._sent_at,
                own=amounts_of(self._lease),
            )
            if ok and self._prompt is not None and self._prompt.prefix is not None:
                self._learn = learn
            else:
                learn()
        if not ok:
            return await self._refused(reply, request, io)
        if self._provider.refusals.latest:
            self._provider.refusals.succeeded(self._sent_at)
        answered(self._lease)
        method = read.call.method
        if method == "GET" and "text/event-stream" in reply.headers.get("content-type", ""):
            self._lease.release()
        elif (
            read.prompt is not None or read.price is not None or read.needs_usage(self._profile)
        ) and reports_own_usage(method, read.call.path):
            self._tail = _Tail(_encoding_of(reply))
        if reply.is_closed:  # it came with its body, or a transport beneath has read it
            self.chunk_received(reply.content)
            self.body_ended(complete=True)
        else:
            reply.stream = _wrapped(_ReplyBody, reply.stream.__class__)(reply.stream, self)
        return None

    async def _refused(self, reply: Any, request: Any, io: IO) -> Verdict | None:
        """Judge a failed reply, pause the limiter if need be, and note that for whoever retries."""
        if self._read.price is not None:
            self._lease.settle(usd=0)  # no provider charges for an error
        self._no_usage()
        if not self._read.teaches:
            self._lease.failed()
            return None
        limiter, learns = self._provider.refusals.limiter, self._provider.headers.learns
        calls = calls_with_room(self._lease, limiter) if learns else 0
        body = any_json(await _read_ahead(reply, request, io, limiter.now))
        verdict = judge_reply(reply.status_code, body, reply.headers)
        noted = self._noted
        effect = take_refusal(self._lease, verdict, noted, limiter, learns=learns, in_flight=calls)
        end_refused(self._lease, verdict, effect)
        return verdict

    def chunk_received(self, chunk: bytes) -> None:
        """Take in a part of the body on its way to the client."""
        if self._tail is not None:
            has_begun = self._tail.add(chunk)
            if self._prompt is not None and has_begun and (head := self._tail.first_events()):
                self._early = find_usage(b"", head)
                if self._early is not None:
                    self._begin(self._prompt, self._early)

    def _begin(self, prompt: Prompt, usage: Usage) -> None:
        """Take in the first event of a stream: its prompt is in the cache now, or was, which settles it."""
        self._prompt = None
        prompt.replied(usage, self._lease)
        if prompt.prefix is not None or usage.cached_tokens or usage.cached_beside:
            used = self._profile.settled(self._read.call, usage)
            if "tokens" in used:  # else they would follow
                self._lease.settle(input_tokens=used["input_tokens"])
            if self._learn is not None:
                self._read_headers(self._learn)

    def _read_headers(self, learn: Callable[[], None]) -> None:
        """Learn from the headers that have waited, once."""
        self._learn = None
        learn()

    def _no_usage(self) -> None:
        prompt, self._prompt = self._prompt, None
        if prompt is not None:
            prompt.over()

    def body_ended(self, *, complete: bool) -> None:
        """End with the body, read to its end or cut off; a second call does nothing."""
        tail, self._tail = self._tail, None
        try:
            if tail is not None:
                head, end = map(unpacked, tail.read())
                if complete or is_complete(end):
                    # In a reply in one piece, what a model wrote may look like usage, and comes first.
                    first = b"" if self._early or head.lstrip()[:1] == b"{" else head
                    usage = find_usage(end, first) or find_usage(head)
                    self._settle(usage and usage | self._early)
            if self._learn is not None:
                self._read_headers(self._learn)
        finally:
            self._lease.release()
            self._no_usage()

    def _settle(self, usage: Usage | None) -> None:
        read = self._read
        if usage is None:
            return
        if is_input_only(read.call.path):  # some report the total only
            usage = Usage(usage.total, 0, usage.total)
        amounts: dict[str, float] = {**self._profile.settled(read.call, usage)}
        if amounts and "tokens" not in amounts:  # else it would become the sum of input and output
            amounts["tokens"] = self._lease.cost.get("tokens", 0)
        if read.price is not None:
            amounts["usd"] = read.price.of(usage)
        if amounts:
            self._lease.settle(**amounts)
        if usage.cached_tokens or usage.cached_beside or usage.written_tokens:
            count_use(self._lease, usage, self._profile)
        if self._prompt is not None:
            self._prompt.replied(usage, self._lease)
            self._prompt = None
        if usage.output_tokens:
            read.lane.forecast.observe(-(-usage.output_tokens // read.call.asked.replies))


class _ReplyBody:
    """Pass on a reply's body, and tell the exchange."""

    def __init__(self, inner: Any, exchange: Exchange) -> None:
        self._inner = inner
        self._exchange: Exchange | None = exchange

    def _end(self, *, complete: bool) -> None:
        """Let go of the exchange, too: a reply is part of a cycle, and may be kept for long."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.body_ended(complete=complete)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        complete = False
        try:
            async for chunk in self._inner:
                if self._exchange is not None:
                    self._exchange.chunk_received(chunk)
                yield chunk
            complete = True
        finally:
            self._end(complete=complete)

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self._inner:
                if self._exchange is not None:
                    self._exchange.chunk_received(chunk)
                yield chunk
        except GeneratorExit:
            raise  # perhaps from the collector, amid the limiter's work: `close` may follow
        except BaseException:
            self._end(complete=False)
            raise
        self._end(complete=True)

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            self._end(complete=False)

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self._end(complete=False)


class _RequestBody:
    """Pass on a request's body, which is read once the headers have been sent."""

    def __init__(self, inner: Any, exchange: Exchange) -> None:
        self._inner = inner
        self._exchange = weakref.ref(exchange)

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._note_sent()
        return aiter(self._inner)

    def __iter__(self) -> Iterator[bytes]:
        self._note_sent()
        return iter(self._inner)

    def _note_sent(self) -> None:
        exchange = self._exchange()
        if exchange is not None:
            exchange.request_sent()


def request_body(stream: Any, exchange: Exchange) -> Any:
    """Return a request's ``stream``, wrapped so that it tells ``exchange`` when it leaves."""
    return _wrapped(_RequestBody, stream.__class__)(stream, exchange)


@functools.lru_cache(maxsize=64)
def _wrapped(wrapper: Any, stream: Any) -> type[Any]:
    """Return ``wrapper`` as a stream of the library that a class of streams is from."""
    library = library_named(_family(stream))
    bases = (wrapper, library.AsyncByteStream, library.SyncByteStream)
    return type("PacedByteStream", bases, {})


async def _read_ahead(reply: Any, request: Any, io: IO, now: Callable[[], float]) -> bytes:
    """Read a refusal's body, which frees its connection, and put it back; return it, decoded.

    What is longer than any provider's or takes longer is cut off, and what breaks off ends there: the
    status and the headers say enough.
    """
    if reply.is_closed:  # it came with its body, or a transport beneath has read it
        return bytes(reply.content)
    stream, chunks, room = reply.stream, list[bytes](), _MAX_DECODED_BYTES
    timeout: Any = contextlib.nullcontext()
    until = now() + _LONGEST_REFUSAL
    if io is ASYNC:
        timeout = asyncio.timeout(_LONGEST_REFUSAL)
    else:  # a thread can't be woken, so its connection has to stop waiting
        timeouts = request.extensions.get("timeout", {})
        longest = min(timeouts.get("read") or _LONGEST_REFUSAL, _LONGEST_REFUSAL)
        request.extensions["timeout"] = {**timeouts, "read": longest}
    with contextlib.suppress(Exception):
        try:
            async with timeout:
                body = io.iterator(stream)
                while room > 0 and (chunk := await io.next_item(body, None)) is not None:
                    chunks.append(chunk)
                    room = room - len(chunk) if now() < until else 0
        finally:
            await io.close(stream)
    data = b"".join(chunks)
    reply.headers.pop("content-length", None)  # less may have come; a proxy passes headers on
    reply.stream = library_of(stream).ByteStream(data)
    return _decoded(data, _encoding_of(reply))


class _Tail:
    """Keep the head and the end of a reply's body that passes by."""

    __slots__ = ("_encoding", "_end", "_head", "_limit")

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._head, self._end = b"", bytearray()
        self._limit = _TAIL_BYTES if encoding == "identity" else _ENCODED_TAIL_BYTES

    def add(self, chunk: bytes) -> bool:
        """Note the next chunk; return whether hardly more than that has come."""
        has_begun = len(self._end) < _HEAD_BYTES
        self._end += chunk
        if len(self._end) > 2 * self._limit:  # seldom, so that a byte is moved once at most
            self._head = self._head or bytes(self._end[:_HEAD_BYTES])
            del self._end[: -self._limit]
        return has_begun

    def first_events(self) -> bytes:
        """Return what has come of a stream that has begun; nothing if it is none, or compressed."""
        if self._encoding != "identity" or self._end.startswith(b"{"):
            return b""
        return self._head or bytes(self._end[:_HEAD_BYTES])

    def read(self) -> tuple[bytes, bytes]:
        """Return head and end, decoded; empty if that cannot be done."""
        end = _decoded(bytes(self._end), self._encoding)
        head = self._head if self._encoding == "identity" else b""
        return head or end[:_HEAD_BYTES], end


def _encoding_of(reply: Any) -> str:
    """Return how the body of a reply is still compressed, or ``"identity"``."""
    if reply.is_closed:  # a body that was read is decoded already
        return "identity"
    return str(reply.headers.get("content-encoding") or "identity").lower()


def _decoded(data: bytes, encoding: str) -> bytes:
    """Return ``data`` decoded, as far as it goes; nothing if it is odd, or becomes too large.

    A few bytes may unpack to gigabytes. So the output is bounded, and an ``encoding`` whose library
    cannot bound it is not decoded.
    """
    limit = _MAX_DECODED_BYTES + 1
    try:
        if encoding == "identity":
            found = data
        elif encoding in ("gzip", "deflate"):
            found = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, limit)
        elif encoding == "br":
            unpacker = importlib.import_module("brotli").Decompressor()
            found = unpacker.process(data, output_buffer_limit=limit)
        elif encoding == "zstd":
            unpacker = _zstd().ZstdDecompressor()
            if hasattr(unpacker, "stream_reader"):  # zstandard's
                found = unpacker.stream_reader(data).read(limit)
            else:
                found = unpacker.decompress(data, limit)
        else:
            return b""
    except Exception:  # noqa: BLE001 - not installed, too old, or not what it says
        return b""
    return found if len(found) < limit else b""


def _zstd() -> Any:
    """Return what httpx2 or httpx unpacks zstd with: Python's from 3.14 on, or a package."""
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return importlib.import_module("zstandard")


def library_of(thing: object) -> Any:
    """Return the library that an object's class is from, or is derived from: httpx or httpx2.

    Raises:
        TypeError: it is from neither.
    """
    return library_named(_family(type(thing)))


def _family(cls: type[Any]) -> str:
    family = family_of(cls)
    if family is None:
        raise TypeError(f"a transport sends requests of httpx or httpx2, not {cls}")
    return family


def library_named(family: str) -> Any:
    """Return the library of that name.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(family)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{family} is not installed: pip install "asyncbucket[http]" {family}'
        ) from error


def family_of(cls: type[Any]) -> str | None:
    """Return the library that a class comes from, or is derived from; None if it is neither."""
    families = (base.__module__.partition(".")[0] for base in cls.__mro__)
    return next((family for family in families if family in FAMILIES), None)
