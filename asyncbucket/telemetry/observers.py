"""Observers that pass events on, to a log or to LlamaIndex, or keep them, for a plot or a test."""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator
from logging import DEBUG, INFO, Logger, getLogger
from os import PathLike
from pathlib import Path
from typing import Any, Final, Self

from asyncbucket.core.events import Admitted, Cancelled, Event, Paused, Queued, Refused
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import is_number, read_count
from asyncbucket.telemetry.metrics import as_given, check_source

#: Fields that are amounts by resource.
_AMOUNTS: Final = {"cost", "reserved", "used", "corrects"}
#: What a trace keeps.
_KEPT: Final = (Admitted, Cancelled, Paused, Queued, Refused)


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


class Trace:
    """Keep the latest events of a limiter and those below it: admissions, and what explains them.

    >>> trace = limiter.trace()
    >>> ...
    >>> trace.save("trace.jsonl")  # for: asyncbucket plot trace.jsonl -o out.png

    It may be read from any thread while it records. Call `stop` when you have seen enough.

    Args:
        limiter: the limiter to record.
        last: how many events are kept, at about 300 bytes each.

    Raises:
        ValueError: ``last`` is not a whole number from 1 on.
    """

    def __init__(self, limiter: Limiter, *, last: int) -> None:
        self._limiter = limiter
        #: A deque's `append` and `copy` are atomic, so no lock is needed.
        self._events = collections.deque[Event](maxlen=read_count(last, "last", least=1))
        self._unobserve = limiter.observe(self._record)

    def _record(self, event: Event) -> None:
        if isinstance(event, _KEPT):
            self._events.append(event)

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events.copy())

    def amounts(self, resource: str) -> list[tuple[int, int]]:
        """Return each admission's instant (ns of the limiter's clock) and units of ``resource``.

        This is what `asyncbucket.testing.assert_never_over` takes.
        """
        return [
            (round(event.at * 1_000_000_000), event.cost[resource])
            for event in self
            if isinstance(event, Admitted) and event.cost.get(resource)
        ]

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON lines: first the limits, then one event per line."""
        limiter, named = self._limiter, ("resource", "amount", "per", "burst")
        limits = [{name: getattr(limit, name) for name in named} for limit in limiter.limits]
        head = {"limiter": limiter.name, "limits": limits, "concurrency": limiter.concurrency}
        lines = [head, *map(_saved, self)]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        Path(path).write_text(text, "utf-8")

    def stop(self) -> None:
        """Stop recording; what was kept stays."""
        self._unobserve()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Trace of {self._limiter.name!r}, {len(self):,} events>"


def _saved(event: Event) -> dict[str, Any]:
    told = {each.name: getattr(event, each.name) for each in dataclasses.fields(event)}
    if "cost" in told:
        told["cost"] = dict(told["cost"])
    told["at"] = round(event.at, 6)
    known = {name: value for name, value in told.items() if value is not None}
    return {"event": type(event).__name__.lower(), **known}
