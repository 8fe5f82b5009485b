"""What one calls: `Limiter.amap`, and `Limiter.map` for code without an event loop."""

import asyncio
import atexit
import contextlib
import functools
import inspect
import os
import weakref
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Sized,
)
from typing import Any, Final, Generic, Literal, Self, TypedDict, TypeVar, Unpack

import anyio
from anyio import CapacityLimiter, ClosedResourceError, EndOfStream, WouldBlock, to_thread
from anyio.from_thread import start_blocking_portal

from asyncbucket.batch.caller import Caller, ItemCostOf, layers_of
from asyncbucket.batch.checkpoint import Checkpoint
from asyncbucket.batch.engine import Engine, Item
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import read_count

T = TypeVar("T")
R = TypeVar("R")

Errors = Literal["raise", "collect"]

#: The most workers if the limiter has no concurrency: if `amap` acquires, there are only as many as
#: are admitted, ...
_MAX_WORKERS: Final = 1_000
#: ... and this many, if the function acquires.
_MAX_IF_FN_ACQUIRES: Final = 256
#: The most threads if the limiter has no concurrency.
_MAX_THREADS: Final = 64


class MapOptions(TypedDict, total=False):
    """What `Limiter.amap` and `Limiter.map` take by keyword."""

    ordered: bool
    errors: Errors
    cost: ItemCostOf | None
    paced: bool | None
    agents: bool | str
    show_progress: bool
    checkpoint: str | os.PathLike[str] | Checkpoint | None
    workers: int | None
    window: int | None


def amap(  # noqa: PLR0913 - each is an option of its own
    limiter: Limiter,
    fn: Callable[[T], Awaitable[R]],
    items: Iterable[T] | AsyncIterable[T],
    *,
    ordered: bool = False,
    errors: Errors = "raise",
    cost: ItemCostOf | None = None,
    paced: bool | None = None,
    agents: bool | str = False,
    show_progress: bool = False,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    workers: int | None = None,
    window: int | None = None,
) -> "Results[T, R]":
    """Call ``fn`` for each item behind ``limiter``; iterate over the results as they arrive.

    >>> async for item in limiter.amap(llm.acomplete, prompts, checkpoint="run.db"):
    ...     print(item.index, item.input, item.result)

    Items may be endless: at most ``window`` are taken and not yet handed out. ``break``,
    ``aclose()``, leaving ``async with`` and cancellation end everything in flight.

    Each call is admitted once: by ``fn`` itself if it is a method of a model that the limiter
    wraps, or is decorated with `Limiter.paced`; otherwise here.

    Args:
        limiter: what admits the calls.
        fn: an async function of one item.
        items: any iterable or async iterable. A plain one is iterated on the event loop.
        ordered: hand results out in the order of the items, not as they arrive.
        errors: with ``"raise"``, nothing new starts once an item has failed; the results before it
            are handed out, and then its error is raised. With ``"collect"``, all items are tried,
            and ``item.error`` says what failed.
        cost: what a call costs, if not one request: a `Cost`, a dict such as ``{"tokens": 500}``,
            or a function from an item to one. If given, it is acquired here, whatever ``fn`` does.
        paced: True if ``fn`` acquires by itself and is not marked; False to acquire here, too.
        agents: True, or a kind, if ``fn`` runs an agent, which acquires for each of its calls: each
            item is one agent to the limiters then, see `asyncbucket.agent`.
        show_progress: a bar on standard error.
        checkpoint: a path, or a `Checkpoint`: results are kept there, and items found in it are not
            called again.
        workers: the most calls at once; by default the limiter's concurrency decides.
        window: by default twice the workers.

    Raises:
        ValueError, TypeError: an option is invalid; ``fn`` cannot be called; or it is paced by a
            limiter above or beside this one, so its calls would be charged twice.
        ImportError: rich, which draws the bar, is not installed.
    """
    if not callable(fn):
        raise TypeError(
            f"the function comes first, not called yet, and then the items, as in amap(ask, prompts); "
            f"{type(fn).__name__} cannot be called"
        )
    if errors not in ("raise", "collect"):
        raise ValueError(f"errors must be 'raise' or 'collect', not {errors!r}")
    caller = Caller(limiter, fn, cost=cost, paced=paced, agents=agents)
    if workers is not None:
        workers = read_count(workers, "workers", least=1)
    elif not caller.fn_acquires:
        workers = _MAX_WORKERS
    else:  # with one more than the slots, somebody is always in line; slots may be added later
        workers = max(32, (limiter.concurrency or _MAX_IF_FN_ACQUIRES - 1) + 1)
    if isinstance(items, (str, bytes)):
        raise TypeError(
            f"items is one string, which would be a call for each of its {len(items):,} characters: "
            f"give a list of strings, or the open file if this is its name"
        )
    engine: Engine[T, R] = Engine(
        items=aiter(items) if isinstance(items, AsyncIterable) else iter(items),
        caller=caller,
        workers=workers,
        window=2 * workers if window is None else read_count(window, "window", least=1),
        ordered=ordered,
        stop_on_error=errors == "raise",
        checkpoint=None if checkpoint is None else Checkpoint.of(checkpoint, name=name_of(fn)),
        bar=_bar(limiter, items) if show_progress else None,
    )
    return Results(engine, raises=errors == "raise")


def _bar(limiter: Limiter, items: object) -> Any:
    try:
        from asyncbucket.batch.progress import Bar
    except ModuleNotFoundError as error:
        raise ImportError('a progress bar needs rich: pip install "asyncbucket[batch]"') from error
    return Bar(limiter, len(items) if isinstance(items, Sized) else None)


def name_of(fn: object) -> str:
    """Return the name of the results of ``fn`` in a checkpoint."""
    *_, fn = layers_of(fn)
    name: str = getattr(fn, "__qualname__", type(fn).__qualname__)
    owner = getattr(fn, "__self__", None)
    output_cls = getattr(owner, "output_cls", None)  # of a structured LLM, which calls another one
    owner = getattr(owner, "llm", owner)
    model = getattr(owner, "model", None) or getattr(owner, "model_name", None)
    if isinstance(output_cls, type):
        name = f"{name} for {output_cls.__qualname__}"
    return f"{name} of {model}" if isinstance(model, str) else name


class Results(AsyncIterator[Item[T, R]], Generic[T, R]):
    """Iterate over each `Item`; made by `amap`. It starts with the first step; it may end anywhere.

    Leaving ``async for`` drops it, which cancels what is running. ``async with`` around it, or
    ``await results.aclose()``, also waits until that has ended.
    """

    def __init__(self, engine: Engine[T, R], *, raises: bool) -> None:
        self._engine = engine
        self._raises = raises
        self._task: asyncio.Task[None] | None = None
        #: Cancelling it ends the task.
        self._scope: anyio.CancelScope
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item[T, R]:
        """Return the next item that is done.

        Raises:
            StopAsyncIteration: there is none.
            Exception: with ``errors="raise"``, what ``fn`` raised; what the items' iterable raised.
            CheckpointError: the checkpoint cannot be used.
        """
        if self._over:
            raise StopAsyncIteration
        if self._task is None:
            # The engine does not refer to this object, so it can be dropped while the engine works.
            self._scope = anyio.CancelScope()
            self._task = asyncio.create_task(self._engine.run(self._scope), name="asyncbucket amap")
        try:
            item = self._engine.results.receive_nowait()
        except (WouldBlock, EndOfStream, ClosedResourceError):
            item = await self._wait()
        self._engine.places.release()
        if item.error is not None and self._raises:
            await self.aclose()
            if isinstance(item.error, StopAsyncIteration):  # would end the loop as if all were done
                raise RuntimeError("the function raised StopAsyncIteration") from item.error
            raise item.error
        return item

    async def _wait(self) -> Item[T, R]:
        try:
            return await self._engine.results.receive()
        except (EndOfStream, ClosedResourceError):
            pass
        except BaseException:
            await self.aclose()
            raise
        if not self._over:  # else another task has closed it
            await self._end()
        raise StopAsyncIteration

    async def _end(self) -> None:
        """Finish after the engine has ended by itself."""
        self._over = True
        self._engine.results.close()
        assert self._task is not None
        if self._task.cancelled():
            raise RuntimeError(
                "this batch was cancelled, but not by its reader: perhaps its event loop has ended; "
                "start it again on the loop that reads it"
            )
        await asyncio.shield(self._task)
        if self._engine.failure is not None:
            raise self._engine.failure

    async def aclose(self) -> None:
        """Cancel what is in flight, and wait for its end; from any task, any number of times."""
        self._over = True
        task = self._task
        if task is not None:
            if not task.done():
                self._scope.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # mark it as retrieved; it does not matter any more
        self._engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        task = self._task
        if task is None or task.done():
            self._engine.close()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and all its tasks with it
            task.get_loop().call_soon_threadsafe(self._scope.cancel)

    def __repr__(self) -> str:
        state = "over" if self._over else "not begun" if self._task is None else "at work"
        return f"<Results {state}>"


#: Iterators that were handed out, and may be left in the middle. Module state, because `atexit` is: if one
#: were closed later than that, it would wait for ever for a thread that has stopped.
_OPEN_ITERATORS: Final["weakref.WeakSet[Generator[Any]]"] = weakref.WeakSet()


def map_sync(
    limiter: Limiter,
    fn: Callable[[T], Any],
    items: Iterable[T] | AsyncIterable[T],
    **options: Unpack[MapOptions],
) -> Generator[Item[T, Any]]:
    """Call ``fn`` for each item, and iterate over the results; see `amap` for the options.

    >>> for item in limiter.map(llm.complete, prompts):
    ...     print(item.input, item.result)

    A plain function is called in threads, by default as many as the limiter's concurrency, at most
    64. An async function runs on an event loop in a thread, where the items are iterated as well.
    Leaving the loop waits for running calls, because a thread cannot be cancelled.

    Raises:
        ValueError, TypeError, ImportError: as for `amap`, at once.
    """
    if callable(fn) and not inspect.iscoroutinefunction(fn):
        workers = options.get("workers")
        if workers is None:
            workers = min(limiter.concurrency or _MAX_THREADS, _MAX_THREADS)
        workers = read_count(workers, "workers", least=1)
        fn = _in_threads(fn, workers)
        options["workers"] = workers
    results = _iterate(amap(limiter, fn, items, **options))
    _OPEN_ITERATORS.add(results)
    return results


@atexit.register
def _close_iterators() -> None:
    for iterator in tuple(_OPEN_ITERATORS):
        with contextlib.suppress(ValueError):  # another thread is in it
            iterator.close()


def _iterate(results: Results[T, Any]) -> Generator[Item[T, Any]]:
    with start_blocking_portal() as portal:
        try:
            while True:
                try:
                    yield portal.call(results.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            portal.call(results.aclose)


def _in_threads(fn: Callable[[T], Any], threads: int) -> Callable[[T], Awaitable[Any]]:
    thread_limit = CapacityLimiter(threads)

    @functools.wraps(fn)
    async def call(item: T) -> Any:
        result = await to_thread.run_sync(fn, item, limiter=thread_limit)
        return await result if inspect.isawaitable(result) else result

    return call
