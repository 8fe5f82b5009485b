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

from asyncbucket.limits import Limit
from asyncbucket.meters import Amounts, Meter


class Passage(Protocol):
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
class Course:
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
    passage: Passage, arrivals: Iterable[tuple[int, Call]], follow: Follow | None = None
) -> Course:
    """Run every call from its arrival to its end, first come first served.

    Args:
        passage: what the calls pass, with nothing booked yet.
        arrivals: instants, ascending, and calls.
        follow: returns the calls that arrive when a call ends.
    """
    return _Drive(passage, follow).run(arrivals)


class _Drive:
    """One run; `now` never goes back."""

    def __init__(self, passage: Passage, follow: Follow | None) -> None:
        self._passage = passage
        self._follow = follow
        limited = {resource for _, resource in passage.meters} - {"concurrency"}
        self._resources = tuple(limited | {"tokens"})
        #: Calls made by other calls, in order of arrival.
        self._line: deque[tuple[int, Call]] = deque()
        self._running: list[_Running] = []
        self._now = 0
        self._course = Course(used=dict.fromkeys(self._resources, 0))

    def run(self, arrivals: Iterable[tuple[int, Call]]) -> Course:
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
                self._end()
            else:
                self._serve(*upcoming)
                upcoming = next(source, None)
        self._course.end = self._now
        return self._course

    def _serve(self, arrived: int, call: Call) -> None:
        """Advance time until ``call``, now the first in line, is admitted."""
        waited = arrived < self._now
        self._now = max(self._now, arrived)
        # As for a newcomer if nobody is in line, or as the pacer asks for those that wait.
        passes = self._pass if waited else self._passage.take
        if not passes(call.amounts, self._now):
            if self._can_never_pass(call):
                self._course.refused.append(call)
                self._beget(call)
                return
            self._wait(call)
        now, course, running = self._now, self._course, self._running
        course.admitted.append(now)
        course.waited.append(now - arrived)
        for resource in self._resources:
            course.used[resource] += call.amounts.get(resource, 0)
        course.busy += call.latency
        heapq.heappush(running, _Running(now + call.latency, len(course.waited), now, call))
        course.peak = max(course.peak, len(running))

    def _pass(self, amounts: Amounts, now: int) -> bool:
        """Book ``amounts`` if there is room for them now."""
        if self._passage.room(amounts, now, most=1) < 1:
            return False
        self._passage.book(amounts, now)
        return True

    def _can_never_pass(self, call: Call) -> bool:
        """Tell whether the limiter would refuse ``call`` on arrival, which takes no time."""
        limits = self._passage.limits
        return any(call.amounts.get(limit.resource, 0) > limit.amount for limit in limits)

    def _wait(self, call: Call) -> None:
        """Advance time until the meters let ``call`` pass."""
        passage, running, held_up = self._passage, self._running, self._course.held_up
        since = now = self._now
        while True:
            due, bound_by = passage.earliest(call.amounts, since)
            if due <= now:  # above a burst, and the rest has flowed in
                passage.book(call.amounts, now)
                return
            then = min(due, running[0].end) if running else due
            assert bound_by is not None, "whoever has to wait waits for something"
            held_up[bound_by] = held_up.get(bound_by, 0) + then - now
            self._now = now = then
            look = then == due
            while running and running[0].end <= now:
                look |= self._end()
            if look and self._pass(call.amounts, now):
                return

    def _end(self) -> bool:
        """End the call that ends next; return whether anything came back."""
        _, _, when, call = heapq.heappop(self._running)
        booked, back = call.amounts, False
        if call.used is not None:
            booked = {**booked, **call.used}
            back = self._settle(call, call.used, when)
        back |= self._passage.close(booked)
        self._beget(call)
        return back

    def _beget(self, call: Call) -> None:
        if self._follow is not None:
            self._line.extend((self._now, child) for child in self._follow(call))

    def _settle(self, call: Call, actual: Amounts, when: int) -> bool:
        """Correct the meters to what the call used; return whether it was less. See `Lease.settle`."""
        for meter, resource in self._passage.meters:
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
            if resource in self._course.used:
                self._course.used[resource] -= less
        return back
