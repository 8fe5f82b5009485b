"""Observers that pass events on: as lines of a log, and through LlamaIndex's instrumentation."""

import dataclasses
from collections.abc import Callable
from logging import DEBUG, INFO, Logger, getLogger
from typing import Any, Final

from asyncbucket.core.events import Event
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import is_number
from asyncbucket.telemetry.metrics import as_given, check_source

#: Fields that are amounts by resource.
_AMOUNTS: Final = {"cost", "reserved", "used", "corrects"}


def logging(
    limiter: Limiter, *, threshold: float = 1.0, logger: Logger | str = "asyncbucket.events"
) -> Callable[[], None]:
    """Log each event as one line, with its fields as ``extra`` for structured logs.

    A wait of ``threshold`` or more is logged at INFO, everything else at DEBUG. An event's fields
    are attributes of the log record: ``asyncbucket.limiter``, ``asyncbucket.waited`` and so on.

    Args:
        limiter: the limiter to observe.
        threshold: the shortest wait, in seconds, that is logged at INFO.
        logger: where to log, a logger or its name.

    Raises:
        TypeError: ``limiter`` is not a limiter, or ``logger`` is not a logger.
        ValueError: ``threshold`` is not a number of seconds from 0 on.
    """
    check_source(limiter)
    if not is_number(threshold) or not threshold >= 0:
        raise ValueError(f"threshold must be a number of seconds from 0 on, not {threshold!r}")
    log = getLogger(logger) if isinstance(logger, str) else logger
    if not isinstance(log, Logger):
        raise TypeError(f"logger must be a logger or its name, not {logger!r}")

    def observe(event: Event) -> None:
        level = INFO if getattr(event, "waited", -1.0) >= threshold else DEBUG
        if log.isEnabledFor(level):
            told = {"event": type(event).__name__, **_fields(event)}
            # With a prefix, so that they cannot clash with the record's own attributes.
            extra = {f"asyncbucket.{name}": value for name, value in told.items()}
            log.log(level, "%s: %s", event.limiter, _line(told), extra=extra)

    return limiter.observe(observe)


def _fields(event: Event) -> dict[str, Any]:
    fields = {each.name: getattr(event, each.name) for each in dataclasses.fields(event)}
    return {name: as_given(value) if name in _AMOUNTS else value for name, value in fields.items()}


def _line(told: dict[str, Any]) -> str:
    """Return the event and what is known of it: ``Admitted requests=1 waited=1.834``."""
    words = [told["event"]]
    for name, value in told.items():
        if name == "cost":
            words += [f"{resource}={amount}" for resource, amount in value.items()]
        elif name not in {"event", "limiter", "at"} and value not in (None, {}, ""):
            words.append(f"{name}={round(value, 3) if isinstance(value, float) else value!r}")
    return " ".join(words)


def llama_index(limiter: Limiter) -> Callable[[], None]:
    """Send refusals, pauses and retries through LlamaIndex's instrumentation.

    They are events of `asyncbucket.llama_index`, dispatched in the span of the code that asked for
    the admission. Wrapped models and tools report their waits by themselves, with or without this.

    Args:
        limiter: the limiter to observe.

    Raises:
        ImportError: LlamaIndex is not installed; the message names the extra.
        TypeError: ``limiter`` is not a limiter.
    """
    check_source(limiter)
    from asyncbucket.llama_index.events import observe

    return observe(limiter)
