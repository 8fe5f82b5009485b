"""What one calls, what runs the calls, and what one iterates over: `Limiter.amap`.

There is not a task for each item, but a few workers that go on: as many as calls in flight, and one
that waits in line. A worker whose call has been admitted makes sure that another one stands in line.
So their number follows what the limiter admits, and only one call of a batch is in the limiter's line.

*Bounded.* An item that was taken holds a place in the window until its result is fetched, so a slow
reader stops the batch, and endless items need only the memory for one window. *In order*, if
requested: results that come early wait for their turn; the window bounds how early they can be.
*Kept*, if there is a checkpoint: a result is on disk before it is handed out.

The tasks run in one anyio task group in a task of its own, not in the reader's: a task group must
end in the task in which it began, and a reader may stop reading anywhere. What it reads is an async
generator. However that ends, by its reader or by the loop of a reader that is gone, the batch ends.
"""

import asyncio
import contextlib
import functools
import itertools
import math
import os
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sized,
)
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, Self, TypedDict, TypeVar, cast

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from asyncbucket.batch.caller import Caller, ItemCostOf, Stopped, layers_of, name_in_code
from asyncbucket.batch.checkpoint import Checkpoint, Entry
from asyncbucket.batch.progress import ProgressBar
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.wording import read_count

T = TypeVar("T")
R = TypeVar("R")

Errors = Literal["raise", "collect"]

#: The most workers if the limiter has no concurrency: if `amap` acquires, there are only as many as
#: are admitted, ...
_MAX_WORKERS: Final = 1_000
#: ... and this many, if the function acquires.
_MAX_IF_FN_ACQUIRES: Final = 256
#: The most items of a plain iterable that are looked up in a checkpoint at a time.
_MAX_LOOK_AHEAD: Final = 64


class MapOptions(TypedDict, total=False):
    """What `Limiter.amap` takes by keyword."""

    ordered: bool
    errors: Errors
    cost: ItemCostOf | None
    paced: bool | None
    agents: bool | str
    show_progress: bool
    checkpoint: str | os.PathLike[str] | None
    workers: int | None


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
    checkpoint: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> "Results[T, R]":
    """Call ``fn`` for each item behind ``limiter``; iterate over the results as they arrive.

    >>> async for item in limiter.amap(llm.acomplete, prompts, checkpoint="run.db"):
    ...     print(item.index, item.input, item.result)

    Items may be endless: at most twice the workers are taken and not yet handed out. ``break``,
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
        checkpoint: the path of a file in which results are kept; items found in it are not called
            again.
        workers: the most calls at once; by default the limiter's concurrency decides.

    Raises:
        ValueError, TypeError: an option is invalid; or ``fn`` is paced by a limiter above or beside
            this one, so its calls would be charged twice.
    """
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
    bar = (
        ProgressBar(limiter, len(items) if isinstance(items, Sized) else None)
        if show_progress
        else None
    )
    is_looked_up = checkpoint is not None and not isinstance(items, AsyncIterable)
    look_ahead = min(workers, _MAX_LOOK_AHEAD) if is_looked_up else 1
    engine: Engine[T, R] = Engine(
        source=_Source(
            aiter(items) if isinstance(items, AsyncIterable) else _async(iter(items)), look_ahead
        ),
        # Items that are ready have no place, but the one that is fetched next.
        window=_Window(2 * workers - look_ahead + 1, ordered=ordered),
        caller=caller,
        workers=workers,
        stop_on_error=errors == "raise",
        checkpoint=None
        if checkpoint is None
        else functools.partial(Checkpoint, checkpoint, name_of(fn)),
        bar=bar,
    )
    return Results(engine.results())


async def _async(items: Iterator[T]) -> AsyncGenerator[T]:
    for item in items:
        yield item


def name_of(fn: object) -> str:
    """Return the name of the results of ``fn`` in a checkpoint: with its model, if it is a model's."""
    *_, fn = layers_of(fn)
    owner = getattr(fn, "__self__", None)
    output_cls = getattr(owner, "output_cls", None)  # of a structured LLM, which calls another one
    owner = getattr(owner, "llm", owner)
    model = getattr(owner, "model", None) or getattr(owner, "model_name", None)
    parts = [name_in_code(fn)]
    parts += [f"for {output_cls.__qualname__}"] if isinstance(output_cls, type) else []
    parts += [f"of {model}"] if isinstance(model, str) else []
    return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Item(Generic[T, R]):
    """One item that went in, and its result or error.

    Attributes:
        index: its place among the items, from 0.
        input: the item itself.
        error: what ``fn`` raised, or why it was not admitted; None if it has a result.
        restored: whether the result comes from a checkpoint, without a call.
    """

    index: int
    input: T
    _result: R | None = None
    error: Exception | None = None
    restored: bool = False

    @property
    def result(self) -> R:
        """What ``fn`` returned; for an item that failed, this raises its error."""
        if self.error is not None:
            raise self.error
        return cast("R", self._result)

    @property
    def ok(self) -> bool:
        """Whether there is a result."""
        return self.error is None


class Results(AsyncIterator[Item[T, R]], Generic[T, R]):
    """Iterate over each `Item`; made by `amap`. It starts with the first step; it may end anywhere.

    Leaving ``async for`` drops it, which cancels what is running. ``async with`` around it, or
    ``await results.aclose()``, also waits until that has ended. One task reads at a time.
    """

    def __init__(self, items: AsyncGenerator[Item[T, R]]) -> None:
        # If it is dropped, its event loop closes it.
        self._items = items

    async def __anext__(self) -> Item[T, R]:
        """Return the next item that is done.

        Raises:
            StopAsyncIteration: there is none.
            Exception: with ``errors="raise"``, what ``fn`` raised; what the items' iterable raised.
            CheckpointError: the checkpoint cannot be used.
            RuntimeError: another task waits for an item.
        """
        return await anext(self._items)

    async def aclose(self) -> None:
        """Cancel what is in flight, and wait for its end; any number of times."""
        await self._items.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Source(Generic[T]):
    """Take the items, and find out which of them are done already.

    Args:
        items: what goes in.
        look_ahead: how many items are taken at a time, which must not wait for each other.
    """

    def __init__(self, items: AsyncIterator[T], look_ahead: int) -> None:
        self._items, self._look_ahead = items, look_ahead
        #: Why it ended early.
        self.failure: Exception | None = None
        self.is_stopped = self._is_exhausted = False
        self._numbers = itertools.count()
        self._taking = anyio.Lock(fast_acquire=True)
        #: Items that were taken and looked up already.
        self._ready = deque[Entry]()

    async def next(self, saved: Checkpoint | None) -> Entry | None:
        """Return the next item, with what is ``saved`` of it; None if there is none."""
        async with self._taking:
            if not (self._ready or self._is_exhausted):
                entries = await self._take()
                if saved is not None:
                    try:
                        entries = await to_thread.run_sync(saved.look_up, entries)
                    except Exception as error:  # noqa: BLE001 - the reader gets it
                        self.failure = self.failure or error
                        self.stop()
                self._ready.extend([] if self.is_stopped else entries)
            return self._ready.popleft() if self._ready else None

    async def _take(self) -> list[Entry]:
        entries: list[Entry] = []
        try:
            with _cancelled_from_within("the iterable of items"):
                for number in itertools.islice(self._numbers, self._look_ahead):
                    entries.append(Entry(number, await anext(self._items)))  # noqa: PERF401 - kept on errors
        except StopAsyncIteration:
            self._is_exhausted = True
        except Exception as error:  # noqa: BLE001 - the reader gets it, after the items before it
            self._is_exhausted, self.failure = True, error
        return entries

    def stop(self) -> None:
        """Return no more items."""
        self.is_stopped = self._is_exhausted = True
        self._ready.clear()

    async def aclose(self) -> None:
        """Close the iterable: nobody else would close an async generator in time."""
        close = getattr(self._items, "aclose", None)
        if close is not None:
            await close()


class _Window(Generic[T, R]):
    """Hold the results that are not read yet.

    Args:
        size: how many items may be taken and not read.
        ordered: whether results come out in the order of the items.
    """

    def __init__(self, size: int, *, ordered: bool) -> None:
        #: One for each item that was taken and not read.
        self.places = anyio.Semaphore(size, fast_acquire=True)
        self._is_ordered, self._has_ended = ordered, False
        self._done = deque[Item[T, R]]()
        self._news = asyncio.Event()
        #: Results that wait for the one of this number.
        self._early: dict[int, Item[T, R]] = {}
        self._next = 0

    def put(self, item: Item[T, R]) -> None:
        """Hand ``item`` to the reader, when it is its turn."""
        self._early[item.index if self._is_ordered else self._next] = item
        while self._next in self._early:
            self._done.append(self._early.pop(self._next))
            self._next += 1
        self._news.set()

    async def get(self) -> Item[T, R] | None:
        """Return what is to be read next; None after the last."""
        while not self._done:
            if self._has_ended:
                return None
            self._news.clear()
            await self._news.wait()
        self.places.release()
        return self._done.popleft()

    def end(self) -> None:
        """Let the reader come to the end, and to those behind an item that was not started."""
        self._done.extend(item for _, item in sorted(self._early.items()))
        self._has_ended = True
        self._news.set()


@dataclass(kw_only=True, eq=False)
class Engine(Generic[T, R]):
    """Run one batch.

    Attributes:
        source: what goes in.
        window: what comes out.
        caller: calls the function for one item.
        workers: the most calls at once.
        stop_on_error: whether nothing is started any more once an item has failed.
        checkpoint: opens the file where results are kept.
        bar: shows how far it has come.
        failure: why it ended early, if not by an item's own error.
    """

    source: _Source[T]
    window: _Window[T, R]
    caller: Caller
    workers: int
    stop_on_error: bool
    checkpoint: Callable[[], Checkpoint] | None
    bar: ProgressBar | None
    failure: Exception | None = None
    _saved: Checkpoint | None = None
    _saving: anyio.Lock = field(default_factory=lambda: anyio.Lock(fast_acquire=True))
    #: Results that wait for the disk, by the keys of their items.
    _unsaved: dict[bytes, R] = field(default_factory=dict[bytes, R])
    _group: TaskGroup | None = None
    _workers: int = 0
    #: Workers without an admitted call: they wait in line, or fetch an item.
    _unadmitted: int = 0

    async def results(self) -> AsyncGenerator[Item[T, R]]:
        """Run the batch while somebody reads; the task that runs it does not refer to the reader."""
        scope = anyio.CancelScope()
        task = asyncio.create_task(self._run(scope), name="asyncbucket amap")
        task.add_done_callback(lambda _: self.window.end())
        try:
            while (item := await self.window.get()) is not None:
                if item.error is not None and self.stop_on_error:
                    raise item.error
                yield item
        finally:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # mark it as retrieved; a reader who leaves does not want it
        await task
        failure = self.failure or self.source.failure
        if failure is not None:
            raise failure

    async def _run(self, scope: anyio.CancelScope) -> None:
        """Work until all is done, or ``scope`` is cancelled.

        Cancel the scope, not the task: the file is opened, written and closed behind a shield,
        which only holds against the scope.
        """
        bar = contextlib.nullcontext() if self.bar is None else self.bar
        with scope, bar, self.caller.watched(self._end):
            try:
                if self.checkpoint is not None:
                    self._saved = await to_thread.run_sync(self.checkpoint)
                async with anyio.create_task_group() as self._group:
                    self._start_worker()
            finally:
                with anyio.CancelScope(shield=True):
                    if self._saved is not None:
                        # If the loop ends, it has cancelled those who wait for the disk.
                        await to_thread.run_sync(self._saved.close, self._unsaved)
                    await self.source.aclose()

    def _start_worker(self) -> None:
        assert self._group is not None
        self._workers += 1
        self._unadmitted += 1
        self._group.start_soon(self._work)

    async def _work(self) -> None:
        while True:
            await self.window.places.acquire()
            entry = await self.source.next(self._saved)
            if entry is None:
                self._unadmitted -= 1
                self.window.places.release()  # nothing was taken
                return
            if entry.stored is not None:
                result = entry.stored[0]
                self._hand_out(Item(entry.number, entry.input, result, restored=True))
            else:
                await self._process(entry)

    async def _process(self, entry: Entry) -> None:
        admitted = False

        def begin() -> None:
            """Note that a worker leaves the line; make sure that another one stands there."""
            nonlocal admitted
            if self.source.is_stopped:
                raise Stopped
            admitted = True
            self._unadmitted -= 1
            if not self._unadmitted and self._workers < self.workers:
                self._start_worker()

        try:
            with _cancelled_from_within("the call"):
                result = await self.caller.call(entry.input, begin)
        except Stopped:
            self.window.places.release()  # as nobody will fetch a result
        except Exception as error:  # noqa: BLE001 - it belongs to the item
            if self.stop_on_error:
                self.source.stop()
            self._hand_out(Item(entry.number, entry.input, error=error))
        else:
            if self._saved is not None:
                await self._save(self._saved, entry.key, result)
            self._hand_out(Item(entry.number, entry.input, result))
        finally:
            self._unadmitted += admitted

    def _fail(self, error: Exception) -> None:
        self.source.stop()
        self.failure = self.failure or error

    def _end(self, error: Exception) -> None:
        """End the batch with an error, and all calls with it."""
        self._fail(error)
        if self._group is not None:
            self._group.cancel_scope.cancel()

    def _hand_out(self, item: Item[T, R]) -> None:
        if self.bar is not None:
            self.bar.count(failed=not item.ok, restored=item.restored)
        self.window.put(item)

    async def _save(self, saved: Checkpoint, key: bytes, result: Any) -> None:
        """Save a result, whatever ends the calls meanwhile: it is paid for.

        Those that come while the disk is busy are saved together: it may be slower than the calls.
        """
        self._unsaved[key] = result
        with anyio.CancelScope(shield=True):
            async with self._saving:
                if key in self._unsaved:
                    results, self._unsaved = self._unsaved, {}
                    try:
                        await to_thread.run_sync(saved.save, results)
                    except Exception as error:  # noqa: BLE001 - the reader gets the results, then this
                        self._fail(error)


@contextlib.contextmanager
def _cancelled_from_within(what: str) -> Generator[None]:
    """Turn a cancellation from inside ``what`` into an error; one that is meant for us passes."""
    try:
        yield
    except asyncio.CancelledError as cancelled:
        if anyio.current_effective_deadline() == -math.inf:
            raise
        raise RuntimeError(
            f"{what} was cancelled from within, by something that it awaits"
        ) from cancelled
