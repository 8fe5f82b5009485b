"""Events through LlamaIndex's instrumentation, beside those of models and agents."""

from collections.abc import Callable

from asyncbucket.core.events import Admitted, Event, Paused, Refused, Retried
from asyncbucket.core.limiter import Limiter
from asyncbucket.telemetry.metrics import check_source


def llama_index(limiter: Limiter) -> Callable[[], None]:
    """Send waits, refusals, pauses and retries through LlamaIndex's instrumentation.

    They are events of `asyncbucket.llama_index`, dispatched in the span of the code that asked for
    the admission. Waits that a wrapped model reports by itself are not reported twice.

    Args:
        limiter: the limiter to observe.

    Raises:
        ImportError: LlamaIndex is not installed; the message names the extra.
        TypeError: ``limiter`` is not a limiter.
    """
    check_source(limiter)
    try:
        from llama_index_instrumentation import get_dispatcher

        from asyncbucket.llama_index import events as told
    except ModuleNotFoundError as error:
        raise ImportError(
            f'events for LlamaIndex need {error.name}: pip install "asyncbucket[llama-index]"'
        ) from error
    dispatch = get_dispatcher(__name__).event

    def observe(event: Event) -> None:
        name = event.limiter
        match event:
            case Admitted(waited=waited, bound_by=bound_by):
                if waited > 0 and not told.is_wait_reported():
                    dispatch(
                        told.RateLimitWaitEvent(limiter=name, waited=waited, bound_by=bound_by)
                    )
            case Refused(reason=reason, bound_by=bound_by, retry_after=retry_after):
                dispatch(
                    told.RateLimitRefusedEvent(
                        limiter=name, reason=reason, bound_by=bound_by, retry_after=retry_after
                    )
                )
            case Retried(attempt=attempt, error=error, delay=delay):
                dispatch(
                    told.RateLimitRetryEvent(
                        limiter=name, attempt=attempt, error=error, delay=delay
                    )
                )
            case Paused(seconds=seconds, reason=reason):
                dispatch(told.RateLimitPauseEvent(limiter=name, seconds=seconds, reason=reason))
            case _:
                pass

    return limiter.observe(observe)
