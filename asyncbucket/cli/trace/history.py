"""A trace read back from its file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class History:
    """Hold what happened; instants are seconds from the first event on."""

    limiter: str
    limits: tuple[Mapping[str, Any], ...]
    #: Instant and cost of each admission.
    admitted: tuple[tuple[float, Mapping[str, int]], ...]
    #: Instant and length of the line.
    waiting: tuple[tuple[float, int], ...]
    #: Begin and end of each pause.
    pauses: tuple[tuple[float, float], ...]
    seconds: float


def read(path: Path) -> History:
    """Return the story in a trace.

    Raises:
        ValueError: it is not a trace, or nothing happened in it.
        OSError: it cannot be read.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or ("limits" if number == 1 else "event") not in line:
            raise ValueError(
                f"{path}, line {number}: no trace; write one by limiter.trace().save()"
            )
        lines.append(line)
    if len(lines) < 2:  # noqa: PLR2004 - the head and an event
        raise ValueError(f"{path}: nothing happened in this trace")
    try:
        return _history(lines[0], lines[1:])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no trace, or one that was changed ({error!r}); write one by "
            f"limiter.trace().save()"
        ) from error


def _history(head: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> History:
    events = sorted(lines, key=lambda event: event["at"])
    start = events[0]["at"]
    return History(
        limiter=head["limiter"],
        limits=tuple(head["limits"]),
        admitted=tuple((e["at"] - start, e["cost"]) for e in events if e["event"] == "admitted"),
        waiting=tuple(_waiting(events, start)),
        pauses=tuple(
            (e["at"] - start, e["at"] - start + e["seconds"])
            for e in events
            if e["event"] == "paused"
        ),
        seconds=max(events[-1]["at"] - start, 1e-3),
    )


def _waiting(events: Sequence[Mapping[str, Any]], start: float) -> Iterator[tuple[float, int]]:
    """Yield how many waited, over all limiters of the trace, each of which reports its own line."""
    lines: dict[str, int] = {}
    yield 0.0, 0  # a refusal or a pause says nothing of the line
    for event in events:
        if "waiting" in event:
            lines[event.get("limiter", "")] = event["waiting"]
            yield event["at"] - start, sum(lines.values())
