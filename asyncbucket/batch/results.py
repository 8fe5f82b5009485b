"""What one iterates over: results as they arrive, and a clean end wherever one stops."""

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Generic, Literal, Self, TypeVar

import anyio
from anyio import ClosedResourceError, EndOfStream, WouldBlock

from asyncbucket.batch.checkpoint import Checkpoint
from asyncbucket.batch.engine import Engine
from asyncbucket.batch.item import Item
from asyncbucket.batch.paced import acquires_itself
from asyncbucket.batch.pacing import PriceOf, admit_each, leave_admission_to
from asyncbucket.batch.progress import Shown, progress_for
from asyncbucket.batch.source import Source
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import read_count

T = TypeVar("T")
R = TypeVar("R")

Errors = Literal["raise", "collect"]

#: The most workers if the limiter has no concurrency: if `amap` acquires, there are only as many as
#: are admitted, ...
_MAX_WORKERS = 1_000
#: ... and this many, if the function acquires.
_MAX_IF_FN_ACQUIRES = 256


def amap(  # noqa: PLR0913 - each is an option of its own
    limiter: Limiter,
    fn: Callable[[T], Awaitable[R]],
    items: Iterable[T] | AsyncIterable[T],
    *,
    ordered: bool = False,
    errors: Errors = "raise",
    cost: PriceOf | None = None,
    paced: bool | None = None,
    show_progress: Shown = False,
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
    wraps, is decorated with `Limiter.paced`, or acquires; otherwise here. See
    `asyncbucket.batch.paced`.

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
        paced: whether ``fn`` acquires by itself, if detecting that goes wrong.
        show_progress: a bar on standard error; True takes rich if it is installed, else tqdm.
        checkpoint: a path, or a `Checkpoint`: results are kept there, and items found in it are not
            called again.
        workers: the most calls at once; by default the limiter's concurrency decides.
        window: by default twice the workers.

    Raises:
        ValueError, TypeError: an option is invalid; ``fn`` cannot be called; or it acquires by
            itself from a limiter above or beside this one, so its calls would pay twice.
        ImportError: the library for the bar is not installed.
    """
    check_function(fn)
    if errors not in ("raise", "collect"):
        raise ValueError(f"errors must be 'raise' or 'collect', not {errors!r}")
    if cost is not None and paced:
        raise ValueError(
            "cost= says that the batch acquires, paced=True that fn does: give one of them"
        )
    if cost is None and paced is None:
        paced = acquires_itself(fn, limiter)
    fn_acquires = bool(paced) and cost is None
    max_workers = _workers(limiter, workers, fn_acquires=fn_acquires)
    engine: Engine[T, R] = Engine(
        Source(items),
        leave_admission_to(fn) if fn_acquires else admit_each(limiter, fn, cost),
        workers=max_workers,
        window=_window(window, max_workers),
        ordered=ordered,
        stop_on_error=errors == "raise",
        checkpoint=None if checkpoint is None else Checkpoint.of(checkpoint, name=name_of(fn)),
        progress=progress_for(limiter, show_progress),
    )
    return Results(engine, raises=errors == "raise")


def check_function(fn: object) -> None:
    """Refuse what cannot be called at once, not when the first item has been admitted."""
    if not callable(fn):
        raise TypeError(
            f"the function comes first, not called yet, and then the items, as in amap(ask, prompts); "
            f"{type(fn).__name__} cannot be called"
        )


def name_of(fn: object) -> str:
    """Return the name of the results of ``fn`` in a checkpoint."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name: str = getattr(fn, "__qualname__", type(fn).__qualname__)
    holder = getattr(fn, "__self__", None)
    output_cls = getattr(holder, "output_cls", None)  # of a structured LLM, which calls another one
    holder = getattr(holder, "llm", holder)
    model = getattr(holder, "model", None) or getattr(holder, "model_name", None)
    if isinstance(output_cls, type):
        name = f"{name} for {output_cls.__qualname__}"
    return f"{name} of {model}" if isinstance(model, str) else name


def _workers(limiter: Limiter, workers: int | None, *, fn_acquires: bool) -> int:
    if workers is not None:
        return read_count(workers, "workers", least=1)
    if not fn_acquires:
        return _MAX_WORKERS
    # One more than the slots, so that somebody is always in line. If the limiter finds its slots by
    # itself, there may be more of them later.
    return _MAX_IF_FN_ACQUIRES if limiter.concurrency is None else max(32, limiter.concurrency + 1)


def _window(window: int | None, workers: int) -> int:
    return 2 * workers if window is None else read_count(window, "window", least=1)


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

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
