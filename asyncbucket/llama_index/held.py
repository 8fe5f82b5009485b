"""The guard against paying twice, which the wrap shares with the transports beneath it.

Here a note carries the usage besides: where a method of a model ends in another and makes something
of its reply, or asks its provider several times, the usage is seen within, and settles the call
outside. A method that calls others several times makes so many requests; what those call themselves is
part of them. And it knows the SDK's stream, to hang up: that refers to itself, so that closing the model's
stream, which only forgets it, leaves the provider at work until the garbage collector comes by.
"""

import contextlib
import inspect
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from asyncbucket.context import put_back
from asyncbucket.http.held import Held, around
from asyncbucket.http.learn import Ear
from asyncbucket.http.usage import Usage, usage_of
from asyncbucket.limiter import Limiter
from asyncbucket.limiter.lease import Lease
from asyncbucket.limiter.levels import is_under

T = TypeVar("T")


class HeldCall(Held):
    """Note that a model's call runs in this context under a lease of ``limiter``."""

    __slots__ = ("_nested", "_replies", "_stream", "usage")

    def __init__(self, limiter: Limiter, lease: Lease, ear: Ear) -> None:
        super().__init__(limiter, lease, ear)
        #: Methods called within.
        self._nested = 0
        #: What they said they used.
        self.usage: Usage | None = None
        #: The same of the SDK's replies, all together.
        self._replies: Usage | None = None
        # Weakly: a pooled connection keeps this note for good.
        self._stream: weakref.ref[Any] | None = None

    def asks(self) -> None:
        """Count a method that is called within: each but the first owes a request more."""
        self._nested += 1
        self.owe(self._nested)

    def replied(self, usage: Usage | None) -> None:
        """Add what one reply of the SDK says was used."""
        if usage is not None:
            self._replies = usage if self._replies is None else self._replies + usage

    def used(self, said: Usage | None) -> Usage | None:
        """Return what the call used: what its reply ``said``, or what was seen within if that is more."""
        for seen in (self.usage, self._replies):
            said = said | seen if said is not None else seen
        return said

    def streams(self, stream: object) -> None:
        """Note the SDK's own stream that this call reads."""
        self._stream = weakref.ref(stream)

    async def hang_up(self) -> None:
        """Close the SDK's stream, and with it the request. Idempotent."""
        closing = self._close()
        if inspect.isawaitable(closing):
            await closing

    def hang_up_sync(self) -> None:
        """Do what `hang_up` does, of a synchronous stream."""
        self._close()

    def _close(self) -> Any:
        stream = None if self._stream is None else self._stream()
        return None if stream is None else stream.close()


def held_call(limiter: Limiter) -> Held | None:
    """Return the note that this context runs under a lease that counts at ``limiter``, or None."""
    return next((held for held, _ in around() if is_under(held.limiter, limiter)), None)


class _Nested:
    """A method that runs within a paced call, with those that it calls."""

    __slots__ = ("held", "usage")

    def __init__(self, held: HeldCall) -> None:
        self.held = held
        self.usage: Usage | None = None


_NESTED: Final[ContextVar[_Nested | None]] = ContextVar("asyncbucket nested", default=None)


@contextlib.contextmanager
def nested(held: Held) -> Generator[None]:
    """Have a method run within the call of ``held``: what several of them use adds up."""
    outer = _NESTED.get()
    if not isinstance(held, HeldCall) or (outer is not None and outer.held is held):
        yield
        return
    held.asks()
    token = _NESTED.set(mine := _Nested(held))
    try:
        yield
    finally:
        put_back(_NESTED, token)
        if mine.usage is not None:
            held.usage = mine.usage if held.usage is None else held.usage + mine.usage


def note_usage(held: Held, usage: Usage | None) -> None:
    """Keep the usage that a nested call has seen, for the call outside."""
    outer = _NESTED.get()
    if usage is not None and isinstance(held, HeldCall):
        keeps = held if outer is None or outer.held is not held else outer
        keeps.usage = usage | keeps.usage


async def noted(held: Held, stream: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """Pass the stream of a nested call on; the call outside is settled by the usage that goes by."""
    try:
        async for item in stream:
            note_usage(held, usage_of(item))
            yield item
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()


def noted_sync(held: Held, stream: Iterator[T]) -> Generator[T, None, None]:
    """Do what `noted` does, of a synchronous stream."""
    try:
        for item in stream:
            note_usage(held, usage_of(item))
            yield item
    finally:
        if isinstance(stream, Generator):
            stream.close()
