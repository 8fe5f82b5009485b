"""Run calls through the real meters on virtual time: the basis of a plan.

A limiter consists of meters, which say what may pass and when; a line, which says who is next; and
a pacer, which sleeps. Here nobody has to sleep: the clock is set to the next instant at which
something can happen, when the meters let the first in line pass, or when a call ends. The meters
are asked and booked as by the pacer, through the same `Gates`, with the same integers; only
futures, tasks and timers are left out. A million calls take seconds, and the instants are those of
a `Limiter` to the nanosecond (tests/plan compares them).
"""

import heapq
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Amounts, Meter


class GatesLike(Protocol):
    """What a call passes: the part of a limiter's `Gates` that is needed here."""

    @property
    def meters(self) -> Sequence[tuple[Meter, str]]:
        """Each meter with the resource that it counts."""
        ...

    @property
    def limits(self) -> Sequence[Limit]:
        """The limits that the meters keep."""
        ...

    def take(self, amounts: Amounts, now: int) -> bool:
        """Book ``amounts`` if all meters allow it now."""
        ...

    def room(self, amounts: Amounts, now: int, *, most: int) -> int:
        """Return how many calls of ``amounts`` are sure to pass now."""
        ...

    def earliest(self, amounts: Amounts, since: int) -> tuple[int, str | None]:
        """Return the first instant that suits all meters, and what binds."""
        ...

    def book(self, amounts: Amounts, when: int) -> None:
        """Book ``amounts`` at ``when``."""
        ...

    def close(self, booked: Amounts) -> bool:
        """End a call; return whether anyone may wait for what comes back."""
        ...


class Call(NamedTuple):
    """One call: what it reserves, how long it takes (ns), and what it turns out to have used."""

    amounts: Amounts
    latency: int
    used: Amounts | None = None
    #: How many generations of calls follow it in an `AgentTree`.
    generations: int = 0


class _Running(NamedTuple):
    """A call in flight; the number orders calls that end at the same instant."""

    end: int
    number: int
    when: int
    call: Call


@dataclass(slots=True)
class Record:
    """What happened; instants and lengths are nanoseconds."""

    #: When each call was admitted, and how long it had waited, in order of admission.
    admitted: "array[int]" = field(default_factory=lambda: array("q"))
    waited: "array[int]" = field(default_factory=lambda: array("q"))
    #: How long calls, or the first in line, waited for each resource.
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


Follow = Callable[[Call], Iterable[Call]]


def drive(
    gates: GatesLike, arrivals: Iterable[tuple[int, Call]], follow: Follow | None = None
) -> Record:
    """Run every call from its arrival to its end, first come first served.

    Args:
        gates: what the calls pass, with nothing booked yet.
        arrivals: instants, ascending, and calls.
        follow: returns the calls that arrive when a call ends.
    """
    return _Drive(gates, follow).run(arrivals)


class _Drive:
    """One run; `now` never goes back."""

    def __init__(self, gates: GatesLike, follow: Follow | None) -> None:
        self._gates = gates
        self._follow = follow
        limited = {resource for _, resource in gates.meters} - {"concurrency"}
        self._resources = tuple(limited | {"tokens"})
        #: Calls made by other calls, in order of arrival.
        self._line: deque[tuple[int, Call]] = deque()
        self._running: list[_Running] = []
        self._now = 0
        self._record = Record(used=dict.fromkeys(self._resources, 0))

    def run(self, arrivals: Iterable[tuple[int, Call]]) -> Record:
        """Run all calls, and return when the last one has ended."""
        source = iter(arrivals)
        upcoming = next(source, None)
        line, running = self._line, self._running
        while True:
            if line and (upcoming is None or line[0][0] <= upcoming[0]):
                self._serve(*line.popleft())
            elif upcoming is None or (
                running and running[0].end <= upcoming[0] and upcoming[0] > self._now
            ):
                if not running:
                    break
                self._now = max(self._now, running[0].end)
                self._end_next_call()
            else:
                self._serve(*upcoming)
                upcoming = next(source, None)
        self._record.end = self._now
        return self._record

    def _serve(self, arrived: int, call: Call) -> None:
        """Advance time until ``call``, now the first in line, is admitted."""
        waited = arrived < self._now
        self._now = max(self._now, arrived)
        # As for a newcomer if nobody is in line, or as the pacer asks for those that wait.
        take = self._take_if_room if waited else self._gates.take
        if not take(call.amounts, self._now):
            if self._can_never_pass(call):
                self._record.refused.append(call)
                self._add_followers(call)
                return
            self._wait(call)
        now, record, running = self._now, self._record, self._running
        record.admitted.append(now)
        record.waited.append(now - arrived)
        for resource in self._resources:
            record.used[resource] += call.amounts.get(resource, 0)
        record.busy += call.latency
        heapq.heappush(running, _Running(now + call.latency, len(record.waited), now, call))
        record.peak = max(record.peak, len(running))

    def _take_if_room(self, amounts: Amounts, now: int) -> bool:
        """Book ``amounts`` if there is room for them now."""
        if self._gates.room(amounts, now, most=1) < 1:
            return False
        self._gates.book(amounts, now)
        return True

    def _can_never_pass(self, call: Call) -> bool:
        """Tell whether the limiter would refuse ``call`` on arrival, which takes no time."""
        limits = self._gates.limits
        return any(call.amounts.get(limit.resource, 0) > limit.amount for limit in limits)

    def _wait(self, call: Call) -> None:
        """Advance time until the meters let ``call`` pass."""
        gates, running, held_up = self._gates, self._running, self._record.held_up
        since = now = self._now
        while True:
            due, bound_by = gates.earliest(call.amounts, since)
            if due <= now:  # above a burst, and the rest has flowed in
                gates.book(call.amounts, now)
                return
            until = min(due, running[0].end) if running else due
            assert bound_by is not None, "whoever has to wait waits for something"
            held_up[bound_by] = held_up.get(bound_by, 0) + until - now
            self._now = now = until
            ask_again = until == due
            while running and running[0].end <= now:
                ask_again |= self._end_next_call()
            if ask_again and self._take_if_room(call.amounts, now):
                return

    def _end_next_call(self) -> bool:
        """End the call that ends next; return whether anything came back."""
        _, _, when, call = heapq.heappop(self._running)
        booked, back = call.amounts, False
        if call.used is not None:
            booked = {**booked, **call.used}
            back = self._settle(call, call.used, when)
        back |= self._gates.close(booked)
        self._add_followers(call)
        return back

    def _add_followers(self, call: Call) -> None:
        if self._follow is not None:
            self._line.extend((self._now, follower) for follower in self._follow(call))

    def _settle(self, call: Call, actual: Amounts, when: int) -> bool:
        """Correct the meters to what the call used; return whether it was less. See `Lease.settle`."""
        for meter, resource in self._gates.meters:
            if resource in actual:
                used = actual[resource]
                more = used - call.amounts.get(resource, 0)
                if more > 0:
                    meter.owe(more, self._now)
                elif more < 0:
                    meter.unbook(-more, when, left=used)
        back = False
        for resource, used in actual.items():
            less = call.amounts.get(resource, 0) - used
            back |= less > 0
            if resource in self._record.used:
                self._record.used[resource] -= less
        return back
