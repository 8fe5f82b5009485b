"""One line over several limiters: each call goes to whichever can start it first.

A pool has a tree of its own, with a root, children, tenants and a queue, but no limits. At each
*member*, a limiter with its own tree, the pool is a child, and competes there for its share with
whoever uses the member directly: a `PoolLine` stands in the member's queue for it, and its head is
the head of the pool's. So a call is bound to a member at the last moment, when it goes. From then on
it counts along one path: the pool's levels, then the member's (`NodeAtMember`).

The trees of a pool and its members look together, under one lock: they are a `Group`. A look lets
the members' direct calls go as always, up to where the pool is next; then it asks for the pool's
head who can start it now, and chooses one of them.

A call may prefer one member, where its conversation's prompt cache is warm. If that one is busy when
the call's turn comes, the call is kept for it, while others go ahead. If its patience ends first,
the call is next at whichever member has room.

A member that fails is left out for a time that doubles up to a minute. Then one call goes as a
probe. Its end decides whether the others follow.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Literal, TypeAlias

from asyncbucket.core.blocked import is_late
from asyncbucket.core.errors import AcquireTimeout, CostExceedsLimit
from asyncbucket.core.members import LineAtMember, Member
from asyncbucket.core.meters import NEVER, Amounts
from asyncbucket.core.node import Node
from asyncbucket.core.pacer import BATCH, Pacer
from asyncbucket.core.queue import AnyWaiter, Line, rouse
from asyncbucket.core.seats import EMPTY, Seat
from asyncbucket.core.wording import counted

_log: Final = logging.getLogger("asyncbucket")

#: How a pool chooses among the members that can start a call now.
Prefer: TypeAlias = Literal["least_used", "first"] | Callable[[list[Any]], Any]

#: After so many failures in a row of each member, nobody waits for any: 1 + 2 + 4 s have passed.
_HOPELESS: Final = 4
#: How many conversations are remembered.
_HOMES: Final = 10_000


class Members:
    """Choose a member for each call of a pool; every method is called with the group's lock held."""

    def __init__(self, root: Node, prefer: Prefer, patience: int) -> None:
        self.root, self.pacer = root, root.pacer
        self.prefer = prefer
        #: For how long (ns) a call waits for its own member while others could start it.
        self.patience = patience
        self.members: tuple[Member, ...] = ()
        #: Calls that were kept in vain, which are next everywhere.
        self._overdue: deque[AnyWaiter] = deque()
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
        if not self.pacer.waiting:
            for member in self.members:
                member.pacer.since = self.pacer.clock()
        self.pacer.waiting += calls
        for member in self.members:
            member.pacer.waiting += calls

    def arrive(self) -> None:
        """Compete at the members while anybody waits."""
        waits = bool(self.pacer.top.living or self._overdue)
        for member in self.members:
            line = member.line
            if waits or member.kept:
                if not line.competes:
                    line.arrive()
                line.living = 1
            elif line.living:
                line.depart()

    depart = arrive

    def first(
        self, now: int, back: int = 0, member: Member | None = None
    ) -> tuple[AnyWaiter | None, int]:
        """Return the call that is next, for ``member``, or when there may be one."""
        if member is not None and self._in_stores:
            places: list[Any] = [m.pacer.place for m in self._in_stores if m is not member]
            held_back = [waiter for place in places for waiter in place.held_back()[:1]]
            if held_back:
                return min(held_back), now
        overdue = self._overdue
        while overdue and overdue[0].done():
            overdue.popleft()
        waiter = next((each for each in overdue if not each.seat.is_late), None)
        return self.pacer.top.head(now, back) if waiter is None else (waiter, now)

    # --- who goes where ---

    def admit(self, seat: Seat, now: int) -> tuple[int, int]:
        """Admit all that may go; return how many did, and when this seat must look again."""
        passed = 0
        while True:
            due = self._end_keeping(now)
            first = None if self._in_stores else self.first(now)
            able: list[tuple[AnyWaiter, Member]] = []
            for member in self.members:
                waiter, when = self._head_at(member, first, seat, now)
                due = min(due, when)
                if waiter is not None:
                    able.append((waiter, member))
            head = min((waiter for waiter, _ in able), default=(first or self.first(now))[0])
            due = now if able else due
            if head is not None and head.seat is not seat:
                if is_late(self.pacer, head.seat, now):
                    continue
                return passed, self.pacer.leave_to(head.seat, due, now)
            if not able:
                return passed, self._override(seat, now) if due == NEVER else due
            assert head is not None
            if passed >= BATCH:
                return passed, now
            candidates = [member for waiter, member in able if waiter is head]
            passed += self._assign(head, candidates, now)

    def _override(self, seat: Seat, now: int) -> int:
        """Let a call pass without a slot at a member whose slots are held on blocked loops."""
        due = NEVER
        for member in self.members:
            if member.is_in(now):
                member.rouse()
                due = min(due, member.pacer.override(seat, now))
        return due

    def _head_at(
        self, member: Member, first: tuple[AnyWaiter | None, int] | None, seat: Seat, now: int
    ) -> tuple[AnyWaiter | None, int]:
        """Return the pool's call that a member can start now, or when there may be one."""
        if member.is_shared:
            member.rouse()
            waiter, when = member.pacer.top.head(now)
        else:  # which gives the same
            waiter, when = member.choose(first or self.first(now, member=member), now)
        if waiter is None:
            return None, when
        if waiter.line.waited_at.path[-1] is not self.root:
            return None, EMPTY  # a call of others, who see to it
        place = member.pacer.place
        if place is not None and (not place.room(seat) or place.held_back()):
            return None, NEVER
        # One that another member holds back has earned nothing here.
        since = now if isinstance(waiter.line, LineAtMember) else waiter.line.since
        when, bound_by = member.root.earliest(waiter.amounts, since)
        if when > now:
            self.pacer.bound_by = waiter.line.bound_by = bound_by
            return None, when
        return waiter, EMPTY

    def _assign(self, waiter: AnyWaiter, candidates: list[Member], now: int) -> int:
        """Let a call go at the best of ``candidates``, or keep it for its own; return how many went."""
        home = self.home_of(waiter.lease)
        if home in candidates:
            return self.serve(waiter, home.pacer, now)
        was_kept = waiter.line.above is None
        patience = 0 if was_kept else waiter.lease.patience
        if home is not None and patience and home.is_in(now) and home.takes(waiter.amounts):
            self._keep(waiter, home, now + patience)
            return 0
        return self.serve(waiter, self.best(candidates, now).pacer, now)

    def best(self, candidates: Sequence[Member], now: int) -> Member:
        """Return the preferred one of ``candidates``, which can all start a call now."""
        if len(candidates) == 1 or self.prefer == "first":
            return candidates[0]
        if callable(self.prefer):
            return self._preferred(self.prefer, candidates)
        return min(candidates, key=lambda member: member.use(now))

    def _preferred(
        self, prefer: Callable[[list[Any]], Any], candidates: Sequence[Member]
    ) -> Member:
        """Ask the user's function; if it fails, all others would wait for ever: take the first."""
        chosen: object = None
        error: Exception | None = None
        try:
            chosen = prefer([member.limiter for member in candidates])
        except Exception as raised:  # noqa: BLE001 - whatever it is
            error = raised
        found = next((member for member in candidates if member.limiter is chosen), None)
        if found is None and not self._has_warned:
            self._has_warned = True
            self.pacer.news.append(
                partial(
                    _log.error,
                    "prefer= of pool %r chose none of the members it was given, so the first takes "
                    "the call: %r",
                    self.root.name,
                    chosen if error is None else error,
                )
            )
        return candidates[0] if found is None else found

    def for_newcomer(self, lease: Any, node: Node, amounts: Amounts) -> list[Member]:
        """Return the members that a newcomer at ``node`` may ask now, the preferred ones first."""
        now = self.pacer.clock()
        if self.root.waiting and not (
            self.pacer.is_free_locked(node, now) and self.first(now)[0] is None
        ):
            return []
        members = [each for each in self.members if each.is_in(now) and each.takes(amounts)]
        home, in_order = self.home_of(lease), []
        if home in members:
            if lease.patience:
                return [home]
            in_order.append(home)
            members.remove(home)
        while members:
            in_order.append(self.best(members, now))
            members.remove(in_order[-1])
        return in_order

    def serve(self, waiter: AnyWaiter, pacer: Pacer, now: int) -> int:
        """Let a call go at the member of ``pacer``; return 1 if it still waited, else 0."""
        member = next(each for each in self.members if each.pacer is pacer)
        line, is_shared = waiter.line, member.is_shared
        bound_by = line.bound_by
        self._take_out(waiter, member)
        line = waiter.line
        here = member.at(line.node).line_for(line.priority, is_shared=is_shared)
        waiter.line = here
        if pacer.place is not None:
            pacer.push_at(here.node, pacer.place, waiter, now)
        elif not pacer.let_go(waiter, now, bound_by):
            waiter.line = line
            return 0
        else:
            here.node.book(waiter.amounts, now)
            if bound_by is not None:
                here.node.count_waits(1, now - waiter.asked, bound_by)
            self.pacer.count_in(line.node, waiter.seat, -1)
        line.since = pacer.since = now
        self.pacer.top.charge(line, waiter.amounts)
        if is_shared:
            pacer.top.charge(member.line, waiter.amounts)
        line.depart()
        if line.above is None:  # it was kept for a member
            self.arrive()
        if line.node.parent is not None:  # a limiter above may sleep because of another call
            rouse(line.node)
        return 1

    def _take_out(self, waiter: AnyWaiter, member: Member) -> None:
        """Take the head from wherever it stands."""
        line = waiter.line
        if isinstance(line, LineAtMember):
            self._take_back(waiter, line)
        elif line.calls and line.calls[0] is waiter:
            line.calls.popleft()
        elif waiter in self._overdue:
            self._overdue.remove(waiter)
        else:
            member.kept = deque(each for each in member.kept if each[1] is not waiter)

    def _take_back(self, waiter: AnyWaiter, line: LineAtMember) -> None:
        """Take a call back from a store that holds it up."""
        line.node.pacer.place.leave(waiter)
        for each in line.node.path:
            each.in_flight -= 1
        _set_aside(waiter)

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

    def _keep(self, waiter: AnyWaiter, home: Member, until: int) -> None:
        """Keep the head of the line for ``home``, and let others go ahead."""
        line = waiter.line
        line.calls.popleft()
        self.pacer.top.charge(line, waiter.amounts)
        line.depart()
        _set_aside(waiter)
        home.kept.append((until, waiter))
        self.arrive()

    def _end_keeping(self, now: int) -> int:
        """Let calls go elsewhere whose patience has ended; return when the next one's does."""
        due = EMPTY
        for member in self.members:
            kept = member.kept
            while kept and (kept[0][0] <= now or not member.is_in(now)):
                _, waiter = kept.popleft()
                if not waiter.done():
                    self._overdue.append(waiter)
                self.arrive()
            if kept:
                due = min(due, kept[0][0])
        return due

    # --- when all are out ---

    def hopeless(self, now: int) -> AcquireTimeout | None:
        """Return the error of all calls that would wait, if each member has failed again and again."""
        if any(each.is_in(now) or each.failures < _HOPELESS for each in self.members):
            return None
        states = [each.state(now) for each in self.members]
        return AcquireTimeout(
            f"no member of pool {self.root.name!r} works: {'; '.join(map(str, states))}; mend one, or "
            f"try again later",
            retry_after=min(state.left_out for state in states),
        )

    def give_up(self, now: int) -> None:
        """Have all calls fail that wait, if there is no hope."""
        kept = [waiter for member in self.members for _, waiter in member.kept]
        for waiter in (*self.pacer.top.waiters(), *self._overdue, *kept):
            error = self.hopeless(now)
            if error is None:
                return
            self.pacer.fail_locked(waiter, error)

    # --- what its nodes ask ---

    def check(self, amounts: Amounts) -> None:
        """Refuse a cost that no member can ever take.

        Raises:
            CostExceedsLimit: so it is.
        """
        if any(member.takes(amounts) for member in self.members):
            return
        if len(self.members) == 1:
            self.members[0].root.check(amounts)  # which refuses
        exceeded = {member.limiter.name: member.node.exceeded(amounts) for member in self.members}
        resources = dict.fromkeys(limit.resource for limit in exceeded.values() if limit)
        cost = ", ".join(counted(amounts[each], each) for each in resources)
        limits = ", ".join(f"{limit} at {name!r}" for name, limit in exceeded.items())
        raise CostExceedsLimit(
            f"cost of {cost} exceeds a limit of every member ({limits}) and can never pass; raise a "
            f"limit or split the request"
        )

    def seconds(self) -> dict[str, float]:
        """Return how many seconds one unit takes of all members' limits together."""
        rates: dict[str, float] = {}
        for member in self.members:
            for resource, seconds in member.node.seconds.items():
                rates[resource] = rates.get(resource, 0.0) + 1 / seconds
        return {resource: 1 / rate for resource, rate in rates.items()}

    def after_fork(self) -> None:
        """Start afresh in a child process."""
        self._overdue.clear()
        for member in self.members:
            member.kept.clear()
            member.probe = None


def _set_aside(waiter: AnyWaiter) -> None:
    """Let a call stand in no line any more, though it still waits at its limiter."""
    line = waiter.line
    waiter.line = Line(line.waited_at, None, line.priority)
    waiter.line.since = line.since


class Group:
    """Trees that look together, because pools tie them: they share a lock, and where calls wait."""

    def __init__(self, pool: Members) -> None:
        pacers = [member.pacer for member in pool.members]
        known = dict.fromkeys(pacer.group for pacer in pacers if pacer.group is not None)
        self.pools: tuple[Members, ...] = (*(each for group in known for each in group.pools), pool)
        #: Those of the pools and those of their members.
        self.pacers: tuple[Pacer, ...] = tuple(
            dict.fromkeys(
                (*(each for group in known for each in group.pacers), pool.pacer, *pacers)
            )
        )
        observed = sum({id(p.group or p): p.observed for p in self.pacers}.values())
        for pacer in self.pacers:
            pacer.group = self
            pacer.observed = observed
        self.share(self.pacers[0])

    def share(self, first: Pacer) -> None:
        """Have all use the lock of ``first``, and where its calls wait."""
        for pacer in self.pacers:
            pacer.lock, pacer.jobs, pacer.news = first.lock, first.jobs, first.news
            pacer.seats = first.seats

    def forget(self) -> None:
        """Have the pools work out anew what their calls pass, because a member has changed."""
        for pool in self.pools:
            pool.root.forget()

    def rouse(self, pacer: Pacer) -> None:
        """Ask for the pools anew in the queue of one member."""
        for pool in self.pools:
            for member in pool.members:
                if member.pacer is pacer:
                    member.rouse()

    def admit(self, seat: Seat, now: int) -> int:
        """Admit all that may go, of all trees; return when this seat must look again."""
        for pacer in self.pacers:
            pacer.looks += 1
        while True:
            due, passed = EMPTY, 0
            for pacer in self.pacers:
                if pacer.root.waiting and pacer.pool is None:
                    due = min(due, pacer.admit(seat, now))
            for pool in self.pools:
                if pool.pacer.waiting:
                    count, when = pool.admit(seat, now)
                    passed += count
                    due = min(due, when)
            if not passed or due <= now or not self._is_shared:
                return due

    @property
    def _is_shared(self) -> bool:
        """Whether a call that passed may make way for one of another line."""
        return len(self.pools) > 1 or any(
            pacer.root.waiting for pacer in self.pacers if pacer.pool is None
        )
