"""The latest admissions of a limiter, for a plot or a test."""

import collections
import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Final, Self

from asyncbucket.core.events import Admitted, Cancelled, Event, Paused, Queued, Refused
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import read_count

#: The most events that are kept; no machine would hold more.
_MOST: Final = 1_000_000_000
_EVENT_NAMES: Final[dict[type[Event], str]] = {
    Admitted: "admitted",
    Queued: "queued",
    Refused: "refused",
    Cancelled: "cancelled",
    Paused: "paused",
}


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
        ValueError: ``last`` is not a whole number from 1 to a thousand million.
    """

    def __init__(self, limiter: Limiter, *, last: int) -> None:
        self._limiter = limiter
        kept = read_count(last, "last", least=1)
        if kept > _MOST:
            raise ValueError(f"last must be at most {_MOST:,} events, some 300 GB, not {last!r}")
        #: A deque's `append` and `copy` are atomic, so no lock is needed.
        self._events: collections.deque[Event] = collections.deque(maxlen=kept)
        self._unobserve: Callable[[], None] = limiter.observe(self._record)

    def _record(self, event: Event) -> None:
        if type(event) in _EVENT_NAMES:
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
        lines = [self._header(), *map(_line, self)]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        Path(path).write_text(text, "utf-8")

    def _header(self) -> dict[str, Any]:
        limiter = self._limiter
        limits = [
            {
                "resource": limit.resource,
                "amount": limit.amount,
                "per": limit.per,
                "burst": limit.burst,
            }
            for limit in limiter.limits
        ]
        return {"limiter": limiter.name, "limits": limits, "concurrency": limiter.concurrency}

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
    line: dict[str, Any] = {"event": _EVENT_NAMES[type(event)], "at": round(event.at, 6)}
    line["limiter"] = event.limiter
    for name in ("cost", "waited", "bound_by", "waiting", "in_flight", "reason", "seconds"):
        value = getattr(event, name, None)
        if value is not None:
            line[name] = dict(value) if name == "cost" else value
    return line
