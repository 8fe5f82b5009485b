"""Many limits, one admission: requests, tokens and a slot together, or nothing."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, Unpack

from asyncbucket.engine.context import (
    Inherited,
    Priority,
    deadline_of,
    inherited,
    read_priority,
    span_of,
)
from asyncbucket.engine.cost import COMMON, Cost, amounts_of
from asyncbucket.engine.dispatchers import OfThisProcess
from asyncbucket.engine.events import Callback, LimitChanged, LimitLearned, Observers, Paused
from asyncbucket.engine.interfaces import PauseMeter, Sizer
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.limits import Limit, read_limits
from asyncbucket.engine.meters import NEVER
from asyncbucket.engine.node import EMPTY_MAPPING, Node
from asyncbucket.engine.queue import reweigh
from asyncbucket.engine.report import statistics_locked
from asyncbucket.engine.statistics import Statistics
from asyncbucket.engine.terms import (
    CallAmounts,
    CallKeywords,
    Concurrency,
    Keywords,
    LimitKeywords,
    OtherResources,
    Terms,
    read_concurrency,
    read_name,
    read_weight,
)
from asyncbucket.engine.wording import USD, is_integer, shown, warn_user

if TYPE_CHECKING:
    from asyncbucket.engine.pacer import Pacer

# A limiter touches the private parts of its parent, of its tenants and of their leases.
# ruff: noqa: SLF001

#: After so many calls of which none paid for a limit, something is wrong with it; dollars cost all.
_MANY: Final = 100
_MANY_WITHOUT_PRICE: Final = 10


class Limiter(OfThisProcess):
    """Pace calls under limits: ask, divide among children, steer, watch.

    It is what admits calls, without the doors to whatever makes them: the public
    `asyncbucket.Limiter` adds those, tenants, stores, and whatever pays for calls.
    """

    def __init__(self, node: Node, terms: Terms) -> None:
        """Put ``terms`` in force at the root ``node``."""
        self._set_up(node, None, terms)
        self._start(terms)

    def _set_up(self, node: Node, parent: "Limiter | None", terms: Terms) -> None:
        """Set up the public object in front of ``node``."""
        self._node, self._parent, self._terms = node, parent, terms
        self._timeout, self._priority = terms.timeout, 0
        if parent is not None:
            self._timeout = parent._timeout if terms.timeout is None else terms.timeout
            self._priority = parent._priority
        if isinstance(terms.priority, int):
            self._priority = terms.priority
        self._has_terms = bool(self._timeout is not None or self._priority)
        #: Whether calls have come this way, and have paid for all that is limited.
        self._is_proven = False
        self._children: dict[str, Self] = EMPTY_MAPPING
        #: Whether it is no longer on these terms.
        self._was_changed = False

    def _start(self, terms: Terms) -> None:
        """Put the terms of a new limiter in force."""
        node = self._node
        node.standing.max_queue = terms.max_queue
        for each in (node, *node.ways):
            each.standing.weight = terms.weight
            if terms.priority == "within":
                each.standing.within = True
        if terms.limits or terms.concurrency is not None:
            self._put_in_force_locked(terms.limits, terms.concurrency)

    # --- asking ---

    def acquire(  # noqa: PLR0913 - each says something else, and all but one by keyword
        self,
        cost: Cost | None = None,
        *,
        requests: float = 1,
        tokens: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
        priority: Priority | None = None,
        tenant: str | None = None,
        **resources: Unpack[OtherResources],
    ) -> Lease:
        """Wait for an admission: ``await`` the lease, or enter it with ``async with``.

        Args:
            cost: the whole cost, instead of its parts.
            requests: how many requests the call counts as, usually 1.
            tokens: LLM tokens, input and output together.
            input_tokens: LLM tokens sent.
            output_tokens: LLM tokens expected back.
            timeout: the most seconds to wait; ``math.inf`` lifts the limiter's own ``timeout``.
            deadline: the latest instant, in seconds of the limiter's clock (``time.monotonic()``).
            priority: how urgent the call is; see `asyncbucket.priority`.
            tenant: whose call it is; the same as asking ``limiter.key(tenant)``.
            resources: amounts of other resources that the limiter limits, e.g. ``images=3``; and
                ``usd=0.002``, US dollars.

        Raises:
            CostExceedsLimit: the cost is above a limit and can never pass; a ValueError.
            AcquireTimeout: the call was not admitted in time, or cannot be; a TimeoutError. It is
                raised at once if even a safe lower bound of the wait, with everything lent given
                back, is longer.
            QueueFull: ``max_queue`` calls wait already.
            BudgetExceeded: the call would pass a budget around this code: see `asyncbucket.budget`.
            StoreError: the store that keeps the limits cannot be used, or was closed meanwhile.
            TypeError, ValueError: an amount or a time is not a finite number from 0 on.
        """
        context, limiter = inherited.get(), self
        if tenant is not None or context is not None:
            limiter = self._limiter_for(tenant, context)
        if (
            type(tokens) is int
            and tokens >= 0
            and type(requests) is int
            and requests == 1
            and input_tokens is None
            and output_tokens is None
            and cost is None
            and not resources
        ):  # the usual case, as `amounts_of` has it, without the call: this is the hottest path
            amounts = {
                "requests": 1,
                "tokens": tokens,
                "input_tokens": tokens,
                "output_tokens": tokens,
                "concurrency": 1,
            }
        elif cost is None and not resources:
            amounts = amounts_of(requests, tokens, input_tokens, output_tokens)
        else:
            amounts = limiter._amounts(
                cost, requests, tokens, input_tokens, output_tokens, **resources
            )
        if not limiter._is_proven:
            limiter._prove()
        if (
            context is None
            and timeout is None
            and deadline is None
            and priority is None
            and not limiter._has_terms
        ):
            return Lease(limiter._node, amounts)
        return limiter._lease(amounts, context, timeout, deadline, priority)

    def acquire_nowait(
        self, cost: Cost | None = None, *, tenant: str | None = None, **amounts: Unpack[CallAmounts]
    ) -> Lease:
        """Take a lease now, or refuse; see `acquire`.

        Raises:
            WouldBlock: the call cannot pass now, or others wait. ``retry_after`` is the time until
                it could, in seconds. It is None if a slot has to be given back first, if the cost
                is above a burst (such a call passes only by waiting), and always if a store keeps
                the limits, because the store has to be asked.
            CostExceedsLimit, TypeError, ValueError: as for `acquire`.
        """
        # Nobody waits, so that a timeout, a deadline or a priority among the amounts is an error.
        lease = self.acquire(
            cost, tenant=tenant, timeout=None, deadline=None, priority=None, **amounts
        )
        if not lease._take_now():
            pacer: Pacer = lease._node.pacer
            with pacer.lock:
                discarded = pacer.waiting and pacer.discard_closed()
            if not (discarded and lease._take_now()):
                lease._refuse()
        return lease

    def acquire_sync(self, cost: Cost | None = None, **call: Unpack[CallKeywords]) -> Lease:
        """Block this thread until an admission; the lease is a context manager. See `acquire`.

        A call that has to wait stands in the same line as all others. If it waits in a coroutine, a
        RuntimeWarning names the line: nothing else runs on that event loop meanwhile.
        """
        lease = self.acquire(cost, **call)
        if lease.accounts or not lease._try_now():
            lease._block()
        return lease

    def _amounts(
        self,
        cost: Cost | None,
        requests: float = 1,
        tokens: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        **others: Any,
    ) -> dict[str, int]:
        """Return the amounts of a call, the slot it takes included."""
        if cost is None:
            amounts = amounts_of(requests, tokens, input_tokens, output_tokens, others)
        elif not isinstance(cost, Cost):
            raise TypeError(
                f"a cost must be a Cost or keywords such as tokens=500, not {shown(cost)}"
            )
        elif requests != 1 or others or {tokens, input_tokens, output_tokens} != {None}:
            raise TypeError(f"{cost!r} is a whole cost: give no other amounts with it")
        else:
            others = cost._amounts
            amounts = {**others, "concurrency": 1}
        if not others.keys() <= COMMON:
            self._node.check_known(others)
        return amounts

    def _deadline(
        self, timeout: float | None, deadline: float | None, context: Inherited | None
    ) -> int | None:
        """Return the earliest of all given deadlines, in ns of the limiter's clock."""
        now = self._node.pacer.clock()
        timeout = self._timeout if timeout is None else timeout
        left = None if context is None else context.seconds_left()
        return deadline_of(now, timeout, left, deadline=deadline)

    def _urgency(self, priority: Priority | None, context: Inherited | None) -> int:
        """Return the priority of a call: its own, the inherited one, or the limiter's."""
        if priority is None and context is not None:
            priority = context.priority
        return self._priority if priority is None else read_priority(priority)

    def _lease(
        self,
        amounts: dict[str, int],
        context: Inherited | None,
        timeout: float | None,
        deadline: float | None,
        priority: Priority | None,
    ) -> Lease:
        """Return the lease of a call on the given terms, the inherited ones, and the limiter's."""
        end = partial(self._deadline, timeout, deadline, context)
        end()  # report mistakes at once
        urgency = self._urgency(priority, context)
        lease = self._make_lease(amounts)
        if context is not None and context.payers:
            opened = [payer.account(self._node, amounts) for payer in context.payers]
            lease.accounts = tuple(account for account in opened if account is not None)
        lease._deadline, lease._priority = end, urgency
        return lease

    def _make_lease(self, amounts: dict[str, int]) -> Lease:
        return Lease(self._node, amounts)

    def _prove(self) -> None:
        """Look whether calls have come and have paid for each limit; warn if many have not."""
        node = self._node
        if not node.slots.admitted:
            return
        place = node.pacer.place
        limits = [each for level in node.path if not level.place for each in level.limits.values()]
        unpaid = [window.limit for window in limits if not window.was_used]
        unpaid += [] if place is None else [use.limit for use in place.use() if not use.used]
        ended, few = node.slots.admitted - node.slots.in_flight, {USD: _MANY_WITHOUT_PRICE}
        wrong = next((each for each in unpaid if ended >= few.get(each.resource, _MANY)), None)
        self._is_proven = wrong is not None or not unpaid
        if wrong is not None:
            warn_user(
                f"{ended} calls of limiter {self.name!r} have ended, and none counted towards its "
                f"limit of {wrong}: give the amount with each call, as in "
                f"acquire({wrong.resource}=...)",
                RuntimeWarning,
            )

    async def __aenter__(self) -> NoReturn:
        """Refuse, and say what to write: an acquisition is a context manager, a limiter is not.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a limiter is not a context manager, an acquisition is: write `async with limiter.acquire():`, "
            "or `async with bucket:` with a TokenBucket"
        )

    async def __aexit__(self, *_: object) -> None:
        """Satisfy the protocol; never reached."""

    # --- limiters below ---

    def child(self, name: str, *limits: str | Limit, **terms: Unpack[Keywords]) -> Self:
        """Return the child with this name, made at the first call.

        A child's calls count here, too: once, in the same admission. If children want more than
        there is, they share it by weight, measured in cost. A child that has used up its own limits delays no other.

        >>> acme = limiter.child("acme", rpm=100, weight=2)
        >>> tools = limiter.child("tools", concurrency=4)

        Args:
            name: the child's name among its siblings; its ``name`` is the path, ``"openai/chat"``.
            limits: limits on the child's calls, besides those of this limiter.
            terms: ``weight=``, its share compared with its siblings', 1 by default;
                ``concurrency=``, ``max_queue=``, ``timeout=`` and limits such as ``rpm=`` as for
                `Limiter`; ``priority=`` for those of its calls that have none of their own. With
                ``priority="within"``, priorities count among its own calls alone, and to its
                siblings all of them are normal.

        Raises:
            LimitSyntaxError: a limit cannot be read; a ValueError.
            ValueError: the child exists on other terms (see `reconfigure`), a number is out of range,
                or the name is not valid.
        """
        if not isinstance(name, str) or not name or "/" in name or name.startswith("*"):
            raise ValueError(
                f"a child's name must be a string without a slash or a leading star, not {name!r}"
            )
        given = Terms.read(limits, terms)
        child = self._children.get(read_name(name))
        if child is None:
            made = self._make_child(name, given)
            with self._node.pacer.lock:  # another thread may ask for it, too
                self._children = self._children or {}
                child = self._children.setdefault(name, made)
        if (limits or terms) and given != child._terms:
            raise ValueError(
                f"{child.name!r} already exists on other terms: get it by name alone, and change it "
                f"with child({name!r}).reconfigure(...)"
            )
        return child

    def _make_child(self, name: str, terms: Terms) -> Self:
        """Return a new limiter below this one."""
        with self._node.pacer.lock:
            child = self._of(self._make_node(name), terms)
            child._start(terms)
        return child

    def _make_node(self, name: str) -> Node:
        return Node(f"{self._node.name}/{name}", self._node)

    def _of(self, node: Node, terms: Terms) -> Self:
        """Return the public object in front of ``node``, which is below this limiter's."""
        limiter = type(self).__new__(type(self))  # below a pool, all are pools
        limiter._set_up(node, self, terms)
        return limiter

    def _limiter_for(self, tenant: str | None, context: Inherited | None) -> "Limiter":
        """Return the limiter of ``tenant`` or of an inherited one, if there are tenants here."""
        raise NotImplementedError

    @property
    def parent(self) -> "Limiter | None":
        """The limiter above this one."""
        return self._parent

    @property
    def children(self) -> Mapping[str, "Limiter"]:
        """The children by name, as of now, without tenants."""
        return dict(self._children)

    # --- steering ---

    def pause(self, seconds: float, *, reason: str = "", gradually: bool = False) -> None:
        """Admit nobody for ``seconds`` from now; an earlier pause that ends later stays in force.

        Args:
            seconds: how long.
            reason: why, for people, who read it in errors; ``"429"`` and ``"daily quota"`` count as
                refusals by the provider.
            gradually: start slowly after the pause, so that its end causes no rush: one call at
                first, then twice as many in each step of a 16th of the pause (at most 0.25 s), up
                to 256.

        Raises:
            ValueError: ``seconds`` is not a finite number from 0 on.
            TypeError: ``reason`` is not a string.
        """
        if not isinstance(reason, str):
            raise TypeError(f'reason must be a string, such as "429", not {reason!r}')
        span = span_of(seconds, "a pause", "it counts from now")
        if span >= NEVER:
            raise ValueError("a pause must end: give a finite number of seconds")
        node = self._node
        pacer: Pacer = node.pacer
        with pacer.lock:
            now, bystander = pacer.clock(), node.path[-1].bystander
            if reason in ("429", "daily quota"):
                node.count("upstream_429")
                if bystander is not None:
                    bystander.refused(now)
            if bystander is None:
                pause = self._find_pause_locked()
                pause.begin(now + span, now, gradually=gradually, reason=reason)
                if node.place is not None:
                    node.place.pause(span, gradually=gradually)
                pacer.ring_locked(node, now)
        pacer.notify(node, Paused, seconds=float(seconds), reason=reason)

    def resume(self) -> None:
        """End a pause now, whatever began it; of a store, other processes go on with theirs."""
        node = self._node
        pacer: Pacer = node.pacer
        with pacer.lock:
            now = pacer.clock()
            for pause in node.pauses():
                pause.end(now)
            pacer.ring_locked(node, now)

    def leave_shadow(self) -> None:
        """Pace the calls of the whole tree from now on, as limits that were booked in the shadow allow."""
        root = self._node.path[-1]
        with root.pacer.lock:
            root.bystander = None
            root.forget()

    def learn(self, limit: Limit) -> None:
        """Adopt a limit that the provider announces, if this limiter was given none.

        A learned limit follows later announcements; given limits stay as they are. It holds calls
        back, but never refuses one: a call above it goes out alone, and its reply may correct the
        limit. In a store it is the limit of all processes that were given none.

        Raises:
            TypeError: it is not a `Limit`.
            ValueError: the store that keeps the limits cannot count that far.
        """
        if not isinstance(limit, Limit):
            raise TypeError(f'learn() takes a Limit, such as Limit("requests", 500), not {limit!r}')
        node = self._node
        pacer: Pacer = node.pacer
        self._check_place([limit], None)
        with pacer.lock:
            known = node.limits.get(limit.key)
            given = any(window.refuses for window in node.limits.values())
            if given or (known and known.amount == limit.amount):
                return
            self._put_in_force_locked([limit], None, learned=True)
            pacer.notify_locked(node, LimitLearned, limit=str(limit))

    def reconfigure(
        self,
        *limits: str | Limit,
        concurrency: Concurrency | None = None,
        weight: float | None = None,
        **limits_by_keyword: Unpack[LimitKeywords],
    ) -> None:
        """Change the named limits at once, while calls wait; the others stay.

        ``concurrency`` may also change between a fixed number and ``"auto"``; ``weight`` applies to
        a child. What was admitted stays counted, and calls in flight hold slots that are added (not
        those of a store), so a lower limit is kept from the first moment. Waiting calls that can
        never pass under the new limits fail with `CostExceedsLimit`.

        Raises:
            LimitSyntaxError, ValueError: as for `Limiter` and `child`.
        """
        given = read_limits(limits, limits_by_keyword)
        read_concurrency(concurrency)
        new_weight = None if weight is None else read_weight(weight)
        node = self._node
        pacer: Pacer = node.pacer
        self._check_place(given, concurrency)
        with pacer.lock:
            if new_weight is not None:
                for each in (node, *node.ways):
                    reweigh(each, new_weight)
            self._put_in_force_locked(given, concurrency)
            for limit in given:
                pacer.notify_locked(node, LimitChanged, limit=str(limit))
            if concurrency is not None:
                pacer.notify_locked(node, LimitChanged, limit=f"concurrency {node.slots.most}")
            self._was_changed = True

    def _check_place(self, limits: Iterable[Limit], concurrency: Concurrency | None) -> None:
        """Refuse what the store cannot keep, if one keeps these limits."""
        place = self._node.keeper or self._node.place
        if place is not None:
            place.check(limits, concurrency)

    def _put_in_force_locked(
        self, limits: Iterable[Limit], concurrency: Concurrency | None, *, learned: bool = False
    ) -> None:
        """Put limits in force, keeping what was booked under limits of the same window."""
        node, bounds = self._node, read_concurrency(concurrency)
        pacer: Pacer = node.pacer
        node.set_limits(limits, pacer.clock(), learned=learned)
        if bounds is not None:
            fixed = is_integer(concurrency)
            node.sizer = None if fixed else self._make_sizer(bounds)
            node.slots.most = bounds[0] if node.sizer is None else node.sizer.size
        pacer.limits_changed_locked(node)
        if node.place is not None:
            node.place.configure()

    def observe(self, callback: Callback) -> Callable[[], None]:
        """Call ``callback`` with each event here and below; the returned function ends that.

        See `asyncbucket.engine.events` for the events. The callback runs synchronously, in the thread
        where the event happens. The first exception it raises is logged, and none does harm. While
        nobody observes, no events are made.

        Raises:
            TypeError: ``callback`` cannot be called, or is a coroutine function.
        """
        node = self._node
        pacer: Pacer = node.pacer
        with pacer.lock:
            node.observers = node.observers or Observers()
            remove = node.observers.add(callback)
            pacer.count_observers(1)

        def unobserve() -> None:
            with pacer.lock:
                pacer.count_observers(-remove())

        return unobserve

    async def aclose(self) -> None:
        """Leave the store, if one keeps the limits: what is booked ahead is given back.

        Without a store it does nothing. It closes the limiter for all loops and threads of the
        process: calls that still wait fail with `StoreError`, later ones open it again.
        """
        if self._node.place is not None:
            await self._node.place.aclose()

    def _make_sizer(self, bounds: tuple[int, int]) -> Sizer:
        """Return what finds the number of slots, on from where an earlier search is."""
        raise NotImplementedError

    def _find_pause_locked(self) -> PauseMeter:
        """Return the pause of this limiter, made at the first one."""
        raise NotImplementedError

    # --- watching ---

    def now(self) -> float:
        """Return the current time in seconds of the limiter's clock, as used by deadlines."""
        now: int = self._node.pacer.clock()
        return now * 1e-9

    @property
    def name(self) -> str:
        """The name in statistics, events, logs and metrics: ``"openai"``, ``"openai/chat"``."""
        return self._node.name

    @property
    def max_queue(self) -> int | None:
        """The most calls that may wait."""
        return self._node.standing.max_queue

    @property
    def limits(self) -> tuple[Limit, ...]:
        """This limiter's own limits in force; those of the limiters above apply as well."""
        return tuple(window.limit for window in self._node.limits.values())

    @property
    def concurrency(self) -> int | None:
        """The most calls in flight at once, as it is now; None if unbounded."""
        return self._node.concurrency

    def statistics(self) -> Statistics:
        """Return a frozen snapshot: what passed, what waits, and what for; children included."""
        with self._node.pacer.lock:
            return statistics_locked(self._node)

    def __repr__(self) -> str:
        node = self._node
        shadow = " in shadow" if node.path[-1].bystander else ""
        parts = [f"{type(self).__name__} {self.name!r}{shadow}", *map(str, self.limits)]
        if self.concurrency is not None:
            sizer = node.sizer
            found = "" if sizer is None else f" of {sizer.least:,} to {sizer.most:,}"
            parts.append(f"concurrency {node.slots.in_flight}/{self.concurrency}{found}")
        return f"<{', '.join(parts)}, {node.standing.waiting:,} waiting>"
