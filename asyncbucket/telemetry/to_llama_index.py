"""Events through LlamaIndex's instrumentation, beside those of models and agents."""

from typing import Final

from llama_index_instrumentation import get_dispatcher

from asyncbucket.core.events import Admitted, Event, Paused, Refused, Retried
from asyncbucket.llama_index.events import (
    RateLimitPauseEvent,
    RateLimitRefusedEvent,
    RateLimitRetryEvent,
    RateLimitWaitEvent,
    is_wait_reported,
)

_dispatcher: Final = get_dispatcher(__name__)


def observer(event: Event) -> None:
    """Dispatch an event in the span of the code that asked for the admission."""
    name = event.limiter
    match event:
        case Admitted(waited=waited, bound_by=bound_by) if waited > 0 and not is_wait_reported():
            told = RateLimitWaitEvent(limiter=name, waited=waited, bound_by=bound_by)
            _dispatcher.event(told)
        case Refused(reason=reason, bound_by=bound_by, retry_after=retry_after):
            _dispatcher.event(
                RateLimitRefusedEvent(
                    limiter=name, reason=reason, bound_by=bound_by, retry_after=retry_after
                )
            )
        case Retried(attempt=attempt, error=error, delay=delay):
            _dispatcher.event(
                RateLimitRetryEvent(limiter=name, attempt=attempt, error=error, delay=delay)
            )
        case Paused(seconds=seconds, reason=reason):
            _dispatcher.event(RateLimitPauseEvent(limiter=name, seconds=seconds, reason=reason))
        case _:
            pass
