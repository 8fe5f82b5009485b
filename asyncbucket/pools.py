"""Several limiters, one line: each call goes to whichever can start it first."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack, cast, overload

from asyncbucket.engine.context import inherited, read_text, span_of
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.lease import ASKED, Lease
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Meters
from asyncbucket.engine.node import PoolNode
from asyncbucket.engine.pacer import Pacer
from asyncbucket.engine.queue import AnyWaiter
from asyncbucket.engine.statistics import MemberState, Statistics
from asyncbucket.engine.terms import CallAmounts, CallKeywords, Concurrency, Terms, read_name
from asyncbucket.members import Member, Members, Prefer

if TYPE_CHECKING:
    from asyncbucket.http.clients import ClientOptions
    from asyncbucket.http.endpoints import Endpoints
    from asyncbucket.http.transport import PacedTransport, TransportOptions
    from asyncbucket.llama_index.wrap import WrapOptions

T = TypeVar("T")

# A pool touches the private parts of its members and of its leases.
# ruff: noqa: SLF001

_PATIENCE: Final = ("patience", "0 never waits for one member")


class PoolLease(Lease):
    """Ask for an admission at any member of a pool; hold what one of them gave."""

    #: What the call has in common with earlier ones, whose member it prefers; and for how long (ns).
    sticky: str | None = None
    patience = 0
    #: Whether the pool waits for its end, because the member has failed before.
    is_probe = False
    _member: Member | None = None

    @property
    def limiter(self) -> Limiter:
        """The member that took the call.

        Raises:
            RuntimeError: none has yet.
        """
        if self._member is None:
            raise RuntimeError("no member has taken this call yet: await the lease, or enter it")
        return cast("Limiter", self._member.limiter)

    def member_failed(self, reason: str) -> None:
        """Release, and report that the member itself failed, not this call.

        The pool leaves the member out for 1 s, at the next failure for twice as long, up to 60 s.
        Then one call goes as a probe.

        Args:
            reason: why, for people: ``"HTTP 401"``. It is logged.
        """
        member = self._member
        if member is not None:
            member.pacer.do_and_tell(member.fail, self, reason)
        self.failed()

    def member_works(self) -> None:
        """Report that the member answers, though the call goes on: so a probe's stream keeps nobody."""
        member = self._member
        if member is not None and member.failures:
            member.pacer.do(partial(member.ended, self, is_proof=True))

    # --- the machine ---

    def _take_now(self) -> bool:
        self.patience = 0
        return super()._take_now()

    def _try_now(self, state: int = ASKED) -> bool:
        if self._state != state:
            return super()._try_now(state)  # which refuses
        inner = self._node
        members: Members = inner.pacer.pool
        with members.pacer:
            member = members.for_newcomer(self, inner, self._amounts)
        if member is None:
            return False
        self._node = member.at(inner)
        if super()._try_now(state):
            members.pacer.do(self._bind_locked, member)
            return True
        self._node = inner  # others were faster
        return False

    def _hold_locked(
        self, now: int, waiter: AnyWaiter, bound_by: str | None, meters: Meters | None = None
    ) -> None:
        super()._hold_locked(now, waiter, bound_by, meters)
        node: Any = waiter.line.node
        self._node = node
        self._bind_locked(node.member)

    def _hand_back_locked(self) -> None:
        super()._hand_back_locked()
        assert self._member is not None
        self._member.ended(self, is_proof=False)

    def _bind_locked(self, member: Member) -> None:
        self._member = member
        member.began(self, self._when)
        member.pool.settle_down(self, member)

    def _end_locked(self, outcome: Any) -> None:
        super()._end_locked(outcome)
        assert self._member is not None
        self._member.ended(self, is_proof=outcome == "ok")


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
        prefer: who takes a call that several members could start now: the ``"least_used"``; the
            ``"first"`` in the order given, so that calls spill over to the next; or what a function
            of the list of these limiters returns. It may look at their `statistics`, but must be
            quick.
        patience: the most seconds that a ``sticky`` call waits for its member when others could
            start it.
        max_queue: the most calls that may wait; more are refused with `QueueFull`.
        timeout: the most seconds to wait, for calls that set no timeout of their own.

    Raises:
        TypeError: a member is not a `Limiter`.
        ValueError: there is no member, a name comes twice, members have different clocks, or a
            number is out of range.
        RuntimeError: calls are in flight or wait at a member, or wait in a pool that has it already.
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
        pacer = Pacer(members[0]._node.pacer.clock, read_name(name), root_type=PoolNode)
        pacer.wall = members[0]._node.pacer.wall
        self._prices = {
            model: price for each in reversed(members) for model, price in each._prices.items()
        }
        pool = pacer.pool = Members(pacer.root, prefer, span)
        self._set_up(pacer.root, None, terms)
        self._start(terms)
        nodes = [member.child(name)._node for member in members]
        pool.tie([Member(pool, *each) for each in zip(members, nodes, strict=True)])

    def _set_up(self, node: Any, parent: Limiter | None, terms: Terms) -> None:
        super()._set_up(node, parent, terms)
        self._has_terms = True  # so each call asks `_lease`

    @property
    def members(self) -> tuple[Limiter, ...]:
        """The limiters to which calls go."""
        pool: Members = self._node.pacer.pool
        return tuple(member.limiter for member in pool.members)

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
        lease.patience = node.pacer.pool.patience
        lease.sticky = None if context is None else context.sticky
        return lease

    # --- watching ---

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits in force of all members; of a child, its own."""
        if self._parent is not None:
            return super().limits
        return tuple(limit for member in self.members for limit in member.limits)

    def statistics(self) -> Statistics:
        """Return a frozen snapshot of the pool's calls, and of all members' limits."""
        now = super().statistics()
        if self._parent is not None:
            return now
        each = [member.statistics() for member in self.members]
        return replace(
            now,
            limits=tuple(use for member in each for use in member.limits),
            paused=min(member.paused for member in each),
            upstream_429=now.upstream_429 + sum(member.upstream_429 for member in each),
            overridden=sum(member.overridden for member in each),
        )

    def states(self) -> tuple[MemberState, ...]:
        """Return for each member whether it is given calls, and if not, why and for how long.

        >>> print(*pool.states(), sep="; ")
        'openai': left out for 4 s more (HTTP 401); 'azure': in use
        """
        pool: Members = self._node.pacer.pool
        with pool.pacer:
            now = pool.pacer.clock()
            return tuple(member.state(now) for member in pool.members)

    # --- doors ---

    @overload
    def wrap(self, obj: Sequence[T], **options: Unpack["WrapOptions"]) -> T: ...
    @overload
    def wrap(self, obj: T, **options: Unpack["WrapOptions"]) -> T: ...
    def wrap(self, obj: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a LlamaIndex model that calls the model of whichever member takes the call.

        It is like the first: of its class, with its fields, tools, streams and structured output. A
        field that is set later changes the first alone, so set those of the others, too.

        >>> llm = pool.wrap([OpenAI(...), AzureOpenAI(...)])

        Args:
            obj: one LLM for each member, in the order of `members`, of one family; or embedding
                models of the same name. Or an agent whose model is the pool's already: each of its
                runs is one agent.
            options: as for `Limiter.wrap`.

        Raises:
            TypeError: it is a single model or a tool, or models that cannot serve as one.
            ValueError: there is not one model for each member, or embedding models differ.
        """
        return super().wrap(obj, **options)

    def transport(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, endpoints: "Endpoints", inner: Any = None, **options: Unpack["TransportOptions"]
    ) -> "PacedTransport":
        """Return a transport that sends each request to the member that takes it.

        See `http_client`; for clients that need a transport of their own, such as ``inner=``.

        Args:
            endpoints: where each member is, and its credentials.
            inner: as for `Limiter.transport`.
            options: as for `Limiter.transport`.

        Raises:
            ValueError, TypeError: endpoints or an option cannot be understood.
            ImportError: the extra ``asyncbucket[http]`` is not installed.
        """
        make: Any = super().transport
        return cast("PacedTransport", make(inner, endpoints=endpoints, **options))

    transport_sync = transport  # type: ignore[assignment]

    def http_client(self, endpoints: "Endpoints", **options: Unpack["ClientOptions"]) -> Any:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return an ``AsyncClient`` that sends each request to the member that takes it.

        Address and credentials are the member's, for each attempt; see `asyncbucket.http.endpoints`.
        Make the client above it with the ``base_url`` of any member.

        >>> http = pool.http_client(
        ...     {
        ...         openai: {"base_url": OPENAI, "headers": {"Authorization": f"Bearer {key}"}},
        ...         azure: {"base_url": AZURE, "headers": {"api-key": azure_key}},
        ...     }
        ... )
        >>> client = AsyncOpenAI(base_url=OPENAI, api_key="-", http_client=http, max_retries=0)

        Args:
            endpoints: where each member is, and its credentials.
            options: as for `Limiter.http_client`.

        Raises:
            ImportError: neither httpx nor httpx2 is installed, or stamina is not.
            ValueError, TypeError: endpoints or an option cannot be understood.
        """
        make: Any = super().http_client
        return make(endpoints=endpoints, **options)

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
        if member._node.in_flight or any(tree.waiting for tree in member._node.pacer.trees):
            raise RuntimeError(
                f"calls of {member.name!r}, or of what it shares a pool with, wait or are in flight: "
                f"make the pool before the first call"
            )
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        raise ValueError(f"a pool's members need different names, not {', '.join(names)}")
    if any(member._node.pacer.clock != members[0]._node.pacer.clock for member in members):
        raise ValueError("a pool's members need the same clock")
    if not callable(prefer) and prefer not in ("least_used", "first"):
        raise ValueError(
            f"prefer must be 'least_used', 'first' or a function of limiters, not {prefer!r}"
        )
