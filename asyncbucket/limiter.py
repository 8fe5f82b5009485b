"""The public face of a limiter: its doors to functions, models, HTTP clients, batches; tenants, stores.

Each door loads its adapter when it is used, so that a limiter alone needs none of them. Nothing
below imports this module: adapters know `asyncbucket.engine.limiter.Limiter`.
"""

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    ParamSpec,
    Self,
    TypeAlias,
    TypeVar,
    Unpack,
    cast,
    overload,
)

from asyncbucket.agents import Agents, running_agent
from asyncbucket.engine.context import Inherited, inherited, read_text
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.errors import LimitSyntaxError
from asyncbucket.engine.interfaces import PauseMeter, Place, Sizer
from asyncbucket.engine.limiter import Limiter as EngineLimiter
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.node import Node
from asyncbucket.engine.pacer import Pacer
from asyncbucket.engine.statistics import Statistics
from asyncbucket.engine.terms import (
    CallAmounts,
    Concurrency,
    Keywords,
    LimitKeywords,
    OnOutage,
    Terms,
    read_name,
    read_on_outage,
    read_slot_ttl,
)
from asyncbucket.engine.wording import read_count
from asyncbucket.explanations import Explanation, explain_locked
from asyncbucket.levels import find_pause
from asyncbucket.pools import Pool as PoolOfLimiters
from asyncbucket.shadow import Shadow
from asyncbucket.tenants import ALIVE, Tenants

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Iterable
    from os import PathLike

    from asyncbucket.batch import Results
    from asyncbucket.batch.results import MapOptions
    from asyncbucket.http.clients import ClientOptions
    from asyncbucket.http.endpoints import Endpoints
    from asyncbucket.http.transport import PacedTransport, TransportOptions
    from asyncbucket.llama_index.estimate import Estimator
    from asyncbucket.llama_index.wrap import WrapOptions
    from asyncbucket.providers.prices import Prices
    from asyncbucket.retry import Retry
    from asyncbucket.telemetry.stats import StatsServer, Trace

# It has the private parts of what it is the face of.
# ruff: noqa: SLF001

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
#: What people give to a limiter that is meant for what it paces.
_OF_DOORS: Final = frozenset(("learn", "cache", "retries", "retry", "profile"))
#: An amount for `Limiter.paced`, or a function of the call's arguments that returns it.
PacedCost: TypeAlias = float | str | Callable[..., float | str] | None


class LimiterKeywords(LimitKeywords, total=False):
    """What `pace` takes for its limiter; see `Limiter`."""

    concurrency: Concurrency | None
    name: str
    max_queue: int | None
    timeout: float | None
    store: Any
    on_outage: OnOutage
    slot_ttl: float
    prices: "Prices | str | PathLike[str] | None"
    shadow: bool


class Limiter(EngineLimiter):
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
            limits, let no call pass (``"closed"``), or every call (``"open"``).
        slot_ttl: seconds after which the slots of a process that died come back.
        clock: a callable that returns monotonic integer nanoseconds.
        wall_clock: a callable that returns integer nanoseconds since 1970 (UTC), for limits that
            reset by the calendar; by default ``time.time_ns``. With a ``clock`` of your own, it starts
            at the current time and moves with that clock. With a store, the store's clock counts.
        prices: what models cost, for limits and budgets of dollars, if not what is published:
            ``{"gpt-4o-mini": Price(input=0.15, output=0.60)}``, or the path of a TOML file;
            see `asyncbucket.prices`.
        shadow: let every call pass at once, and tell what the limits would have done:
            ``statistics().shadow``. Pauses, learned limits and retries of transports hold back
            nothing, either. See `leave_shadow`.
        limits_by_keyword: ``rpm=500`` for ``"500 RPM"``; also rps, rph, rpd, tpm, tpd, itpm, otpm.

    Raises:
        LimitSyntaxError: a limit cannot be read; a ValueError.
        ValueError: ``concurrency``, ``max_queue``, ``timeout`` or ``slot_ttl`` is out of range,
            ``on_outage`` is none of these words, the store's URL is not understood, or ``prices``
            cannot be read.
        TypeError: ``name`` is not a string, ``store`` is not a store, or a clock returns no
            integer.
        ImportError: the extra that serves the store is not installed.
    """

    def __init__(  # noqa: PLR0913 - each says something else, and all by keyword
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
        wall_clock: Callable[[], int] | None = None,
        prices: "Prices | str | PathLike[str] | None" = None,
        shadow: bool = False,
        **limits_by_keyword: Unpack[LimitKeywords],
    ) -> None:
        if not isinstance(shadow, bool):
            raise TypeError(f"shadow must be True or False, not {shadow!r}")
        if shadow and store is not None:
            raise ValueError("a limiter in shadow cannot use a store: leave out store=")
        for option in _OF_DOORS & limits_by_keyword.keys():
            raise TypeError(
                f"{option}= is for transport(), http_client() or wrap(), not for Limiter()"
            )
        given = {"concurrency": concurrency, "max_queue": max_queue, "timeout": timeout}
        terms = Terms.read(limits, {**given, **limits_by_keyword})
        read_on_outage(on_outage)
        slot_ttl = read_slot_ttl(slot_ttl)
        self._prices: Mapping[str, Any] = {} if prices is None else read_prices(prices)
        super().__init__(Pacer(clock, read_name(name), wall_clock).root, terms)
        if store is not None:
            place = open_place(self._node, store, on_outage=on_outage, slot_ttl=slot_ttl)
            self._node.pacer.place = place
        if shadow:
            self._node.bystander = Shadow(self)

    def _set_up(self, node: Node, parent: EngineLimiter | None, terms: Terms) -> None:
        super()._set_up(node, parent, terms)
        self._tenants: Tenants[Self] | None = None  # pyright: ignore[reportUninitializedInstanceVariable]

    # --- from outside the code ---

    @classmethod
    def from_env(cls, prefix: str = "ASYNCBUCKET_", **options: Any) -> Self:
        """Return a limiter configured by environment variables such as ``ASYNCBUCKET_RPM=500``.

        Args:
            prefix: how the names of the variables begin.
            options: as in `asyncbucket.settings.from_env`.

        Raises:
            LimitSyntaxError: a variable cannot be read, or none limits anything; a ValueError.
        """
        from asyncbucket.settings import from_env

        return from_env(cls, prefix, **options)

    @classmethod
    def from_toml(cls, path: Any = "pyproject.toml", **options: Any) -> Self:
        """Return a limiter configured by ``[tool.asyncbucket]`` in a TOML file.

        Args:
            path: the file.
            options: as in `asyncbucket.settings.from_toml`.

        Raises:
            LimitSyntaxError: an entry cannot be read, or none limits anything; a ValueError.
            FileNotFoundError: there is no such file.
        """
        from asyncbucket.settings import from_toml

        return from_toml(cls, path, **options)

    @overload
    def paced(self, function: Callable[P, R], /, **cost: PacedCost) -> Callable[P, R]: ...
    @overload
    def paced(self, /, **cost: PacedCost) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    def paced(self, function: Any = None, /, **cost: Any) -> Any:
        """Decorate a function, async or plain, so that each call waits for an admission first.

        Keywords are those of `acquire`. A callable is called with the call's own arguments:
        ``@limiter.paced(tokens=lambda prompt: len(prompt) // 4)``. Without decorating it:
        ``paced_ask = limiter.paced(ask, tokens=500)``.

        Raises:
            TypeError: it is not a function, or it is a generator function; or, when called, it is a
                plain function that returns a coroutine.
        """
        if function is None:
            return functools.partial(self.paced, **cost)
        if not callable(function):
            raise TypeError(
                f"paced decorates a function, not {function!r}; amounts go by keyword: "
                f"@limiter.paced(tokens=500)"
            )
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(
                f"{function!r} is a generator: a call of it holds nothing yet; "
                f"acquire inside it, around what it iterates over"
            )

        function, limiter = cast("Callable[..., Any]", function), self

        from asyncbucket.attempt import Attempt
        from asyncbucket.waiting import SYNC, run

        @functools.wraps(function)
        async def paced(*args: Any, **kwargs: Any) -> Any:
            attempt = Attempt(limiter)
            with await attempt.admit(**call_amounts(cost, *args, **kwargs)), attempt:
                return await function(*args, **kwargs)

        @functools.wraps(function)
        def paced_sync(*args: Any, **kwargs: Any) -> Any:
            attempt = Attempt(limiter)
            with run(attempt.admit(SYNC, **call_amounts(cost, *args, **kwargs))) as lease, attempt:
                result = function(*args, **kwargs)
                if inspect.iscoroutine(result):  # it has not started
                    result.close()
                    lease._undo()
                    raise TypeError(
                        f"{function!r} is a plain function that returns a coroutine, which would "
                        f"run when its admission is over: decorate an async def"
                    )
                return result

        call = getattr(function, "__call__", None)  # noqa: B004 - of an object, it may be async
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        decorated: Callable[..., Any] = paced if is_async else paced_sync
        vars(decorated)["paced_by"] = self  # so that a batch does not acquire for it, too
        return decorated

    @overload
    def wrap(self, obj: list[Any], **options: Unpack["WrapOptions"]) -> list[Any]: ...
    @overload
    def wrap(self, obj: tuple[Any, ...], **options: Unpack["WrapOptions"]) -> tuple[Any, ...]: ...
    @overload
    def wrap(self, obj: T, **options: Unpack["WrapOptions"]) -> T: ...
    def wrap(self, obj: Any, **options: Unpack["WrapOptions"]) -> Any:
        """Return ``obj``, a LlamaIndex LLM, embedding model or tool, paced by this limiter.

        The result is of the same class, with the same fields, tools, streaming and structured
        output. For a list it is a list. Needs the extra ``asyncbucket[llama-index]``. A session of
        MCP is paced by its tools: see `asyncbucket.mcp.wrap_session`.

        >>> llm = limiter.child("chat").wrap(OpenAI(model="gpt-4o-mini"))
        >>> tools = limiter.child("tools").wrap([search, weather])
        >>> session = limiter.child("github").wrap(session)

        Args:
            obj: any LlamaIndex ``LLM``, ``BaseEmbedding`` or ``BaseTool``, or a list or tuple of
                them, where plain functions become tools; or a client or session of MCP.
            options: ``retry=`` and ``estimator=`` of models; see `asyncbucket.llama_index.wrap`.

        Raises:
            TypeError: ``obj`` cannot be wrapped, or an option does not apply to it.
            ValueError: ``obj`` is paced by another limiter.
        """
        from asyncbucket.mcp import wrap_session

        session = wrap_session(obj, self, options)
        if session is not None:
            return session
        from asyncbucket.llama_index.wrap import wrap

        return wrap(obj, self, **options)

    def transport(
        self, inner: Any = None, **options: Unpack["TransportOptions"]
    ) -> "PacedTransport":
        """Return a paced transport for any client of httpx or httpx2, async or synchronous.

        Each HTTP attempt waits for its admission, and holds its slot until the body of the reply is
        read, closed or dropped. A request that fails temporarily is sent again. Everything else is
        unchanged. Needs the extra ``asyncbucket[http]``.

        >>> http = httpx.AsyncClient(transport=limiter.transport())
        >>> client = AsyncOpenAI(http_client=http, max_retries=0)

        Args:
            inner: the transport that sends the requests; by default the client's own kind.
            options: ``profile=``, ``learn=``, ``routes=`` and ``retries=``, as in
                `asyncbucket.http.transport.PacedTransport`.

        Raises:
            ImportError: the extra is not installed.
            ValueError, TypeError: an option cannot be understood.
        """
        from asyncbucket.http.transport import PacedTransport

        return PacedTransport(self, inner, **options)

    #: The same, for those who look for it.
    transport_sync = transport

    def http_client(self, **options: Unpack["ClientOptions"]) -> Any:
        """Return a paced ``AsyncClient`` with the SDKs' settings for pool, timeouts and redirects.

        >>> client = AsyncOpenAI(http_client=limiter.http_client(), max_retries=0)

        Args:
            options: ``family=``, ``sync=``, ``profile=``, ``learn=``, ``routes=`` and ``retries=``,
                as in `asyncbucket.http.clients.http_client`, and arguments for the client itself.

        Raises:
            ImportError: neither httpx nor httpx2 is installed, or stamina is not.
            ValueError, TypeError: an option cannot be understood.
        """
        from asyncbucket.http.clients import http_client

        return http_client(self, **options)

    def amap(
        self,
        fn: "Callable[[T], Awaitable[R]]",
        items: "Iterable[T] | AsyncIterable[T]",
        **options: Unpack["MapOptions"],
    ) -> "Results[T, R]":
        """Call ``fn`` with each of ``items``, paced, and iterate over the results as they arrive.

        Memory is bounded however many items there are. Needs ``asyncbucket[batch]``.

        >>> async for item in limiter.amap(llm.acomplete, prompts, checkpoint="run.db"):
        ...     print(item.index, item.result)

        Args:
            fn: an async function of one item.
            items: any iterable, plain or async; it may be endless.
            options: ``ordered=``, ``errors=``, ``show_progress=``, ``checkpoint=`` and others, as
                in `asyncbucket.batch.amap`.
        """
        from asyncbucket.batch import amap

        return amap(self, fn, items, **options)

    def serve_stats(self, *, port: int | None = None, control: bool = False) -> "StatsServer":
        """Serve the statistics of this limiter and its children, on this machine only.

        >>> server = limiter.serve_stats()
        >>> server.url  # where `asyncbucket watch` looks
        'http://127.0.0.1:4294'

        Args:
            port: where to listen on 127.0.0.1; by default 4294, or any free port if that is taken.
            control: whether `asyncbucket watch` may change limits, pause and resume; the command with
                its token is printed on standard error.

        Raises:
            OSError: the port is taken.
            OverflowError: a port is from 0 to 65535.
        """
        from asyncbucket.telemetry.stats import serve_stats

        return serve_stats(self, port=port, control=control)

    def trace(self, last: int = 10_000) -> "Trace":
        """Keep the latest events from now on, for a plot or a test; see `asyncbucket.telemetry.Trace`.

        Args:
            last: how many are kept, at least 1.

        Raises:
            ValueError: ``last`` is not a whole number from 1 on.
        """
        from asyncbucket.telemetry.stats import Trace

        return Trace(self, last=last)

    if TYPE_CHECKING:  # they are of this class, too

        @property
        def parent(self) -> "Limiter | None": ...
        @property
        def children(self) -> Mapping[str, "Limiter"]: ...

    # --- tenants ---

    def key(self, tenant: str, *limits: str | Limit, **terms: Unpack[Keywords]) -> Self:
        """Return the limiter of a tenant under this one, made on demand.

        There may be any number of tenants. Limiters that have not been used for a while, and whose
        limits are unused again, are let go (see `per_key`). The returned object stays valid
        forever. Its name shows a hash, never the tenant.

        Args:
            tenant: any text that identifies the user who shares this limiter.
            limits: limits of this tenant. Without limits and terms, those of `per_key` apply; with any
                of them, none of those do, ``max_queue`` included.
            terms: as for `child`.

        Raises:
            LimitSyntaxError, ValueError: as for `child`; the tenant is not a string, or is empty.
        """
        given = self._read_terms(limits, terms) if limits or terms else None
        return self._all_tenants().get(read_text(tenant, "a tenant"), given)

    def per_key(self, *limits: str | Limit, alive: int = ALIVE, **terms: Unpack[Keywords]) -> None:
        """Set the terms for tenants that have none of their own; see `key`.

        They apply to tenants that come from now on, in calls that ask this limiter. Tenants of a
        child are the child's own.

        Args:
            limits: as for `child`.
            alive: how many tenants' limiters are kept in any case. Beyond that, those unused for
                the longest time go once they are unused again: no calls in flight, windows empty.
            terms: as for `child`.

        Raises:
            LimitSyntaxError, ValueError: as for `child`.
        """
        alive, tenants = read_count(alive, "alive"), self._all_tenants()
        tenants.default_terms, tenants.alive = self._read_terms(limits, terms), alive

    def _read_terms(self, limits: "Iterable[str | Limit]", terms: Any) -> Terms:
        """Return the terms of a tenant, which the store can keep if there is one."""
        given = Terms.read(limits, terms)
        if self._node.pacer.place is not None:
            self._node.pacer.place.check(given.limits, given.concurrency)
        return given

    def _all_tenants(self) -> Tenants[Self]:
        if self._tenants is None:
            made = Tenants(self._make_child, self._of)
            with self._node.pacer.lock:  # another thread may ask, too
                self._tenants = self._tenants or made
        return self._tenants

    def _limiter_for(self, tenant: str | None, context: Inherited | None) -> "Limiter":
        """Return the limiter of ``tenant`` or, unless this is a tenant's, of an inherited one."""
        if tenant is None and context is not None and "/*" not in self._node.name:
            tenant = context.tenant
        return self if tenant is None else self.key(tenant)

    # --- watching, steering ---

    def explain(self, cost: Cost | None = None, **amounts: Unpack[CallAmounts]) -> Explanation:
        """Say which limit binds such a call now, how long it would wait, and what would help.

        >>> print(limiter.explain(tokens=1_000))
        a call would wait 12 s behind 40 calls: tokens bind; tokens allow 200 such calls a minute
        (200,000 tokens per 60 s); without that limit, requests would allow 500 a minute (500 requests
        per 60 s, burst 50)

        It takes nothing. It uses the tenant, the priority and the agent that a call from here would
        inherit. If many calls wait, it takes about 10 µs for each.

        Raises:
            CostExceedsLimit, TypeError, ValueError: as for `acquire`.
        """
        context = inherited.get()
        limiter = self._limiter_for(None, context)
        whole, node = limiter._amounts(cost, **amounts), limiter._node
        with node.pacer.lock:
            node.check(whole)
            urgency = limiter._urgency(None, context)
            return explain_locked(node, whole, urgency, running_agent(context))

    def statistics(self) -> Statistics:
        """Return a frozen snapshot: what passed, what waits, and what for; children included."""
        node, pacer = self._node, self._node.pacer
        order, ahead = node.standing.order, None
        with pacer.lock:
            if isinstance(shadow := node.path[-1].bystander, Shadow):
                # It books at earlier instants, so before anyone asks the meters.
                shadow.play(pacer.clock())
        now = super().statistics()
        with pacer.lock:
            if isinstance(order, Agents):
                now = replace(now, agents=order.statistics())
            if isinstance(node.bystander, Shadow):
                ahead = node.bystander.copied_locked()
        return replace(now, shadow=ahead.look_ahead()) if ahead else now

    def _make_sizer(self, bounds: tuple[int, int]) -> Sizer:
        from asyncbucket.feedback.adaptive import Adaptive

        earlier = self._node.sizer
        start = {} if earlier is None else {"start": earlier.size}
        return Adaptive(least=bounds[0], most=bounds[1], **start)

    def _find_pause_locked(self) -> PauseMeter:
        return find_pause(self._node)


class Pool(PoolOfLimiters, Limiter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Pace calls under several limiters: each call goes to whichever can start it first.

    See `asyncbucket.pools.Pool` for what it promises and takes; this adds the doors.
    """

    if TYPE_CHECKING:  # as they were given

        @property
        def members(self) -> tuple[Limiter, ...]: ...

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


def call_amounts(cost: Mapping[str, Any], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the amounts of a call: a callable amount is called with the call's own arguments.

    Raises:
        TypeError: it does not take them.
    """
    amounts = dict(cost)
    for name, amount in cost.items():
        if callable(amount):
            try:
                amounts[name] = amount(*args, **kwargs)
            except TypeError as error:
                if error.__traceback__ and error.__traceback__.tb_next:
                    raise  # it was raised inside
                raise TypeError(
                    f"{name}= is called with the arguments of the paced function, and does not take "
                    f"them ({error}): give it the same parameters, such as "
                    f"{name}=lambda prompt, *_, **__: len(prompt) // 4"
                ) from error
    return amounts


def read_prices(prices: Any) -> Mapping[str, Any]:
    """Return what models cost, from what the user gave."""
    from asyncbucket.providers.prices import read_prices

    return read_prices(prices)


def open_place(node: Node, store: Any, **options: Any) -> Place:
    """Return what keeps the limits of a root in a store: a `asyncbucket.engine.interfaces.Place`."""
    from asyncbucket.stores.place import StorePlace

    return StorePlace(node, store, **options)


def pace(
    obj: T,
    *limits: str | Limit,
    retry: "Retry | int | None" = None,
    estimator: "Estimator | None" = None,
    **terms: Unpack[LimiterKeywords],
) -> T:
    """Return ``obj``, a LlamaIndex LLM, embedding model or tool, paced by a limiter of its own.

    >>> llm = pace(OpenAI(model="gpt-4o-mini"), rpm=500, tpm=200_000, concurrency=20)

    Args:
        obj: see `Limiter.wrap`.
        limits: see `Limiter`.
        retry: see `asyncbucket.llama_index.wrap`.
        estimator: see `asyncbucket.llama_index.wrap`.
        terms: the arguments of the `Limiter`, limits such as ``rpm=500`` included.

    Raises:
        LimitSyntaxError: a limit cannot be read, or there is none.
        TypeError: ``obj`` cannot be wrapped.
        ValueError: as for `Limiter`.
    """
    limiter = Limiter(*limits, **terms)
    if not limiter.limits and limiter.concurrency is None:
        raise LimitSyntaxError("pace() without a limit would pace nothing: give e.g. rpm=500")
    return limiter.wrap(obj, retry=retry, estimator=estimator)
