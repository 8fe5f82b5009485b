"""See what a limiter would do, before it does it: every call passes, and is made at a twin, too.

``Limiter(..., shadow=True)`` lets every call of its tree pass at once. A `Shadow` hears of each call
as an account does (`asyncbucket.engine.interfaces`): when it asks, what it used, and how long it took.
It makes the same call at a twin: a tree of the same limits and terms, on a clock that the shadow sets.
There a call starts when the engine admits it, and ends as long after that as it took in reality. So it
ends there no sooner than in reality, and what happened until now is always known. What comes after
that happens to a copy, in which calls that go on take as long as the others did. The meters are the
real ones, so that pacing can begin with what was booked.

Two things are missing: arrivals that would have come later because replies did, and the order of
agents, which changes who waits rather than how long all wait.
"""

import copy
import heapq
import logging
import sys
import weakref
from asyncio import CancelledError
from typing import Any, Final

from asyncbucket.engine.dispatchers import DeferringLock
from asyncbucket.engine.errors import AsyncBucketError
from asyncbucket.engine.events import Shadowed
from asyncbucket.engine.interfaces import Account
from asyncbucket.engine.lease import HELD, OVER, WAITING, Lease
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.meters import NEVER, Amounts, Route
from asyncbucket.engine.node import EMPTY_MAPPING, Node
from asyncbucket.engine.pacer import Pacer
from asyncbucket.engine.queue import Dispatcher, copied, reweigh
from asyncbucket.engine.statistics import ShadowStatistics, Waits

# It hears of a lease what no user is to see.
# ruff: noqa: SLF001

_log: Final = logging.getLogger("asyncbucket")

#: How many calls may wait in the twin, unless ``max_queue`` says so: nobody slows them down there.
_MOST_WAIT: Final = 10_000


class _Place(Dispatcher):
    """Where all calls of the twin wait: `Shadow.play` dispatches them."""

    has_rung = False

    def ring(self, now: int) -> bool:
        self.has_rung, self.wakes_at = True, min(self.wakes_at, now)
        return True

    def sleep(self, until: int, now: int) -> None:
        self.wakes_at = now if self.has_rung else until  # it may ring while it dispatches


class _Call(Lease):
    """A call in the twin."""

    _state = WAITING
    #: How long it took in reality (ns), and what it used; what waits for it in the twin.
    took = NEVER
    used: Amounts = EMPTY_MAPPING
    waiter: Any = None

    def __init__(self, shadow: "Shadow", lease: Any, now: int) -> None:
        self._shadow, self._node, self._amounts = shadow, shadow.twin(lease._node), lease._amounts
        self._priority, self._deadline = lease._priority, lease._deadline
        #: Where it asks in reality, and when (ns).
        self.real, self.asked = lease._node, now

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        changing = "_shadow", "_node", "_dispatcher", "_route", "_in_line", "_ledger", "waiter"
        return copied(self, memo, changing)

    def _hold_locked(self, now: int, waiter: Any, bound_by: str | None, route: Route) -> None:
        super()._hold_locked(now, waiter, bound_by, route)
        self._shadow.starts(self)

    def _gave_up_locked(self) -> None:
        self._shadow.failed += not self.waiter.cancelled()


class Shadow(Account):
    """Make the calls of a tree of limiters, which all pass, at its twin; see the module."""

    def __init__(self, limiter: Limiter) -> None:
        self._node = limiter._node
        #: Until when (ns) it is known what happens in the twin.
        self._now = 0
        self._pacer = Pacer(self._clock, limiter.name)
        self._pacer.dispatchers.here = self._here  # type: ignore[method-assign]
        self._twins = weakref.WeakKeyDictionary({self._node: self._pacer.root})
        #: The calls that go on in reality; how many are over, and how long (ns) those took.
        self._open: set[_Call] = set()
        self._over = self._took = 0
        self._asked = self.failed = self._prevented = 0
        #: When those end that are over in reality: instant, number, call; behind the last, nothing does.
        self._ends: list[tuple[int, int, Any]] = [(NEVER, 0, None)]
        weakref.finalize(limiter, self._node.pacer.lock.do, self._report_locked)

    # --- what it hears ---

    def passed(self, lease: Any, now: int) -> None:
        """See `Account.passed`: the call asks."""
        self.play(now)
        self._asked += 1
        call = lease.twin = _Call(self, lease, now)
        self._open.add(call)
        if call._try_now(WAITING):
            self.starts(call)
            return
        try:
            call.waiter = call._join_line(call._deadline and call._deadline(), self._here())
            self.play(now)
        except AsyncBucketError:
            self.failed += 1

    def settled(self, lease: Any, before: Amounts, after: Amounts) -> None:  # noqa: ARG002 - an account's
        """See `Account.settled`; in the twin, that is done when the call ends there."""
        call = lease.twin
        call.used = after
        if call._state == OVER:
            call._settle_locked({**after})

    def ended(self, lease: Any, outcome: str) -> None:  # noqa: ARG002 - as above
        """See `Account.ended`."""
        if self._node.bystander is not self:
            return  # else it would book what pacing needs
        call, now = lease.twin, self._node.pacer.clock()
        self.play(now)
        self._open.remove(call)
        call.took = now - call.asked
        self._over, self._took = self._over + 1, self._took + call.took
        if isinstance(sys.exception(), CancelledError):  # whether or not it has started
            call.took = now - call._when
            if call.waiter and not call.waiter.done():
                self._pacer.withdraw_locked(call.waiter)
        self._await_end(call)

    def refused(self, now: int) -> None:
        """See `Account.refused`: if calls would wait now, those before it would not have come so soon."""
        self.play(now)
        self._prevented += bool(self._pacer.waiting)

    # --- what it tells ---

    def copied_locked(self) -> "Shadow":
        """Return a copy as of now, in which to look ahead without the lock."""
        self.play(self._node.pacer.clock())
        memo: dict[int, Any] = {id(each): each for each in (*self._twins, EMPTY_MAPPING)}
        memo[id(self._pacer.lock)] = DeferringLock()
        ahead = copy.deepcopy(self, memo)
        vars(ahead)["starts"] = ahead._await_end  # nobody is told of what may come
        return ahead

    def look_ahead(self) -> ShadowStatistics:
        """Return what would have happened, and what will if nobody else calls: for a copy."""
        for call in self._open:
            call.took = self._took // max(1, self._over)
            self._await_end(call)
        self.play(NEVER - 1)
        found, refusals = self._pacer.root.tally.waits, self._node.tally.counts["upstream_429"]
        waits = {name: Waits(count, ns * 1e-9) for name, (count, ns) in found.items()}
        would_wait = sum(each.count for each in waits.values())
        mean_wait = sum(each.seconds for each in waits.values()) / max(1, self._asked)
        return ShadowStatistics(
            self._asked, would_wait, mean_wait, self.failed, self._prevented, refusals, waits
        )

    def _report_locked(self) -> None:
        """Log what would have happened, now that the limiter goes."""
        told = self.copied_locked().look_ahead()
        if told.calls:
            _log.warning("limiter %r in shadow: %s", self._node.name, told)

    # --- the twin ---

    def _clock(self) -> int:
        return self._now

    def _here(self) -> Any:
        """Return where all its calls wait; a forked process begins with none."""
        places = self._pacer.dispatchers
        if self not in places:
            places[self] = _Place(self._pacer.dispatch)
            self._open, self._ends = set(), [(NEVER, 0, None)]
        return places[self]

    def twin(self, node: Node) -> Node:
        """Return the twin of a limiter, with the limits and terms as they are now."""
        above = None if node.parent is None else self.twin(node.parent)
        twin = self._twins.get(node) or self._twins.setdefault(node, Node(node.name, above))
        terms, own = node.standing, twin.standing
        own.max_queue = _MOST_WAIT if terms.max_queue is None else terms.max_queue
        own.within = terms.within
        if own.weight != terms.weight:
            reweigh(twin, terms.weight)
        if twin.limits is not node.limits or twin.slots.most != node.slots.most:
            twin.limits, twin.slots.most = node.limits, node.slots.most
            self._pacer.limits_changed_locked(twin)
        return twin

    def play(self, until: int) -> None:
        """Let happen in the twin what does by then."""
        here = self._here()
        while (due := min(here.wakes_at, self._ends[0][0])) <= until:
            self._now = max(self._now, due)
            if self._ends[0][0] > self._now:
                here.has_rung = False
                self._pacer.dispatch(here)
            else:
                call = heapq.heappop(self._ends)[2]
                call._settle_locked({**call.used})
                call._end_locked("ok")
        self._now = until

    def starts(self, call: _Call) -> None:
        """Take in that a call starts in the twin."""
        self._await_end(call)
        told = {"cost": call.cost, "would_wait": call.waited, "bound_by": call.bound_by}
        self._node.pacer.notify_locked(call.real, Shadowed, **told)

    def _await_end(self, call: _Call) -> None:
        """Note when a call ends in the twin, once that is known."""
        if call._state == HELD and call.took < NEVER:
            heapq.heappush(self._ends, (call._when + call.took, id(call), call))
