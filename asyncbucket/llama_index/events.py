"""Queueing, as LlamaIndex's instrumentation shows it, and the admission of which it tells."""

import asyncio
import contextlib
from collections.abc import Generator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Final

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from pydantic import ConfigDict

from asyncbucket.http.running import make_way
from asyncbucket.limiter import Limiter
from asyncbucket.limiter.books import shown_name
from asyncbucket.limiter.lease import Lease
from asyncbucket.llama_index.misuse import warn_of_time_out

_dispatcher: Final = get_dispatcher(__name__)

#: Whether the admission that is asked for right now is told of by whoever asks.
_told: Final[ContextVar[bool]] = ContextVar("asyncbucket told of waits", default=False)


class RateLimitEvent(BaseEvent):
    """Say what a limiter did."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    #: The limiter's name, with a star for a tenant.
    limiter: str

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex's handlers know an event by."""
        return cls.__name__


class RateLimitWaitEvent(RateLimitEvent):
    """Say that a call waited for its admission, and for what.

    It comes before the event that starts the call (``LLMChatStartEvent`` and its like), so that a
    model's latency is the model's alone. A call that passed at once has none.
    """

    #: Seconds between asking and admission.
    waited: float
    #: The resource that held it up: ``"requests"``, ``"tokens"``, ``"concurrency"``, ``"paused"``.
    bound_by: str | None


class RateLimitRefusedEvent(RateLimitEvent):
    """Say that a call was turned away before it reached the model."""

    #: ``"would_block"``, ``"timeout"``, ``"queue_full"`` or ``"too_costly"``.
    reason: str
    #: The resource that had no room; None if others came first.
    bound_by: str | None
    #: In how many seconds it might pass; None where nobody can tell, or it never will.
    retry_after: float | None


class RateLimitRetryEvent(RateLimitEvent):
    """Say that a call failed and will be tried again."""

    #: How often it was tried so far, from 1 on.
    attempt: int
    #: The kind of error; never its message.
    error: str
    #: Seconds until the next attempt asks for its admission.
    delay: float


class RateLimitPauseEvent(RateLimitEvent):
    """Say that nobody is admitted for a while: after a provider's refusal the reason is ``"429"``."""

    seconds: float
    reason: str


async def admit(limiter: Limiter, amounts: Mapping[str, Any]) -> Lease:
    """Wait for the admission of a call and tell of the wait; the calls around it make way."""
    make_way(limiter)
    began = limiter.now()
    try:
        with _told_here():
            lease = await limiter.acquire(**amounts)
    except asyncio.CancelledError:
        warn_of_time_out(limiter, limiter.now() - began)
        raise
    _tell_of_wait(lease, limiter)
    return lease


def admit_sync(limiter: Limiter, amounts: Mapping[str, Any]) -> Lease:
    """Do what `admit` does, on a thread that may be blocked."""
    make_way(limiter)
    with _told_here():
        lease = limiter.acquire_sync(**amounts)
    _tell_of_wait(lease, limiter)
    return lease


def is_told() -> bool:
    """Return whether whoever asks for the present admission tells of its wait."""
    return _told.get()


@contextlib.contextmanager
def _told_here() -> Generator[None]:
    """Keep others from telling of the admissions that are asked for inside."""
    _told.set(True)
    try:
        yield
    finally:
        _told.set(False)  # no token: a coroutine may be closed in another context than it ran in


def _tell_of_wait(lease: Lease, limiter: Limiter) -> None:
    if lease.waited > 0:
        name = shown_name(limiter.name)
        _dispatcher.event(
            RateLimitWaitEvent(waited=lease.waited, bound_by=lease.bound_by, limiter=name)
        )
