"""What a pool has at its members: its place in their queues, and what its calls pass there.

See `asyncbucket.core.binding`, which chooses a member for each call.
"""

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.node import Node
from asyncbucket.core.queue import AnyWaiter, Line, branch_of, line_of, rouse
from asyncbucket.core.statistics import MemberState

if TYPE_CHECKING:
    from asyncbucket.core.pacer import Pacer

#: For how long (ns) a member is left out at its first failure, and at most.
_FIRST_REST: Final = 1_000_000_000
_LONGEST_REST: Final = 60_000_000_000
#: Where the pool's line stands among the lines of its node at a member.
_POOL: Any = "pool"


class PoolLine(Line):
    """Stand in the queue of a member for a pool."""

    __slots__ = ("member",)

    def __init__(self, member: "Member") -> None:
        super().__init__(member.node, branch_of(member.node, 0), 0)
        self.member = member

    def head(self, now: int, back: int = 0) -> tuple[AnyWaiter | None, int]:
        """Return the pool's head, if this member may have it; else when to ask again."""
        return self.member.choose(self.member.pool.first(now, back, self.member), now)

    def lines(self) -> Iterator[Line]:
        yield from self.member.pool.pacer.top.lines()


class LineAtMember(Line):
    """Where a pool's call comes from that a member has taken, and which lines have paid for it."""

    __slots__ = ("paid",)

    def __init__(self, node: "NodeAtMember", paid: tuple[Line, ...]) -> None:
        super().__init__(node, None, paid[0].priority)
        self.paid = paid

    @property
    def waited_at(self) -> Node:
        return self.paid[0].node

    def credit_flows(self, reserved: Amounts, used: Amounts | None = None) -> None:
        for line in self.paid:
            line.credit_flows(reserved, used)


class PoolNode(Node):
    """A limiter of a pool: the pool itself, or one below it. Its calls also pass one of the members."""

    __slots__ = ("at_members",)

    def __init__(self, name: str, parent: Node | None = None, *, pacer: Any = None) -> None:
        super().__init__(name, parent, pacer=pacer)
        #: What a call from here passes at each member that has taken one.
        self.at_members: dict[Member, NodeAtMember] = {}

    def routes(self, amounts: Amounts) -> list[Node]:
        """Return what such a call would pass at each member that can take it."""
        return [each.at(self) for each in self.pacer.pool.members if each.takes(amounts)]

    def forget(self) -> None:
        super().forget()
        for node in self.at_members.values():
            node.forget()

    def _work_out_limits(self) -> None:
        super()._work_out_limits()
        if self.parent is None:
            self.seconds = self.pacer.pool.seconds()

    def earliest_of_all(self, amounts: Amounts, now: int) -> tuple[int, str | None]:
        dues = [
            member.at(self).earliest_of_all(amounts, max(now, member.out_until))
            for member in self.pacer.pool.members
            if member.takes(amounts)
        ]
        return min(dues, key=lambda due: due[0], default=(NEVER, None))

    def soonest(self, amounts: Amounts, now: int, *, is_first: bool = True) -> int:
        anywhere = min(
            (
                each.node.soonest(amounts, now, is_first=not self.path[-1].waiting)
                for each in self.pacer.pool.members
                if each.takes(amounts)
            ),
            default=NEVER,
        )
        return max(super().soonest(amounts, now, is_first=is_first), anywhere)

    def check(self, amounts: Amounts) -> None:
        super().check(amounts)
        self.pacer.pool.check(amounts)

    def resources(self) -> set[str]:
        anywhere = (each.node.resources() for each in self.pacer.pool.members)
        return super().resources().union(*anywhere)

    def after_fork(self) -> None:
        super().after_fork()
        self.at_members = {}
        if self.parent is None:
            self.pacer.pool.after_fork()


class NodeAtMember(Node):
    """What a call of a pool's limiter passes if a member takes it: the pool's levels, then its own."""

    __slots__ = ("inner", "member")

    def __init__(self, inner: PoolNode, member: "Member") -> None:
        super().__init__(inner.name, pacer=member.pacer)
        self.inner, self.member = inner, member
        self.path = (*inner.path, *member.node.path)
        self.parent = member.node

    @property
    def agents(self) -> Any:
        """What orders the calls by agent: the pool's limiter."""
        return self.inner.agents

    @agents.setter
    def agents(self, _: object) -> None: ...

    @property
    def queue_path(self) -> tuple[Node, ...]:
        return self.member.node.path[:-1]

    def _work_out(self) -> None:
        self.own = tuple(pair for node in self.inner.path for pair in node.own)
        self.meters = (*self.own, *self.member.node.meters)
        self.takes = tuple((meter.take, resource) for meter, resource in self.meters)
        self._work_out_limits()
        self.seconds = self.inner.seconds  # by which the pool's agents are measured
        self.bounded = (
            *(node for node in self.inner.path if node.slots < NEVER),
            *self.member.node.bounded,
        )

    def line_for(self, priority: int, *, is_shared: bool) -> LineAtMember:
        """Return the line of calls of a priority that came from the pool.

        While nobody shares the member, there is nothing for its own queue to divide.
        """
        key: Any = priority, is_shared
        found = self.lines.get(key)
        if found is None:
            ours = line_of(self.inner, priority)
            found = LineAtMember(self, (ours, self.member.line) if is_shared else (ours,))
            self.lines = {**self.lines, key: found}
        here: LineAtMember = found
        return here


class Member:
    """A limiter in a pool: the pool's place there, and whether it works."""

    def __init__(self, pool: Any, limiter: Any, node: Node) -> None:
        self.pool = pool
        #: The member itself; and the pool as its child.
        self.limiter, self.node = limiter, node
        self.pacer: Pacer = node.pacer
        #: Calls that are kept for it, and until when.
        self.kept: deque[tuple[int, AnyWaiter]] = deque()
        #: How often it has failed in a row, and why; until when it is left out; and the lease that
        #: probes it.
        self.failures, self.reason = 0, ""
        self.out_until = 0
        self.probe: object = None

    @property
    def root(self) -> Node:
        """The node with the member's limits."""
        return self.node.path[-1]

    @property
    def line(self) -> PoolLine:
        """Where the pool stands in its queue."""
        line = self.node.lines.get(_POOL)
        if line is None:
            line = PoolLine(self)
            self.node.lines = {**self.node.lines, _POOL: line}
        found: PoolLine = line
        return found

    def rouse(self) -> None:
        """Ask for the pool anew in the member's queue: what is next in the pool may have changed."""
        line = self.line
        assert line.above is not None
        line.above.rouse(line)
        rouse(self.node)

    def at(self, inner: Node) -> NodeAtMember:
        """Return what a call from ``inner``, of the pool, passes if this member takes it."""
        assert isinstance(inner, PoolNode)
        node = inner.at_members.get(self)
        if node is None:
            node = inner.at_members[self] = NodeAtMember(inner, self)
        return node

    def choose(self, first: tuple[AnyWaiter | None, int], now: int) -> tuple[AnyWaiter | None, int]:
        """Return the call that this member is to take next, if ``first`` is next in the pool."""
        if not self.is_in(now):
            return None, self.out_until if self.probe is None else NEVER
        if self.kept:
            kept = (each for _, each in self.kept if not each.done() and not each.seat.is_late)
            waiter = next(kept, None)
            if waiter is not None:
                return waiter, now
        waiter = first[0]
        return first if waiter is None or self.takes(waiter.amounts) else (None, NEVER)

    @property
    def is_shared(self) -> bool:
        """Whether calls wait at it that are not the pool's."""
        everybody, our_own = self.pacer.waiting, self.pool.pacer.waiting
        return bool(everybody > our_own)

    def is_in(self, now: int) -> bool:
        """Tell whether it may be given calls."""
        return self.out_until <= now and self.probe is None

    def state(self, now: int) -> MemberState:
        """Return whether it is given calls."""
        if self.is_in(now):
            return MemberState(self.limiter.name, None, 0.0)
        left = max(0, self.out_until - now) * 1e-9
        return MemberState(self.limiter.name, self.reason, left)

    def takes(self, amounts: Amounts) -> bool:
        """Tell whether such a call can ever pass here."""
        return self.node.exceeded(amounts) is None

    def use(self, now: int) -> float:
        """Return the largest part of any of its limits, or of its slots, that is used."""
        root = self.root
        parts = [root.in_flight / root.slots]
        for window in root.limits.values():
            window.available(now)  # which forgets what is over
            parts.append(window.used / window.limit.units)
        return max(parts)

    def began(self, lease: Any, now: int) -> None:
        """Take in that a call goes here: after a failure, it is the probe."""
        if self.failures and self.out_until <= now:
            self.probe = lease

    def ended(self, lease: Any, *, is_proof: bool) -> None:
        """Take in that a call is over; one that ended well proves that the member works."""
        if is_proof and self.failures and self.out_until <= self.pacer.clock():
            self.failures = 0
        elif lease is not self.probe:
            return
        self.probe = None
        self.pacer.ring_locked(self.node)

    def fail(self, reason: str, now: int) -> bool:
        """Leave it out for a while; return whether it was in until now."""
        was_in = not self.failures
        if self.out_until <= now:  # else several calls that were in flight fail together
            rest = min(_FIRST_REST << min(self.failures, 6), _LONGEST_REST)
            self.failures += 1
            self.out_until = now + rest
        self.reason = reason
        return was_in
