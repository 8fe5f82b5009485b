"""Several limiters, one line: each call goes to whichever can start it first."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, TypeAlias, TypeVar, Unpack, cast

from asyncbucket.engine.context import inherited, read_text, span_of
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.errors import AcquireTimeout
from asyncbucket.engine.events import Outcome
from asyncbucket.engine.interfaces import Account
from asyncbucket.engine.lease import ASKED, Lease
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import NEVER, Route
from asyncbucket.engine.node import Node
from asyncbucket.engine.pacer import Pacer
from asyncbucket.engine.queue import AnyWaiter, Line
from asyncbucket.engine.statistics import MemberState, Statistics
from asyncbucket.engine.terms import CallAmounts, CallKeywords, Concurrency, Terms, read_name
from asyncbucket.levels import find_pause, prices_of

T = TypeVar("T")

# A pool touches the private parts of its members and of its leases.
# ruff: noqa: SLF001

_log: Final = logging.getLogger("asyncbucket")

#: How a pool chooses among the members that can start a call now.
Prefer: TypeAlias = Literal["least_used", "first"]

_PATIENCE: Final = ("patience", "0 never waits for one member")
#: For how long (ns) a member is left out at its first failure, and at most.
_FIRST_REST: Final = 1_000_000_000
_LONGEST_REST: Final = 60_000_000_000
#: After so many failures in a row of each member, nobody waits for any: 1 + 2 + 4 s have passed.
_HOPELESS: Final = 4
#: How many conversations are remembered.
_HOMES: Final = 10_000


class Member(Account):
    """A limiter in a pool; after a failure, it is told of calls until one ends well."""

    def __init__(self, limiter: Limiter, way: Node) -> None:
        #: The limiter itself; and the pool as its child, where its calls pass.
        self.limiter, self.way = limiter, way
        #: How often it has failed in a row, why, and until when it is left out.
        self.failures, self.reason, self.out_until = 0, "", 0

    def use(self, now: int) -> float:
        """Return the largest part of any of its limits, or of its slots, that is used."""
        root = self.way.path[-1]
        use = root.slots.in_flight / root.slots.most
        for window in root.limits.values():
            window.forget(now)
            use = max(use, window.log.used / window.units)
        return use

    def state(self, now: int) -> MemberState:
        """Return whether it is given calls."""
        left = max(0, self.out_until - now) * 1e-9
        return MemberState(self.limiter.name, self.reason or None, left)

    def works(self, lease: "PoolLease") -> None:
        """Take in that a call went well; one that came after the latest failure proves that it works."""
        if self.failures and lease._when >= self.out_until:
            self.failures = 0
            pause = find_pause(self.way)
            if pause.step:  # else another pause has begun
                pause.end(self.way.pacer.clock())
            self.way.pacer.limits_changed_locked(self.way)

    def ended(self, lease: Any, outcome: Outcome) -> None:
        if outcome == "ok":
            self.works(lease)

    def fail(self, reason: str, now: int) -> bool:
        """Leave it out: once, if several calls that were in flight fail together; return whether that is new."""
        self.reason = reason
        if self.out_until > now:
            return False
        self.out_until = now + min(_FIRST_REST << min(self.failures, 6), _LONGEST_REST)
        self.failures += 1
        pause = find_pause(self.way)
        pause.begin(self.out_until, now, gradually=True, reason=reason)
        return True


class Members:
    """What a pool, and all below it, know of its members; with the lock held."""

    def __init__(
        self, root: Node, prefer: Prefer, patience: int, limiters: Iterable[Limiter]
    ) -> None:
        self.root, self.prefer, self.patience = root, prefer, patience
        each = zip(limiters, root.ways, strict=True)
        self.by_tree = {way.pacer: Member(limiter, way) for limiter, way in each}
        #: Which member served a conversation last.
        self._homes: OrderedDict[str, Member] = OrderedDict()

    def home_of(self, key: str | None) -> Member | None:
        """Return the member that served a conversation last, if it is known and not left out."""
        home = None if key is None else self._homes.get(key)
        return None if home is None or home.out_until > self.root.pacer.clock() else home

    def rank(self, home: Member | None, now: int, line: Line) -> tuple[bool, float]:
        """Return how much a member is preferred of those that could start a call: the least goes first."""
        member = self.by_tree[line.node.pacer]
        return member is not home, 0.0 if self.prefer == "first" else member.use(now)

    def settle_down(self, key: str, member: Member) -> None:
        """Remember that ``member`` serves a conversation."""
        self._homes[key] = member
        self._homes.move_to_end(key)
        if len(self._homes) > _HOMES:
            self._homes.popitem(last=False)

    def fail(self, member: Member, reason: str) -> None:
        """Leave a member out, and have others take the calls that prefer it."""
        pacer, now = self.root.pacer, self.root.pacer.clock()
        if not member.failures:
            says, pool = "pool %r leaves out %r: %s", self.root.name
            pacer.lock.news.append(partial(_log.warning, says, pool, member.limiter.name, reason))
        if not member.fail(reason, now):
            return
        error = self.hopeless(now)
        for waiter in [*member.way.pacer.top.waiters()]:
            if not isinstance(waiter.lease, PoolLease):
                continue
            if error is not None:
                pacer.fail_locked(waiter, error())
            else:
                waiter.lease._seek_locked(waiter, now)
        pacer.ring_locked(member.way, now)

    def hopeless(self, now: int) -> Callable[[], AcquireTimeout] | None:
        """Return what makes the error of calls that wait while each member has failed again and again."""
        members = self.by_tree.values()
        if any(each.out_until <= now or each.failures < _HOPELESS for each in members):
            return None
        states = [each.state(now) for each in members]
        says = (
            f"no member of pool {self.root.name!r} works: {'; '.join(map(str, states))}; fix one, or "
            f"try again later"
        )
        return partial(AcquireTimeout, says, retry_after=min(state.left_out for state in states))


class PoolLease(Lease):
    """Ask for an admission at any member of a pool; hold what one of them gave."""

    _pool: Members  # pyright: ignore[reportUninitializedInstanceVariable]
    #: What the call has in common with earlier ones, whose member it prefers; for how long (ns); and
    #: until when.
    sticky: str | None = None
    patience = 0
    _until = 0

    @property
    def limiter(self) -> Any:
        """The member that took the call, a limiter as it was given to the pool.

        Raises:
            RuntimeError: none has yet.
        """
        if self._member is None:
            raise RuntimeError("no member has taken this call yet: await the lease, or enter it")
        return self._member.limiter

    @property
    def _member(self) -> Member | None:
        return self._pool.by_tree.get(self._node.pacer)

    def member_failed(self, reason: str) -> None:
        """Release, and report that the member itself failed, not this call.

        The pool leaves the member out for 1 s, at the next failure for twice as long, up to 60 s.
        Then calls go there again: one at first, and more until one has ended well.

        Args:
            reason: why, for people: ``"HTTP 401"``. It is logged.
        """
        if self._member is not None:
            self._node.pacer.lock.do_and_tell(self._pool.fail, self._member, reason)
        self.failed()

    def member_works(self) -> None:
        """Report that the member answers, though the call goes on: a stream keeps nobody."""
        if self._member is not None and self._member.failures:
            self._node.pacer.lock.do(self._member.works, self)

    # --- the machine ---

    def _ways(self, home: Member | None, *, is_patient: bool) -> Sequence[Node]:
        """Return where the call may pass: where its conversation is known, or wherever it fits."""
        able = (self._node.common or self._node).able(self._amounts)
        if home is None:
            return able
        at_home = [way for way in able if way.pacer is home.way.pacer]
        return (
            at_home
            if at_home and is_patient
            else [*at_home, *(way for way in able if way not in at_home)]
        )

    def _take_now(self) -> bool:
        self.patience = 0
        return super()._take_now()

    def _try_now(self, state: int = ASKED) -> bool:
        if self._state != state:
            return super()._try_now(state)  # which refuses
        common, lock = self._node, self._node.pacer.lock
        lock.acquire()  # `with` would take twice the time
        try:
            ways = self._free_ways_locked()
        finally:
            lock.release()
        for self._node in ways:
            if super()._try_now(state):
                lock.do(self._settle_down_locked)
                return True
        self._node = common
        return False

    def _free_ways_locked(self) -> Sequence[Node]:
        """Return where nobody of the same limiter waits, the preferred first."""
        pool, home = self._pool, self._pool.home_of(self.sticky)
        ways = self._ways(home, is_patient=self.patience > 0)
        if self._node.standing.waiting:
            ways = [way for way in ways if not _has_line(way)]
        if len(ways) == 1 or pool.prefer == "first" or home is not None:
            return ways
        now = self._node.pacer.clock()
        return sorted(ways, key=lambda way: pool.by_tree[way.pacer].use(now))

    def _settle_down_locked(self) -> None:
        member = self._pool.by_tree[self._node.pacer]
        if self.sticky is not None:
            self._pool.settle_down(self.sticky, member)
        if member.failures:
            self.accounts = (*self.accounts, member)

    def _stand_locked(self, waiter: AnyWaiter, now: int) -> None:
        error = self._pool.hopeless(now)
        if error is not None:
            raise error()
        ways = self._node.able(self._amounts)
        ways[0].pacer.join_locked(waiter, ways, now, self._priority)

    def _declines_locked(self, waiter: AnyWaiter, now: int) -> bool:
        pool, here = self._pool, waiter.line
        home = pool.home_of(self.sticky)
        if home is None and pool.prefer == "first":
            return False
        able = [each for each in waiter.lines if each is here or not each.node.pacer.refuses(now)]
        if home is None and len(able) == 1:
            return False
        ranked = sorted(able, key=partial(pool.rank, home, now))
        best = next(each for each in ranked if each is here or each.node.pacer.is_next(waiter, now))
        waiter.line = best
        if home is not None and home.way.pacer is not best.node.pacer and not self._until:
            waiter.line = here
            return self._waits_at(home, waiter, now)
        if best is here:
            return False
        best.node.pacer.serve_next(waiter, now)
        return True

    def _waits_at(self, home: Member, waiter: AnyWaiter, now: int) -> bool:
        """Have the call wait for its member alone for a while, if it may pass there."""
        end = NEVER if waiter.deadline is None else waiter.deadline
        self._until = min(now + self.patience, end - 1)  # then it may still pass elsewhere
        others = [line for line in waiter.lines if line.node.pacer is not home.way.pacer]
        if self._until <= now or len(others) == len(waiter.lines):
            return False
        for line in others:
            line.node.pacer.leave_line(waiter, line)
        waiter.dispatcher.watch(waiter, self._until)
        return True

    def _seek_locked(self, waiter: AnyWaiter, now: int) -> None:
        if not waiter.done():
            home = self._pool.home_of(self.sticky)
            for way in self._ways(home, is_patient=now < self._until):
                way.pacer.join_too_locked(waiter, way, now)

    def _hold_locked(self, now: int, waiter: AnyWaiter, bound_by: str | None, route: Route) -> None:
        super()._hold_locked(now, waiter, bound_by, route)
        self._settle_down_locked()


def _has_line(way: Node) -> bool:
    """Tell whether calls of the same limiter wait there."""
    lines = way.standing.lines.values()
    return True in [line.living > 0 for line in lines]  # `any` takes twice the time


class Pool(Limiter):
    """Pace calls under several limiters: each call goes to whichever can start it first.

    All calls stand in one line, in order. The first goes to the first member whose limits, slots
    and pauses allow it, and it is bound to that one only then. So a pool uses the sum of its
    members' limits. A member that is also used directly shares with the pool as with a child.

    >>> pool = Pool(openai, azure_east, azure_west)
    >>> async with pool.acquire(tokens=900) as lease:
    ...     reply = await clients[lease.limiter].chat.completions.create(...)

    Children, tenants, agents, priorities and deadlines work as with any `Limiter`. A call too
    costly for one member goes to those that can take it. Limits are the members': `reconfigure` and
    `learn` raise a TypeError, but for a child.

    Args:
        members: limiters without parents, at least one, with different names. Make the pool before
            calls are in flight at them.
        name: the name in statistics, events, logs and metrics.
        prefer: who takes a call that several members could start now: the ``"least_used"``, or the
            ``"first"`` in the order given, so that calls spill over to the next.
        patience: the most seconds that a ``sticky`` call waits for its member when others could
            start it.
        max_queue: the most calls that may wait; more are refused with `QueueFull`.
        timeout: the most seconds to wait, for calls that set no timeout of their own.

    Raises:
        TypeError: a member is not a `Limiter`.
        ValueError: there is no member, a name comes twice, members have different clocks, or a
            number is out of range.
        RuntimeError: calls are in flight or wait at a member, or another pool has it.
    """

    def __init__(
        self,
        *members: Limiter,
        name: str = "pool",
        prefer: Prefer = "least_used",
        patience: float = 2.0,
        max_queue: int | None = None,
        timeout: float | None = None,
    ) -> None:
        _check(members, prefer)
        terms = Terms.read((), {"max_queue": max_queue, "timeout": timeout})
        span = span_of(patience, *_PATIENCE)
        first, *others = (member._node.pacer for member in members)
        pacer = Pacer(first.clock, read_name(name))
        pacer.wall = first.wall
        self._prices: Mapping[str, Any] = {
            model: price for each in reversed(members) for model, price in prices_of(each).items()
        }
        pacer.root.add_ways(member.child(name)._node for member in members)
        first.share(*others, pacer)
        self._members = Members(pacer.root, prefer, span, members)
        self._set_up(pacer.root, None, terms)
        self._start(terms)

    def _set_up(self, node: Node, parent: Limiter | None, terms: Terms) -> None:
        super()._set_up(node, parent, terms)
        self._has_terms = True  # so each call asks `_lease`
        if isinstance(parent, Pool):
            self._members = parent._members

    def _make_node(self, name: str) -> Node:
        node = super()._make_node(name)
        node.add_ways(Node(f"{way.name}/{name}", way) for way in self._node.ways)
        return node

    @property
    def members(self) -> tuple[Limiter, ...]:
        """The limiters to which calls go."""
        return tuple(member.limiter for member in self._members.by_tree.values())

    def acquire(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        cost: Cost | None = None,
        *,
        sticky: str | None = None,
        patience: float | None = None,
        **call: Unpack[CallKeywords],
    ) -> PoolLease:
        """Wait for an admission at any member: ``await`` the lease, or enter it.

        Args:
            cost: as for `Limiter.acquire`.
            sticky: what the call has in common with earlier ones, such as a conversation. It prefers
                the member that served those last, where the provider's prompt cache is warm.
            patience: the most seconds to wait for that member while others could start the call;
                by default the pool's.
            call: as for `Limiter.acquire`.

        Raises:
            CostExceedsLimit: the cost is above a limit of every member.
            AcquireTimeout: as for `Limiter.acquire`; and if all members are left out, each for its
                fourth failure in a row or a later one.
            QueueFull, StoreError, TypeError, ValueError: as for `Limiter.acquire`.
        """
        key = None if sticky is None else read_text(sticky, "sticky")
        span = None if patience is None else span_of(patience, *_PATIENCE)
        lease: Any = super().acquire(cost, **call)
        lease.sticky = key or lease.sticky
        lease.patience = lease.patience if span is None else span
        return cast("PoolLease", lease)

    def acquire_nowait(
        self, cost: Cost | None = None, *, tenant: str | None = None, **amounts: Unpack[CallAmounts]
    ) -> PoolLease:
        """Take a lease of a member now, or refuse; see `Limiter.acquire_nowait`."""
        return cast("PoolLease", super().acquire_nowait(cost, tenant=tenant, **amounts))

    def acquire_sync(self, cost: Cost | None = None, **call: Unpack[CallKeywords]) -> PoolLease:
        """Block this thread until any member admits the call; see `Limiter.acquire_sync`."""
        return cast("PoolLease", super().acquire_sync(cost, **call))

    def _make_lease(self, amounts: dict[str, int]) -> PoolLease:
        node, context = self._node, inherited.get()
        lease = PoolLease(node, amounts)
        lease._pool, lease.patience = self._members, self._members.patience
        lease.sticky = None if context is None else context.sticky
        return lease

    # --- watching ---

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits in force of all members; of a child, its own."""
        if self._parent is not None:
            return super().limits
        return tuple(limit for member in self.members for limit in member.limits)

    @property
    def concurrency(self) -> int | None:
        """The most calls in flight at all members together; of a child, its own; None if unbounded."""
        if self._parent is not None:
            return super().concurrency
        slots = [member.concurrency for member in self.members]
        return None if None in slots else sum(filter(None, slots))

    def statistics(self) -> Statistics:
        """Return a frozen snapshot of the pool's calls, and of all members' limits."""
        now = super().statistics()
        if self._parent is not None:
            return now
        each = tuple(member.statistics() for member in self.members)
        return replace(
            now,
            concurrency=self.concurrency,
            limits=tuple(use for member in each for use in member.limits),
            paused=min(member.paused for member in each),
            upstream_429=now.upstream_429 + sum(member.upstream_429 for member in each),
            overridden=sum(member.overridden for member in each),
            members=each,
        )

    def states(self) -> tuple[MemberState, ...]:
        """Return for each member whether it is given calls, and if not, why and for how long.

        >>> print(*pool.states(), sep="; ")
        'openai': left out for 4 s more (HTTP 401); 'azure': in use
        """
        pacer: Pacer = self._node.pacer
        with pacer.lock:
            now = pacer.clock()
            return tuple(member.state(now) for member in self._members.by_tree.values())

    # --- steering ---

    def pause(self, seconds: float, *, reason: str = "", gradually: bool = False) -> None:
        """Pause every member; see `Limiter.pause`. A child is paused by itself."""
        if self._parent is not None:
            super().pause(seconds, reason=reason, gradually=gradually)
            return
        for member in self.members:
            member.pause(seconds, reason=reason, gradually=gradually)

    async def aclose(self) -> None:
        """Have every member leave its store; see `Limiter.aclose`. Of a child, it does nothing."""
        if self._parent is None:
            for member in self.members:
                await member.aclose()

    def _check_place(self, limits: Iterable[Limit], concurrency: Concurrency | None) -> None:
        if self._parent is None:
            raise TypeError(
                "a pool has no limits of its own: reconfigure a member, such as pool.members[0]"
            )
        super()._check_place(limits, concurrency)


def _check(members: tuple[Limiter, ...], prefer: Prefer) -> None:
    if not members:
        raise ValueError("a pool needs at least one limiter: Pool(openai, azure)")
    for member in members:
        if not isinstance(member, Limiter) or isinstance(member, Pool):
            raise TypeError(f"a pool's members are limiters, not {member!r}")
        if member.parent is not None:
            raise ValueError(f"a pool's members have no parents: {member.name!r} is a child")
        pacer: Pacer = member._node.pacer
        if len(pacer.trees) > 1:
            raise RuntimeError(
                f"{member.name!r} is a member of pool {pacer.trees[-1].root.name!r} already, and a "
                f"limiter can be a member of one: give that pool children instead, pool.child(...)"
            )
        if member._node.slots.in_flight or pacer.waiting:
            raise RuntimeError(
                f"calls of {member.name!r} wait or are in flight: make the pool before the first call"
            )
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        raise ValueError(f"a pool's members need different names, not {', '.join(names)}")
    if any(member._node.pacer.clock != members[0]._node.pacer.clock for member in members):
        raise ValueError("a pool's members need the same clock")
    if prefer not in ("least_used", "first"):
        raise ValueError(f"prefer must be 'least_used' or 'first', not {prefer!r}")
