"""The guard against paying twice, which the wrap shares with the transports beneath it.

Here the note in the context also carries the usage. If a method of a model calls another and makes
something of its reply, or sends the provider several requests, the usage is seen inside, and
settles the call outside. A method that calls others several times makes that many requests; calls
within those are part of them. The note also knows the SDK's stream, to close the request: that
stream is part of a reference cycle, so closing the model's stream, which only drops it, leaves the
provider at work until the garbage collector runs.
"""

import contextlib
import functools
import inspect
import operator
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from asyncbucket.core.context import put_back
from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import is_under
from asyncbucket.core.limiter import Limiter
from asyncbucket.nesting import HeldLease, held_leases, innermost_held_lease
from asyncbucket.providers.errors import end_failed, never_sent
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.providers.usage import Usage, usage_of

T = TypeVar("T")

#: Marks the end of a stream, because None may be one of its items.
_END: Final[Any] = object()


class HeldCall(HeldLease):
    """Note that a model's call runs in this context under a lease of ``limiter``."""

    __slots__ = ("_sdk_usage", "_stream", "methods", "reports_requests")

    def __init__(self, limiter: Limiter, lease: Lease, header_reader: HeaderReader) -> None:
        super().__init__(limiter, lease, header_reader)
        #: Methods called inside.
        self.methods: list[NestedMethod] = []
        #: What the SDK's replies said was used, in total.
        self._sdk_usage: Usage | None = None
        # A weak reference, because a pooled connection keeps this note for good.
        self._stream: weakref.ref[Any] | None = None
        #: Whether it sends its requests by a client that reports them.
        self.reports_requests = False

    def add_method(self, method: "NestedMethod") -> None:
        """Note a method that is called inside: each but the first adds a request."""
        self.methods.append(method)
        self.pay_for(len(self.methods))

    def add_usage(self, usage: Usage | None) -> None:
        """Add what one reply of the SDK says was used."""
        if usage is not None:
            self._sdk_usage = usage if self._sdk_usage is None else self._sdk_usage + usage

    def actual_usage(self, reported: Usage | None) -> Usage | None:
        """Return what the call used: what its reply ``reported``, or what was seen inside if more.

        What the provider's limits do not count is left out.
        """
        nested_usages = [method.usage for method in self.methods if method.usage is not None]
        for seen in (
            functools.reduce(operator.add, nested_usages) if nested_usages else None,
            self._sdk_usage,
        ):
            reported = reported | seen if reported is not None else seen
        if reported is None or self.profile is None:
            return reported
        return self.profile.counted(reported)

    def failed(self, lease: Lease, error: BaseException) -> None:
        """End the call's lease; a call that is known to have sent nothing costs nothing."""
        end_failed(lease, error, unsent=self._has_sent_nothing(error))

    def _has_sent_nothing(self, error: BaseException) -> bool:
        """Tell whether no request left, by what the client reported, or by the only one's error."""
        if not self.requests:
            return self.reports_requests
        # The SDK's own error says only that there was no connection; its cause says why.
        return self.requests == 1 and self._sent_at is None and never_sent(error.__cause__)

    def note_stream(self, stream: object) -> None:
        """Note the SDK's own stream that this call reads."""
        self._stream = weakref.ref(stream)

    async def close_stream(self) -> None:
        """Close the SDK's stream, and with it the request. Idempotent."""
        closing = self._close()
        if inspect.isawaitable(closing):
            await closing

    def close_stream_sync(self) -> None:
        """Do the same as `close_stream`, for a synchronous stream."""
        self._close()

    def _close(self) -> Any:
        stream = None if self._stream is None else self._stream()
        return None if stream is None else stream.close()


def held_call(limiter: Limiter) -> HeldCall | None:
    """Return the note of a lease in this context that counts at ``limiter``, or None."""
    return next(
        (
            held
            for held, _ in held_leases()
            if isinstance(held, HeldCall) and is_under(held.limiter, limiter)
        ),
        None,
    )


def note_client(*, reports: bool) -> None:
    """Note whether the client that this context's call asks for reports its requests."""
    held = innermost_held_lease()
    if isinstance(held, HeldCall):
        held.reports_requests = reports


class NestedMethod:
    """Run a method inside a paced call, with the methods it calls, and note what it uses."""

    __slots__ = ("usage",)

    def __init__(self) -> None:
        self.usage: Usage | None = None

    def note(self, usage: Usage | None) -> None:
        """Keep what a reply, or a part of one, says was used."""
        if usage is not None:
            self.usage = usage | self.usage

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Make everything called in a ``with`` block part of this method."""
        token = _METHOD.set(self)
        try:
            yield
        finally:
            put_back(_METHOD, token)

    async def relay(self, stream: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """Pass on the stream that this method returns."""
        try:
            while True:
                with self.running():
                    item: T = await anext(stream, _END)
                if item is _END:
                    return
                self.note(usage_of(item))
                yield item
        finally:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()

    def relay_sync(self, stream: Iterator[T]) -> Generator[T, None, None]:
        """Do the same as `relay`, for a synchronous stream."""
        try:
            while True:
                with self.running():
                    item: T = next(stream, _END)
                if item is _END:
                    return
                self.note(usage_of(item))
                yield item
        finally:
            if isinstance(stream, Generator):
                stream.close()


_METHOD: Final[ContextVar[NestedMethod | None]] = ContextVar("asyncbucket nested", default=None)


@contextlib.contextmanager
def nested(held: HeldCall) -> Generator[NestedMethod]:
    """Run a method inside the call of ``held``; what several of them use adds up."""
    method = _METHOD.get()
    if method is None or method not in held.methods:
        held.add_method(method := NestedMethod())
    with method.running():
        yield method


async def nested_stream(
    held: HeldCall, start: Callable[[], Awaitable[AsyncIterator[T]]]
) -> AsyncGenerator[T, None]:
    """Do the same as `nested` for a method that returns a stream: start it, and return the stream."""
    with nested(held) as method:
        stream = await start()
    return method.relay(aiter(stream))


def nested_stream_sync(
    held: HeldCall, start: Callable[[], Iterator[T]]
) -> Generator[T, None, None]:
    """Do the same as `nested_stream`, for a synchronous stream."""
    with nested(held) as method:
        stream = start()
    return method.relay_sync(iter(stream))
