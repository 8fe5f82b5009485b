"""What can be put behind a limiter: functions, models, HTTP clients, whole batches.

Each method loads its adapter when it is called, so the core needs none of them.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeAlias, TypeVar, Unpack, cast, overload

from asyncbucket.engine.meters import Window
from asyncbucket.engine.node import Node, Sizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Iterable

    from asyncbucket.batch import Results
    from asyncbucket.batch.results import MapOptions
    from asyncbucket.engine.limiter import Limiter
    from asyncbucket.http.clients import ClientOptions
    from asyncbucket.http.transport import PacedTransport, TransportOptions
    from asyncbucket.llama_index.wrap import WrapOptions
    from asyncbucket.telemetry.stats import StatsServer, Trace

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
#: An amount for `Doors.paced`, or a function of the call's arguments that returns it.
PacedCost: TypeAlias = float | str | Callable[..., float | str] | None


class Doors:
    """Put things behind the limits of a `Limiter`, which inherits all of these methods."""

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

        function, limiter = cast("Callable[..., Any]", function), cast("Limiter", self)

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
                    lease._undo()  # noqa: SLF001 - the call was not made
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

        session = wrap_session(obj, cast("Limiter", self), options)
        if session is not None:
            return session
        from asyncbucket.llama_index.wrap import wrap

        return wrap(obj, cast("Limiter", self), **options)

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

        return PacedTransport(cast("Limiter", self), inner, **options)

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

        return http_client(cast("Limiter", self), **options)

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

        return amap(cast("Limiter", self), fn, items, **options)

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

        return serve_stats(cast("Limiter", self), port=port, control=control)

    def trace(self, last: int = 10_000) -> "Trace":
        """Keep the latest events from now on, for a plot or a test; see `asyncbucket.telemetry.Trace`.

        Args:
            last: how many are kept, at least 1.

        Raises:
            ValueError: ``last`` is not a whole number from 1 on.
        """
        from asyncbucket.telemetry.stats import Trace

        return Trace(cast("Limiter", self), last=last)


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


def find_pause(node: Node) -> Any:
    """Return the pause of a limiter; with the lock held."""
    from asyncbucket.feedback.pause import Pause

    for pause in node.pauses():
        return pause
    node.extra = ((Pause(), "concurrency"), *node.extra)  # each call takes one of it
    node.pacer.limits_changed_locked(node)
    return node.extra[0][0]


def find_provider_meter(node: Node, window: Window) -> Any:
    """Return what is known of how a provider counts a limit; with the lock held."""
    from asyncbucket.feedback.provider_meter import ProviderMeter

    for meter, _ in node.extra:
        if getattr(meter, "limit", None) is window.limit:
            return meter
    found = ProviderMeter(window.limit)
    for date, units in window.entries():
        if units:
            found.book(units, date)
    others = (pair for pair in node.extra if getattr(pair[0], "key", None) != window.limit.key)
    node.extra = (*others, (found, window.limit.resource))
    node.pacer.limits_changed_locked(node)
    return found


def make_sizer(bounds: tuple[int, int], earlier: Sizer | None) -> Sizer:
    """Return what finds the number of slots, on from where an earlier search is."""
    from asyncbucket.feedback.adaptive import Adaptive

    start = {} if earlier is None else {"start": earlier.size}
    return Adaptive(least=bounds[0], most=bounds[1], **start)


def make_shadow(node: Node) -> Any:
    """Return what plays the line of a limiter whose calls pass at once."""
    from asyncbucket.shadow import Shadow

    return Shadow(node)


def read_prices(prices: Any) -> Mapping[str, Any]:
    """Return what models cost, from what the user gave."""
    from asyncbucket.providers.prices import read_prices

    return read_prices(prices)


def open_place(node: Node, store: Any, **options: Any) -> Any:
    """Return what keeps the limits of a root in a store: a `asyncbucket.engine.seats.Place`."""
    from asyncbucket.stores.place import StorePlace

    return StorePlace(node, store, **options)
