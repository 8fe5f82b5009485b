"""The latest admissions of a limiter, for a plot or a test."""

import collections
import json
from collections.abc import Iterator
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, Final, Self

from asyncbucket.core.events import Admitted, Cancelled, Event, Paused, Queued, Refused
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import read_count

_KEPT: Final = (Admitted, Cancelled, Paused, Queued, Refused)


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
        lines = [head, *map(_line, self)]
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


def _line(event: Event) -> dict[str, Any]:
    told = {each.name: getattr(event, each.name) for each in fields(event)}
    if "cost" in told:
        told["cost"] = dict(told["cost"])
    told["at"] = round(event.at, 6)
    known = {name: value for name, value in told.items() if value is not None}
    return {"event": type(event).__name__.lower(), **known}
