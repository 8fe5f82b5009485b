"""Queueing as LlamaIndex's instrumentation shows it.

Models and tools report their waits by themselves; `observe` sends the rest, if asked to.
"""

from collections.abc import Callable
from typing import ClassVar, Final

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from pydantic import ConfigDict

from asyncbucket.engine.events import Event, Paused, Refused, Retried
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.limiter import Limiter
from asyncbucket.levels import shown_name

_dispatcher: Final = get_dispatcher(__name__)


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


_KINDS: Final[dict[type[Event], type[RateLimitEvent]]] = {
    Refused: RateLimitRefusedEvent,
    Retried: RateLimitRetryEvent,
    Paused: RateLimitPauseEvent,
}


def report_wait(limiter: Limiter, lease: Lease) -> None:
    """Say how long an admission by ``limiter`` waited."""
    name = shown_name(limiter)
    _dispatcher.event(
        RateLimitWaitEvent(waited=lease.waited, bound_by=lease.bound_by, limiter=name)
    )


def observe(limiter: Limiter) -> Callable[[], None]:
    """Send refusals, pauses and retries of ``limiter``; return a function that ends this."""

    def send(event: Event) -> None:
        if kind := _KINDS.get(type(event)):
            known = (name for name in kind.model_fields if hasattr(event, name))
            _dispatcher.event(kind(**{name: getattr(event, name) for name in known}))

    return limiter.observe(send)
