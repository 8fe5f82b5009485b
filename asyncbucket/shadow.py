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

import copy
import heapq
import logging
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from asyncbucket.engine.cost import Cost
from asyncbucket.engine.events import Shadowed
from asyncbucket.engine.interfaces import Account
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.meters import NEVER, Amounts, Route, Slots, admit
from asyncbucket.engine.node import EMPTY_MAPPING, Node
from asyncbucket.engine.statistics import ShadowStatistics, Waits

# It hears of a lease what no user is to see.
# ruff: noqa: SLF001

_log: Final = logging.getLogger("asyncbucket")


@dataclass(slots=True, eq=False)
class _Call:
    """A call: where it asks, what for, what it uses, and when (ns)."""

    node: Node
    amounts: Amounts
    used: Amounts
    asked: int
    deadline: int
    #: Since when it is the first in line, what it waits for, when it starts, and how long it takes.
    since: int = NEVER
    bound_by: str = "concurrency"
    started: int = NEVER
    took: int = NEVER


class Shadow(Account):
    """Play the line of a tree of limiters whose calls all pass; see the module."""

    def __init__(self, limiter: Limiter) -> None:
        self._node = limiter._node
        #: For each limiter, the slots of the calls that would go on.
        self._slots = weakref.WeakKeyDictionary[Node, Slots]()
        self._root = self._slots[self._node] = Slots()
        #: What its calls pass.
        self._routes = weakref.WeakKeyDictionary[Node, Route]()
        #: How many calls would have waited, and how long (ns) in total, by what held them up.
        self._waits: dict[str, tuple[int, int]] = {}
        self._lines: dict[Node, deque[_Call]] = {}
        #: The calls that go on in reality, by lease; how many are over, and how long (ns) those took.
        self._calls: dict[int, _Call] = {}
        self._now = self._failed = self._prevented = self._over = self._took = 0
        #: When those end that are over in reality: instant, number, call; behind the last, nothing does.
        self._ends: list[tuple[int, int, Any]] = [(NEVER, 0, None)]
        self._is_copy = False
        weakref.finalize(limiter, self._node.pacer.lock.do, self._report_locked)

    # --- what it hears ---

    def passed(self, lease: Any, now: int) -> None:
        """See `Account.passed`: the call asks."""
        node, latest = lease._node, lease._deadline and lease._deadline()
        call = _Call(node, lease.amounts, lease.amounts, now, NEVER if latest is None else latest)
        self._calls[id(lease)] = call
        self._routes[node] = self._route(node)
        self._play(now)
        line = self._lines.setdefault(node, deque())
        bounds = (level.standing.max_queue for level in node.path)
        if line and len(line) >= min((each for each in bounds if each is not None), default=NEVER):
            self._failed += 1
        else:
            line.append(call)
            self._play(now)

    def ended(self, lease: Any, outcome: str) -> None:  # noqa: ARG002 - whatever came of it
        """See `Account.ended`."""
        call, now = self._calls.pop(id(lease)), self._node.pacer.clock()
        self._play(now)
        call.used, call.took = lease._used(), now - call.asked
        self._over, self._took = self._over + 1, self._took + call.took
        self._await_end(call)

    def refused(self, now: int) -> None:
        """See `Account.refused`: if calls would wait now, those before it would not have come so soon."""
        self._play(now)
        self._prevented += bool(self._lines)

    # --- what it tells ---

    def statistics(self, now: int) -> ShadowStatistics:
        """Return what would have happened, and what will if nobody else calls; with the lock held."""
        self._play(now)
        kept = (*self._slots, self._node.pacer, EMPTY_MAPPING)
        ahead = copy.deepcopy(self, {id(each): each for each in kept})
        ahead._is_copy = True
        for call in ahead._calls.values():
            call.took = self._took // max(1, self._over)
            ahead._await_end(call)
        ahead._play(NEVER - 1)
        calls = ahead._root.admitted + ahead._failed
        refusals = self._node.tally.counts["upstream_429"]
        waits = {name: Waits(count, ns * 1e-9) for name, (count, ns) in ahead._waits.items()}
        would_wait = sum(each.count for each in waits.values())
        mean_wait = sum(each.seconds for each in waits.values()) / max(1, calls)
        return ShadowStatistics(
            calls, would_wait, mean_wait, ahead._failed, self._prevented, refusals, waits
        )

    def _report_locked(self) -> None:
        """Log what would have happened, now that the limiter goes."""
        told = self.statistics(self._node.pacer.clock())
        if told.calls:
            _log.warning("limiter %r in shadow: %s", self._node.name, told)

    # --- the line ---

    def _route(self, node: Node) -> Route:
        """Return what a call of ``node`` passes: the real meters, and slots of those that would go on."""
        for level in node.path:
            self._slots.setdefault(level, Slots()).most = level.slots.most
        levels = tuple(self._slots[level] for level in node.path)
        windows = (window for level in node.path for window in level.limits.values())
        return Route(levels, tuple((each, each.limit.resource) for each in windows), bounded=levels)

    def _play(self, until: int) -> None:
        """Let happen what would happen by then."""
        while (due := min(self._dispatch(), self._ends[0][0])) <= until:
            self._now = max(self._now, due)
            if self._ends[0][0] <= self._now:
                self._end(heapq.heappop(self._ends)[2])
        self._now = until

    def _dispatch(self) -> int:
        """Start the first of each line that may start now, in order of arrival; return when to look again."""
        heads = sorted(self._lines.values(), key=lambda line: line[0].asked)
        return min(map(self._start, heads), default=NEVER)

    def _start(self, line: deque[_Call]) -> int:
        """Start the first in line, or let it fail, and return 0; else return when to try again."""
        call, now = line[0], self._now
        call.since = min(call.since, now)
        due, bound_by = NEVER, None
        if now <= call.deadline:
            due, bound_by = admit(self._routes[call.node], call.amounts, call.since, now)
        if due <= now:
            self._started(call)
        elif due < NEVER or bound_by == "concurrency":
            call.bound_by = bound_by or call.bound_by
            return min(due, call.deadline + 1)
        else:  # too late, or it costs more than a limit
            self._failed += 1
        line.popleft()
        if not line:
            del self._lines[call.node]
        return 0

    def _started(self, call: _Call) -> None:
        call.started, node = self._now, call.node
        waited = call.started - call.asked
        if waited:
            count, before = self._waits.get(call.bound_by, (0, 0))
            self._waits[call.bound_by] = count + 1, before + waited
        self._await_end(call)
        if not self._is_copy:
            told = {"would_wait": waited * 1e-9, "bound_by": call.bound_by if waited else None}
            node.pacer.notify_locked(node, Shadowed, cost=Cost.of(call.amounts), **told)

    def _await_end(self, call: _Call) -> None:
        """Note when a call ends in the line, once it is known when it starts and how long it takes."""
        if call.started + call.took < NEVER:
            heapq.heappush(self._ends, (call.started + call.took, id(call), call))

    def _end(self, call: _Call) -> None:
        """Give a call's slots back, and correct its cost to what it used."""
        route = self._routes[call.node]
        for level in route.levels:
            level.in_flight -= 1
        for meter, resource in route.meters:
            reserved, used = call.amounts.get(resource, 0), call.used.get(resource, 0)
            if used > reserved:
                meter.owe(used - reserved, self._now)
            elif used < reserved:
                meter.unbook(reserved - used, call.started, left=used)
