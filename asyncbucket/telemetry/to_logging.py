"""Events as lines of a log."""

import dataclasses
from collections.abc import Callable, Mapping
from logging import DEBUG, INFO, Logger, getLogger
from typing import Any, Final

from asyncbucket.core import events
from asyncbucket.core.events import Event
from asyncbucket.core.wording import counted, in_seconds, is_number, named
from asyncbucket.telemetry.metrics import Source, as_given, check_source

#: Prefix of the record's attributes, so that they cannot clash with its own.
_PREFIX: Final = "asyncbucket."
#: Fields that are amounts by resource.
_AMOUNTS: Final = {"cost", "reserved", "used", "corrects"}


def logging(
    limiter: Source, *, threshold: float = 1.0, logger: Logger | str = "asyncbucket.events"
) -> Callable[[], None]:
    """Log each event as one readable line, with its fields as ``extra`` for structured logs.

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
            log.log(level, "%s: %s", event.limiter, _line(event), extra=_extra(event))

    return limiter.observe(observe)


def _extra(event: Event) -> dict[str, Any]:
    extra: dict[str, Any] = {f"{_PREFIX}event": type(event).__name__}
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        extra[_PREFIX + field.name] = as_given(value) if field.name in _AMOUNTS else value
    return extra


def _line(event: Event) -> str:
    write = _LINES.get(type(event))
    return type(event).__name__ if write is None else write(event)


def _queued(event: events.Queued) -> str:
    return f"a call of {_cost(event.cost)} waits, {_number(event.waiting, 'wait')}"


def _admitted(event: events.Admitted) -> str:
    waited = ""
    if event.waited:
        held_up = f" for {_resource(event.bound_by)}" if event.bound_by else ""
        waited = f" after {in_seconds(event.waited)}{held_up}"
    return (
        f"a call of {_cost(event.cost)} passed{waited}; "
        f"{_number(event.waiting, 'wait')}, {event.in_flight:,} in flight"
    )


def _refused(event: events.Refused) -> str:
    why = event.reason.replace("_", " ")
    bound = f", bound by {_resource(event.bound_by)}" if event.bound_by else ""
    again = "" if event.retry_after is None else f"; free in {in_seconds(event.retry_after)}"
    return f"a call of {_cost(event.cost)} was refused: {why}{bound}{again}"


def _cancelled(event: events.Cancelled) -> str:
    return f"a call of {_cost(event.cost)} gave up after {in_seconds(event.waited)}"


def _settled(event: events.Settled) -> str:
    words = [
        f"{counted(used, resource)} of {event.reserved.get(resource, 0):,} reserved"
        for resource, used in event.used.items()
    ]
    return f"a call used {', '.join(words)}"


def _released(event: events.Released) -> str:
    return f"a call ended after {in_seconds(event.held)}: {event.outcome}"


def _paused(event: events.Paused) -> str:
    why = f": {event.reason}" if event.reason else ""
    return f"nobody passes for {in_seconds(event.seconds)}{why}"


def _retried(event: events.Retried) -> str:
    return f"attempt {event.attempt} failed ({event.error}), again in {in_seconds(event.delay)}"


_LINES: Final[Mapping[type[Event], Callable[[Any], str]]] = {
    events.Queued: _queued,
    events.Admitted: _admitted,
    events.Refused: _refused,
    events.Cancelled: _cancelled,
    events.Settled: _settled,
    events.Released: _released,
    events.Paused: _paused,
    events.Retried: _retried,
    events.LimitLearned: lambda event: f"the provider announces {event.limit}",
    events.LimitChanged: lambda event: f"the limit is now {event.limit}",
    events.StoreLost: lambda event: f"the shared store cannot be reached: {event.reason}",
    events.StoreRecovered: lambda event: (
        f"the shared store is back after {in_seconds(event.seconds)}"
    ),
}


def _cost(amounts: Mapping[str, int]) -> str:
    shown = {
        name: amount
        for name, amount in as_given(amounts).items()
        # Input and output are left out if their sum is there.
        if name not in {"input_tokens", "output_tokens"} or "tokens" not in amounts
    }
    return ", ".join(counted(amount, name) for name, amount in shown.items()) or "nothing"


def _resource(name: str) -> str:
    return "the end of a pause" if name == "paused" else named(name)


def _number(count: int, verb: str) -> str:
    return f"{count:,} {verb}" if count else f"none {verb}"
