"""The workers: each takes an item, calls the function with it, and keeps the result.

There is not a task for each item, but a few that go on: as many as calls in flight, and one that
waits in line. A worker whose call has been admitted makes sure that another one stands in line. So
their number follows what the limiter admits, and the limiter's queue holds no more than necessary.

*Bounded.* An item that was taken holds a place in the window until its result is fetched, so a slow
reader stops the workers, and endless items need only the memory for one window. *In order*, if
requested: results that come early wait for their turn; the window bounds how early they can be.
*Kept*, if there is a checkpoint: a result is on disk before it is handed out; results that come
while the disk is busy are one transaction.

The tasks run in one anyio task group in a task of its own, not in the reader's: a task group must
end in the task in which it began, and a reader may stop reading anywhere.
"""

import asyncio
import contextlib
import math
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import anyio
from anyio import CancelScope, to_thread
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from asyncbucket.batch.checkpoint import Checkpoint, Ledger
from asyncbucket.batch.item import Entry, Item
from asyncbucket.batch.pacing import Call, Stopped
from asyncbucket.batch.progress import Progress
from asyncbucket.batch.source import Source

T = TypeVar("T")
R = TypeVar("R")


class Engine(Generic[T, R]):
    """Run everything between the items and the reader.

    Args:
        source: hands out the items.
        call: calls the function for one item.
        workers: the most workers.
        window: the most items that are taken and whose results are not fetched.
        ordered: whether results come out in the order of the items.
        stop_on_error: whether nothing is started any more once an item has failed.
        checkpoint: where results are kept.
        progress: shows how far it has come.
    """

    def __init__(
        self,
        source: Source[T],
        call: Call,
        *,
        workers: int,
        window: int,
        ordered: bool,
        stop_on_error: bool,
        checkpoint: Checkpoint | None,
        progress: Progress,
    ) -> None:
        self._source = source
        self._call = call
        self._max_workers = workers
        self._workers = 0
        #: Workers without an admitted call: they wait in line, or fetch an item.
        self._unadmitted = 0
        #: Places in the window.
        self.places = anyio.Semaphore(window, fast_acquire=True)
        self._ordered = ordered
        self._early: dict[int, Item[T, R]] = {}
        self._next = 0
        self._stop_on_error = stop_on_error
        self._failed = False
        self._checkpoint = checkpoint
        self._progress = progress
        #: Why it ended early, if not by an item's own error.
        self.failure: Exception | None = None
        self._group: TaskGroup | None = None
        self._sender: MemoryObjectSendStream[Item[T, R]]
        self.results: MemoryObjectReceiveStream[Item[T, R]]
        # Unbounded, because the places are the bound.
        self._sender, self.results = anyio.create_memory_object_stream(float("inf"))
        self._save_sender: MemoryObjectSendStream[tuple[bytes, Item[T, R]]] | None = None

    def close(self) -> None:
        """Drop what is not read."""
        self._sender.close()
        self.results.close()

    async def run(self, scope: CancelScope) -> None:
        """Work until all is done, or ``scope`` is cancelled; then the stream of results ends.

        Cancel the scope, not the task: the file is opened, written and closed behind a shield,
        which only holds against the scope.
        """
        with self._sender, scope:
            try:
                async with (
                    self._progress.shown(self._source.total),
                    anyio.create_task_group() as task_group,
                ):
                    await self._work_all(task_group)
                for index in sorted(self._early):  # those behind one that was not started
                    self._sender.send_nowait(self._early[index])
            except BaseException:  # cancelled: nobody will read on
                self.results.close()
                raise
            finally:
                await self._source.aclose()

    async def _work_all(self, group: TaskGroup) -> None:
        self._group = group
        if self._checkpoint is None:
            self._start_worker()
            return
        try:
            ledger = await to_thread.run_sync(Ledger, self._checkpoint)
        except Exception as error:  # noqa: BLE001 - the reader gets it
            self.failure = error
            return
        self._source.ledger = ledger
        self._save_sender, to_save = anyio.create_memory_object_stream(float("inf"))
        try:
            async with anyio.create_task_group() as saving:
                saving.start_soon(self._save_results, ledger, to_save)
                with self._save_sender:
                    async with anyio.create_task_group() as self._group:
                        self._start_worker()
        finally:
            with CancelScope(shield=True):
                await to_thread.run_sync(ledger.close)

    def _start_worker(self) -> None:
        assert self._group is not None
        self._workers += 1
        self._unadmitted += 1
        self._group.start_soon(self._work, name="asyncbucket amap")

    def _note_admission(self) -> None:
        """Note that a worker left the line; make sure that another one stands there."""
        if self._failed and self._stop_on_error:
            raise Stopped
        self._unadmitted -= 1
        if not self._unadmitted and self._workers < self._max_workers:
            self._start_worker()

    async def _work(self) -> None:
        while True:
            await self.places.acquire()
            entry = await self._fetch()
            if entry is None:
                self._unadmitted -= 1
                self.places.release()  # for the others, which must see the end, too
                return
            if entry.stored is not None:
                self._progress.count(restored=True)
                self._hand_out(Item(entry.number, entry.input, entry.stored[0], restored=True))
            else:
                await self._process(entry)

    async def _fetch(self) -> Entry | None:
        try:
            return await self._source.next()
        except Exception as error:  # noqa: BLE001 - the reader gets it
            self._fail(error)
        except asyncio.CancelledError as cancelled:
            self._fail(_cancellation_error(cancelled, "the iterable of items"))
        return None

    async def _process(self, entry: Entry) -> None:
        admitted = False

        def begin() -> None:
            nonlocal admitted
            self._note_admission()
            admitted = True

        try:
            result = await self._call(entry.input, begin)
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - it belongs to the item
            self._hand_out_failed(entry, error)
        except asyncio.CancelledError as cancelled:
            self._hand_out_failed(entry, _cancellation_error(cancelled, "the call"))
        else:
            self._progress.count()
            self._save_or_hand_out(entry, Item(entry.number, entry.input, result))
        finally:
            self._unadmitted += admitted

    def _hand_out_failed(self, entry: Entry, error: Exception) -> None:
        self._failed = True
        if self._stop_on_error:
            self._source.stop()
        self._progress.count(failed=True)
        self._hand_out(Item(entry.number, entry.input, error=error))

    def _fail(self, error: Exception) -> None:
        self._source.stop()
        if self.failure is None:
            self.failure = error

    def _save_or_hand_out(self, entry: Entry, item: Item[T, R]) -> None:
        if self._save_sender is None:
            self._hand_out(item)
        else:
            self._save_sender.send_nowait((entry.key, item))

    def _hand_out(self, item: Item[T, R]) -> None:
        if not self._ordered:
            self._sender.send_nowait(item)
            return
        self._early[item.index] = item
        while self._next in self._early:
            self._sender.send_nowait(self._early.pop(self._next))
            self._next += 1

    async def _save_results(
        self, ledger: Ledger, to_save: MemoryObjectReceiveStream[tuple[bytes, Item[T, R]]]
    ) -> None:
        """Save results in order of arrival, all available ones in one transaction.

        Whatever ends the workers, their results are saved: this ends when their stream does.
        """
        with CancelScope(shield=True), to_save:
            async for first in to_save:
                batch = [first, *_receive_available(to_save)]
                try:
                    rows = [(key, item.result) for key, item in batch]
                    await to_thread.run_sync(ledger.save, rows)
                except Exception as error:  # noqa: BLE001 - the reader gets the results, then this
                    self._fail(error)
                for _, item in batch:
                    self._hand_out(item)


def _cancellation_error(cancelled: asyncio.CancelledError, what: str) -> RuntimeError:
    """Return the error for a cancellation from inside ``what``; re-raise one meant for us."""
    if anyio.current_effective_deadline() == -math.inf:
        raise cancelled
    error = RuntimeError(f"{what} was cancelled from within, by something that it awaits")
    error.__cause__ = cancelled
    return error


def _receive_available(stream: MemoryObjectReceiveStream[Any]) -> Iterator[Any]:
    with contextlib.suppress(anyio.WouldBlock, anyio.EndOfStream):
        while True:
            yield stream.receive_nowait()
