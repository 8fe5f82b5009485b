"""Many limits, one admission: requests, tokens and a slot together, or nothing."""

import functools
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NoReturn, Unpack

from asyncbucket.core.account import Account
from asyncbucket.core.acquisition import Acquisition, FirstAcquisition
from asyncbucket.core.context import Inherited, Priority, inherited, read_tenant
from asyncbucket.core.cost import Cost, amounts_of
from asyncbucket.core.door import Door
from asyncbucket.core.doors import Doors
from asyncbucket.core.explain import Explanation, explain_locked
from asyncbucket.core.keys import Keys
from asyncbucket.core.lease import Lease
from asyncbucket.core.limits import Limit, read_limits
from asyncbucket.core.loops import OfThisProcess
from asyncbucket.core.steering import Steering
from asyncbucket.core.terms import (
    Keywords,
    OnOutage,
    Terms,
    read_count,
    read_max_queue,
    read_name,
    read_on_outage,
    read_slot_ttl,
    read_timeout,
)
from asyncbucket.core.wording import shown
from asyncbucket.feedback.adaptive import Concurrency

#: How many tenants' limiters are kept alive unless `per_key` says otherwise.
_ALIVE: Final = 1_000


class Limiter(Doors, Steering, OfThisProcess):
    """Pace calls under any number of limits, on any number of event loops and threads.

    For every limit of N per window W, the cost admitted in every window of length W is at most N.
    Calls pass in order of arrival, each with its whole cost at once; a call that waits holds
    nothing. A call that is cancelled, at whichever await, gives back what it took.

    >>> limiter = Limiter("500 RPM", "200k TPM", "10k RPD", concurrency=20, name="openai")
    >>> async with limiter.acquire(input_tokens=900, output_tokens=300, timeout=30) as lease:
    ...     reply = await anything()
    ...     lease.settle(tokens=reply.usage.total_tokens)

    Args:
        limits: texts such as ``"500 RPM"`` or `Limit` objects.
        concurrency: the most calls in flight (leases not yet released) at once. ``"auto"`` finds
            the number from how the calls go, between 1 and 1,000; a pair ``(least, most)`` sets
            other bounds. This is for servers that publish no limits: see
            `asyncbucket.feedback.adaptive`.
        name: the name in statistics, events, logs and metrics.
        max_queue: the most calls that may wait; more are refused with `QueueFull`.
        timeout: the most seconds to wait, for calls that set no timeout of their own.
        store: where limits are kept that several processes share, e.g.
            ``"redis://127.0.0.1:6379/0"`` or ``"sqlite:///limits.db"``. Limiters of the same
            ``name`` share their limits. See `asyncbucket.stores`.
        on_outage: what to do while the store is gone: go on with this process's ``"share"`` of the
            limits, admit nobody (``"closed"``) or everybody (``"open"``).
        slot_ttl: seconds after which the slots of a process that died come back.
        clock: a callable that returns monotonic integer nanoseconds.
        limits_by_keyword: ``rpm=500`` for ``"500 RPM"``; also rps, rph, rpd, tpm, tpd, itpm, otpm.

    Raises:
        LimitSyntaxError: a limit cannot be read; a ValueError.
        ValueError: ``concurrency``, ``max_queue``, ``timeout`` or ``slot_ttl`` is out of range,
            ``on_outage`` is none of these words, the store's URL is not understood, or ``name``
            holds surrogates.
        TypeError: ``name`` is not a string, ``store`` is not a store, or ``clock`` returns no
            integer.
        ImportError: the extra that serves the store is not installed.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_budget",
        "_door",
        "_parent",
        "_terms",
    )

    def __init__(
        self,
        *limits: str | Limit,
        concurrency: Concurrency | None = None,
        name: str = "default",
        max_queue: int | None = None,
        timeout: float | None = None,
        store: Any = None,
        on_outage: OnOutage = "share",
        slot_ttl: float = 30.0,
        clock: Callable[[], int] = time.monotonic_ns,
        **limits_by_keyword: float | None,
    ) -> None:
        given = read_limits(limits, limits_by_keyword)
        read_on_outage(on_outage)
        slot_ttl = read_slot_ttl(slot_ttl)
        account = Account(read_name(name), clock=clock, max_queue=read_max_queue(max_queue))
        self._set_up(Door(account, timeout=read_timeout(timeout)), None)
        account.set_limits(given, concurrency)
        if store is not None:
            from asyncbucket.stores.shared import share

            share(account, store, on_outage=on_outage, slot_ttl=slot_ttl)

    def _set_up(self, door: Door, parent: "Limiter | None", terms: Terms | None = None) -> None:
        """Set up the public object in front of ``door``."""
        self._door = door
        self._budget = door.account.budget
        self._parent = parent
        self._terms = terms

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
        **resources: float,
    ) -> Acquisition:
        """Wait for an admission: ``await`` it for a `Lease`, or enter it with ``async with``.

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
            resources: amounts of other resources that the limiter limits, e.g. ``images=3``.

        Raises:
            CostExceedsLimit: the cost is above a limit and can never pass; a ValueError.
            AcquireTimeout: the call was not admitted in time, or cannot be; a TimeoutError. It is
                raised at once if even a safe lower bound of the wait, with everything lent given
                back, is longer.
            QueueFull: ``max_queue`` calls wait already.
            StoreError: the store that keeps the limits cannot be used, or was closed meanwhile.
            TypeError, ValueError: an amount or a time is not a finite number from 0 on.
        """
        context, door = inherited.get(), self._door
        if tenant is not None or context is not None:
            door = self._door_for(tenant, context)
        if cost is None and not resources:  # the usual case: a short cut
            amounts = amounts_of(requests, tokens, input_tokens, output_tokens)
        else:
            amounts = _amounts(door, cost, requests, tokens, input_tokens, output_tokens, resources)
        acquisition_type = Acquisition if door.called else FirstAcquisition
        if (
            context is None
            and priority is None
            and timeout is None
            and deadline is None
            and door.timeout is None
        ):
            return acquisition_type(door, amounts, None, door.priority)
        end = functools.partial(door.deadline_for, timeout, deadline, context)
        end()  # report mistakes at once
        return acquisition_type(door, amounts, end, door.priority_for(priority, context))

    def acquire_nowait(
        self,
        cost: Cost | None = None,
        *,
        requests: float = 1,
        tokens: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        tenant: str | None = None,
        **resources: float,
    ) -> Lease:
        """Take a lease now, or refuse; see `acquire`.

        Raises:
            WouldBlock: the call cannot pass now, or others wait. ``retry_after`` is the time until
                it could, in seconds. It is None if a slot has to be given back first, if the cost
                is above a burst (such a call passes only by waiting), and always if a store keeps
                the limits, because the store has to be asked.
            CostExceedsLimit, TypeError, ValueError: as for `acquire`.
        """
        door = self._door_for(tenant, inherited.get())
        amounts = _amounts(door, cost, requests, tokens, input_tokens, output_tokens, resources)
        return door.take(amounts)

    def acquire_sync(  # noqa: PLR0913 - as `acquire`
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
        **resources: float,
    ) -> Lease:
        """Block this thread until an admission; the lease is a context manager. See `acquire`.

        A call that has to wait does so on one background event loop, in the same line as all
        others.
        """
        context = inherited.get()
        door = self._door_for(tenant, context)
        amounts = _amounts(door, cost, requests, tokens, input_tokens, output_tokens, resources)
        end = door.deadline_for(timeout, deadline, context)
        urgency = door.priority_for(priority, context)
        lease = door.try_now(amounts, on_loop=False)
        if lease is None:
            wait = functools.partial(door.wait, amounts, end, urgency, on_loop=False)
            lease = self._budget.background.call(wait, Lease.undo)
        return lease

    def explain(
        self,
        cost: Cost | None = None,
        *,
        requests: float = 1,
        tokens: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        **resources: float,
    ) -> Explanation:
        """Say which limit binds such a call now, how long it would wait, and what would help.

        >>> print(limiter.explain(tokens=1_000))
        a call would wait 12 s behind 40 calls: tokens bind; tokens allow 200 such calls a minute
        (200,000 tokens per 60 s); without that limit, requests would allow 500 a minute (500 requests
        per 60 s, burst 50)

        It takes nothing. It uses the tenant and the priority that a call from here would inherit.
        If many calls wait, it takes about 10 µs for each.

        Raises:
            CostExceedsLimit, TypeError, ValueError: as for `acquire`.
        """
        context = inherited.get()
        door = self._door_for(None, context)
        amounts = _amounts(door, cost, requests, tokens, input_tokens, output_tokens, resources)
        account, urgency = door.account, door.priority_for(None, context)
        with self._budget.lock:
            account.check_locked(amounts)
            return explain_locked(account, amounts, urgency)

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

    def child(self, name: str, *limits: str | Limit, **terms: Unpack[Keywords]) -> "Limiter":
        """Return the child with this name, made at the first call.

        A child's calls count here, too: once, in the same admission. If children want more than
        there is, they share it by weight, measured in cost: see `asyncbucket.core.shares`. A child that
        has used up its own limits holds up nobody else.

        >>> acme = limiter.child("acme", rpm=100, weight=2)
        >>> tools = limiter.child("tools", concurrency=4)

        Args:
            name: the child's name among its siblings; its ``name`` is the path, ``"openai/chat"``.
            limits: limits on the child's calls, besides those of this limiter.
            terms: ``weight=``, its share compared with its siblings', 1 by default;
                ``concurrency=``, ``max_queue=``, ``timeout=`` and limits such as ``rpm=`` as for
                `Limiter`; ``priority=`` for those of its calls that have none of their own.

        Raises:
            LimitSyntaxError: a limit cannot be read; a ValueError.
            ValueError: the child exists on other terms (see `reconfigure`), a number is out of range,
                or the name is not valid.
        """
        if not isinstance(name, str) or not name or "/" in name or name.startswith("*"):
            raise ValueError(
                f"a child's name must be a string without a slash or a leading star, not {name!r}"
            )
        read_name(name)
        given_terms = Terms.read(limits, terms)
        with self._budget.lifecycle_lock:
            account = self._account
            child = account.limiters.get(name)
            if child is None:
                account.limiters = account.limiters or {}
                child = account.limiters[name] = self._make_child(name, given_terms)
        if (limits or terms) and given_terms != child._terms:  # noqa: SLF001 - another `Limiter`
            raise ValueError(
                f"{child.name!r} exists on other terms: ask for it by name alone, and change it "
                f"with child({name!r}).reconfigure(...)"
            )
        return child

    def key(self, tenant: str, *limits: str | Limit, **terms: Unpack[Keywords]) -> "Limiter":
        """Return the limiter of a tenant under this one, made on demand.

        There may be any number of tenants. Limiters that have not been used for a while are put to
        rest: only what they used is remembered (see `per_key`). The returned object stays valid for
        ever. Its name shows a hash, never the tenant.

        Args:
            tenant: any text that identifies the user who shares this limiter.
            limits: limits of this tenant. Without limits and terms, those of `per_key` apply.
            terms: as for `child`.

        Raises:
            LimitSyntaxError, ValueError: as for `child`; the tenant is not a string, or is empty.
        """
        read_tenant(tenant)
        return self._tenants().get(tenant, Terms.read(limits, terms) if limits or terms else None)

    def per_key(self, *limits: str | Limit, alive: int = _ALIVE, **terms: Unpack[Keywords]) -> None:
        """Set the terms for tenants that have none of their own; see `key`.

        They apply to tenants that come from now on, in calls that ask this limiter. Tenants of a
        child are the child's own.

        Args:
            limits: as for `child`.
            alive: how many tenants' limiters are kept in full. Of the others, only what they used
                is remembered, until their limits are as good as new. A limiter with calls waiting
                or in flight stays, and so does one that was reconfigured.
            terms: as for `child`.

        Raises:
            LimitSyntaxError, ValueError: as for `child`.
        """
        count = read_count(alive, "alive")
        self._tenants().set_defaults(Terms.read(limits, terms), alive=count)

    @property
    def parent(self) -> "Limiter | None":
        """The limiter above this one."""
        return self._parent

    @property
    def children(self) -> Mapping[str, "Limiter"]:
        """The children by name, as of now, without tenants."""
        return MappingProxyType(dict(self._account.limiters))

    def _busy_tenants(self) -> list["Limiter"]:
        """Return the tenants' limiters with calls that wait or are in flight now."""
        keys = self._account.keys
        return [] if keys is None else keys.busy()

    def _tenants(self) -> Keys["Limiter"]:
        with self._budget.lifecycle_lock:
            account = self._account
            if account.keys is None:
                account.steered = True  # a `Rest` lacks what a tenant's own tenants used
                account.keys = Keys(account, self._make_tenant, alive=_ALIVE)
            return account.keys

    def _make_tenant(
        self, name: str, terms: Terms, find_again: Callable[[], Account]
    ) -> tuple["Limiter", Account]:
        child = self._make_child(name, terms)
        door = child._door  # noqa: SLF001 - another `Limiter`
        door.find_again = find_again
        return child, door.account

    def _make_child(self, name: str, terms: Terms) -> "Limiter":
        above = self._door
        with self._budget.lock:
            account = above.account.add_child_locked(name, terms)
        timeout = above.timeout if terms.timeout is None else terms.timeout
        priority = above.priority if terms.priority is None else terms.priority
        child = Limiter.__new__(Limiter)
        door = Door(account, timeout=timeout, priority=priority)
        child._set_up(door, self, terms)  # noqa: SLF001 - another `Limiter`
        account.set_limits(list(terms.limits), terms.concurrency)
        return child

    def _door_for(self, tenant: str | None, context: Inherited | None) -> Door:
        """Return the door of ``tenant`` or, unless this is a tenant's, of an inherited one."""
        if tenant is None:
            tenant = None if context is None or self._account.belongs_to_tenant else context.tenant
        return self._door if tenant is None else self.key(tenant)._door  # noqa: SLF001 - its own kind

    @property
    def _account(self) -> Account:
        return self._door.account


def _amounts(
    door: Door,
    cost: Cost | None,
    requests: float,
    tokens: float | None,
    input_tokens: float | None,
    output_tokens: float | None,
    others: Mapping[str, float],
) -> dict[str, int]:
    """Return the amounts of a call, the slot it takes included."""
    named = others
    if cost is None:
        amounts = amounts_of(requests, tokens, input_tokens, output_tokens, others)
    elif isinstance(cost, Cost):
        parts = (tokens, input_tokens, output_tokens)
        if requests != 1 or others or any(part is not None for part in parts):
            raise TypeError(f"{cost!r} is a whole cost: give no other amounts with it")
        amounts, named = {**cost, "concurrency": 1}, cost
    else:
        raise TypeError(f"a cost must be a Cost or keywords such as tokens=500, not {shown(cost)}")
    if named:
        door.account.check_known(named)
    return amounts
