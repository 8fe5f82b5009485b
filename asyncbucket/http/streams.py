"""Bodies that tell the attempt what passes: a request's when it leaves, a reply's when it is over.

A client insists on its own library's kind of stream, so a body's class is derived from that of the
request's or the reply's stream, whichever library that is from.

A reply's body holds the attempt; if it is dropped, the attempt's slot is given back. A request's
body refers to it weakly, because a connection pool keeps the request while its connection is in
use, and a reply that is dropped unread never ends that use.
"""

import functools
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Final

from asyncbucket.http.attempt import Attempt


class _AsyncReplyBody:
    """Pass on an async body, and tell the attempt."""

    def __init__(self, inner: Any, attempt: Attempt) -> None:
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

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            self._attempt.body_ended(complete=False)


class _SyncReplyBody:
    """Pass on a body, and tell the attempt."""

    def __init__(self, inner: Any, attempt: Attempt) -> None:
        self._inner = inner
        self._attempt = attempt

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

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self._attempt.body_ended(complete=False)


class _AsyncRequestBody:
    """The body of a request, which is read once the headers have been sent."""

    def __init__(self, inner: Any, attempt: Attempt) -> None:
        self._inner = inner
        self._attempt = weakref.ref(attempt)

    def __aiter__(self) -> AsyncIterator[bytes]:
        _note_sent(self._attempt)
        chunks: AsyncIterator[bytes] = self._inner.__aiter__()
        return chunks

    async def aclose(self) -> None:
        await self._inner.aclose()


class _SyncRequestBody:
    """The body of a request, which is read once the headers have been sent."""

    def __init__(self, inner: Any, attempt: Attempt) -> None:
        self._inner = inner
        self._attempt = weakref.ref(attempt)

    def __iter__(self) -> Iterator[bytes]:
        _note_sent(self._attempt)
        return iter(self._inner)

    def close(self) -> None:
        self._inner.close()


def _note_sent(attempt: "weakref.ref[Attempt]") -> None:
    referent = attempt()
    if referent is not None:
        referent.request_sent()


_REPLY_BODIES: Final = {"AsyncByteStream": _AsyncReplyBody, "SyncByteStream": _SyncReplyBody}
_REQUEST_BODIES: Final = {"AsyncByteStream": _AsyncRequestBody, "SyncByteStream": _SyncRequestBody}


def reply_body_class(stream: object, name: str) -> type[Any] | None:
    """Return a class of body of the same kind as ``stream``: a subclass of its library's ``name``."""
    stream_class: Any = type(stream)  # hashable, which mypy cannot know
    return _paced_body_class(stream_class, name, _REPLY_BODIES[name])


def request_body(stream: Any, attempt: Attempt, name: str) -> Any:
    """Return the body of a request, wrapped so that it tells ``attempt`` when it leaves."""
    stream_class: Any = type(stream)
    body_class = _paced_body_class(stream_class, name, _REQUEST_BODIES[name])
    return stream if body_class is None else body_class(stream, attempt)


@functools.lru_cache(maxsize=64)
def _paced_body_class(stream: type[Any], name: str, mixin: type[Any]) -> type[Any] | None:
    for base in stream.__mro__:
        if base.__name__ == name:
            return type(f"Paced{name}", (mixin, base), {})
    return None
