"""Run calls through the real meters on virtual time: the basis of a plan.

A limiter consists of meters, which say what may pass and when; a queue, which says who is next; and
a pacer, which sleeps. Here nobody has to sleep: time moves to the next instant at which something
can happen, when the meters let the first in line pass, or when a call ends. The meters are asked
and booked as by the pacer, with the same integers; only futures, tasks and timers are left out. A
million calls take seconds, and the instants are those of a `Limiter` to the nanosecond (tests/plan
compares them). A limit that resets by the calendar does so at the start and then after days of 24
hours, whatever the date is, so that a plan is the same tomorrow; months are those of 2025.
"""

import heapq
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import NEVER, Amounts, Window
from asyncbucket.core.node import Meters, latest

NANOSECONDS: Final = 1_000_000_000
#: When plans begin, for limits that reset by the calendar: early in January 2025.
_DATE: Final = 1_736_380_800 * NANOSECONDS


class PlannedCall(NamedTuple):
    """One call: what it costs, and how long it takes (ns)."""

    amounts: Amounts
    latency: int


@dataclass(slots=True)
class Record:
    """What happened; instants and lengths are nanoseconds."""

    #: When each call was admitted, and how long it had waited, in order of admission.
    admitted: "array[int]" = field(default_factory=lambda: array("q"))
    waited: "array[int]" = field(default_factory=lambda: array("q"))
    #: How long the first in line waited for each resource.
    held_up: dict[str, int] = field(default_factory=dict)
    #: Units used, by resource: of limited resources, and tokens.
    used: dict[str, int] = field(default_factory=dict)
    #: Calls that can never pass.
    refused: list[PlannedCall] = field(default_factory=list)
    #: When the last call ended.
    end: int = 0
    #: Calls in flight: the most at once, and the sum of their lengths.
    peak: int = 0
    busy: int = 0

    @property
    def seconds(self) -> float:
        """How long everything took."""
        return self.end / NANOSECONDS


def run_calls(  # noqa: C901 - one loop over time
    calls: Iterable[tuple[int, PlannedCall]], limits: Sequence[Limit], slots: int | None
) -> Record:
    """Run every call from its arrival to its end, first come first served.

    Args:
        calls: instants (ns), ascending, and the calls that come then.
        limits: what the calls pass.
        slots: the most calls in flight, if there is a bound.
    """
    meters: Meters = tuple(
        (Window(limit, wall=_wall_of(limit)), limit.resource) for limit in limits
    )
    record = Record(used=dict.fromkeys({limit.resource for limit in limits} | {"tokens"}, 0))
    #: When each call in flight ends, the first one first.
    running: list[int] = []
    now = 0

    def advance(to: int) -> None:
        nonlocal now
        now = max(now, to)
        while running and running[0] <= now:
            record.end = heapq.heappop(running)

    for arrived, call in calls:
        amounts = call.amounts
        if any(amounts.get(limit.resource, 0) > limit.units for limit in limits):
            record.refused.append(call)
            continue
        advance(arrived)
        since = now  # it is first in line from now on
        while True:
            due, bound_by = latest(meters, amounts, since)
            if slots is not None and len(running) >= slots:
                due, bound_by = NEVER, "concurrency"
            if due <= now:
                break
            until = min(due, running[0]) if running else due
            assert bound_by is not None  # as it has to wait
            record.held_up[bound_by] = record.held_up.get(bound_by, 0) + until - now
            advance(until)
        for meter, resource in meters:
            if amounts.get(resource):
                meter.book(amounts[resource], now)
        record.admitted.append(now)
        record.waited.append(now - arrived)
        record.busy += call.latency
        heapq.heappush(running, now + call.latency)
        record.peak = max(record.peak, len(running))
        for resource in record.used:
            record.used[resource] += amounts.get(resource, 0)
    advance(NEVER)
    return record


def _wall_of(limit: Limit) -> Callable[[int], int]:
    """Return what the wall clock shows in a plan: it begins when the limit has just reset."""
    calendar = limit.calendar
    start = 0 if calendar is None else calendar.start(calendar.number(_DATE))
    return lambda now: now + start
