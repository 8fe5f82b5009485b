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
import itertools
import logging
import weakref
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Final

from asyncbucket.engine.account import Account, Admission
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.events import Shadowed
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.meters import NEVER, Amounts, Route, admit
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
    #: Since when it is the first in line, and what it waits for.
    since: int | None = None
    bound_by: str = ""


class _Line:
    """The calls that would wait, those that would be open, and what the others waited."""

    def __init__(self) -> None:
        self.now = 0
        self.waiting: dict[Node, deque[_Call]] = {}
        self.open: set[_Call] = set()
        #: When those end that are over in reality: instant, number, call.
        self.ends: list[tuple[int, int, _Call]] = []
        self.in_flight = Counter[Node]()
        self.calls = self.failed = 0
        self.waits: dict[str, list[int]] = {}
        #: Copies of the limits, if this is a forecast.
        self.copies: dict[Node, Route] = {}

    def ask(self, call: _Call) -> None:
        """Let ``call`` join, unless it would be refused at once."""
        self.play(call.asked)
        self.calls += 1
        line = self.waiting.get(call.node, ())
        bounds = [node.max_queue for node in call.node.path if node.max_queue is not None]
        can_pass = all(
            call.amounts.get(resource, 0) <= meter.limit.units or not meter.refuses
            for meter, resource in _limits_of(call.node).meters
        )
        if can_pass and not (line and len(line) >= min(bounds, default=NEVER)):
            self.waiting.setdefault(call.node, deque()).append(call)
            self.play(call.asked)
        else:
            self.failed += 1

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

    def forecast(self, took: int) -> "_Line":
        """Return how all this ends if nobody else calls, and calls that go on take ``took`` (ns)."""
        nodes = {*self.waiting, *self.in_flight}
        nodes.update(level for node in self.waiting for level in node.path)
        line = copy.copy(self)
        line.copies = {node: _limits_of(node) for node in nodes}
        line = copy.deepcopy(line, {id(node): node for node in nodes})
        for call in list(line.open):
            assert call.started is not None
            line.over(call, max(took, line.now - call.started))
        for call in itertools.chain(*line.waiting.values()):
            call.took = took if call.took is None else call.took
        line.play(NEVER - 1)
        return line

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
        call, binds = calls[0], "concurrency"
        call.since = self.now if call.since is None else call.since
        latest = NEVER if call.deadline is None else call.deadline
        due: int = NEVER
        if all(self.in_flight[level] < level.slots for level in call.node.path):
            due, bound_by = admit(self._limits(call.node), call.amounts, call.since, self.now)
            binds = bound_by or binds
        if self.now < due and self.now <= latest:
            call.bound_by = binds
            return min(due, latest + 1)
        if due <= self.now:
            self._started(call)
        else:
            self.failed += 1
        calls.popleft()
        if not calls:
            del self.waiting[call.node]
        return 0

    def _started(self, call: _Call) -> None:
        call.started, waited = self.now, self.now - call.asked
        if waited:
            sums = self.waits.setdefault(call.bound_by, [0, 0])
            sums[0] += 1
            sums[1] += waited
        self.in_flight.update(call.node.path)
        self.open.add(call)
        if call.took is not None:
            self.over(call, call.took)
        if not self.copies:
            cost, bound_by, seconds = Cost.of(call.amounts), call.bound_by or None, waited * 1e-9
            call.node.pacer.notify_locked(
                call.node, Shadowed, cost=cost, would_wait=seconds, bound_by=bound_by
            )

    def _end(self, call: _Call) -> None:
        """Give a call's slots back, and correct its cost to what it used."""
        self.in_flight.subtract(call.node.path)
        assert call.started is not None
        for meter, resource in self._limits(call.node).meters:
            reserved, used = call.amounts.get(resource, 0), call.used.get(resource, 0)
            if used > reserved:
                meter.owe(used - reserved, self.now)
            elif used < reserved:
                meter.unbook(reserved - used, call.started, left=used)

    def _limits(self, node: Node) -> Any:
        return self.copies.get(node) or _limits_of(node)


def _limits_of(node: Node) -> Any:
    windows = (window for each in node.path for window in each.limits.values())
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

    def passed(self, lease: Admission, now: int) -> None:
        """See `Account.passed`: the call asks."""
        assert isinstance(lease, Lease)
        node, amounts, deadline = lease._node, lease._amounts, lease._deadline
        until = None if deadline is None else deadline()
        call = _Call(node, amounts, now, until, amounts)
        self._calls[id(lease)] = call
        self._line.ask(call)

    def settled(self, lease: Admission, before: Amounts, after: Amounts) -> None:  # noqa: ARG002
        """See `Account.settled`."""
        self._calls[id(lease)].used = dict(after)

    def ended(self, lease: Admission, outcome: str) -> None:  # noqa: ARG002 - whatever came of it
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
        over, took = self._took
        line = self._line.forecast(took // max(1, over))
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
