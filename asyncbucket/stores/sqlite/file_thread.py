"""The one thread that works on the file, for all ledgers of a store.

The event loop never waits for the disk: it hands over jobs, and is called back. All jobs that came
up while the thread was busy become one transaction (group commit), so for the disk and the lock a
batch of jobs costs as much as a single one. If that transaction fails, all its jobs fail, and so do
those that have come up meanwhile: nobody waits behind a lock for longer than the store's patience.

Slots that come back are noticed by polling: while somebody waits for one, the thread checks every
few milliseconds whether another connection has written, which costs one look into shared memory.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from asyncbucket.core.errors import StoreError
from asyncbucket.core.process import reset_after_fork
from asyncbucket.stores.sqlite.clock import Reading, SharedClock
from asyncbucket.stores.sqlite.closing import register_closable
from asyncbucket.stores.sqlite.file import File
from asyncbucket.stores.sqlite.replica import Replica
from asyncbucket.stores.sqlite.verbs import Verb
from asyncbucket.stores.store import Terms

#: How often (s) the thread checks for changes while somebody waits for one.
_POLL_INTERVAL: Final = 0.005
#: How often (ns) it checks whether a slot has expired meanwhile.
_EXPIRY_INTERVAL: Final = 20_000_000
#: The most jobs in one transaction.
_MAX_BATCH: Final = 256
#: How long (s) a fork waits for a transaction to end; then it forks all the same.
_FORK_PATIENCE: Final = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a job."""

    #: The last verb's answer, or the requested snapshot.
    result: Any
    #: Which terms are in force.
    edition: int
    terms: Terms


#: Called on the job's loop with an answer or an error.
Done: TypeAlias = Callable[[Answer | None, StoreError | None], None]


@dataclass(frozen=True, slots=True)
class Job:
    """Apply to the books of limiter ``name`` what ``verbs`` returns when it is run.

    Without verbs it asks for a snapshot, which is None if there is no such limiter.
    """

    name: str
    verbs: Callable[[], tuple[Verb, ...]]
    loop: asyncio.AbstractEventLoop
    done: Done


class ListNames(Job):
    """Ask for the names of all limiters."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Wait until it is ``worker``'s turn for a slot, or other terms are in force."""

    name: str
    worker: str
    edition: int
    in_line: bool
    changed: "asyncio.Future[bool]"


class FileThread:
    """Serve jobs in order, on a thread that starts with the first one."""

    def __init__(self, file: File, clock: SharedClock) -> None:
        self._file = file
        self._clock = clock
        self._replicas: dict[str, Replica] = {}
        self.after_fork(new=True)
        reset_after_fork(self)
        register_closable(self)

    def after_fork(self, *, new: bool = False) -> None:
        """Start afresh in a child process: thread and connection are the parent's."""
        self._jobs: queue.SimpleQueue[Job | Watch | None] = queue.SimpleQueue()
        self._watches: list[Watch] = []
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        #: Held while the file is in use, or is kept closed.
        self._file_lock = threading.Lock()
        self._closed = False
        #: The file's state when waiters were last notified, and when time alone may change it.
        self._seen_changes = -1
        self._next_check = 0
        if not new:
            self._file.abandon_connection()

    def suspend(self) -> bool:
        """Close the file, and keep it closed until `resume`; return whether that succeeded in time."""
        if not self._file_lock.acquire(timeout=_FORK_PATIENCE):
            return False
        self._file.close()
        return True

    def resume(self) -> None:
        """Use the file again."""
        self._file_lock.release()

    def put(self, job: Job | Watch) -> None:
        """Have ``job`` done; its ``done`` is called on its loop.

        Raises:
            StoreError: the thread was told to stop.
        """
        with self._starting:
            if self._closed:
                raise StoreError(f"{self._file.path}: this store has been closed: open another")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="asyncbucket sqlite", daemon=True
                )
                self._thread.start()
            self._jobs.put(job)

    def stop(self) -> threading.Thread | None:
        """End the thread when it has done its jobs; return it, to be joined."""
        with self._starting:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
            return self._thread

    def _work(self) -> None:
        jobs = self._jobs
        try:
            while self._step(jobs):
                pass
        finally:
            with self._file_lock:
                self._file.close()
            self._thread = None

    def _step(self, jobs: "queue.SimpleQueue[Job | Watch | None]") -> bool:
        """Do the jobs that there are; return whether there will be more.

        Between steps no job is referred to, because it would keep its ledger, and so its store,
        alive.
        """
        batch, more = self._next_batch(jobs)
        with self._file_lock:
            if batch:
                self._serve(batch, jobs)
            if self._watches:
                self._notify_watches()
        return more

    def _next_batch(self, jobs: "queue.SimpleQueue[Job | Watch | None]") -> tuple[list[Job], bool]:
        """Return the jobs that there are, and whether there will be more."""
        batch: list[Job] = []
        wait: float | None = _POLL_INTERVAL if self._watches else None
        with contextlib.suppress(queue.Empty):
            while len(batch) < _MAX_BATCH:
                job = jobs.get(timeout=wait)
                wait = 0
                if job is None:
                    return batch, False
                if isinstance(job, Watch):
                    self._watches.append(job)
                    self._next_check = 0
                else:
                    batch.append(job)
        return batch, True

    def _serve(self, batch: list[Job], jobs: "queue.SimpleQueue[Job | Watch | None]") -> None:
        touched: dict[str, Replica] = {}
        try:
            with self._file.transaction() as connection:
                answers = self._apply(connection, batch, touched)
            for replica in touched.values():
                replica.committed()
            self._next_check = 0
        except StoreError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - our own mistake must not end the thread
            failure = StoreError(f"{self._file.path}: {type(error).__name__}: {error}")
            failure.__cause__ = error
        else:
            _call_back([(job, answer, None) for job, answer in zip(batch, answers, strict=True)])
            return
        for replica in touched.values():
            replica.failed()
        batch += self._queued_jobs(jobs)
        _call_back([(job, None, failure) for job in batch])

    def _queued_jobs(self, jobs: "queue.SimpleQueue[Job | Watch | None]") -> list[Job]:
        """Return the jobs that have come up during one that failed."""
        rest: list[Job] = []
        for _ in range(jobs.qsize()):
            job = jobs.get()
            if isinstance(job, Job):
                rest.append(job)
            else:
                jobs.put(job)
        return rest

    def _apply(
        self, connection: sqlite3.Connection, batch: list[Job], touched: dict[str, Replica]
    ) -> list[Answer]:
        known = connection.execute("SELECT boot, ahead, last FROM clock").fetchone()
        reading = self._clock.read(None if known is None else Reading(*known))
        connection.execute("INSERT OR REPLACE INTO clock VALUES (1, ?, ?, ?)", reading)
        now, generation = reading.last, self._file.generation
        answers: list[Answer] = []
        for job in batch:
            if isinstance(job, ListNames):
                names = connection.execute(
                    "SELECT name FROM limiters WHERE until >= ? ORDER BY name", (now,)
                ).fetchall()
                answers.append(Answer([name for (name,) in names], 0, Terms(limits=())))
                continue
            replica = touched.get(job.name)
            if replica is None:
                replica = touched[job.name] = self._replicas.setdefault(job.name, Replica(job.name))
                replica.catch_up(connection, generation, now)
            answers.append(self._answer(connection, replica, job.verbs(), now))
        for replica in touched.values():
            replica.save(connection, now)
        return answers

    def _answer(
        self, connection: sqlite3.Connection, replica: Replica, verbs: tuple[Verb, ...], now: int
    ) -> Answer:
        result: Any = None
        for verb in verbs:
            result = replica.apply(connection, self._file.generation, verb, now)
        books = replica.books
        if books is None:
            return Answer(None, 0, Terms(limits=()))
        if not verbs:
            result = books.peek(now)
            result.details.update(self._file.details())
        return Answer(result, books.edition, books.terms)

    def _notify_watches(self) -> None:
        """Notify those that wait for a change if there was one."""
        self._watches = [watch for watch in self._watches if not watch.changed.done()]
        now = self._clock.now()
        if not self._watches or not (self._refresh_watched() or now >= self._next_check):
            return
        self._next_check = now + _EXPIRY_INTERVAL
        for watch in [watch for watch in self._watches if self._is_due(watch, now)]:
            self._watches.remove(watch)
            _call_soon(watch.changed.get_loop(), _resolve, watch.changed)

    def _refresh_watched(self) -> bool:
        """Keep watched books up to date with the file; return whether it changed."""
        with contextlib.suppress(StoreError):  # the next commit reports it
            seen = self._file.changes()
            if seen != self._seen_changes:
                with self._file.read_transaction() as connection:
                    for name in {watch.name for watch in self._watches}:
                        self._replicas[name].refresh(connection, self._file.generation)
                self._seen_changes = seen
                return True
        return False

    def _is_due(self, watch: Watch, now: int) -> bool:
        books = self._replicas[watch.name].books
        if books is None:
            return False
        return books.edition != watch.edition or (
            watch.in_line and books.should_ask(watch.worker, now)
        )


def _call_back(done: Iterable[tuple[Job, Answer | None, StoreError | None]]) -> None:
    """Call every job back, with one wake-up for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Done, Answer | None, StoreError | None]]]
    by_loop = {}
    for job, answer, error in done:
        by_loop.setdefault(job.loop, []).append((job.done, answer, error))
    for loop, calls in by_loop.items():
        _call_soon(loop, _run, calls)


def _run(calls: list[tuple[Done, Answer | None, StoreError | None]]) -> None:
    for done, answer, error in calls:
        done(answer, error)


def _resolve(changed: "asyncio.Future[bool]") -> None:
    if not changed.done():
        changed.set_result(True)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # closed: nobody waits there any more
        loop.call_soon_threadsafe(function, *args)
