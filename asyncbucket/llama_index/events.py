"""Queueing as LlamaIndex's instrumentation shows it, and the admissions that it reports."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Final

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from pydantic import ConfigDict

from asyncbucket.core.lease import Lease
from asyncbucket.core.levels import shown_name
from asyncbucket.core.limiter import Limiter
from asyncbucket.nesting import give_up_slots
from asyncbucket.waiting import IO

_dispatcher: Final = get_dispatcher(__name__)

#: Whether the code that asks for the current admission reports its wait.
_wait_is_reported: Final[ContextVar[bool]] = ContextVar("asyncbucket told of waits", default=False)


class RateLimitEvent(BaseEvent):
    """Say what a limiter did."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    #: The limiter's name, with a star for a tenant.
    limiter: str

    @classmethod
    def class_name(cls) -> str:
        """Return the name by which LlamaIndex's handlers know an event."""
        return cls.__name__


class RateLimitWaitEvent(RateLimitEvent):
    """Say that a call waited for its admission, and for what.

    It comes before the event that starts the call (``LLMChatStartEvent`` and the like), so that a
    model's latency is the model's alone. A call that passed at once has no such event.
    """

    #: Seconds between asking and admission.
    waited: float
    #: What held it up: ``"requests"``, ``"tokens"``, ``"concurrency"``, ``"paused"``...
    bound_by: str | None


class RateLimitRefusedEvent(RateLimitEvent):
    """Say that a call was refused before it reached the model."""

    #: ``"would_block"``, ``"timeout"``, ``"queue_full"`` or ``"too_costly"``.
    reason: str
    #: What had no room; None if others came first.
    bound_by: str | None
    #: In how many seconds it might pass; None if that is not known, or it never will.
    retry_after: float | None


class RateLimitRetryEvent(RateLimitEvent):
    """Say that a call failed and will be retried."""

    #: The number of the attempt that failed, from 1 on.
    attempt: int
    #: The kind of error; never its message.
    error: str
    #: Seconds until the next attempt asks for its admission.
    delay: float


class RateLimitPauseEvent(RateLimitEvent):
    """Say that nobody is admitted for a while; the reason is ``"429"`` after a provider's refusal."""

    seconds: float
    reason: str


async def admit(io: IO, limiter: Limiter, amounts: Mapping[str, Any]) -> Lease:
    """Wait for the admission of a call and report the wait; calls around it give up slots it needs."""
    give_up_slots(limiter)
    _wait_is_reported.set(True)
    try:
        lease = await io.acquire(limiter, **amounts)
    finally:
        # No token: a coroutine may be closed in another context than it ran in.
        _wait_is_reported.set(False)
    if lease.waited > 0:
        name = shown_name(limiter)
        _dispatcher.event(
            RateLimitWaitEvent(waited=lease.waited, bound_by=lease.bound_by, limiter=name)
        )
    return lease


def is_wait_reported() -> bool:
    """Return whether the code that asks for the current admission reports its wait."""
    return _wait_is_reported.get()
