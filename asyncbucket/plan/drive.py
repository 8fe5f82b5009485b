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
from operator import itemgetter
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


class Bounds(NamedTuple):
    """What calls pass: limits and, if there is a bound, slots; of one limiter, or a pool's member."""

    limits: tuple[Limit, ...]
    slots: int | None
    name: str = ""


@dataclass(slots=True)
class Record:
    """What happened; instants and lengths are nanoseconds."""

    #: When each call was admitted, and how long it had waited, in order of admission.
    admitted: "array[int]" = field(default_factory=lambda: array("q"))
    waited: "array[int]" = field(default_factory=lambda: array("q"))
    #: How long the first in line waited for each resource.
    held_up: dict[str, int] = field(default_factory=dict)
    #: What each of the bounds has admitted.
    lanes: "list[Lane]" = field(default_factory=list)
    #: Calls that can never pass.
    refused: list[PlannedCall] = field(default_factory=list)
    #: When the last call ended.
    end: int = 0
    #: The most calls in flight at once.
    peak: int = 0

    @property
    def seconds(self) -> float:
        """How long everything took."""
        return self.end / NANOSECONDS


def run_calls(calls: Iterable[tuple[int, PlannedCall]], members: Sequence[Bounds]) -> Record:
    """Run every call from its arrival to its end, first come first served.

    Args:
        calls: instants (ns), ascending, and the calls that come then.
        members: what the calls pass: each goes to the member that can start it first.
    """
    lanes = [Lane(bounds) for bounds in members]
    record = Record(lanes=lanes)
    now = 0
    for arrived, call in calls:
        able = [lane for lane in lanes if lane.takes(call.amounts)]
        if not able:
            record.refused.append(call)
            continue
        since = now = max(now, arrived)  # it is first in line from now on
        while True:
            for lane in lanes:
                lane.end_calls(now, record)
            dues = [lane.earliest(call.amounts, since) for lane in able]
            due, bound_by = min(dues, key=itemgetter(0))
            if due <= now:
                break
            ends = [lane.running[0] for lane in lanes if lane.running]
            until = min([due, *ends])
            assert bound_by is not None  # as it has to wait
            record.held_up[bound_by] = record.held_up.get(bound_by, 0) + until - now
            now = until
        able[dues.index((due, bound_by))].admit(call, now)
        record.admitted.append(now)
        record.waited.append(now - arrived)
        record.peak = max(record.peak, sum(len(lane.running) for lane in lanes))
    for lane in lanes:
        lane.end_calls(NEVER, record)
    return record


class Lane:
    """One limiter, or one member of a pool, while the calls run."""

    def __init__(self, bounds: Bounds) -> None:
        self.slots = bounds.slots
        self.meters: Meters = tuple(
            (Window(limit, wall=_wall_of(limit)), limit.resource) for limit in bounds.limits
        )
        #: How many calls it has admitted, the sum of their lengths (ns), and the units that they used
        #: of limited resources, and of tokens.
        self.calls = self.busy = 0
        self.used = {limit.resource: 0 for limit in bounds.limits} | {"tokens": 0}
        self.most = [(limit.resource, limit.units) for limit in bounds.limits]
        #: When each call in flight ends, the first one first.
        self.running: list[int] = []

    def takes(self, amounts: Amounts) -> bool:
        """Tell whether such a call can ever pass."""
        return all(amounts.get(resource, 0) <= units for resource, units in self.most)

    def earliest(self, amounts: Amounts, since: int) -> tuple[int, str | None]:
        """Return when a call can pass that is first in line since then, and what binds."""
        if self.slots is not None and len(self.running) >= self.slots:
            return self.running[0], "concurrency"
        return latest(self.meters, amounts, since)

    def admit(self, call: PlannedCall, now: int) -> None:
        """Let a call go."""
        for meter, resource in self.meters:
            if call.amounts.get(resource):
                meter.book(call.amounts[resource], now)
        self.calls += 1
        self.busy += call.latency
        for resource in self.used:
            self.used[resource] += call.amounts.get(resource, 0)
        heapq.heappush(self.running, now + call.latency)

    def end_calls(self, now: int, record: Record) -> None:
        """End the calls that are over by ``now``."""
        running = self.running
        while running and running[0] <= now:
            record.end = max(record.end, heapq.heappop(running))


def _wall_of(limit: Limit) -> Callable[[int], int]:
    """Return what the wall clock shows in a plan: it begins when the limit has just reset."""
    calendar = limit.calendar
    start = 0 if calendar is None else calendar.start(calendar.number(_DATE))
    return lambda now: now + start
