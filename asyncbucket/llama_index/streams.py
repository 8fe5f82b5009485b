"""Streams that hold their slot until they are exhausted, closed, broken off or dropped.

They are classes and not generators, because the ``finally`` of a generator that was never started
never runs. A stream must take nothing before its first item is requested, and must not depend on
being closed. Everything happens at the first ``__anext__``: the admission, the model's own call,
and the first item of its stream, which is where OpenAI's 429 appears. Up to that point a failed
attempt is retried like any call; after it never, because the caller has seen a part of the answer.

A dropped stream drops its lease, and a dropped lease releases itself, safely even if the garbage
collector interrupts the limiter. (A ``__del__`` here could not call `Lease.release`.)

However a stream ends, the request is closed, too, and so it is if an asynchronous stream is
dropped. Otherwise the provider would have more calls in flight than there are slots, because a
model's stream may stop, or break off, before the provider does. That the model's stream has ended
or was closed is not enough: see `held`. (SDKs not built like OpenAI's and Anthropic's close the
request when Python closes their own stream.)

The usage comes with a stream's last chunk; OpenAI sends it only if asked. If we asked and the user
did not, that chunk, empty except for the usage, is withheld: whoever looks at the last chunk
expects the end of the answer there.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from llama_index_instrumentation.dispatcher import active_instrument_tags
from llama_index_instrumentation.span import active_span_id

from asyncbucket.core.context import inherited, put_back
from asyncbucket.core.lease import Lease
from asyncbucket.llama_index.estimate import Estimate
from asyncbucket.llama_index.held import HeldCall
from asyncbucket.llama_index.pacing import Pacing
from asyncbucket.nesting import holding
from asyncbucket.providers.usage import Usage, usage_of
from asyncbucket.retry import Sent

if TYPE_CHECKING:
    from contextvars import ContextVar

T = TypeVar("T")

#: What makes OpenAI's streams end with their usage.
USAGE_OPTION: Final = {"stream_options": {"include_usage": True}}

_BAD_REQUEST: Final = (400, 404, 422)
#: Marks the end of a stream, because None may be one of its items.
_END: Final[Any] = object()


class _Stream(Generic[T]):
    """What both kinds of stream share: hold a lease, note the usage that passes, let go once."""

    def __init__(
        self,
        pacing: Pacing,
        start: Callable[..., Any],
        estimate: Callable[[], Estimate],
        *,
        ask_for_usage: bool = False,
        read: Callable[[T], Usage | None] = usage_of,
    ) -> None:
        """Pace the stream that ``start()`` gives; nothing is taken and nothing sent yet."""
        self._pacing = pacing
        self._start = start
        self._estimate = estimate
        self._read = read
        self._asks_for_usage = ask_for_usage and pacing.asks_for_usage
        variables: list[ContextVar[Any]] = [inherited, active_span_id, active_instrument_tags]
        #: The context in which the stream was requested.
        self._caller_context = [(variable, variable.get()) for variable in variables]
        self._inner: Any = None
        self._lease: Lease | None = None
        self._held: HeldCall | None = None
        self._usage: Usage | None = None
        self._sent = Sent()
        self._busy = False
        self._ended = False

    def _hold(self, lease: Lease) -> None:
        self._lease = lease
        self._held = HeldCall(self._pacing.limiter, lease, self._pacing.header_reader)

    @contextlib.contextmanager
    def _step(self) -> Generator[None]:
        """Do one thing at a time, like any generator: two first steps would be two calls."""
        if self._busy:
            raise RuntimeError("this stream is being read already, by another task or thread")
        self._busy = True
        try:
            yield
        except BaseException as error:
            self._end(error)
            raise
        finally:
            self._busy = False

    def _options(self) -> dict[str, Any]:
        return USAGE_OPTION if self._asks_for_usage else {}

    @contextlib.contextmanager
    def _under_lease(self) -> Generator[None]:
        """Run the model's own code: under our lease, in the context of the request for the stream."""
        assert self._held is not None
        with self._in_caller_context(), holding(self._held):
            yield

    @contextlib.contextmanager
    def _in_caller_context(self) -> Generator[None]:
        """Restore the context in which the stream was requested: inherited terms, span and tags.

        Engines hand streams to threads and tasks of their own, which know none of these.
        """
        tokens = [(variable, variable.set(value)) for variable, value in self._caller_context]
        try:
            yield
        finally:
            for variable, token in tokens:
                put_back(variable, token)

    def _is_for_caller(self, item: T) -> bool:
        """Note the usage that ``item`` carries; return whether it carries anything else."""
        usage = self._read(item)
        if usage is not None:
            self._usage = usage | self._usage
        return not (
            self._asks_for_usage and usage and not getattr(getattr(item, "raw", None), "choices", 1)
        )

    def _is_usage_refused(self, error: BaseException) -> bool:
        """Tell whether the provider refused the option that asks for usage; if so, ask no more."""
        if not (self._asks_for_usage and getattr(error, "status_code", None) in _BAD_REQUEST):
            return False
        if "stream_options" not in str(error):
            return False
        self._asks_for_usage = self._pacing.asks_for_usage = False
        return True

    def _end_attempt(self, error: BaseException | None = None) -> None:
        """Give the slot back, and forget the attempt."""
        lease, held = self._lease, self._held
        self._inner = self._lease = self._held = None
        if lease is None:
            return
        if error is None:
            lease.release()
        else:
            assert held is not None
            held.failed(lease, error)

    def _exhaust(self) -> None:
        """End after the last item, when the usage is known; for a broken stream it never is."""
        assert self._lease is not None
        assert self._held is not None
        self._pacing.settle(self._lease, self._held.actual_usage(self._usage))
        self._end()

    def _end(self, error: BaseException | None = None) -> None:
        self._ended = True
        self._end_attempt(error)


class AsyncPacedStream(_Stream[T], AsyncGenerator[T, None]):
    """Pace an asynchronous stream of a model's replies."""

    _loop: asyncio.AbstractEventLoop

    async def asend(self, _: None, /) -> T:
        """Return the next item, like ``__anext__``."""
        if self._ended:
            raise StopAsyncIteration
        with self._step():
            item = await self._next()
        if item is _END:
            self._exhaust()
            raise StopAsyncIteration
        return item

    async def _next(self) -> T:
        item: T = _END
        try:
            item = await (self._pull() if self._inner is not None else self._first_item())
        finally:
            if item is _END:
                await self._close_request()
        return item

    async def _first_item(self) -> T:
        attempt = functools.partial(self._attempt, self._estimate())
        with self._in_caller_context():
            return await self._pacing.retrier.call(
                attempt, deadline=self._pacing.deadline(), tried=self._start, sent=self._sent
            )

    async def _attempt(self, estimate: Estimate) -> T:
        """Make one attempt; return the first item, or the end."""
        self._loop = asyncio.get_running_loop()
        self._hold(await self._pacing.admit(estimate, self._sent))
        try:
            with self._under_lease():
                self._inner = aiter(await self._start(**self._options()))
            return await self._pull()
        except BaseException as error:
            try:
                await self._close_request()
            finally:
                self._end_attempt(error)
            if not self._is_usage_refused(error):
                raise
        return await self._attempt(estimate)

    async def _pull(self) -> T:
        while True:
            with self._under_lease():
                item: T = await anext(self._inner, _END)
            if item is _END or self._is_for_caller(item):
                return item

    async def athrow(
        self,
        exc_type: type[BaseException] | BaseException,
        value: BaseException | object = None,
        traceback: TracebackType | None = None,
        /,
    ) -> T:
        """End the stream and raise; nobody inside would handle it."""
        await self.aclose()
        raise _exception_to_raise(exc_type, value, traceback)

    async def aclose(self) -> None:
        """End the stream and give the slot back. Idempotent."""
        inner = self._inner
        with self._step():
            if inner is not None and hasattr(inner, "aclose"):
                await inner.aclose()
            await self._close_request()
        self._end()

    async def _close_request(self) -> None:
        if self._held is not None:
            await self._held.close_stream()

    def __del__(self) -> None:
        """Close the request soon, as asyncio closes a generator that is dropped."""
        if self._held is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_close_request_soon, self._held)


def _close_request_soon(held: HeldCall) -> None:
    asyncio.ensure_future(held.close_stream())  # noqa: RUF006 - like asyncio itself


class PacedStream(_Stream[T], Generator[T, None, None]):
    """Pace a synchronous stream of a model's replies."""

    def send(self, _: None, /) -> T:
        """Return the next item, like ``__next__``."""
        if self._ended:
            raise StopIteration
        with self._step():
            item = self._next()
        if item is _END:
            self._exhaust()
            raise StopIteration
        return item

    def _next(self) -> T:
        item: T = _END
        try:
            item = self._pull() if self._inner is not None else self._first_item()
        finally:
            if item is _END:
                self._close_request()
        return item

    def _first_item(self) -> T:
        attempt = functools.partial(self._attempt, self._estimate())
        with self._in_caller_context():
            return self._pacing.retrier.call_sync(
                attempt, deadline=self._pacing.deadline(), tried=self._start, sent=self._sent
            )

    def _attempt(self, estimate: Estimate) -> T:
        """Make one attempt; return the first item, or the end."""
        self._hold(self._pacing.admit_sync(estimate, self._sent))
        try:
            with self._under_lease():
                self._inner = iter(self._start(**self._options()))
            return self._pull()
        except BaseException as error:
            try:
                self._close_request()
            finally:
                self._end_attempt(error)
            if not self._is_usage_refused(error):
                raise
        return self._attempt(estimate)

    def _pull(self) -> T:
        while True:
            with self._under_lease():
                item: T = next(self._inner, _END)
            if item is _END or self._is_for_caller(item):
                return item

    def throw(
        self,
        exc_type: type[BaseException] | BaseException,
        value: BaseException | object = None,
        traceback: TracebackType | None = None,
        /,
    ) -> T:
        """End the stream and raise; nobody inside would handle it."""
        self.close()
        raise _exception_to_raise(exc_type, value, traceback)

    def close(self) -> None:
        """End the stream and give the slot back. Idempotent."""
        inner = self._inner
        with self._step():
            if inner is not None and hasattr(inner, "close"):
                inner.close()
            self._close_request()
        self._end()

    def _close_request(self) -> None:
        if self._held is not None:
            self._held.close_stream_sync()


def _exception_to_raise(
    exc_type: type[BaseException] | BaseException, value: object, traceback: TracebackType | None
) -> BaseException:
    """Return the exception that ``throw(kind, value, traceback)`` raises."""
    if isinstance(exc_type, BaseException):
        error = exc_type
    elif isinstance(value, BaseException):
        error = value
    else:
        error = exc_type() if value is None else exc_type(value)
    return error if traceback is None else error.with_traceback(traceback)
