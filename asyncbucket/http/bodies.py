"""Bodies that tell the attempt what passes: a request's when it leaves, a reply's when it is over.

A client insists on its own library's kind of stream, so a body's class is derived from the bases of
the request's or the reply's stream, whichever library that is from.

A reply's body holds the attempt; if it is dropped, the attempt's slot is given back. A request's
body refers to it weakly, because a connection pool keeps the request while its connection is in
use, and a reply that is dropped unread never ends that use.
"""

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

#: How much of a reply's end is kept, in bytes: more than an error's body, or what follows the usage.
_TAIL_BYTES: Final = 65_536
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

    async def aclose(self) -> None:
        await self._inner.aclose()

    def close(self) -> None:
        self._inner.close()

    def _note_sent(self) -> None:
        attempt = self._attempt()
        if attempt is not None:
            attempt.request_sent()


class _KeptBody:
    """Give a reply's body that was read already."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._data

    def __iter__(self) -> Iterator[bytes]:
        yield self._data


async def keep_body(reply: Any, io: IO) -> None:
    """Read a reply's body, which frees its connection, and put it back for whoever reads the reply."""
    stream: Any = reply.stream
    stream_class: Any = type(stream)
    kept = _body_class(stream_class, _KeptBody)
    if kept is not None and not reply.is_closed:
        try:
            data = await io.read(stream)
        finally:
            await io.close(stream)
        reply.stream = kept(data)


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
    stream_class: Any = type(stream)  # hashable, which mypy cannot know
    body_class = _body_class(stream_class, _RequestBody)
    return stream if body_class is None else body_class(stream, attempt)


def reply_body(stream: Any, attempt: "Attempt") -> Any:
    """Return a reply's ``stream``, wrapped so that ``attempt`` sees it pass; None if it is foreign."""
    stream_class: Any = type(stream)
    body_class = _body_class(stream_class, _ReplyBody)
    return None if body_class is None else body_class(stream, attempt)


@functools.lru_cache(maxsize=64)
def _body_class(stream: type[Any], body: type[Any]) -> type[Any] | None:
    bases = tuple(base for base in stream.__mro__ if base.__name__ in _STREAM_CLASSES)
    return type("PacedByteStream", (body, *bases), {}) if bases else None


class Tail:
    """Keep the head and the end of a body that passes by, without copying the end.

    Args:
        encoding: how the body is compressed, or ``"identity"``.
    """

    __slots__ = ("_chunks", "_encoding", "_head", "_limit", "_size")

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._chunks: deque[bytes] = deque()
        self._head = b""
        self._size = 0
        self._limit = _TAIL_BYTES if encoding == "identity" else _ENCODED_TAIL_BYTES

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
        end = b"".join(self._chunks)
        if self._encoding == "identity":
            return self._head, end
        end = decoded(end, self._encoding)
        return end, end


def decoded(data: bytes, encoding: str) -> bytes:
    """Return ``data`` decoded, as far as it goes; nothing if it is odd, or becomes too large.

    A few bytes may unpack to gigabytes. So the output is bounded, and an ``encoding`` whose library
    cannot bound it is not decoded.
    """
    limit = _MAX_DECODED_BYTES + 1
    try:
        if encoding in ("gzip", "deflate"):
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
