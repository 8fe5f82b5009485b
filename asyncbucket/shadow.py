"""See what a limiter would do, before it does it: every call passes, and its line is played beside.

``Limiter(..., shadow=True)`` lets every call of its tree pass at once. The limits are booked all the
same, at the instants at which the calls would have been admitted. A `Shadow` hears of each call as
an account does (`asyncbucket.engine.interfaces`): when it asks, what it used, and how long it took. It
plays the line on these arrivals: a call starts when the meters and the slots would have let it, first
come, first served at each limiter, and ends as long after that as it took in reality. A call ends in
the line no sooner than in reality, so what happened until now is always known. What comes after that
is played on a copy, with calls that go on as long as the others took.

Two things are not played: arrivals that would have come later because replies did, and shares, agents
and priorities, which change who waits rather than how long all wait.
"""

import atexit
import copy
import heapq
import logging
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from asyncbucket.engine.cost import Cost
from asyncbucket.engine.events import Shadowed
from asyncbucket.engine.interfaces import Account, Admission
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.meters import NEVER, Amounts, admit
from asyncbucket.engine.node import EMPTY_MAPPING, Node
from asyncbucket.engine.statistics import ShadowStatistics, Waits

# It hears of a lease what no user is to see.
# ruff: noqa: SLF001

_log: Final = logging.getLogger("asyncbucket")


@dataclass(slots=True, eq=False)
class _Call:
    """A call: what it asks for and uses, and when (ns)."""

    node: Node
    amounts: Amounts
    used: Amounts
    asked: int
    deadline: int
    #: Tells observers how long it would have waited, and for what.
    tell: Callable[[int, str | None], None]
    #: How long it took; None while it goes on.
    took: int | None = None
    #: Since when it is the first in line, what it waits for, and when it starts.
    since: int | None = None
    bound_by: str | None = None
    started: int | None = None


class Shadow(Account):
    """Play the line of a tree of limiters whose calls all pass; see the module."""

    def __init__(self, node: Node) -> None:
        self._node = node
        #: For each limiter, one that has the same limits, and counts what would have happened.
        self._twins = weakref.WeakKeyDictionary[Node, Node]()
        self._now = self._failed = self._prevented = 0
        self._waiting: dict[Node, deque[_Call]] = {}
        #: The calls that go on in reality, by lease; how many are over, and how long those took.
        self._calls: dict[int, _Call] = {}
        self._over = self._took = 0
        #: When those end that are over in reality: instant, number, call.
        self._ends: list[tuple[int, int, _Call]] = []
        self._is_copy = False
        _AT_EXIT.add(self)

    # --- what it hears ---

    def passed(self, lease: Admission, now: int) -> None:
        """See `Account.passed`: the call asks."""
        assert isinstance(lease, Lease)
        node, amounts = lease._node, lease._amounts
        latest = None if lease._deadline is None else lease._deadline()

        def tell(waited: int, bound_by: str | None) -> None:
            fields = {"would_wait": waited * 1e-9, "bound_by": bound_by}
            node.pacer.notify_locked(node, Shadowed, cost=Cost.of(amounts), **fields)

        deadline, twin = NEVER if latest is None else latest, self._twin(node)
        call = self._calls[id(lease)] = _Call(twin, amounts, amounts, now, deadline, tell)
        self._play(now)
        line = self._waiting.setdefault(twin, deque())
        bounds = (level.standing.max_queue for level in node.path)
        if line and len(line) >= min((each for each in bounds if each is not None), default=NEVER):
            self._failed += 1
        else:
            line.append(call)
            self._play(now)

    def settled(self, lease: Admission, before: Amounts, after: Amounts) -> None:  # noqa: ARG002
        """See `Account.settled`."""
        self._calls[id(lease)].used = dict(after)

    def ended(self, lease: Admission, outcome: str) -> None:  # noqa: ARG002 - whatever came of it
        """See `Account.ended`."""
        call, now = self._calls.pop(id(lease)), self._node.pacer.clock()
        self._play(now)
        self._over, self._took = self._over + 1, self._took + now - call.asked
        self._end_after(call, now - call.asked)

    def refused(self, now: int) -> None:
        """See `Account.refused`: if calls would wait now, those before it would not have come so soon."""
        self._play(now)
        self._prevented += bool(self._waiting)

    # --- what it tells ---

    def statistics(self, now: int) -> ShadowStatistics:
        """Return what would have happened, and what will if nobody else calls; with the lock held."""
        self._play(now)
        kept = (self._node, self._node.pacer, EMPTY_MAPPING)
        ahead = copy.deepcopy(self, {id(each): each for each in kept})
        ahead._is_copy = True
        for call in ahead._calls.values():
            ahead._end_after(call, self._took // max(1, self._over))
        ahead._play(NEVER - 1)
        root = ahead._twin(self._node)
        waits = root.counted().waits
        calls = root.slots.admitted + ahead._failed
        return ShadowStatistics(
            calls=calls,
            would_wait=sum(count for count, _ in waits.values()),
            mean_wait=sum(waited for _, waited in waits.values()) * 1e-9 / max(1, calls),
            would_fail=ahead._failed,
            prevented=self._prevented,
            refusals=self._node.counted().counts["upstream_429"],
            waits={name: Waits(count, ns * 1e-9) for name, (count, ns) in waits.items()},
        )

    def report(self) -> None:
        """Log what would have happened."""
        with self._node.pacer.lock:
            told = self.statistics(self._node.pacer.clock())
        if told.calls:
            _log.warning("limiter %r in shadow: %s", self._node.name, told)

    # --- the line ---

    def _twin(self, node: Node) -> Node:
        twin = self._twins.get(node)
        if twin is None:
            parent = None if node.parent is None else self._twin(node.parent)
            twin = self._twins[node] = Node(node.name, parent, pacer=node.pacer)
        if not self._is_copy and (twin.limits, twin.slots.most) != (node.limits, node.slots.most):
            twin.limits, twin.slots.most = node.limits, node.slots.most
            twin.forget()
        return twin

    def _play(self, until: int) -> None:
        """Let happen what would happen by then."""
        while (
            upcoming := min([self._dispatch(), *(end for end, _, _ in self._ends[:1])])
        ) <= until:
            self._now = max(self._now, upcoming)
            while self._ends and self._ends[0][0] <= self._now:
                self._end(heapq.heappop(self._ends)[2])
        self._now = max(self._now, until)

    def _dispatch(self) -> int:
        """Start the calls that may start now, in order of arrival; return when the next may."""
        while True:
            heads = sorted(self._waiting.values(), key=lambda calls: calls[0].asked)
            dues = [self._start(calls) for calls in heads]
            if 0 not in dues:
                return min(dues, default=NEVER)

    def _start(self, calls: deque[_Call]) -> int:
        """Start the first of ``calls``, or let it fail, and return 0; or when to try again."""
        call, now = calls[0], self._now
        call.since = now if call.since is None else call.since
        if now > call.deadline or call.node.exceeded(call.amounts):
            self._failed += 1
        else:
            due, bound_by = admit(call.node.route, call.amounts, call.since, now)
            if due > now:
                call.bound_by = bound_by
                return min(due, call.deadline + 1)
            self._started(call, now)
        calls.popleft()
        if not calls:
            del self._waiting[call.node]
        return 0

    def _started(self, call: _Call, now: int) -> None:
        call.started, waited = now, now - call.asked
        if waited:
            call.node.count_waits(1, waited, call.bound_by or "concurrency")
        if call.took is not None:
            self._end_after(call, call.took)
        if not self._is_copy:
            call.tell(waited, call.bound_by)

    def _end_after(self, call: _Call, took: int) -> None:
        """Note how long a call takes, and so when it ends in the line."""
        call.took = took
        if call.started is not None:
            heapq.heappush(self._ends, (call.started + took, id(call), call))

    def _end(self, call: _Call) -> None:
        """Give a call's slots back, and correct its cost to what it used."""
        for level in call.node.route.levels:
            level.in_flight -= 1
        assert call.started is not None
        for meter, resource in call.node.route.meters:
            reserved, used = call.amounts.get(resource, 0), call.used.get(resource, 0)
            if used > reserved:
                meter.owe(used - reserved, self._now)
            elif used < reserved:
                meter.unbook(reserved - used, call.started, left=used)


_AT_EXIT: Final["weakref.WeakSet[Shadow]"] = weakref.WeakSet()


@atexit.register
def _report() -> None:
    for shadow in tuple(_AT_EXIT):
        shadow.report()
