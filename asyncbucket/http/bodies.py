"""Bodies that tell the attempt what passes: a request's when it leaves, a reply's when it is over.

A client insists on its own library's kind of stream, so a body's class is derived from the bases of
the request's or the reply's stream, whichever library that is from.

A reply's body holds the attempt; if it is dropped, the attempt's slot is given back. A request's
body refers to it weakly, because a connection pool keeps the request while its connection is in
use, and a reply that is dropped unread never ends that use.
"""

import contextlib
import functools
import importlib
import weakref
import zlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.waiting import IO

if TYPE_CHECKING:
    from asyncbucket.http.attempt import Attempt

#: How much of a reply's end is kept, in bytes: more than what follows the usage.
_TAIL_BYTES: Final = 65_536
#: How long (s) a refusal's body may take after its headers.
_LONGEST_REFUSAL: Final = 5.0
#: How much of a compressed reply is kept (it must be complete to be decoded), and decoded.
_ENCODED_TAIL_BYTES: Final = 1_048_576
_MAX_DECODED_BYTES: Final = 8 * 1_048_576
#: The first bytes of a stream: Anthropic's first event has the tokens of the prompt.
_HEAD_BYTES: Final = 4_096

#: The bases by which httpx and httpx2 know a stream.
_STREAM_CLASSES: Final = ("AsyncByteStream", "SyncByteStream")


class _ReplyBody:
    """Pass on a reply's body, and tell the attempt."""

    def __init__(self, inner: Any, attempt: "Attempt") -> None:
        self._inner = inner
        self._attempt = attempt

    async def __aiter__(self) -> AsyncIterator[bytes]:
        complete = False
        chunks = self._inner.__aiter__()
        try:
            async for chunk in chunks:
                self._attempt.chunk_received(chunk)
                yield chunk
            complete = True
        finally:
            self._attempt.body_ended(complete=complete)
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self._inner:
                self._attempt.chunk_received(chunk)
                yield chunk
        except GeneratorExit:
            raise  # perhaps from the collector, amid the limiter's work: `close` may follow
        except BaseException:
            self._attempt.body_ended(complete=False)
            raise
        self._attempt.body_ended(complete=True)

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            self._attempt.body_ended(complete=False)

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self._attempt.body_ended(complete=False)


class _RequestBody:
    """Pass on a request's body, which is read once the headers have been sent."""

    def __init__(self, inner: Any, attempt: "Attempt") -> None:
        self._inner = inner
        self._attempt = weakref.ref(attempt)

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._note_sent()
        chunks: AsyncIterator[bytes] = self._inner.__aiter__()
        return chunks

    def __iter__(self) -> Iterator[bytes]:
        self._note_sent()
        return iter(self._inner)

    def _note_sent(self) -> None:
        attempt = self._attempt()
        if attempt is not None:
            attempt.request_sent()


class _KeptBody:
    """Give a reply's body that was read already, and the error that ended it, if one did."""

    def __init__(self, data: bytes, error: Exception | None) -> None:
        self._data = data
        self._error = error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def __iter__(self) -> Iterator[bytes]:
        yield self._data
        if self._error is not None:
            raise self._error


async def read_ahead(reply: Any, io: IO) -> bytes:
    """Read a refusal's body, which frees its connection, and put it back; return it, decoded.

    What is longer than any provider's, or takes longer, is cut off: a call that is refused is over.
    """
    if reply.is_closed:  # it came with its body, as in tests
        content: bytes = reply.content
        return content
    stream, chunks, error = reply.stream, list[bytes](), None
    body, room = io.iterator(stream), _MAX_DECODED_BYTES
    try:
        with contextlib.suppress(TimeoutError):
            async with io.timeout(_LONGEST_REFUSAL):
                while room > 0 and (chunk := await io.next_item(body, None)) is not None:
                    chunks.append(chunk)
                    room -= len(chunk)
    except Exception as broken:  # noqa: BLE001 - the headers say enough; whoever reads on meets it
        error = broken
    finally:
        await io.close(stream)
    data = b"".join(chunks)
    reply.stream = _wrapped(_KeptBody, stream, data, error)
    return decoded(data, encoding_of(reply))


def content_of(request: Any) -> bytes | None:
    """Return a request's body, if it is in memory; one that is still to be streamed is left alone."""
    try:
        content: bytes = request.content
    except RuntimeError:
        return None
    return content


def can_be_resent(request: Any) -> bool:
    """Tell whether a request's body can be sent once more: it is in memory, or a form with files."""
    if content_of(request) is not None:
        return True
    # A file of unknown length cannot be rewound.
    is_form = type(request.stream).__name__ == "MultipartStream"
    return is_form and "content-length" in request.headers


def request_body(stream: Any, attempt: "Attempt") -> Any:
    """Return a request's ``stream``, wrapped so that it tells ``attempt`` when it leaves."""
    return _wrapped(_RequestBody, stream, stream, attempt)


def reply_body(stream: Any, attempt: "Attempt") -> Any:
    """Return a reply's ``stream``, wrapped so that ``attempt`` sees it pass."""
    return _wrapped(_ReplyBody, stream, stream, attempt)


def _wrapped(wrapper: Any, stream: Any, *args: Any) -> Any:
    """Return ``wrapper(*args)`` as a stream of the library that ``stream`` is from."""
    bases = tuple(base for base in type(stream).__mro__ if base.__name__ in _STREAM_CLASSES)
    return _with_bases(wrapper, bases)(*args)


@functools.lru_cache(maxsize=64)
def _with_bases(wrapper: Any, bases: tuple[type[Any], ...]) -> type[Any]:
    return type("PacedByteStream", (wrapper, *bases), {})


def encoding_of(reply: Any) -> str:
    """Return how the body of a reply is compressed, or ``"identity"``."""
    encoding: str = reply.headers.get("content-encoding") or "identity"
    return encoding.lower()


class Tail:
    """Keep the head and the end of a reply's body that passes by, without copying the end."""

    __slots__ = ("_chunks", "_encoding", "_head", "_limit", "_size")

    def __init__(self, reply: Any) -> None:
        # A body that came with the reply, as in tests, is decoded already.
        self._encoding = "identity" if reply.is_closed else encoding_of(reply)
        self._chunks: deque[bytes] = deque()
        self._head = b""
        self._size = 0
        self._limit = _TAIL_BYTES if self._encoding == "identity" else _ENCODED_TAIL_BYTES

    def add(self, chunk: bytes) -> None:
        """Note the next chunk."""
        chunks = self._chunks
        if len(self._head) < _HEAD_BYTES:  # even the first event may come in pieces
            self._head += chunk[: _HEAD_BYTES - len(self._head)]
        chunks.append(chunk)
        self._size += len(chunk)
        while self._size - len(chunks[0]) >= self._limit:
            self._size -= len(chunks.popleft())

    def read(self) -> tuple[bytes, bytes]:
        """Return head and end, decoded; empty if that cannot be done."""
        end = decoded(b"".join(self._chunks), self._encoding)
        return (self._head if self._encoding == "identity" else end), end


def decoded(data: bytes, encoding: str) -> bytes:
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
            reader = importlib.import_module("zstandard").ZstdDecompressor().stream_reader(data)
            found = reader.read(limit)
        else:
            return b""
    except Exception:  # noqa: BLE001 - not installed, too old, or not what it says
        return b""
    return found if len(found) < limit else b""
