"""What a pool has at its members: its place in their queues, and what its calls pass there.

See `asyncbucket.core.binding`, which chooses a member for each call.
"""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.node import Node
from asyncbucket.core.queue import AnyWaiter, Line, branch_of, rouse
from asyncbucket.core.seats import EMPTY
from asyncbucket.core.statistics import MemberState

if TYPE_CHECKING:
    from asyncbucket.core.pacer import Pacer

#: For how long (ns) a member is left out at its first failure, and at most.
_FIRST_REST: Final = 1_000_000_000
_LONGEST_REST: Final = 60_000_000_000


class PoolLine(Line):
    """Stand in the queue of a member for a pool, as urgent as the pool's most urgent call."""

    __slots__ = ("member",)

    def __init__(self, member: "Member", priority: int) -> None:
        super().__init__(member.node, branch_of(member.node, priority), priority)
        self.member = member

    def head(self, now: int, back: int = 0) -> tuple[AnyWaiter | None, int]:
        """Return the pool's call that this member is to take next; else when to ask again."""
        if not self.living:
            return None, EMPTY
        pool = self.member.pool
        found: tuple[AnyWaiter | None, int]
        found = pool.next_at(self.member, pool.pacer.top.head(now, back), now)
        return found

    def lines(self) -> Iterator[Line]:
        yield from self.member.pool.pacer.top.lines()


class PaidLine(Line):
    """Where a pool's call stands that has left its line, which has paid for it: alone, or at a member."""

    __slots__ = ("paid",)

    def __init__(self, node: Node, paid: tuple[Line, ...]) -> None:
        super().__init__(node, None, paid[0].priority)
        self.paid = paid

    @classmethod
    def of(cls, waiter: AnyWaiter) -> "PaidLine":
        """Have a call stand out of line, in one of its own."""
        line = waiter.line
        paid = line.paid[0] if isinstance(line, PaidLine) else line
        waiter.line = own = cls(paid.node, (paid,))
        own.calls.append(waiter)
        own.since, own.living = line.since, 1
        return own

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

    @property
    def concurrency(self) -> int | None:
        """The most calls in flight at all members together; None if unbounded."""
        members: tuple[Member, ...] = self.pacer.pool.members
        bounds = [member.root.concurrency for member in members]
        if self.parent is not None or None in bounds:
            return super().concurrency
        return sum(bound for bound in bounds if bound is not None)

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


class Member:
    """A limiter in a pool: the pool's place there, and whether it works."""

    def __init__(self, pool: Any, limiter: Any, node: Node) -> None:
        self.pool = pool
        #: The member itself; and the pool as its child.
        self.limiter, self.node = limiter, node
        self.pacer: Pacer = node.pacer
        #: How often it has failed in a row, and why; until when it is left out; and whether a call
        #: probes it.
        self.failures, self.reason = 0, ""
        self.out_until = 0
        self.after_fork()

    def after_fork(self) -> None:
        """Start afresh: nobody stands here."""
        #: Where the pool stands in its queue, by priority; and where it does now.
        self._lines: dict[int, PoolLine] = {}
        self.standing: PoolLine | None = None
        #: Calls that are kept for it: until when, their numbers, and where they stand.
        self.kept: list[tuple[int, int, PaidLine]] = []
        self.is_probed = False

    @property
    def root(self) -> Node:
        """The node with the member's limits."""
        return self.node.path[-1]

    # --- the pool's place in its queue ---

    def compete(self, priority: int | None) -> None:
        """Stand in the member's queue with this priority; None if nobody waits."""
        line = self.standing
        if line is not None and line.living and line.priority != priority:
            line.depart()
        if priority is None:
            return
        if line is None or line.priority != priority:
            line = self._lines.get(priority) or PoolLine(self, priority)
            self._lines[priority] = self.standing = line
        if not line.competes:
            line.arrive()
        line.living = 1

    def rouse(self) -> None:
        """Ask for the pool anew in the member's queue: what is next in the pool may have changed."""
        line = self.standing
        if line is not None and line.above is not None:
            line.above.rouse(line)
            rouse(self.node)

    @property
    def is_shared(self) -> bool:
        """Whether calls wait at it that are not the pool's."""
        everybody, our_own = self.pacer.waiting, self.pool.pacer.waiting
        return bool(everybody > our_own)

    def held_back(self) -> list[AnyWaiter]:
        """Return the first of the pool's calls that the member's store holds back, if there is one."""
        assert self.pacer.place is not None
        ours = (
            waiter
            for waiter in self.pacer.place.held_back()
            if waiter.line.waited_at.path[-1] is self.pool.root and not waiter.seat.is_late
        )
        return [*islice(ours, 1)]

    # --- what it can take ---

    def at(self, inner: Node) -> NodeAtMember:
        """Return what a call from ``inner``, of the pool, passes if this member takes it."""
        assert isinstance(inner, PoolNode)
        node = inner.at_members.get(self)
        if node is None:
            node = inner.at_members[self] = NodeAtMember(inner, self)
        node.agents = inner.agents
        return node

    def paid_line(self, line: Line) -> PaidLine:
        """Return where a call from ``line`` of the pool stands now that this member takes it.

        While nobody shares the member, there is nothing for its own queue to divide.
        """
        ours = line.paid[0] if isinstance(line, PaidLine) else line
        paid = (ours, self.standing) if self.is_shared and self.standing else (ours,)
        return PaidLine(self.at(ours.node), paid)

    def takes(self, amounts: Amounts) -> bool:
        """Tell whether such a call can ever pass here."""
        return self.node.exceeded(amounts) is None

    def can_take(self, amounts: Amounts, now: int) -> bool:
        """Tell whether such a call may wait for this member."""
        return self.is_in(now) and self.takes(amounts)

    def can_start(self, inner: Node, amounts: Amounts, now: int) -> bool:
        """Tell whether a newcomer at ``inner``, of the pool, could start here now."""
        if self.pacer.place is not None or not self.can_take(amounts, now):
            return False
        node = self.at(inner)
        is_free = not self.pacer.waiting or self.pacer.is_free_locked(node, now)
        return is_free and node.earliest_of_all(amounts, now)[0] <= now

    def use(self, now: int) -> float:
        """Return the largest part of any of its limits, or of its slots, that is used."""
        root = self.root
        parts = [root.in_flight / root.slots]
        for window in root.limits.values():
            window.available(now)  # which forgets what is over
            parts.append(window.used / window.limit.units)
        return max(parts)

    # --- whether it works ---

    def is_in(self, now: int) -> bool:
        """Tell whether it may be given calls."""
        return self.out_until <= now and not self.is_probed

    def state(self, now: int) -> MemberState:
        """Return whether it is given calls."""
        if self.is_in(now):
            return MemberState(self.limiter.name, None, 0.0)
        left = max(0, self.out_until - now) * 1e-9
        return MemberState(self.limiter.name, self.reason, left)

    def began(self, lease: Any, now: int) -> None:
        """Take in that a call goes here: after a failure, it is the probe."""
        if self.failures and self.out_until <= now:
            self.is_probed = lease.is_probe = True

    def ended(self, lease: Any, *, is_proof: bool) -> None:
        """Take in that a call is over; one that ended well proves that the member works."""
        if is_proof and self.failures and self.out_until <= self.pacer.clock():
            self.failures = 0
        elif not lease.is_probe:
            return
        self.is_probed = lease.is_probe = False
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
