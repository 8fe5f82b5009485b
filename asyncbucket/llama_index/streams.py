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
or was closed is not enough: see `pacing`. (SDKs not built like OpenAI's and Anthropic's close the
request when Python closes their own stream.)

The usage comes with a stream's last chunk; OpenAI sends it only if asked, so we ask if the user
does not, and `clients` leaves that chunk out.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from llama_index_instrumentation.dispatcher import active_instrument_tags
from llama_index_instrumentation.span import active_span_id

from asyncbucket.core.context import inherited, put_back
from asyncbucket.llama_index.estimate import Estimate
from asyncbucket.llama_index.pacing import HeldCall, ModelCall, Pacing
from asyncbucket.providers.errors import answered
from asyncbucket.waiting import ASYNC, run

if TYPE_CHECKING:
    from contextvars import ContextVar

    from asyncbucket.core.lease import Lease
    from asyncbucket.providers.usage import Usage

T = TypeVar("T")

#: What makes OpenAI's streams end with their usage.
USAGE_OPTION: Final = {"stream_options": {"include_usage": True}}

_BAD_REQUEST: Final = (400, 404, 422)
#: Marks the end of a stream, because None may be one of its items.
_END: Final[Any] = object()


class _Stream(Generic[T]):
    """Hold a lease, note the usage that passes, let go once."""

    def __init__(self, pacing: Pacing, call: ModelCall) -> None:
        """Pace the stream that ``call.send()`` gives; nothing is taken and nothing sent yet."""
        self._pacing = pacing
        self._call = call
        variables: list[ContextVar[Any]] = [inherited, active_span_id, active_instrument_tags]
        #: The context in which the stream was requested.
        self._caller_context = [(variable, variable.get()) for variable in variables]
        self._inner: Any = None
        self._lease: Lease | None = None
        self._held: HeldCall | None = None
        self._usage: Usage | None = None
        self._busy = False
        self._ended = False

    async def _advance(self) -> T:
        """Return the next item, or the end, of which all later calls hear, too."""
        item: T = _END
        if self._ended:
            return item
        with self._step():
            try:
                item = await (self._first_item() if self._inner is None else self._pull())
            finally:
                if item is _END:
                    await self._close_request()
        if item is _END:
            assert self._lease is not None
            assert self._held is not None
            # When the whole reply is there; for a broken stream the usage is never known.
            self._pacing.settle(self._held, lambda: self._usage)
            self._end()
        return item

    async def _first_item(self) -> T:
        attempt = functools.partial(self._attempt, self._call.estimate(self._pacing.estimator))
        item: T = await self._pacing.retry(self._call, attempt)
        if self._lease is not None:
            answered(self._lease)
        return item

    async def _attempt(self, estimate: Estimate) -> T:
        """Make one attempt; return the first item, or the end."""
        _, held = self._lease, self._held = await self._pacing.admit(self._call, estimate)
        try:
            with held:
                call = self._call.at_member(self._pacing.models)
                self._inner = await _started(self._pacing, call, held)
            return await self._pull()
        except BaseException as error:
            try:
                await self._close_request()
            finally:
                self._end_attempt(error)
            if not self._is_usage_refused(held, error):
                raise
        return await self._attempt(estimate)

    async def _pull(self) -> T:
        """Let the model's own stream go on under our lease."""
        assert self._held is not None
        with self._held:
            item: T = await self._call.io.next_item(self._inner, _END)
        if self._held.stream is None:
            usage = self._call.method.read(item)
            self._usage = self._usage if usage is None else usage | self._usage
        return item

    async def _close_all(self) -> None:
        io = self._call.io
        with self._step():
            if hasattr(self._inner, "aclose" if io is ASYNC else "close"):
                await io.close(self._inner)
            await self._close_request()
        self._end()

    async def _close_request(self) -> None:
        if self._held is not None:
            await self._held.close_stream(self._call.io)

    @contextlib.contextmanager
    def _step(self) -> Generator[None]:
        """Do one thing at a time, like any generator: two first steps would be two calls.

        It is done in the context in which the stream was requested: inherited terms, span and tags.
        Engines hand streams to threads and tasks of their own, which know none of these.
        """
        if self._busy:
            raise RuntimeError("this stream is being read already, by another task or thread")
        self._busy = True
        tokens = [(variable, variable.set(value)) for variable, value in self._caller_context]
        try:
            yield
        except BaseException as error:
            self._end(error)
            raise
        finally:
            self._busy = False
            for variable, token in tokens:
                put_back(variable, token)

    def _is_usage_refused(self, held: HeldCall, error: BaseException) -> bool:
        """Tell whether the provider refused the option that asks for usage; if so, ask no more."""
        is_refused = (
            held.hides_usage
            and getattr(error, "status_code", None) in _BAD_REQUEST
            and "stream_options" in str(error)
        )
        if is_refused:
            self._pacing.asks_for_usage = False
        return is_refused

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

    def _end(self, error: BaseException | None = None) -> None:
        self._ended = True
        self._end_attempt(error)


class AsyncPacedStream(_Stream[T], AsyncGenerator[T, None]):
    """Pace an asynchronous stream of a model's replies."""

    _loop: asyncio.AbstractEventLoop | None = None

    async def asend(self, _: None, /) -> T:
        """Return the next item, like ``__anext__``."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        item = await self._advance()
        if item is _END:
            raise StopAsyncIteration
        return item

    async def athrow(self, error: Any, /, value: Any = None, _: object = None) -> T:
        """End the stream and raise; nobody inside would handle it."""
        await self.aclose()
        raise error if value is None else value

    async def aclose(self) -> None:
        """End the stream and give the slot back. Idempotent."""
        await self._close_all()

    def __del__(self) -> None:
        """Close the request soon, as asyncio closes a generator that is dropped."""
        if self._held is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_close_request_soon, self._held)


def _close_request_soon(held: HeldCall) -> None:
    asyncio.ensure_future(held.close_stream(ASYNC))  # noqa: RUF006 - like asyncio itself


class PacedStream(_Stream[T], Generator[T, None, None]):
    """Pace a synchronous stream of a model's replies."""

    def send(self, _: None, /) -> T:
        """Return the next item, like ``__next__``."""
        item = run(self._advance())
        if item is _END:
            raise StopIteration
        return item

    def throw(self, error: Any, /, value: Any = None, _: object = None) -> T:
        """End the stream and raise; nobody inside would handle it."""
        self.close()
        raise error if value is None else value

    def close(self) -> None:
        """End the stream and give the slot back. Idempotent."""
        run(self._close_all())


async def paced_stream(pacing: Pacing, call: ModelCall, held: HeldCall | None) -> Any:
    """Return the stream that ``call.send()`` gives, paced; inside a call that pays, without pacing."""
    if held is not None:
        return await _started(pacing, call, held)
    return AsyncPacedStream(pacing, call) if call.io is ASYNC else PacedStream(pacing, call)


async def _started(pacing: Pacing, call: ModelCall, held: HeldCall) -> Any:
    """Start a stream; it is asked for its usage unless the provider has refused to say that."""
    held.hides_usage = bool(call.options) and pacing.asks_for_usage
    stream = await call.send(**(call.options if held.hides_usage else {}))
    return aiter(stream) if call.io is ASYNC else iter(stream)
