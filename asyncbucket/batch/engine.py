"""What runs between the items and the reader.

There is not a task for each item, but a few workers that go on: as many as calls in flight, and one
that waits in line. A worker whose call has been admitted makes sure that another one stands in line.
So their number follows what the limiter admits, and only one call of a batch is in the limiter's line.

*Bounded.* An item that was taken holds a place in the window until its result is fetched, so a slow
reader stops the batch, and endless items need only the memory for one window. *In order*, if
requested: results that come early wait for their turn; the window bounds how early they can be.
*Kept*, if there is a checkpoint: a result is on disk before it is handed out.

The tasks run in one anyio task group in a task of its own, not in the reader's: a task group must
end in the task in which it began, and a reader may stop reading anywhere.
"""

import asyncio
import contextlib
import itertools
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

import anyio
from anyio import CancelScope, to_thread
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from asyncbucket.batch.caller import Caller, Stopped
from asyncbucket.batch.checkpoint import Checkpoint, Entry, OpenCheckpoint

if TYPE_CHECKING:
    from asyncbucket.batch.progress import Bar

T = TypeVar("T")
R = TypeVar("R")

#: How many items of a plain iterable are looked up in a checkpoint at a time.
_LOOK_AHEAD: Final = 64


@dataclass(frozen=True, slots=True, repr=False)
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

    def __repr__(self) -> str:
        outcome = f"result={self._result!r}" if self.error is None else f"error={self.error!r}"
        restored = ", restored" if self.restored else ""
        return f"<Item {self.index}: {self.input!r}, {outcome}{restored}>"


@dataclass(kw_only=True, eq=False)
class Engine(Generic[T, R]):
    """Run one batch.

    Attributes:
        items: what goes in.
        caller: calls the function for one item.
        workers: the most calls at once.
        window: the most items that are taken and whose results are not fetched.
        ordered: whether results come out in the order of the items.
        stop_on_error: whether nothing is started any more once an item has failed.
        checkpoint: where results are kept.
        bar: shows how far it has come.
        failure: why it ended early, if not by an item's own error.
    """

    items: Iterator[T] | AsyncIterator[T]
    caller: Caller
    workers: int
    window: int
    ordered: bool
    stop_on_error: bool
    checkpoint: Checkpoint | None
    bar: "Bar | None"
    failure: Exception | None = None
    #: Places in the window.
    places: anyio.Semaphore = field(init=False)
    results: MemoryObjectReceiveStream[Item[T, R]] = field(init=False)
    _sender: MemoryObjectSendStream[Item[T, R]] = field(init=False)
    _saved: OpenCheckpoint | None = None
    _saving: anyio.Lock = field(default_factory=lambda: anyio.Lock(fast_acquire=True))
    #: Results that wait for the disk, by the keys of their items.
    _unsaved: dict[bytes, R] = field(default_factory=dict[bytes, R])
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _group: TaskGroup | None = None
    _workers: int = 0
    #: Workers without an admitted call: they wait in line, or fetch an item.
    _unadmitted: int = 0
    _fetching: anyio.Lock = field(default_factory=lambda: anyio.Lock(fast_acquire=True))
    #: Items that were taken and looked up already.
    _ready: deque[Entry] = field(default_factory=deque[Entry])
    _exhausted: bool = False
    _stopped: bool = False
    _early: dict[int, Item[T, R]] = field(default_factory=dict[int, "Item[T, R]"])
    _next: int = 0
    _latest: Coroutine[Any, Any, None] | None = None

    def __post_init__(self) -> None:
        self.places = anyio.Semaphore(self.window, fast_acquire=True)
        # Unbounded, because the places are the bound.
        self._sender, self.results = anyio.create_memory_object_stream[Item[T, R]](math.inf)

    def close(self) -> None:
        """Drop what is not read."""
        self._sender.close()
        self.results.close()

    async def run(self, scope: CancelScope) -> None:
        """Work until all is done, or ``scope`` is cancelled; then the stream of results ends.

        Cancel the scope, not the task: the file is opened, written and closed behind a shield,
        which only holds against the scope.
        """
        bar = contextlib.nullcontext() if self.bar is None else self.bar.shown()
        with self._sender, scope, self.caller.watched(self._end):
            try:
                async with bar, self._opened(), anyio.create_task_group() as self._group:
                    if self.failure is None:
                        self._start_worker()
                for index in sorted(self._early):  # those behind one that was not started
                    self._sender.send_nowait(self._early[index])
            except BaseException:  # cancelled: nobody will read on
                self.results.close()
                raise
            finally:
                if self._latest is not None:  # if the loop ended before it began
                    self._latest.close()
                close = getattr(self.items, "aclose", None)
                if close is not None:  # nobody else would close an async generator in time
                    with CancelScope(shield=True):
                        await close()

    def _start_worker(self) -> None:
        assert self._group is not None
        self._workers += 1
        self._unadmitted += 1
        worker = self._latest = self._work()
        self._group.start_soon(lambda: worker)

    async def _work(self) -> None:
        while True:
            await self.places.acquire()
            async with self._fetching:
                if not self._ready and not self._exhausted:
                    await self._fetch()
                entry = self._ready.popleft() if self._ready else None
            if entry is None:
                self._unadmitted -= 1
                self.places.release()  # for the others, which must see the end, too
                return
            if entry.stored is not None:
                result = entry.stored[0]
                self._hand_out(Item(entry.number, entry.input, result, restored=True))
            else:
                await self._process(entry)

    async def _fetch(self) -> None:
        """Take an item, or several if they are looked up, and find out which of them are done."""
        entries: list[Entry] = []
        try:
            if isinstance(self.items, AsyncIterator):
                with _cancelled_from_within("the iterable of items"):
                    entries.append(Entry(next(self._numbers), await anext(self.items)))
            else:
                for item in itertools.islice(self.items, _LOOK_AHEAD if self._saved else 1):
                    entries.append(Entry(next(self._numbers), item))  # noqa: PERF401 - kept on errors
                self._exhausted |= not entries
        except StopAsyncIteration:
            self._exhausted = True
        except Exception as error:  # noqa: BLE001 - the reader gets it, after the items before it
            self._exhausted, self.failure = True, self.failure or error
        if entries and self._saved is not None:
            try:
                entries = await to_thread.run_sync(self._saved.look_up, entries)
            except Exception as error:  # noqa: BLE001 - the reader gets it
                self._fail(error)
        self._ready.extend([] if self._stopped else entries)

    async def _process(self, entry: Entry) -> None:
        admitted = False

        def begin() -> None:
            """Note that a worker leaves the line; make sure that another one stands there."""
            nonlocal admitted
            if self._stopped:
                raise Stopped
            admitted = True
            self._unadmitted -= 1
            if not self._unadmitted and self._workers < self.workers:
                self._start_worker()

        try:
            with _cancelled_from_within("the call"):
                result = await self.caller.call(entry.input, begin)
        except Stopped:
            self.places.release()  # as nobody will fetch a result
        except Exception as error:  # noqa: BLE001 - it belongs to the item
            if self.stop_on_error:
                self._stop()
            self._hand_out(Item(entry.number, entry.input, error=error))
        else:
            if self._saved is not None:
                await self._save(self._saved, entry.key, result)
            self._hand_out(Item(entry.number, entry.input, result))
        finally:
            self._unadmitted += admitted

    def _stop(self) -> None:
        """Start no more calls."""
        self._stopped = self._exhausted = True
        self._ready.clear()

    def _fail(self, error: Exception) -> None:
        self._stop()
        self.failure = self.failure or error

    def _end(self, error: Exception) -> None:
        """End the batch with an error, and all calls with it."""
        self._fail(error)
        if self._group is not None:
            self._group.cancel_scope.cancel()

    def _hand_out(self, item: Item[T, R]) -> None:
        if self.bar is not None:
            self.bar.count(failed=not item.ok, restored=item.restored)
        if not self.ordered:
            self._sender.send_nowait(item)
            return
        self._early[item.index] = item
        while self._next in self._early:
            self._sender.send_nowait(self._early.pop(self._next))
            self._next += 1

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncGenerator[None]:
        """Open the checkpoint, if there is one, until the end of the block."""
        try:
            if self.checkpoint is not None:
                self._saved = await to_thread.run_sync(OpenCheckpoint, self.checkpoint)
        except Exception as error:  # noqa: BLE001 - the reader gets it
            self._fail(error)
        try:
            yield
        finally:
            if self._saved is not None:
                with CancelScope(shield=True):
                    await to_thread.run_sync(self._saved.close)

    async def _save(self, saved: OpenCheckpoint, key: bytes, result: Any) -> None:
        """Save a result, whatever ends the calls meanwhile: it is paid for.

        Those that come while the disk is busy are saved together: it may be slower than the calls.
        """
        self._unsaved[key] = result
        with CancelScope(shield=True):
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
