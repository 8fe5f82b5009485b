"""`Limiter.map`: the same for code without an event loop."""

import atexit
import contextlib
import inspect
import weakref
from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterable
from typing import Any, Final, TypeVar, overload

from anyio import CapacityLimiter, to_thread
from anyio.from_thread import start_blocking_portal

from asyncbucket.batch.checkpoint import Checkpoint
from asyncbucket.batch.item import Item
from asyncbucket.batch.paced import acquires_itself
from asyncbucket.batch.results import Results, amap, check_function, name_of
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import read_count

T = TypeVar("T")
R = TypeVar("R")

#: The most threads if the limiter has no concurrency.
_MAX_THREADS = 64
#: Iterators that were handed out, and may be left in the middle. Module state, because `atexit` is: if one
#: were closed later than that, it would wait for ever for a thread that has stopped.
_OPEN_ITERATORS: Final["weakref.WeakSet[Generator[Any]]"] = weakref.WeakSet()


@overload
def map_sync(
    limiter: Limiter,
    fn: Callable[[T], Awaitable[R]],
    items: Iterable[T] | AsyncIterable[T],
    *,
    workers: int | None = None,
    **options: Any,
) -> Generator[Item[T, R]]: ...
@overload
def map_sync(
    limiter: Limiter,
    fn: Callable[[T], R],
    items: Iterable[T] | AsyncIterable[T],
    *,
    workers: int | None = None,
    **options: Any,
) -> Generator[Item[T, R]]: ...
def map_sync(
    limiter: Limiter,
    fn: Callable[[T], Any],
    items: Iterable[T] | AsyncIterable[T],
    *,
    workers: int | None = None,
    **options: Any,
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
    check_function(fn)
    if workers is not None:
        workers = read_count(workers, "workers", least=1)
    elif not inspect.iscoroutinefunction(fn):
        workers = min(limiter.concurrency or _MAX_THREADS, _MAX_THREADS)
    if options.get("paced") is None and options.get("cost") is None:
        options["paced"] = acquires_itself(fn, limiter)
    if options.get("checkpoint") is not None:
        options["checkpoint"] = Checkpoint.of(options["checkpoint"], name=name_of(fn))
    call = _in_threads(fn, workers)
    results = _iterate(amap(limiter, call, items, workers=workers, **options))
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


def _in_threads(fn: Callable[[T], Any], threads: int | None) -> Callable[[T], Awaitable[Any]]:
    if inspect.iscoroutinefunction(fn):
        return fn
    thread_limit = CapacityLimiter(threads or _MAX_THREADS)

    async def call(item: T) -> Any:
        result = await to_thread.run_sync(fn, item, limiter=thread_limit)
        return await result if inspect.isawaitable(result) else result

    return call
