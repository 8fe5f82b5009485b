"""Run calls through the real meters on virtual time: the basis of a plan.

A limiter consists of meters, which say what may pass and when; a queue, which says who is next; and
a pacer, which sleeps. Here nobody has to sleep: time moves to the next instant at which something
can happen, when the meters let the first in line pass, or when a call ends. The meters are asked
and booked as by the pacer, with the same integers; only futures, tasks and timers are left out. A
million calls take seconds, and the instants are those of a `Limiter` to the nanosecond (tests/plan
compares them).
"""

import heapq
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import NEVER, Amounts, Meter, Window
from asyncbucket.core.node import Meters, latest

_NANOSECONDS: Final = 1_000_000_000


class Call(NamedTuple):
    """One call: what it reserves, how long it takes (ns), and the tokens that it really uses."""

    amounts: Amounts
    latency: int
    used_tokens: int | None = None


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
    refused: list[Call] = field(default_factory=list)
    #: When the last call ended.
    end: int = 0
    #: Calls in flight: the most at once, and the sum of their lengths.
    peak: int = 0
    busy: int = 0

    @property
    def seconds(self) -> float:
        """How long everything took."""
        return self.end / _NANOSECONDS


class Drive:
    """One run of calls, first come first served; time never goes back.

    Args:
        limits: what the calls pass, with nothing booked yet.
        slots: the most calls in flight, if there is a bound.
    """

    def __init__(self, limits: Sequence[Limit], slots: int | None) -> None:
        self._limits = limits
        self._meters: Meters = tuple((Window(limit), limit.resource) for limit in limits)
        self._slots = NEVER if slots is None else slots
        #: What the call at hand costs, and the meters that it passes, each with its amount.
        self._amounts: Amounts = {}
        self._charges: list[tuple[Meter, int]] = []
        #: Calls in flight: when each ends, a number, when it was admitted, and the call.
        self._running: list[tuple[int, int, int, Call]] = []
        self._record = Record(
            used=dict.fromkeys({limit.resource for limit in limits} | {"tokens"}, 0)
        )

    def run(self, calls: Iterable[tuple[int, Call]]) -> Record:
        """Run every call from its arrival to its end; ``calls`` are instants (ns), ascending, and calls."""
        record, running, now = self._record, self._running, 0
        amounts: Amounts = {}
        for arrived, call in calls:
            if call.amounts is not amounts:
                self._amounts = amounts = call.amounts
                self._charges = [
                    (meter, amounts[resource])
                    for meter, resource in self._meters
                    if amounts.get(resource)
                ]
            if arrived > now:
                now = arrived
                self._end_calls(now)
            # Whoever comes while nobody waits is asked for as `acquire_nowait` does.
            if arrived < now or not self._take(now):
                if any(amounts.get(each.resource, 0) > each.amount for each in self._limits):
                    record.refused.append(call)
                    continue
                now = self._wait(now)
            record.admitted.append(now)
            record.waited.append(now - arrived)
            record.busy += call.latency
            heapq.heappush(running, (now + call.latency, len(record.waited), now, call))
            record.peak = max(record.peak, len(running))
            for resource in record.used:
                record.used[resource] += amounts.get(resource, 0)
        self._end_calls(NEVER)
        return record

    def _take(self, now: int) -> bool:
        """Book the call in all meters if all allow it now, else in none."""
        if len(self._running) >= self._slots:
            return False
        for number, (meter, amount) in enumerate(self._charges):
            if not meter.take(amount, now):
                for earlier, taken in self._charges[:number]:
                    earlier.unbook(taken, now)
                return False
        return True

    def _wait(self, since: int) -> int:
        """Let the first in line wait for the meters and a slot; book it; return when it passed."""
        now, held_up = since, self._record.held_up
        while True:
            due, bound_by = self._earliest(since)
            if due <= now:
                break
            until = min(due, self._running[0][0]) if self._running else due
            assert bound_by is not None  # as it has to wait
            held_up[bound_by] = held_up.get(bound_by, 0) + until - now
            now = until
            self._end_calls(now)
        for meter, amount in self._charges:
            meter.book(amount, now)
        return now

    def _earliest(self, since: int) -> tuple[int, str | None]:
        """Return from when on a call that is first in line ``since`` may pass, and what binds."""
        if len(self._running) >= self._slots:
            return NEVER, "concurrency"
        return latest(self._meters, self._amounts, since)

    def _end_calls(self, now: int) -> None:
        """End the calls that end until ``now``, and correct the meters to what they used."""
        while self._running and self._running[0][0] <= now:
            end, _, when, call = heapq.heappop(self._running)
            self._record.end = end
            if call.used_tokens is not None:
                self._settle(call.amounts.get("tokens", 0), call.used_tokens, when, end)

    def _settle(self, reserved: int, used: int, when: int, now: int) -> None:
        """See `Lease.settle`."""
        self._record.used["tokens"] += used - reserved
        for meter, resource in self._meters:
            if resource == "tokens" and used > reserved:
                meter.owe(used - reserved, now)
            elif resource == "tokens" and used < reserved:
                meter.unbook(reserved - used, when, left=used)
