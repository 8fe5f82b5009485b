"""Who goes next where several lines meet: the lowest tag, by the rule of `asyncbucket.core.shares`."""

import heapq
import math
from collections.abc import Iterator
from typing import TypeAlias

from asyncbucket.core.node import Node
from asyncbucket.core.queue import EMPTY, SWEEP, Line, Waiter
from asyncbucket.core.shares import STEP, Share, VirtualClock

Source: TypeAlias = "Line | Branch"


class Flow:
    """One of the competitors among which a branch chooses."""

    __slots__ = ("asleep", "child", "competes", "held_by", "key", "order", "share", "source")

    def __init__(
        self, key: object, source: Source, share: Share, *, child: Node | None, order: int
    ) -> None:
        #: A priority in `PriorityClasses`; below that the child's node, or None for the limiter's
        #: own line.
        self.key = key
        self.source = source
        self.share = share
        #: The limiter whose limits lie between this flow and the branch, if it is a child's flow.
        self.child = child
        self.order = order
        #: Which of the child's own limits last held up its head.
        self.held_by: str | None = None
        #: Until when it is no candidate; 0 while it is one. Then it competes if anyone waits in it.
        self.asleep = 0
        self.competes = False

    def __lt__(self, other: "Flow") -> bool:
        return self.order < other.order


class Branch:
    """Choose among several flows on one loop: the lowest tag of those that may go."""

    __slots__ = (
        "_asleep",
        "_clock",
        "_flows",
        "_orders",
        "_ready",
        "_self_bound",
        "first",
        "living",
        "lowest_emptied",
        "node",
    )

    def __init__(self, node: Node, clock: VirtualClock, self_bound: set[Flow]) -> None:
        self.node = node
        #: The tree's flows that limits of their own hold up, or did before they were last served.
        self._self_bound = self_bound
        self._clock = clock
        self._flows: dict[object, Flow] = {}
        # Entries with an outdated tag, or of a flow woken earlier, are corrected when found.
        self._ready: list[tuple[float, Flow]] = []
        self._asleep: list[tuple[int, Flow]] = []
        self._orders = 0
        #: The flow whose head was found last.
        self.first: Flow | None = None
        #: How many wait here and below.
        self.living = 0
        #: The lowest tag of those that this pass has emptied.
        self.lowest_emptied = math.inf

    def __len__(self) -> int:
        return self.living

    def waiters(self) -> Iterator[Waiter]:
        """Yield all who wait here and below."""
        for flow in self._flows.values():
            yield from flow.source.waiters()

    @property
    def wake(self) -> int:
        """When to look again if no head was found; `EMPTY` if nobody is left."""
        asleep = self._asleep
        while asleep and asleep[0][1].asleep != asleep[0][0]:
            heapq.heappop(asleep)
        return asleep[0][0] if asleep else EMPTY

    @property
    def bound_by(self) -> str | None:
        """What last held up the head here; if all are asleep, that of the first flow."""
        waiting = (flow for flow in self._flows.values() if flow.source)
        flow = self.first or next(waiting, None)
        return None if flow is None else flow.source.bound_by

    def keys(self) -> tuple[object, ...]:
        """Return the keys of the flows in which somebody waits."""
        return tuple(self._flows)

    def find(self, key: object) -> Flow | None:
        """Return a flow in which somebody waits."""
        return self._flows.get(key)

    def add(self, key: object, source: Source, share: Share, *, child: Node | None = None) -> Flow:
        """Add a flow; its source has, or is about to have, a head."""
        flow = Flow(key, source, share, child=child, order=self._order(key))
        self._flows[key] = flow
        self._make_ready(flow)
        return flow

    def _order(self, key: object) -> int:  # noqa: ARG002 - as `PriorityClasses._order`
        """Return a flow's place among those with the same tag: first come, first served."""
        self._orders += 1
        return self._orders

    def reactivate(self, flow: Flow) -> None:
        """Let a flow compete again in which somebody waits anew."""
        if flow.asleep:
            self._make_ready(flow)
        else:
            self._enter(flow)

    def rouse(self, flow: Flow) -> None:
        """Wake a sleeping flow, because something has changed below."""
        if flow.asleep:
            self._make_ready(flow)

    def rouse_all(self) -> None:
        """Wake all flows, here and below, because limits have changed."""
        for flow in self._flows.values():
            self.rouse(flow)
            if isinstance(flow.source, Branch):
                flow.source.rouse_all()

    def disband(self) -> None:
        """End all competition, here and below."""
        for flow in self._flows.values():
            self._leave(flow)
            if isinstance(flow.source, Branch):
                flow.source.disband()

    def head(self, now: int, *, slotless: int = 0) -> Waiter | None:
        """Return the next waiter, as far as the limits *below* this node are concerned.

        ``slotless`` treats those that wait for a slot as if this many had come back.
        """
        asleep, ready = self._asleep, self._ready
        while asleep and (asleep[0][0] <= now or slotless):
            due, flow = heapq.heappop(asleep)
            if flow.asleep == due:
                self._make_ready(flow)
        while ready:
            tag, flow = ready[0]
            if tag != flow.share.tag:
                heapq.heapreplace(ready, (flow.share.tag, flow))
                continue
            waiter, due = self._head_of(flow, now, slotless=slotless)
            if waiter is not None and due <= now:
                self.first = flow
                return waiter
            heapq.heappop(ready)
            self._put_to_sleep(flow, due)
        self.first = None
        return None

    def _head_of(self, flow: Flow, now: int, *, slotless: int) -> tuple[Waiter | None, int]:
        """Return the head of a flow, if it has one now, and when it may have one."""
        waiter = flow.source.head(now, slotless=slotless)
        if waiter is None:
            return None, flow.source.wake
        if flow.child is None or not flow.child.gates.meters:
            return waiter, now
        gates = flow.child.gates.slotless(slotless) if slotless else flow.child.gates
        due, bound_by = gates.earliest(waiter.amounts, waiter.line.since)
        if due > now:
            waiter.line.bound_by = flow.held_by = bound_by
            due = min(due, flow.source.wake)  # another call may be the head by then
        return waiter, due

    def _make_ready(self, flow: Flow) -> None:
        """Make ``flow`` a candidate, as if idle until now; if held up before, it keeps one call."""
        held_up = flow.asleep and flow.child is not None
        flow.asleep = 0
        share = flow.share
        share.join(self._clock.now, kept=share.price / share.weight if held_up else 0.0)
        self._enter(flow)
        heapq.heappush(self._ready, (share.tag, flow))

    def _put_to_sleep(self, flow: Flow, due: int) -> None:
        """Let ``flow`` sleep until ``due``, or forget it if nobody is left in it."""
        self._leave(flow)
        if due < EMPTY:
            flow.asleep = due
            self._self_bound.add(flow)
            heapq.heappush(self._asleep, (due, flow))
            if len(self._asleep) > 2 * len(self._flows) + SWEEP:
                self._asleep = [(each.asleep, each) for each in self._flows.values() if each.asleep]
                heapq.heapify(self._asleep)
        else:
            del self._flows[flow.key]
            self._self_bound.discard(flow)

    def served(self, head: Waiter, now: int) -> None:
        """Remove ``head``, which `head` returned and which passed, from its line; charge for it."""
        flow = self.first
        assert flow is not None
        self._self_bound.discard(flow)
        flow.source.served(head, now)
        self.living -= 1
        price = self.node.prices.of(head.amounts)
        weights = self._weigh(flow)  # first: among priorities, this sets the flow's weight
        self._clock.advance(flow.share, price, weights=weights)
        flow.share.charge(price / flow.share.weight)
        if not flow.source:
            # It is forgotten when it would be next, unless somebody has come back by then.
            self.lowest_emptied = min(self.lowest_emptied, flow.share.tag)
            self._leave(flow)

    def _enter(self, flow: Flow) -> None:
        """Let ``flow`` compete."""
        if not flow.competes:
            flow.competes = True
            self._clock.enter(flow.share)

    def _leave(self, flow: Flow) -> None:
        """Let ``flow`` compete no longer."""
        if flow.competes:
            flow.competes = False
            self._clock.leave(flow.share)

    def _weigh(self, flow: Flow) -> float:
        """Return the total weight of all that compete, on any loop."""
        return self._clock.weigh(flow.share)


class PriorityClasses(Branch):
    """Choose among priorities; with equal tags the more urgent one goes first."""

    __slots__ = ()

    def _order(self, key: object) -> int:
        assert isinstance(key, int)
        return -key

    def _weigh(self, flow: Flow) -> float:
        """Set the weight of ``flow`` by its rank among its competitors; return the total weight."""
        shares = self.node.fairness.classes
        ready = sorted(priority for priority, share in shares.items() if share.loops)
        weights = [STEP**rank for rank in range(len(ready))]
        flow.share.weight = weights[ready.index(-flow.order)]
        return sum(weights)
