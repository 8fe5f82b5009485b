"""Events as lines of a log."""

import dataclasses
from collections.abc import Callable, Mapping
from logging import DEBUG, INFO, Logger, getLogger
from typing import Any, Final

from asyncbucket.core import events
from asyncbucket.core.events import Event
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import counted, in_seconds, is_number, named
from asyncbucket.telemetry.metrics import as_given, check_source

#: Prefix of the record's attributes, so that they cannot clash with its own.
_PREFIX: Final = "asyncbucket."
#: Fields that are amounts by resource.
_AMOUNTS: Final = {"cost", "reserved", "used", "corrects"}


def logging(
    limiter: Limiter, *, threshold: float = 1.0, logger: Logger | str = "asyncbucket.events"
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


def _line(event: Event) -> str:  # noqa: C901, PLR0912 - one case for each kind of event
    match event:
        case events.Queued(cost=cost, waiting=waiting):
            line = f"a call of {_cost(cost)} waits, {_number(waiting, 'wait')}"
        case events.Admitted(cost=cost, waited=waited, bound_by=bound_by):
            cause = f" for {_resource(bound_by)}" if waited and bound_by else ""
            after = f" after {in_seconds(waited)}{cause}" if waited else ""
            line = (
                f"a call of {_cost(cost)} passed{after}; {_number(event.waiting, 'wait')}, "
                f"{event.in_flight:,} in flight"
            )
        case events.Refused(cost=cost, reason=reason, bound_by=bound_by, retry_after=retry_after):
            bound = f", bound by {_resource(bound_by)}" if bound_by else ""
            again = "" if retry_after is None else f"; free in {in_seconds(retry_after)}"
            line = f"a call of {_cost(cost)} was refused: {reason.replace('_', ' ')}{bound}{again}"
        case events.Cancelled(cost=cost, waited=waited):
            line = f"a call of {_cost(cost)} gave up after {in_seconds(waited)}"
        case events.Settled(reserved=reserved, used=used):
            words = [
                f"{counted(amount, resource)} of {reserved.get(resource, 0):,} reserved"
                for resource, amount in used.items()
            ]
            line = f"a call used {', '.join(words)}"
        case events.Released(held=held, outcome=outcome):
            line = f"a call ended after {in_seconds(held)}: {outcome}"
        case events.Paused(seconds=seconds, reason=reason):
            line = f"nobody passes for {in_seconds(seconds)}{reason and f': {reason}'}"
        case events.Retried(attempt=attempt, error=error, delay=delay):
            line = f"attempt {attempt} failed ({error}), again in {in_seconds(delay)}"
        case events.LimitLearned(limit=limit):
            line = f"the provider announces {limit}"
        case events.LimitChanged(limit=limit):
            line = f"the limit is now {limit}"
        case events.StoreLost(reason=reason):
            line = f"the shared store cannot be reached: {reason}"
        case events.StoreRecovered(seconds=seconds):
            line = f"the shared store is back after {in_seconds(seconds)}"
        case _:
            line = type(event).__name__
    return line


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
