"""Many limits, one admission: requests, tokens and a slot together, or nothing."""

import functools
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NoReturn, Unpack

from asyncbucket.context import Inherited, Priority, inherited, read_tenant
from asyncbucket.cost import Cost, amounts_of
from asyncbucket.feedback.adaptive import Concurrency
from asyncbucket.limiter.account import Account
from asyncbucket.limiter.acquisition import Acquisition, FirstAcquisition
from asyncbucket.limiter.door import Door
from asyncbucket.limiter.doors import Doors
from asyncbucket.limiter.explain import Explanation, explain_locked
from asyncbucket.limiter.keys import Keys
from asyncbucket.limiter.lease import Lease
from asyncbucket.limiter.steering import Steering
from asyncbucket.limiter.terms import (
    Keywords,
    OnOutage,
    Terms,
    read_count,
    read_max_queue,
    read_on_outage,
    read_slot_ttl,
    read_timeout,
)
from asyncbucket.limits import Limit, read_limits
from asyncbucket.loops import OfThisProcess
from asyncbucket.wording import shown

#: How many tenants' limiters are kept alive where nothing else was said.
_ALIVE: Final = 1_000


class Limiter(Doors, Steering, OfThisProcess):
    """Pace calls under any number of limits, on any number of event loops and threads.

    For every limit of N per window W, in every window of length W the cost admitted is at most N.
    Calls pass in order of arrival, each with all that it costs at once; nothing is held while
    waiting. Whatever is cancelled, at whatever await, gives back what it took.

    >>> limiter = Limiter("500 RPM", "200k TPM", "10k RPD", concurrency=20, name="openai")
    >>> async with limiter.acquire(input_tokens=900, output_tokens=300, timeout=30) as lease:
    ...     reply = await anything()
    ...     lease.settle(tokens=reply.usage.total_tokens)

    Args:
        limits: texts such as ``"500 RPM"`` or `Limit` objects.
        concurrency: the most calls in flight at once: leases not yet released. ``"auto"`` finds the
            number by how the calls go, between 1 and 1,000, and a pair ``(least, most)`` between
            those: for servers that publish no limits. See `asyncbucket.feedback.adaptive`.
        name: how statistics, events, logs and metrics call it.
        max_queue: the most calls that may wait; more are refused with `QueueFull`.
        timeout: the most seconds that a call waits which does not say so itself.
        store: where the limits are kept if several processes share them, e.g.
            ``"redis://127.0.0.1:6379/0"`` or ``"sqlite:///limits.db"``: those that give the same
            ``name`` share. See `asyncbucket.stores`.
        on_outage: what to do while the store is gone: go on with this process's ``"share"`` of the
            limits, admit nobody (``"closed"``) or everybody (``"open"``).
        slot_ttl: seconds after which the slots of a process that died come back.
        clock: a callable that returns monotonic integer nanoseconds.
        limits_by_keyword: ``rpm=500`` for ``"500 RPM"``; also rps, rph, rpd, tpm, tpd, itpm, otpm.

    Raises:
        LimitSyntaxError: a limit cannot be read; a ValueError.
        ValueError: ``concurrency``, ``max_queue``, ``timeout`` or ``slot_ttl`` is not such a number,
            ``on_outage`` none of these words, or no store is reached by such a URL.
        TypeError: ``name`` is not a string, ``store`` not a store, or ``clock`` returns no integer.
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
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        read_on_outage(on_outage)
        read_slot_ttl(slot_ttl)
        account = Account(name, clock=clock, max_queue=read_max_queue(max_queue))
        self._open(Door(account, timeout=read_timeout(timeout)), None)
        account.set_limits(given, concurrency)
        if store is not None:
            from asyncbucket.stores.shared import share

            share(account, store, on_outage=on_outage, slot_ttl=slot_ttl)

    def _open(self, door: Door, parent: "Limiter | None", terms: Terms | None = None) -> None:
        """Begin as what people type in front of ``door``."""
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
            requests: how many requests the call is, usually 1.
            tokens: LLM tokens, input and output together.
            input_tokens: LLM tokens sent.
            output_tokens: LLM tokens expected back.
            timeout: the most seconds to wait; ``math.inf`` lifts the limiter's own ``timeout``.
            deadline: the latest instant, in seconds of the limiter's clock (``time.monotonic()``).
            priority: how urgent it is; see `asyncbucket.priority`.
            tenant: whose call it is: the same as to ask ``limiter.key(tenant)``.
            resources: amounts of other resources that the limiter limits, e.g. ``images=3``.

        Raises:
            CostExceedsLimit: the cost is above a limit and can never pass; a ValueError.
            AcquireTimeout: it was not admitted in time, or cannot be (then at once: a safe lower
                bound of the wait, with all that is lent given back, is longer); a TimeoutError.
            QueueFull: ``max_queue`` calls wait already.
            StoreError: the store that keeps the limits cannot be used, or was left meanwhile.
            TypeError, ValueError: an amount or a time is not a finite number from 0 on.
        """
        here, door = inherited.get(), self._door
        if tenant is not None or here is not None:
            door = self._door_for(tenant, here)
        if cost is None and not resources:  # the usual case, without the detour
            amounts = amounts_of(requests, tokens, input_tokens, output_tokens)
        else:
            amounts = _price(door, cost, requests, tokens, input_tokens, output_tokens, resources)
        kind = Acquisition if door.asked else FirstAcquisition
        if (
            here is None
            and priority is None
            and timeout is None
            and deadline is None
            and door.timeout is None
        ):
            return kind(door, amounts, None, door.priority)
        end = functools.partial(door.deadline_for, timeout, deadline, here)
        end()  # a mistake shows at once
        return kind(door, amounts, end, door.priority_for(priority, here))

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
            WouldBlock: it cannot pass now, or others wait; ``retry_after`` says for how long. It is None
                where a slot has to be given back, and where the cost is above a burst: that passes
                by waiting alone. Always where a store keeps the limits, for that has to be asked.
            CostExceedsLimit, TypeError, ValueError: as for `acquire`.
        """
        door = self._door_for(tenant, inherited.get())
        amounts = _price(door, cost, requests, tokens, input_tokens, output_tokens, resources)
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

        The wait itself is served by one background event loop, in one line with all others.
        """
        here = inherited.get()
        door = self._door_for(tenant, here)
        amounts = _price(door, cost, requests, tokens, input_tokens, output_tokens, resources)
        end, urgency = door.deadline_for(timeout, deadline, here), door.priority_for(priority, here)
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
        (200,000 tokens per 60 s); requests alone would allow 2.5x as many (500 requests per 60 s)

        It takes nothing, and answers for the tenant and the priority that calls inherit here. With
        many calls waiting it takes about 10 µs for each.

        Raises:
            CostExceedsLimit, TypeError, ValueError: as for `acquire`.
        """
        here = inherited.get()
        door = self._door_for(None, here)
        amounts = _price(door, cost, requests, tokens, input_tokens, output_tokens, resources)
        account, urgency = door.account, door.priority_for(None, here)
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
        """Never be reached."""

    def child(self, name: str, *limits: str | Limit, **terms: Unpack[Keywords]) -> "Limiter":
        """Return the limiter of that name under this one, made at the first call.

        What passes it is counted here, too, at once and once. Children that want more than there is
        share it by weight, in cost: see `asyncbucket.shares`. One that is out of its own limits
        holds up nobody else.

        >>> acme = limiter.child("acme", rpm=100, weight=2)
        >>> tools = limiter.child("tools", concurrency=4)

        Args:
            name: of this child among its siblings; its own name is the path, ``"openai/chat"``.
            limits: what its calls are limited by, besides the limits of this one.
            terms: ``weight=``, its share beside its siblings', 1 by default; ``concurrency=``,
                ``max_queue=``, ``timeout=`` and limits such as ``rpm=`` as for `Limiter`;
                ``priority=`` of its calls, where they have none of their own.

        Raises:
            LimitSyntaxError: a limit cannot be read; a ValueError.
            ValueError: the child exists and is on other terms (see `reconfigure`), or a number is
                none of what it must be.
        """
        if not isinstance(name, str) or not name or "/" in name or name.startswith("*"):
            raise ValueError(
                f"a child's name must be a string without a slash or a leading star, not {name!r}"
            )
        agreed = Terms.read(limits, terms)
        with self._budget.making:
            account = self._account
            child = account.limiters.get(name)
            if child is None:
                account.limiters = account.limiters or {}
                child = account.limiters[name] = self._make_child(name, agreed)
        if (limits or terms) and agreed != child._terms:  # noqa: SLF001 - its own kind
            raise ValueError(
                f"{child.name!r} exists on other terms: ask for it by name alone, and change it "
                f"with child({name!r}).reconfigure(...)"
            )
        return child

    def key(self, tenant: str, *limits: str | Limit, **terms: Unpack[Keywords]) -> "Limiter":
        """Return the limiter of a tenant under this one, made on demand.

        Any number of tenants may come: those that have not been asked for in a while are put to
        rest, and what they used is remembered (see `per_key`). What is returned stays good for ever.
        Its name shows a hash, never the tenant.

        Args:
            tenant: any text that stands for whoever shares this limiter.
            limits: what it is made with; without terms, what `per_key` said holds.
            terms: as for `child`.

        Raises:
            LimitSyntaxError, ValueError: as for `child`; the tenant is not a string, or is empty.
        """
        read_tenant(tenant)
        return self._tenants().get(tenant, Terms.read(limits, terms) if limits or terms else None)

    def per_key(self, *limits: str | Limit, alive: int = _ALIVE, **terms: Unpack[Keywords]) -> None:
        """Say on what terms tenants stand that have none of their own; see `key`.

        It holds for those that come from now on, in calls that ask this limiter: whoever asks a
        child has a tenant of that child's.

        Args:
            limits: as for `child`.
            alive: how many are kept in full. Of others just what they used is remembered, until
                their limits are as good as new. Those with calls waiting or in flight stay, and
                those that were reconfigured.
            terms: as for `child`.

        Raises:
            LimitSyntaxError, ValueError: as for `child`.
        """
        count = read_count(alive, "alive")
        self._tenants().agree(Terms.read(limits, terms), alive=count)

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
        with self._budget.making:
            account = self._account
            if account.keys is None:
                account.steered = True  # what a tenant's own tenants used is not told in its `Rest`
                account.keys = Keys(account, self._tenant, alive=_ALIVE)
            return account.keys

    def _tenant(
        self, name: str, terms: Terms, again: Callable[[], Account]
    ) -> tuple["Limiter", Account]:
        child = self._make_child(name, terms)
        door = child._door  # noqa: SLF001 - its own kind
        door.find_again = again
        return child, door.account

    def _make_child(self, name: str, terms: Terms) -> "Limiter":
        above = self._door
        with self._budget.lock:
            account = above.account.add_child_locked(name, terms)
        timeout = above.timeout if terms.timeout is None else terms.timeout
        priority = above.priority if terms.priority is None else terms.priority
        child = Limiter.__new__(Limiter)
        door = Door(account, timeout=timeout, priority=priority)
        child._open(door, self, terms)  # noqa: SLF001 - its own kind
        account.set_limits(list(terms.limits), terms.concurrency)
        return child

    def _door_for(self, tenant: str | None, here: Inherited | None) -> Door:
        """Return the door that is asked: a tenant's, if there is one and it is not this one's."""
        if tenant is None:
            tenant = None if here is None or self._account.personal else here.tenant
        return self._door if tenant is None else self.key(tenant)._door  # noqa: SLF001 - its own kind

    @property
    def _account(self) -> Account:
        return self._door.account


def _price(
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
