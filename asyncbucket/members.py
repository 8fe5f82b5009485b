"""One line over several limiters: each call goes to whichever can start it first.

A pool has a tree of its own, with a root, children, tenants and a queue, but no limits. At each
*member*, a limiter with its own tree, the pool is a child, and competes there for its share with
whoever uses the member directly: a `PoolLine` stands in the member's queue for it, as urgent as the
pool's most urgent call. A call is bound to a member at the last moment, when it goes. From then on
it counts along one path: the pool's levels, then the member's (`NodeAtMember`).

How does a call go to a member? The trees of a pool and its members look together, under one lock:
they are a `Group`. A look lets the members' direct calls go as always, up to where the pool is next.
Then `Members.admit` asks for each member which call of the pool it is to take next (`next_at`), and
when that can start (`_next_to_start`). One that can start now goes to the best of the members that
can start it (`_assign`, `best`): it leaves the line, and its lease holds (`serve`). This repeats
until no member can start a call.

The next call is the pool's head, in order. Only two kinds of calls step *out of line* (`PaidLine`),
and let others go ahead:

- A call that prefers one member, where its conversation's prompt cache is warm. While that one is
  busy, the call is kept for it. If the pool's patience ends first, it is next at whichever member
  takes it.
- A call that costs more than a limit of some members. It is next at those that can take it, while
  the others go on with what is behind it.

A member that fails is left out for a time that doubles up to a minute. Then one call goes as a
probe, and the member is left out again until its end decides whether the others follow.
"""

import heapq
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final, Literal, TypeAlias

from asyncbucket.engine.errors import AcquireTimeout, CostExceedsLimit
from asyncbucket.engine.meters import NEVER, Amounts, admit, take
from asyncbucket.engine.node import Node, NodeAtMember, PoolNode
from asyncbucket.engine.pacer import BATCH, Pacer
from asyncbucket.engine.queue import AnyWaiter, Line, PaidLine, PoolLine, rouse
from asyncbucket.engine.seats import EMPTY, Seat, is_late, return_set_aside
from asyncbucket.engine.statistics import MemberState
from asyncbucket.engine.wording import counted

_log: Final = logging.getLogger("asyncbucket")

#: How a pool chooses among the members that can start a call now.
Prefer: TypeAlias = Literal["least_used", "first"] | Callable[[list[Any]], Any]

#: For how long (ns) a member is left out at its first failure, and at most.
_FIRST_REST: Final = 1_000_000_000
_LONGEST_REST: Final = 60_000_000_000
#: After so many failures in a row of each member, nobody waits for any: 1 + 2 + 4 s have passed.
_HOPELESS: Final = 4
#: How many conversations are remembered.
_HOMES: Final = 10_000
#: How many costly calls may step out of line; then the line waits for them.
_MOST_OUT: Final = 100


class Member:
    """A limiter in a pool: the pool's place there, and whether it works."""

    def __init__(self, pool: "Members", limiter: Any, node: Node) -> None:
        self.pool = pool
        #: The member itself; and the pool as its child.
        self.limiter, self.node = limiter, node
        self.pacer: Pacer = node.pacer
        #: How often it has failed in a row, and why.
        self.failures, self.reason = 0, ""
        self.after_fork()

    def after_fork(self) -> None:
        """Start afresh: nobody stands here, and a probe was another process's."""
        #: Until when it is left out.
        self.out_until = 0
        #: Where the pool stands in its queue, by priority; and where it does now.
        self._lines: dict[int, PoolLine] = {}
        self.standing: PoolLine | None = None
        #: Calls that are kept for it: until when, their numbers, and where they stand.
        self.kept: list[tuple[int, int, PaidLine]] = []

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
        return bool(self.pacer.waiting > self.pool.pacer.waiting)

    def held_back(self) -> AnyWaiter | None:
        """Return the first of the pool's calls that the member's store holds back, if there is one."""
        assert self.pacer.place is not None
        ours = (
            waiter
            for waiter in self.pacer.place.held_back()
            if waiter.line.waited_at.path[-1] is self.pool.root and not waiter.seat.is_late
        )
        return next(ours, None)

    # --- what it can take ---

    def at(self, inner: Node) -> NodeAtMember:
        """Return what a call from ``inner``, of the pool, passes if this member takes it."""
        assert isinstance(inner, PoolNode)
        node = inner.at_members.get(self)
        if node is None:
            node = inner.at_members[self] = NodeAtMember(inner, self)
        node.agents = inner.agents
        return node

    def takes(self, amounts: Amounts) -> bool:
        """Tell whether such a call can ever pass here."""
        return self.node.exceeded(amounts) is None

    def can_take(self, amounts: Amounts, now: int) -> bool:
        """Tell whether such a call may wait for this member."""
        return self.out_until <= now and self.takes(amounts)

    def can_start(self, inner: Node, amounts: Amounts, now: int) -> bool:
        """Tell whether a newcomer at ``inner``, of the pool, could start here now."""
        if self.pacer.place is not None or not self.can_take(amounts, now):
            return False
        node = self.at(inner)
        is_free = not self.pacer.waiting or self.pacer.is_free_locked(node, now)
        return is_free and node.earliest(amounts, now)[0] <= now

    def use(self, now: int) -> float:
        """Return the largest part of any of its limits, or of its slots, that is used."""
        root = self.node.path[-1]
        parts = [root.in_flight / root.slots]
        for window in root.limits.values():
            window.available(now)  # which forgets what is over
            parts.append(window.used / window.limit.units)
        return max(parts)

    # --- whether it works ---

    def state(self, now: int) -> MemberState:
        """Return whether it is given calls."""
        left = max(0, self.out_until - now) * 1e-9
        return MemberState(self.limiter.name, self.reason if left else None, left)

    def began(self, lease: Any, now: int) -> None:
        """Take in that a call goes here: after a failure, it is the probe, for a minute at most."""
        if self.failures and self.out_until <= now:  # else a store admits what it was given before
            lease.is_probe = True
            self.out_until = now + _LONGEST_REST

    def ended(self, lease: Any, *, is_proof: bool) -> None:
        """Take in that a call is over; a probe that ended well proves that the member works."""
        if lease.is_probe:
            lease.is_probe = False
            self.out_until = 0
            if is_proof:
                self.failures = 0
            self.pacer.ring_locked(self.node)

    def fail(self, lease: Any, reason: str) -> None:
        """Leave it out because of a call: once, if several that were in flight fail together."""
        now = self.pacer.clock()
        self.pacer.is_plain = False  # from now on, the end of a call may be a proof
        if not self.failures:
            says, pool = "pool %r leaves out %r: %s", self.pool.root.name
            self.pacer.news.append(partial(_log.warning, says, pool, self.limiter.name, reason))
        if lease.is_probe or self.out_until <= now:
            self.out_until = now + min(_FIRST_REST << min(self.failures, 6), _LONGEST_REST)
            self.failures += 1
            lease.is_probe = False
        self.reason = reason
        self.pacer.ring_locked(self.node)


class Members:
    """Choose a member for each call of a pool; every method is called with the group's lock held."""

    def __init__(self, root: Node, prefer: Prefer, patience: int) -> None:
        self.root, self.pacer = root, root.pacer
        self.prefer = prefer
        #: For how long (ns) a call waits for its own member while others could start it.
        self.patience = patience
        self.members: tuple[Member, ...] = ()
        #: Calls out of line that are next at each member that takes them.
        self.out_of_line: list[PaidLine] = []
        #: Members whose limits are in a store.
        self._in_stores: list[Member] = []
        #: Whether it was said that ``prefer`` fails.
        self._has_warned = False
        #: Which member served a conversation last.
        self._homes: OrderedDict[str, Member] = OrderedDict()

    def tie(self, members: Sequence[Member]) -> None:
        """Go to ``members`` from now on, whose trees look together with the pool's."""
        self.members = tuple(members)
        self._in_stores = [each for each in members if each.pacer.place is not None]
        Group(self)

    # --- who waits ---

    def count_in(self, calls: int) -> None:
        """Count ``calls`` calls that wait from now on: at every member, nobody may pass them."""
        self.pacer.waiting += calls
        for member in self.members:
            member.pacer.waiting += calls

    def compete(self) -> None:
        """Stand in the members' queues while anybody waits, as urgent as the most urgent call."""
        urgency = max((-flow.rank for flow in self.pacer.top.flows if flow.living), default=None)
        for member in self.members:
            member.compete(urgency)

    def next_at(
        self, member: Member, head: tuple[AnyWaiter | None, int], now: int
    ) -> tuple[AnyWaiter | None, int]:
        """Return the call that ``member`` is to take next, if ``head`` is the line's; else when."""
        if member.out_until > now:
            return None, member.out_until
        if self.out_of_line or member.kept or self._in_stores:
            for waiter in self._before_the_line(member, now):
                if member.takes(waiter.amounts):
                    return waiter, now
        first, _ = head
        return head if first is None or member.takes(first.amounts) else (None, NEVER)

    def _before_the_line(self, member: Member, now: int) -> Iterator[AnyWaiter]:
        """Yield the calls that a member may take before those in line."""
        yield from _heads((line for _, _, line in member.kept), now)
        held_back = (each.held_back() for each in self._in_stores if each is not member)
        yield from sorted(waiter for waiter in held_back if waiter is not None)
        yield from _heads(self.out_of_line, now)

    # --- who goes where ---

    def admit(self, seat: Seat, now: int) -> tuple[int, int]:
        """Let all go that may, or step out; return how many did, and when this seat must look again."""
        passed = 0
        self._give_up(now)
        while True:
            due = self._end_keeping(now)
            head = self.pacer.top.head(now)
            able: list[tuple[AnyWaiter, Member]] = []
            first, _ = head
            for member in self.members:
                waiter, when = self._next_to_start(member, head, seat, now)
                due = min(due, when)
                if waiter is not None and when <= now:
                    able.append((waiter, member))
                first = first or waiter
            first = able[0][0] if able else first
            if first is not None and first.seat is not seat:
                if is_late(self.pacer, first.seat, now):
                    continue
                return passed, self.pacer.leave_to(first.seat, due, now)
            if able and first is not None:
                if passed >= BATCH:
                    return passed, now
                candidates = [member for waiter, member in able if waiter is first]
                passed += self._assign(first, candidates, seat, now)
            elif self._make_way(head[0], now):
                passed += 1
            else:
                return passed, self._override(seat, now) if due == NEVER else due

    def _next_to_start(
        self, member: Member, head: tuple[AnyWaiter | None, int], seat: Seat, now: int
    ) -> tuple[AnyWaiter | None, int]:
        """Return the pool's call that a member is to start next, and when it can."""
        if member.is_shared:
            member.rouse()
            waiter, when = member.pacer.top.head(now)
            if waiter is not None and waiter.line.waited_at.path[-1] is not self.root:
                return None, EMPTY  # a call of others, who see to it
        else:  # which gives the same
            waiter, when = self.next_at(member, head, now)
        if waiter is None:
            return None, when
        line, place = waiter.line, member.pacer.place
        if place is not None and (not place.room(seat) or place.held_back()):
            return None, NEVER
        is_held_back = line.node.pacer is not self.pacer
        if place is not None and is_held_back and place.holds_up():
            return None, NEVER  # it would go to and fro
        # One that a store holds back has earned nothing elsewhere.
        since = now if is_held_back else line.since
        route = member.node.route
        when, bound_by = admit(route, waiter.amounts, since, now, book=False)
        if when > now:
            self.pacer.bound_by = line.bound_by = bound_by
        return waiter, when

    def _assign(self, waiter: AnyWaiter, candidates: list[Member], seat: Seat, now: int) -> int:
        """Let a call go at the best of ``candidates``, or keep it for its own; return if it did, 1 or 0."""
        home, lease = self.home_of(waiter.lease), waiter.lease
        if home in candidates:
            return self.serve(waiter, home, now)
        until = now + lease.patience
        if waiter.deadline is not None:
            until = min(until, waiter.deadline)
        may_wait = until > now and not isinstance(waiter.line, PaidLine)
        if may_wait and home is not None and home.can_take(waiter.amounts, now):
            self._step_out(waiter, home, until)
            return 1
        member = self.best(candidates, now)
        if callable(self.prefer):  # others may have been here meanwhile
            return_set_aside(seat)  # for them it may have been late
            head = self.pacer.top.head(now)
            still, when = self._next_to_start(member, head, seat, now)
            if still is not waiter or when > now:
                return 0
        return self.serve(waiter, member, now)

    def best(self, candidates: Sequence[Member], now: int) -> Member:
        """Return the preferred one of ``candidates``, which can all start a call now.

        A user's function is asked without the lock, because it may look at statistics. If it fails,
        all others would wait for ever, so the first takes the call.
        """
        prefer, chosen = self.prefer, candidates[0]
        if len(candidates) == 1 or prefer == "first":
            return chosen
        if not callable(prefer):
            return min(candidates, key=lambda member: member.use(now))
        limiters = [member.limiter for member in candidates]
        self.pacer.lock.release()
        try:
            said = prefer(limiters)
        except Exception as error:  # noqa: BLE001 - whatever it is
            said = error
        finally:
            self.pacer.lock.acquire()
        if said in limiters:
            chosen = candidates[limiters.index(said)]
        elif not self._has_warned:
            self._has_warned = True
            says = (
                "prefer= of pool %r chose none of the members it was given, so the first takes the "
                "call: %r"
            )
            self.pacer.news.append(partial(_log.error, says, self.root.name, said))
        return chosen

    def for_newcomer(self, lease: Any, node: Node, amounts: Amounts) -> Member | None:
        """Return the member that takes a newcomer at ``node`` now; None if it has to stand in line."""
        now = self.pacer.clock()
        if self.root.waiting and not self.pacer.is_free_locked(node, now):
            return None
        home = self.home_of(lease)
        able = [member for member in self.members if member.can_start(node, amounts, now)]
        if home in able:
            return home
        if not able or (home is not None and lease.patience and home.can_take(amounts, now)):
            return None
        return self.best(able, now)

    def serve(self, waiter: AnyWaiter, member: Member, now: int) -> int:
        """Let a call go at ``member``; return 1 if it still waited, else 0."""
        if waiter.line.node.pacer is not self.pacer:
            self._take_back(waiter)
        line: Line = waiter.line
        paid, unpaid = (line.paid, ()) if isinstance(line, PaidLine) else ((line,), (line,))
        if member.is_shared and member.standing:  # else its own queue has nothing to divide
            paid, unpaid = (*paid, member.standing), (*unpaid, member.standing)
        here = PaidLine(member.at(paid[0].node), paid)
        if member.pacer.place is None:
            take(here.node.route, waiter.amounts, now)
        return member.pacer.serve(waiter, here, unpaid, now)

    # --- who is out of line ---

    def _stand_alone(self, waiter: AnyWaiter) -> PaidLine:
        """Have a call stand in a line of its own, out of the one that has paid for it."""
        line = waiter.line
        paid = line.paid[0] if isinstance(line, PaidLine) else line
        waiter.line = own = PaidLine(paid.node, (paid,))
        own.calls.append(waiter)
        own.since, own.living = line.since, 1
        return own

    def _step_out(self, waiter: AnyWaiter, home: Member | None = None, until: int = 0) -> None:
        """Have the head step out of line: kept for its home ``until`` then, or for any member."""
        line = waiter.line
        line.calls.popleft()
        self.pacer.top.charge(line, waiter.amounts)
        own = self._stand_alone(waiter)
        self.pacer.top.flows.add(own)
        if home is None:
            self.out_of_line.append(own)
        else:
            heapq.heappush(home.kept, (until, waiter.number, own))
        line.depart()

    def _take_back(self, waiter: AnyWaiter) -> None:
        """Take a call back from a store that holds it up."""
        node = waiter.line.node
        node.pacer.place.leave(waiter)
        for each in node.path:
            each.in_flight -= 1
        self._stand_alone(waiter)

    def _make_way(self, head: AnyWaiter | None, now: int) -> bool:
        """Have the head step out if it costs too much for a member; return whether it does."""
        if head is None or len(self.out_of_line) >= _MOST_OUT:
            return False
        working = (member for member in self.members if member.out_until <= now)
        if all(member.takes(head.amounts) for member in working):
            return False
        self._step_out(head)
        return True

    def _end_keeping(self, now: int) -> int:
        """Let calls go elsewhere whose patience has ended; return when the next one's does."""
        due = EMPTY
        for member in self.members:
            kept = member.kept
            while kept and (kept[0][0] <= now or not kept[0][2].living or member.out_until > now):
                self.out_of_line.append(heapq.heappop(kept)[2])
                self.compete()
            if kept:
                due = min(due, kept[0][0])
        self.out_of_line = [line for line in self.out_of_line if line.living]
        return due

    # --- conversations ---

    def home_of(self, lease: Any) -> Member | None:
        """Return the member that served a call's conversation last, if it is known."""
        return None if lease.sticky is None else self._homes.get(lease.sticky)

    def settle_down(self, lease: Any, member: Member) -> None:
        """Remember that ``member`` serves the conversation of a call."""
        if lease.sticky is not None:
            self._homes[lease.sticky] = member
            self._homes.move_to_end(lease.sticky)
            if len(self._homes) > _HOMES:
                self._homes.popitem(last=False)

    # --- when no member can ---

    def _override(self, seat: Seat, now: int) -> int:
        """Let a call pass without a slot at a member whose slots are held on blocked loops."""
        due = NEVER
        for member in self.members:
            if member.pacer.place is None:  # else its slots are the store's
                member.rouse()
                due = min(due, member.pacer.override(seat, now))
        return due

    def _give_up(self, now: int) -> None:
        """Have all calls fail that wait, if each member has failed again and again."""
        if any(each.out_until <= now or each.failures < _HOPELESS for each in self.members):
            return
        states = [each.state(now) for each in self.members]
        says = (
            f"no member of pool {self.root.name!r} works: {'; '.join(map(str, states))}; mend one, or "
            f"try again later"
        )
        left = min(state.left_out for state in states)
        for waiter in list(self.pacer.top.waiters()):
            self.pacer.fail_locked(waiter, AcquireTimeout(says, retry_after=left))

    # --- what its nodes ask ---

    def check(self, amounts: Amounts) -> None:
        """Refuse a cost that no member can ever take.

        Raises:
            CostExceedsLimit: so it is.
        """
        if any(member.takes(amounts) for member in self.members):
            return
        exceeded = {member.limiter.name: member.node.exceeded(amounts) for member in self.members}
        resources = dict.fromkeys(limit.resource for limit in exceeded.values() if limit)
        cost = ", ".join(counted(amounts[each], each) for each in resources)
        limits = ", ".join(f"{limit} at {name!r}" for name, limit in exceeded.items())
        raise CostExceedsLimit(
            f"cost of {cost} exceeds a limit of every member ({limits}) and can never pass; raise a "
            f"limit or split the request"
        )

    def after_fork(self) -> None:
        """Start afresh in a child process."""
        self.out_of_line.clear()
        for member in self.members:
            member.after_fork()


def _heads(lines: Iterable[Line], now: int) -> Iterator[AnyWaiter]:
    """Yield the first call of each of ``lines``."""
    for line in lines:
        waiter, _ = line.head(now)
        if waiter is not None:
            yield waiter


class Group:
    """Trees that look together, because pools tie them: they share a lock, and where calls wait."""

    def __init__(self, pool: Members) -> None:
        pools, pacers = [pool], [pool.pacer, *(member.pacer for member in pool.members)]
        for group in {pacer.group for pacer in pacers} - {None}:
            pools += group.pools
            pacers += group.pacers
        #: The pools; the trees of these and those of their members.
        self.pools: tuple[Members, ...] = tuple(pools)
        self.pacers: tuple[Pacer, ...] = tuple(dict.fromkeys(pacers))
        observed = sum({id(p.group or p): p.observed for p in self.pacers}.values())
        for pacer in self.pacers:
            pacer.group = self
            pacer.observed = observed
        self.share(max(self.pacers, key=lambda pacer: pacer.seats.arrivals))

    def share(self, first: Pacer) -> None:
        """Have all use the lock of ``first``, and where its calls wait."""
        for pacer in self.pacers:
            for name in ("lock", "jobs", "news", "seats"):
                setattr(pacer, name, getattr(first, name))

    def rouse(self, pacer: Pacer) -> None:
        """Ask for the pools anew in the queue of one member."""
        for pool in self.pools:
            for member in pool.members:
                if member.pacer is pacer:
                    member.rouse()

    def admit(self, seat: Seat, now: int) -> int:
        """Admit all that may go, of all trees; return when this seat must look again."""
        while True:
            due, passed = EMPTY, 0
            for pacer in self.pacers:
                if pacer.root.waiting and pacer.pool is None:
                    due = min(due, pacer.dispatch(seat, now))
            for pool in self.pools:
                if pool.pacer.waiting:
                    count, when = pool.admit(seat, now)
                    passed += count
                    due = min(due, when)
            if not passed or due <= now:
                return due  # else a call that passed may have made way for one of another line
