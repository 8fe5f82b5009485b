"""Many limits, one admission: requests, tokens and a slot together, or nothing."""

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Final, ParamSpec, TypeVar, overload

from asyncbucket.adaptive import Adaptive, Concurrency, read_concurrency
from asyncbucket.cost import COMMON, Cost, amounts_of, counted
from asyncbucket.errors import (
    AcquireTimeout,
    CostExceedsLimit,
    LimitSyntaxError,
    QueueFull,
    WouldBlock,
)
from asyncbucket.headroom import Headroom
from asyncbucket.lease import Account, Acquisition, Lease
from asyncbucket.limits import Limit, read_limits
from asyncbucket.meters import NEVER, Amounts, Bucket, Gates, Meter, Slots, Window
from asyncbucket.pacer import Budget, deadline_of
from asyncbucket.queue import Waiter
from asyncbucket.statistics import LimitUse, Statistics, Waits

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_PATIENCE: Final = "raise the timeout or the limit"
Refusal = TypeVar("Refusal", WouldBlock, AcquireTimeout, QueueFull)


class Limiter:
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
            those: for servers that publish no limits. See `asyncbucket.adaptive`.
        name: how statistics, logs and metrics call it.
        max_queue: the most calls that may wait; more are refused with `QueueFull`.
        clock: a callable that returns monotonic integer nanoseconds.
        limits_by_keyword: ``rpm=500`` for ``"500 RPM"``; also rps, rph, rpd, tpm, tpd, itpm, otpm.

    Raises:
        LimitSyntaxError: a limit cannot be read; a ValueError.
        ValueError: ``concurrency`` or ``max_queue`` is no such number.
    """

    def __init__(
        self,
        *limits: str | Limit,
        concurrency: Concurrency | None = None,
        name: str = "default",
        max_queue: int | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        **limits_by_keyword: float | None,
    ) -> None:
        self.name = name
        self.max_queue = _count(max_queue, "max_queue", least=0)
        self._clock = clock
        self._budget = Budget(clock)
        self._account = Account(self._budget)
        self._upstream_429 = 0
        self._limits: dict[tuple[str, float], tuple[Limit, Window, Bucket | None]] = {}
        self._headrooms: dict[tuple[str, float], Headroom] = {}
        self._learned: set[tuple[str, float]] = set()
        self._slots: Slots | None = None
        self._gates = Gates(())
        self._set(read_limits(limits, limits_by_keyword), concurrency)

    # -- acquiring ---------------------------------------------------------------------------------

    def acquire(
        self,
        cost: Cost | None = None,
        *,
        requests: float = 1,
        tokens: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
        **resources: float,
    ) -> Acquisition:
        """Wait for an admission: ``await`` it for a `Lease`, or enter it with ``async with``.

        Args:
            cost: the whole cost, instead of its parts.
            requests: how many requests the call is, usually 1.
            tokens: LLM tokens, input and output together.
            input_tokens: LLM tokens sent.
            output_tokens: LLM tokens expected back.
            timeout: the most seconds to wait.
            deadline: the latest instant, in seconds of the limiter's clock (``time.monotonic()``).
            resources: amounts of other resources that the limiter limits, e.g. ``images=3``.

        Raises:
            CostExceedsLimit: the cost is above a limit and can never pass; a ValueError.
            AcquireTimeout: it was not admitted in time, or cannot be (then at once: a safe lower
                bound of the wait, with all that is lent given back, is longer); a TimeoutError.
            QueueFull: ``max_queue`` calls wait already.
            TypeError, ValueError: an amount or a time is no finite number from 0 on.
        """
        if cost is None and not resources:  # the usual case, without the detour
            amounts = amounts_of(requests, tokens, input_tokens, output_tokens)
        else:
            amounts = self._price(cost, requests, tokens, input_tokens, output_tokens, resources)
        end = None
        if timeout is not None or deadline is not None:
            end = deadline_of(self._clock(), timeout=timeout, deadline=deadline)
        return Acquisition(self, amounts, end)

    def acquire_nowait(
        self,
        cost: Cost | None = None,
        *,
        requests: float = 1,
        tokens: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        **resources: float,
    ) -> Lease:
        """Take a lease now, or refuse; see `acquire`.

        Raises:
            WouldBlock: it cannot pass now, or others wait; ``retry_after`` says for how long.
            CostExceedsLimit, TypeError, ValueError: as for `acquire`.
        """
        amounts = self._price(cost, requests, tokens, input_tokens, output_tokens, resources)
        lease = self.try_now(amounts)
        if lease is None:
            with self._budget.lock:
                self._check(amounts)
                raise self._refusal_locked(
                    WouldBlock, amounts, "without waiting", "wait with acquire()"
                )
        return lease

    def acquire_sync(
        self,
        cost: Cost | None = None,
        *,
        requests: float = 1,
        tokens: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
        **resources: float,
    ) -> Lease:
        """Block this thread until an admission; the lease is a context manager. See `acquire`.

        The wait itself is served by one background event loop, in one line with all others.
        """
        amounts = self._price(cost, requests, tokens, input_tokens, output_tokens, resources)
        end = deadline_of(self._clock(), timeout=timeout, deadline=deadline)
        lease = self.try_now(amounts, on_loop=False)
        if lease is None:
            wait = functools.partial(self.wait, amounts, end, on_loop=False)
            lease = self._budget.background.call(wait, Lease.undo)
        return lease

    @overload
    def paced(self, function: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def paced(
        self, /, **cost: float | Callable[..., float] | None
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    def paced(self, function: Any = None, /, **cost: Any) -> Any:
        """Decorate a function, async or plain, so that each call of it is admitted first.

        Keywords are those of `acquire`; a callable gets the call's own arguments:
        ``@limiter.paced(tokens=lambda prompt: len(prompt) // 4)``.
        """
        if function is None:
            return functools.partial(self._paced, cost=cost)
        return self._paced(function, cost={})

    def _paced(self, function: Callable[..., Any], *, cost: dict[str, Any]) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator: a call of it holds nothing yet; "
                f"acquire inside it, around what it iterates over"
            )

        def price(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            return {
                name: value(*args, **kwargs) if callable(value) else value
                for name, value in cost.items()
            }

        @functools.wraps(function)
        async def paced(*args: Any, **kwargs: Any) -> Any:
            async with self.acquire(**price(args, kwargs)):
                return await function(*args, **kwargs)

        @functools.wraps(function)
        def paced_sync(*args: Any, **kwargs: Any) -> Any:
            with self.acquire_sync(**price(args, kwargs)):
                return function(*args, **kwargs)

        return paced if inspect.iscoroutinefunction(function) else paced_sync

    def wrap(self, obj: T, **options: Any) -> T:
        """Return ``obj``, a LlamaIndex LLM or embedding model, paced by this limiter.

        It is of the same class, with the same fields, tools, streaming and structured output.
        Needs the extra ``asyncbucket[llama-index]``.

        Args:
            obj: any LlamaIndex ``LLM`` or ``BaseEmbedding``.
            options: ``retry=`` and ``estimator=``, as in `asyncbucket.llama_index.wrap`.

        Raises:
            TypeError: ``obj`` is nothing that can be wrapped.
        """
        from asyncbucket.llama_index.wrap import wrap

        return wrap(obj, self, **options)

    def transport(self, inner: Any = None, **options: Any) -> Any:
        """Return a transport for ``httpx.AsyncClient`` or ``httpx2.AsyncClient``, paced.

        Every HTTP attempt waits for its admission, and holds its slot until the reply's body is
        read, closed or dropped; else all is as without it. Needs ``asyncbucket[http]``.

        >>> http = httpx.AsyncClient(transport=limiter.transport())
        >>> client = AsyncOpenAI(http_client=http, max_retries=0)

        Args:
            inner: the transport that does the work; by default the client's own kind.
            options: ``family=``, ``profile=`` and ``learn=``, as in
                `asyncbucket.http.transport.transport`.
        """
        from asyncbucket.http.transport import transport

        return transport(self, inner, **options)

    def transport_sync(self, inner: Any = None, **options: Any) -> Any:
        """Return a transport for ``httpx.Client`` or ``httpx2.Client``; see `transport`."""
        from asyncbucket.http.transport import transport_sync

        return transport_sync(self, inner, **options)

    def http_client(self, **options: Any) -> Any:
        """Return an ``AsyncClient``, paced, with the pool, time-outs and redirects of the SDKs.

        >>> client = AsyncOpenAI(http_client=limiter.http_client(), max_retries=0)

        Args:
            options: ``family=``, ``sync=``, ``profile=`` and ``learn=``, as in
                `asyncbucket.http.clients.http_client`, and those of the client itself.
        """
        from asyncbucket.http.clients import http_client

        return http_client(self, **options)

    # -- steering ----------------------------------------------------------------------------------

    def pause(self, seconds: float, *, reason: str = "", gradually: bool = False) -> None:
        """Admit nobody for ``seconds`` from now; an earlier, longer pause stays in force.

        Args:
            seconds: how long.
            reason: why, for people; ``"429"`` counts as a refusal by the provider.
            gradually: begin again slowly, so that the end of the pause is no storm: one call at
                first, then twice as many in each 16th of the pause (at most 0.25 s), up to 256.

        Raises:
            ValueError: ``seconds`` is no finite number from 0 on.
        """
        now = self._clock()
        until = deadline_of(now, timeout=seconds)
        if until is None:
            raise ValueError("a pause must end: give a finite number of seconds")
        with self._budget.lock:
            self._upstream_429 += reason == "429"
            self._budget.pause_locked(until, now, gradually=gradually)

    def observe_remaining(
        self,
        remaining: int,
        *,
        resource: str,
        per: float,
        limit: int | None = None,
        since: float | None = None,
        rounding: int = 0,
    ) -> None:
        """Hear from the provider what is left of a limit that others spend from, too.

        It may lower what is available, never raise it above the limits of this limiter, and is
        forgotten when nothing is heard for a whole window. Of a window that is not limited here
        nothing is kept. Transports call this; see `asyncbucket.headroom` for what comes of it.

        Args:
            remaining: units left.
            resource: what they are units of.
            per: the window of the limit, in seconds.
            limit: the limit as the provider has it, if it says so.
            since: when the call was sent that was answered so, in seconds of the limiter's clock:
                later calls may or may not be in ``remaining`` yet.
            rounding: by how many units ``remaining`` may have been rounded down.
        """
        key = (resource, per)
        with self._budget.lock:
            if key not in self._limits:
                return
            ours, window, _ = self._limits[key]
            now = self._clock()
            headroom = self._headrooms.get(key)
            if headroom is None:
                headroom = Headroom(amount=ours.amount, window=ours.window)
                self._headrooms[key] = headroom
                self._regate_locked()
            sent = now if since is None else round(since * 1_000_000_000)
            headroom.hear(
                remaining,
                now,
                amount=ours.amount if limit is None else max(1, min(limit, ours.amount)),
                under_way=window.since(sent),
                rounding=rounding,
            )
            self._budget.ring_locked()

    def learn(self, limit: Limit) -> None:
        """Take over a limit that the provider announces, if this limiter was given none.

        What was learned follows what is announced later; what was given stays as it is.
        """
        key = (limit.resource, limit.per)
        with self._budget.lock:
            ours = self._limits.get(key)
            if self._limits.keys() - self._learned or (ours and ours[0].amount == limit.amount):
                return
            self._learned.add(key)
        self._set([limit], None)

    def reconfigure(
        self,
        *limits: str | Limit,
        concurrency: Concurrency | None = None,
        **limits_by_keyword: float | None,
    ) -> None:
        """Change the limits that are named, at once, while calls wait; the others stay.

        ``concurrency`` may change between a fixed number and one to be found, too.
        What was admitted stays counted, so a lower limit is kept from the first moment. Calls that
        wait and could never pass again fail with `CostExceedsLimit`.
        """
        given = read_limits(limits, limits_by_keyword)
        self._learned.difference_update((limit.resource, limit.per) for limit in given)
        self._set(given, concurrency)

    def now(self) -> float:
        """Return the present instant in seconds of the limiter's clock, as deadlines are given."""
        return self._clock() * 1e-9

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits in force."""
        return tuple(limit for limit, _, _ in self._limits.values())

    @property
    def concurrency(self) -> int | None:
        """The most calls in flight at once, as it is now; None for no bound."""
        return None if self._slots is None else self._slots.size

    def statistics(self) -> Statistics:
        """Return a frozen snapshot: what passed, what waits, and for what."""
        budget, account = self._budget, self._account
        with budget.lock:
            budget.collect_locked()
            now = self._clock()
            return Statistics(
                name=self.name,
                admitted=account.admitted,
                refused=account.refused,
                cancelled=account.cancelled,
                waiting=budget.waiting,
                in_flight=account.in_flight,
                concurrency=self.concurrency,
                paused=max(0, budget.paused_until - now) * 1e-9,
                upstream_429=self._upstream_429,
                overridden=budget.blocked.overridden,
                waits={name: Waits(n, ns * 1e-9) for name, (n, ns) in account.waits.items()},
                refunded=dict(account.refunded),
                limits=tuple(self._use(now)),
            )

    def __repr__(self) -> str:
        parts = [f"Limiter {self.name!r}", *map(str, self.limits)]
        if self._slots is not None:
            adaptive = self._account.adaptive
            found = "" if adaptive is None else f" of {adaptive.least:,} to {adaptive.most:,}"
            parts.append(f"concurrency {self._slots.used}/{self._slots.size}{found}")
        return f"<{', '.join(parts)}, {self._budget.waiting} waiting>"

    # -- inside ------------------------------------------------------------------------------------

    def try_now(self, amounts: dict[str, int], *, on_loop: bool = True) -> Lease | None:
        """Return a lease, held on this loop or thread, if nobody has to wait for it; see `Door`."""
        budget = self._budget
        lock = budget.lock
        lock.acquire()  # `with` would take twice the time
        try:
            gates, now = self._gates, self._clock()
            if not budget.take_locked(gates, amounts, now):
                return None
            blocked = budget.blocked
            holder = blocked.here() if on_loop else blocked.threads
            return Lease(self._account, gates, amounts, now, holder)
        finally:
            lock.release()

    async def wait(
        self, amounts: dict[str, int], deadline: int | None, *, on_loop: bool = True
    ) -> Lease:
        """Return a lease in turn; ``on_loop`` tells whether this loop's task will hold it."""
        budget = self._budget
        with budget.lock:
            gates = self._check(amounts)
            now = self._clock()
            self._refuse_if_hopeless_locked(amounts, now, deadline)
            waiter = budget.join_locked(gates, amounts, now, deadline)
        try:
            when = await waiter
        except BaseException:
            budget.drop(functools.partial(self._withdraw_locked, waiter))
            raise
        with budget.lock:
            if when == NEVER:
                how = f"within {_seconds(((deadline or now) - now) * 1e-9)}"
                raise self._refusal_locked(AcquireTimeout, amounts, how, _PATIENCE)
            holder = budget.blocked.here() if on_loop else budget.blocked.threads
            lease = Lease(self._account, waiter.gates, amounts, when, holder)
            self._account.waited_locked(lease, when - now, waiter.bound_by)
            return lease

    def _withdraw_locked(self, waiter: Waiter) -> None:
        self._account.cancelled += self._budget.withdraw_locked(waiter)

    def _refuse_if_hopeless_locked(
        self, amounts: dict[str, int], now: int, deadline: int | None
    ) -> None:
        budget = self._budget
        if self.max_queue is not None and budget.waiting >= self.max_queue:
            raise self._refusal_locked(
                QueueFull,
                amounts,
                f"behind {budget.waiting:,} calls that wait already",
                f"try again later or raise max_queue={self.max_queue:,}",
            )
        if deadline is not None:
            soonest = max(budget.paused_until, self._gates.soonest(amounts, now))
            if soonest > deadline:
                how = f"within {_seconds(max(0, deadline - now) * 1e-9)}"
                raise self._refusal_locked(AcquireTimeout, amounts, how, _PATIENCE)

    def _refusal_locked(
        self, kind: type[Refusal], amounts: dict[str, int], how: str, remedy: str
    ) -> Refusal:
        """Count a refusal and return its error, with what binds and for how long."""
        self._account.refused += 1
        now = self._clock()
        due, bound_by = self._budget.look_locked(self._gates, amounts, now)
        after = (due - now) * 1e-9
        what = ", ".join(counted(amounts[each], each) for each in self._counted(amounts))
        if bound_by is None:
            why = "others came first"
        elif bound_by == "paused":
            why = f"the limiter is paused for {_seconds(after)} more"
        elif due >= NEVER:
            why = f"all {self.concurrency} slots are taken"
        else:
            why = f"{bound_by} bind for {_seconds(after)} more"
        return kind(
            f"a call of {what} cannot pass {how}: {why}; {remedy}",
            retry_after=None if due >= NEVER else after,
            bound_by=bound_by,
        )

    def _price(
        self,
        cost: Cost | None,
        requests: float,
        tokens: float | None,
        input_tokens: float | None,
        output_tokens: float | None,
        others: Mapping[str, float],
    ) -> dict[str, int]:
        """Return the amounts of a call, the slot it takes included."""
        if cost is None:
            amounts = amounts_of(requests, tokens, input_tokens, output_tokens, others)
        elif isinstance(cost, Cost):
            amounts, others = {**cost, "concurrency": 1}, cost
        else:
            raise TypeError(f"a cost is a Cost or keywords such as tokens=500, not {cost!r}")
        if others:
            self._check_known(others)
        return amounts

    def _check_known(self, names: Mapping[str, float]) -> None:
        limited = {limit.resource for limit in self.limits}
        unknown = sorted(names.keys() - COMMON - limited)
        if unknown:
            raise TypeError(
                f"no limit counts {', '.join(unknown)}: this limiter counts "
                f"{', '.join(sorted(COMMON | limited))}"
            )

    def _counted(self, amounts: Amounts) -> Iterator[str]:
        """Yield the resources of ``amounts`` that this limiter limits, or requests."""
        limited = {limit.resource for limit in self.limits}
        counted = [name for name, amount in amounts.items() if amount and name in limited]
        return iter(counted or Cost.of(amounts))

    def _check(self, amounts: Amounts) -> Gates:
        """Return the gates, unless ``amounts`` can never pass them."""
        for limit in self.limits:
            if amounts.get(limit.resource, 0) > limit.amount:
                raise self._never(limit, amounts[limit.resource])
        return self._gates

    def _never(self, limit: Limit, amount: int) -> CostExceedsLimit:
        self._account.refused += 1
        return CostExceedsLimit(
            f"cost of {counted(amount, limit.resource)} exceeds the limit of {limit} "
            f"and can never pass; raise {limit.keyword or 'the limit'} or split the request"
        )

    def _set(self, limits: list[Limit], concurrency: Concurrency | None) -> None:
        """Put limits in force, keeping what was booked under those of the same window."""
        bounds = read_concurrency(concurrency)
        budget = self._budget
        with budget.lock:
            now = self._clock()
            for limit in limits:
                key = (limit.resource, limit.per)
                _, window, bucket = self._limits.get(key, (None, None, None))
                if window is None:
                    window = Window(amount=limit.amount, window=limit.window)
                window.reshape(amount=limit.amount)
                self._limits[key] = (limit, window, _pacing(limit, bucket, now))
            if bounds is not None:
                self._set_slots_locked(bounds, fixed=isinstance(concurrency, int))
            self._regate_locked()
            budget.ring_locked()

    def _set_slots_locked(self, bounds: tuple[int, int], *, fixed: bool) -> None:
        """Have a fixed number of slots, or one to be found; a search goes on from where it is."""
        account, size = self._account, bounds[0]
        if fixed:
            account.adaptive = None
        else:
            start = {} if account.adaptive is None else {"start": account.adaptive.size}
            account.adaptive = Adaptive(least=bounds[0], most=bounds[1], **start)
            size = account.adaptive.size
        if self._slots is None:
            self._slots = account.slots = Slots(size=size)
        else:
            self._slots.reshape(size=size)

    def _regate_locked(self) -> None:
        """Send newcomers and those who wait through the meters as they are now."""
        self._gates = Gates(self._meters())
        for pacer in self._budget.pacers.values():
            pacer.regate_locked(self._check)

    def _meters(self) -> Iterator[tuple[Meter, str]]:
        if self._slots is not None:
            yield self._slots, "concurrency"
        for limit, window, bucket in self._limits.values():
            yield window, limit.resource
            if bucket is not None:
                yield bucket, limit.resource
        for (resource, _), headroom in self._headrooms.items():
            yield headroom, resource

    def _use(self, now: int) -> Iterator[LimitUse]:
        for limit, window, bucket in self._limits.values():
            heard = self._headrooms.get((limit.resource, limit.per))
            meters = [meter for meter in (window, bucket, heard) if meter is not None]
            available = min(meter.available(now) for meter in meters)
            yield LimitUse(limit, used=window.used, available=available)


def pace(
    obj: T,
    *limits: str | Limit,
    concurrency: Concurrency | None = None,
    name: str = "default",
    retry: Any = None,
    estimator: Any = None,
    **limits_by_keyword: Any,
) -> T:
    """Return ``obj``, a LlamaIndex LLM or embedding model, paced by a limiter of its own.

    >>> llm = pace(OpenAI(model="gpt-4o-mini"), rpm=500, tpm=200_000, concurrency=20)

    Args:
        obj: see `Limiter.wrap`.
        limits: see `Limiter`.
        concurrency: see `Limiter`.
        name: see `Limiter`.
        retry: see `asyncbucket.llama_index.wrap`.
        estimator: see `asyncbucket.llama_index.wrap`.
        limits_by_keyword: see `Limiter`.

    Raises:
        LimitSyntaxError: a limit cannot be read, or there is none.
        TypeError: ``obj`` is nothing that can be wrapped.
    """
    if not limits and concurrency is None and not any(limits_by_keyword.values()):
        raise LimitSyntaxError("pace() without a limit would pace nothing: give e.g. rpm=500")
    limiter = Limiter(*limits, concurrency=concurrency, name=name, **limits_by_keyword)
    options = {"retry": retry, "estimator": estimator}
    return limiter.wrap(obj, **{key: value for key, value in options.items() if value is not None})


def _pacing(limit: Limit, bucket: Bucket | None, now: int) -> Bucket | None:
    """Return the bucket that paces ``limit`` from now on, or None where nothing does."""
    if limit.burst is None or limit.burst == limit.amount:
        return None
    rate = Fraction(limit.amount * 1_000_000_000, limit.window)
    if bucket is None:
        return Bucket(rate=rate, burst=limit.burst)
    bucket.reshape(rate=rate, burst=limit.burst, now=now)
    return bucket


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"  # noqa: PLR2004 - three digits


def _count(value: int | None, name: str, *, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value
