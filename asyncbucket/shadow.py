"""See what a limiter would do, before it does it: every call passes, and its line is played beside.

``Limiter(..., shadow=True)`` lets every call of its tree pass at once. The limits are booked all the
same, at the instants at which the calls would have been admitted. A `Shadow` hears of each call as
an account does (`asyncbucket.engine.account`): when it asks, what it used, and how long it took. It
plays the line on these arrivals: a call starts when the meters and the slots would have let it, first
come, first served at each limiter, and ends as long after that as it took in reality. A call ends in
the line no sooner than in reality, so what happened until now is always known.

Two things are not played: arrivals that would have come later because replies did, and shares, agents
and priorities, which change who waits rather than how long all wait.
"""

import atexit
import copy
import heapq
import logging
import weakref
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Final

from asyncbucket.engine.account import Account
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.events import Shadowed
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.meters import NEVER, Amounts, Route, Window, admit
from asyncbucket.engine.node import Node
from asyncbucket.engine.statistics import ShadowStatistics, Waits

# It hears of a lease what no user is to see.
# ruff: noqa: SLF001

_log: Final = logging.getLogger("asyncbucket")


@dataclass(slots=True, eq=False)
class _Call:
    """A call: what it asked for and used, and how long it took (ns); None while it goes on."""

    node: Node
    amounts: Amounts
    asked: int
    deadline: int | None
    used: Amounts
    took: int | None = None
    started: int | None = None


class _Line:
    """The calls that would wait, those that would be open, and what the others waited."""

    def __init__(self) -> None:
        self.now = 0
        #: The calls that wait at each limiter; and since when the first of them is first.
        self.waiting: dict[Node, deque[_Call]] = {}
        self.since: dict[Node, int] = {}
        self.bound_by: dict[Node, str | None] = {}
        self.open: set[_Call] = set()
        #: When those end that are over in reality: instant, number, call.
        self.ends: list[tuple[int, int, _Call]] = []
        self.in_flight = Counter[Node]()
        self.calls = self.failed = 0
        self.waits: dict[str, list[int]] = {}
        #: Copies of the windows, if this is a forecast.
        self.windows: dict[Window, Window] | None = None

    def ask(self, call: _Call) -> None:
        """Let ``call`` join, unless it would be refused at once."""
        self.play(call.asked)
        self.calls += 1
        line = self.waiting.get(call.node, ())
        bounds = [node.max_queue for node in call.node.path if node.max_queue is not None]
        meters = self._route(call.node).meters
        can_pass = all(
            call.amounts.get(resource, 0) <= meter.limit.units or not meter.refuses
            for meter, resource in meters
        )
        if not can_pass or (line and len(line) >= min(bounds, default=NEVER)):
            self.failed += 1
            return
        self.waiting.setdefault(call.node, deque()).append(call)
        if not line:
            self.since[call.node], self.bound_by[call.node] = call.asked, None
        self.play(call.asked)

    def play(self, until: int) -> None:
        """Let happen what would happen by then."""
        while True:
            due = self._dispatch()
            upcoming = min(due, self.ends[0][0] if self.ends else NEVER)
            if upcoming > until:
                break
            self.now = max(self.now, upcoming)
            while self.ends and self.ends[0][0] <= self.now:
                self._end(heapq.heappop(self.ends)[2])
        self.now = max(self.now, until)

    def over(self, call: _Call, took: int) -> None:
        """Note how long a call took in reality, and what that means for its place in the line."""
        call.took = took
        if call.started is not None:
            self.open.discard(call)
            heapq.heappush(self.ends, (call.started + took, id(call), call))

    def forecast(self) -> "_Line":
        """Return how all this ends if nobody else calls, and open calls take as long as others did."""
        line = copy.copy(self)
        line.windows = {}
        copies: dict[_Call, _Call] = {}

        def copied(call: _Call) -> _Call:
            return copies.setdefault(call, copy.copy(call))

        line.waiting = {node: deque(map(copied, calls)) for node, calls in self.waiting.items()}
        line.ends = [(when, number, copied(call)) for when, number, call in self.ends]
        line.open, line.in_flight = set(map(copied, self.open)), Counter(self.in_flight)
        line.since, line.bound_by = dict(self.since), dict(self.bound_by)
        line.waits = {name: list(sums) for name, sums in self.waits.items()}
        return line

    def play_to_the_end(self, took: int) -> None:
        """Play until nobody waits; calls that go on take ``took``."""
        for call in list(self.open):
            assert call.started is not None
            self.over(call, max(took, self.now - call.started))
        for call in (each for calls in self.waiting.values() for each in calls):
            call.took = took if call.took is None else call.took
        self.play(NEVER - 1)

    # --- the machine ---

    def _dispatch(self) -> int:
        """Start the calls that may start now, in order of arrival; return when the next may."""
        while True:
            heads = sorted(self.waiting.values(), key=lambda calls: calls[0].asked)
            dues = [self._start(calls) for calls in heads]
            if 0 not in dues:
                return min(dues, default=NEVER)

    def _start(self, calls: deque[_Call]) -> int:
        """Start the first of ``calls`` and return 0, or when to try again."""
        call, node, binds = calls[0], calls[0].node, "concurrency"
        latest = NEVER if call.deadline is None else call.deadline
        due: int = NEVER
        if all(self.in_flight[level] < level.slots for level in node.path):
            due, bound_by = admit(self._route(node), call.amounts, self.since[node], self.now)
            binds = bound_by or binds
        if due <= self.now:
            self._started(call)
        elif self.now > latest:
            self.failed += 1
        else:
            self.bound_by[node] = binds
            return min(due, latest + 1)
        calls.popleft()
        if calls:
            self.since[node] = self.now
        else:
            del self.waiting[node]
        return 0

    def _started(self, call: _Call) -> None:
        call.started, waited = self.now, self.now - call.asked
        bound_by = self.bound_by[call.node] if waited else None
        if bound_by is not None:
            sums = self.waits.setdefault(bound_by, [0, 0])
            sums[0] += 1
            sums[1] += waited
        self.in_flight.update(call.node.path)
        self.open.add(call)
        if call.took is not None:
            self.over(call, call.took)
        if self.windows is None:
            cost, seconds = Cost.of(call.amounts), waited * 1e-9
            call.node.pacer.notify_locked(
                call.node, Shadowed, cost=cost, would_wait=seconds, bound_by=bound_by
            )

    def _end(self, call: _Call) -> None:
        """Give a call's slots back, and correct its cost to what it used."""
        self.in_flight.subtract(call.node.path)
        assert call.started is not None
        for meter, resource in self._route(call.node).meters:
            reserved, used = call.amounts.get(resource, 0), call.used.get(resource, 0)
            if used > reserved:
                meter.owe(used - reserved, self.now)
            elif used < reserved:
                meter.unbook(reserved - used, call.started, left=used)

    def _route(self, node: Node) -> Any:
        windows = [window for each in node.path for window in each.limits.values()]
        if self.windows is not None:
            for window in windows:
                if window not in self.windows:
                    self.windows[window] = copy.deepcopy(window)
            windows = [self.windows[window] for window in windows]
        return Route((), tuple((window, window.limit.resource) for window in windows))


class Shadow(Account):
    """Play the line of a tree of limiters whose calls all pass; see the module."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._line = _Line()
        #: The open calls, by lease; how many are over, and how long they took together (ns).
        self._calls: dict[int, _Call] = {}
        self._took = [0, 0]
        self._prevented = 0
        _AT_EXIT.add(self)

    def passed(self, lease: Lease, now: int) -> None:
        """See `Account.passed`: the call asks."""
        node, amounts, deadline = lease._node, lease._amounts, lease._deadline
        until = None if deadline is None else deadline()
        call = _Call(node, amounts, now, until, amounts)
        self._calls[id(lease)] = call
        self._line.ask(call)

    def settled(self, lease: Lease, before: Amounts, after: Amounts) -> None:  # noqa: ARG002
        """See `Account.settled`."""
        self._calls[id(lease)].used = dict(after)

    def ended(self, lease: Lease, outcome: str) -> None:  # noqa: ARG002 - whatever came of it
        """See `Account.ended`."""
        call, now = self._calls.pop(id(lease)), self._node.pacer.clock()
        self._line.play(now)
        self._took = [self._took[0] + 1, self._took[1] + now - call.asked]
        self._line.over(call, now - call.asked)

    def refused(self, now: int) -> None:
        """See `Account.refused`: if calls would wait now, those before it would not have come so soon."""
        self._line.play(now)
        self._prevented += bool(self._line.waiting)

    def statistics(self, now: int) -> ShadowStatistics:
        """Return what would have happened; with the lock held."""
        self._line.play(now)
        line, (over, took) = self._line.forecast(), self._took
        line.play_to_the_end(took // max(1, over))
        waited = sum(count for count, _ in line.waits.values())
        seconds = sum(sums for _, sums in line.waits.values()) * 1e-9
        return ShadowStatistics(
            calls=line.calls,
            would_wait=waited,
            mean_wait=seconds / max(1, line.calls),
            would_fail=line.failed,
            prevented=self._prevented,
            refusals=self._node.upstream_429,
            waits={name: Waits(count, sums * 1e-9) for name, (count, sums) in line.waits.items()},
        )

    def report(self) -> None:
        """Log what would have happened."""
        with self._node.pacer:
            told = self.statistics(self._node.pacer.clock())
        if told.calls:
            _log.warning("limiter %r in shadow: %s", self._node.name, told)


_AT_EXIT: Final["weakref.WeakSet[Shadow]"] = weakref.WeakSet()


@atexit.register
def _report() -> None:
    for shadow in tuple(_AT_EXIT):
        shadow.report()
