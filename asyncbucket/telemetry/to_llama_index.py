"""Events through LlamaIndex's instrumentation, beside those of models and agents."""

from typing import Final

from llama_index_instrumentation import get_dispatcher

from asyncbucket import events
from asyncbucket.llama_index.events import (
    RateLimitPauseEvent,
    RateLimitRefusedEvent,
    RateLimitRetryEvent,
    RateLimitWaitEvent,
    is_wait_reported,
)
from asyncbucket.telemetry.watched import dispatch_by_type

_dispatcher: Final = get_dispatcher(__name__)


def _admitted(event: events.Admitted) -> None:
    if event.waited > 0 and not is_wait_reported():
        _dispatcher.event(
            RateLimitWaitEvent(limiter=event.limiter, waited=event.waited, bound_by=event.bound_by)
        )


def _refused(event: events.Refused) -> None:
    _dispatcher.event(
        RateLimitRefusedEvent(
            limiter=event.limiter,
            reason=event.reason,
            bound_by=event.bound_by,
            retry_after=event.retry_after,
        )
    )


def _retried(event: events.Retried) -> None:
    _dispatcher.event(
        RateLimitRetryEvent(
            limiter=event.limiter, attempt=event.attempt, error=event.error, delay=event.delay
        )
    )


def _paused(event: events.Paused) -> None:
    _dispatcher.event(
        RateLimitPauseEvent(limiter=event.limiter, seconds=event.seconds, reason=event.reason)
    )


observer: Final = dispatch_by_type(
    {
        events.Admitted: _admitted,
        events.Refused: _refused,
        events.Retried: _retried,
        events.Paused: _paused,
    }
)
