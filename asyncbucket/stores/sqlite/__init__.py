"""Limits shared by the processes of one machine, in a file: ``store="sqlite:///limits.db"``.

No server, nothing to install. Bookings survive restarts, so limits of a day or a month still hold.
A process may be killed at any instant: the file holds whole batches only, and the slots of dead
processes come back when they expire. `state` is the arithmetic, pure; `file` the SQLite file, its
errors, and the clock of all processes; here is what workers use, on a thread for each store.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import secrets
import sqlite3
import weakref
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from asyncbucket.core.errors import StoreError
from asyncbucket.core.meters import NEVER
from asyncbucket.core.wording import in_seconds
from asyncbucket.stores.sqlite.file import File, SharedClock
from asyncbucket.stores.sqlite.state import State
from asyncbucket.stores.store import (
    OPEN_PATIENCE,
    PATIENCE,
    Batch,
    Ledger,
    LimitConfig,
    Receipt,
    Snapshot,
    check_membership,
    in_time,
)

__all__ = ["SQLiteLedger", "SQLiteStore", "from_url"]

T = TypeVar("T")

#: How much longer (s) than for the lock to wait for the thread's report.
_GRACE: Final = 0.05
#: How often (s) a worker in line looks whether its turn has come.
_POLL_INTERVAL: Final = 0.005
_HOW: Final = (
    "write sqlite:///limits.db for a file in this folder, sqlite:////var/lib/limits.db for another"
)


class SQLiteStore:
    """Keep limiters in the file at ``path``, for any number of processes of this machine.

    Nothing is opened before it is used. The file, and SQLite's ``-wal`` and ``-shm`` files beside
    it, must be on a local disk: network file systems share no memory between machines.

    Args:
        path: the file; it is made if necessary, its folder is not.
        patience: seconds to wait for the file's write lock, which others hold for well under a
            millisecond.
        clock: the time that all processes share, for tests.

    Raises:
        ValueError: ``patience`` is not a positive number of seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        patience: float = PATIENCE,
        clock: SharedClock | None = None,
    ) -> None:
        if not 0 < patience < float("inf"):
            raise ValueError(f"patience must be a positive number of seconds, not {patience!r}")
        self._path = Path(path).absolute()
        self.patience = patience
        self.file = File(self._path, patience=patience, clock=clock or SharedClock())
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._is_closed = False
        weakref.finalize(self, self.file.close).atexit = False

    @property
    def url(self) -> str:
        """A URL that leads to the same file from any working directory."""
        patience = "" if self.patience == PATIENCE else f"?patience={self.patience}"
        return f"sqlite:///{quote(str(self._path))}{patience}"

    def check(self, config: LimitConfig) -> None:
        """See `asyncbucket.stores.store.Store.check`: whole numbers of any size can be counted."""

    async def open(
        self, name: str, config: LimitConfig, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> "SQLiteLedger":
        """See `asyncbucket.stores.store.Store.open`."""
        check_membership(name, slot_ttl)
        ledger = SQLiteLedger(self, name, worker, life=round(slot_ttl * 1_000_000_000))
        await ledger.join(config)
        return ledger

    async def peek(self, name: str) -> Snapshot | None:
        """See `asyncbucket.stores.store.Store.peek`; it makes no file if there is none."""
        return await self._look(self._peek, name) if self._path.exists() else None

    async def names(self) -> list[str]:
        """See `asyncbucket.stores.store.Store.names`; it makes no file if there is none."""
        return await self._look(self._names) if self._path.exists() else []

    async def _look(self, work: Callable[..., T], *args: Any) -> T:
        answer: T = await in_time(self.run(work, *args), OPEN_PATIENCE, self.too_late)
        return answer

    async def aclose(self) -> None:
        """Finish what is in progress, and close the file."""
        self._is_closed = True
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
        self.file.close()

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Do ``work`` on the store's thread, however long it takes.

        Raises:
            StoreError: it failed.
        """
        if self._is_closed:
            raise StoreError(f"{self._path}: this store has been closed: open another")
        self.file.refuse_fork()
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "asyncbucket sqlite")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except StoreError:
            raise
        except Exception as error:  # of the state, or the interpreter is ending
            raise StoreError(f"{self._path}: {type(error).__name__}: {error}") from error

    def too_late(self, patience: float) -> str:
        """Return what to say if there was no answer within ``patience`` seconds."""
        return (
            f"the disk has not answered for {in_seconds(patience)}: see what keeps it busy, or allow "
            f"more with ?patience={max(5, patience * 4):g}"
        )

    @contextlib.contextmanager
    def changing(
        self, name: str, known: tuple[str, int], config: LimitConfig
    ) -> Generator[tuple[State, int, bool]]:
        """Change the state of a limiter in one step, or a new one with these limits.

        Yield the state, now, and whether the state is lost of which the caller knows the epoch and
        until when it would have been kept.
        """
        with self.file.transaction() as connection:
            now = self.file.now(connection)
            state = self.read(connection, name)
            if state is None:
                connection.execute("DELETE FROM limiters WHERE until < ?", (now,))
                state = State(config, now, epoch=secrets.token_hex(8))
            state.ahead = self.file.clock.wall() - now
            epoch, until = known
            yield state, now, now < until and not state.follows(epoch, now)
            row = (name, state.expires_at(now), state.to_text())
            connection.execute("INSERT OR REPLACE INTO limiters VALUES (?, ?, ?)", row)

    def read(self, connection: sqlite3.Connection, name: str) -> State | None:
        """Return the state of a limiter as it is in the file; None if there is none."""
        find = "SELECT state FROM limiters WHERE name = ?"
        row = connection.execute(find, (name,)).fetchone()
        return None if row is None else State.from_text(*row)

    def _peek(self, name: str) -> Snapshot | None:
        with self.file.transaction() as connection:
            now = self.file.now(connection)
            state = self.read(connection, name)
        if state is None:
            return None
        state.ahead = self.file.clock.wall() - now
        return replace(state.peek(now), details=self.file.details())

    def _names(self) -> list[str]:
        with self.file.transaction() as connection:
            find = "SELECT name FROM limiters WHERE until >= ? ORDER BY name"
            return [name for (name,) in connection.execute(find, (self.file.now(connection),))]

    def __repr__(self) -> str:
        return f"<SQLiteStore {self._path}>"


class SQLiteLedger(Ledger):
    """Keep one limiter in a file, for one worker; made by `SQLiteStore.open`."""

    def __init__(self, store: SQLiteStore, name: str, worker: str | None, *, life: int) -> None:
        super().__init__(name, worker)
        self.patience = store.patience + _GRACE
        self._store = store
        self._life = life
        #: The epoch of the state that it saw, and until when that is kept.
        self._known = ("", 0)
        #: The file's changes when it was last looked at, and when it was this worker's turn.
        self._seen: object = None
        self._due = 0

    async def _send(self, number: int, batch: Batch) -> Receipt:  # noqa: ARG002 - what failed was not applied
        receipt, config = await self._store.run(self._apply, batch)
        changed = None if config in (self.config, batch.config) else config
        self.config = config
        return replace(receipt, changed=changed)

    def _too_late(self, patience: float) -> str:
        return self._store.too_late(patience - _GRACE)

    def _apply(self, batch: Batch) -> tuple[Receipt, LimitConfig]:
        with self._store.changing(self.name, self._known, self.config) as (state, now, is_lost):
            receipt = state.apply(self.worker, batch, now, life=self._life)
        self._known = state.epoch, state.expires_at(now)
        return replace(receipt, lost=is_lost), state.config

    async def changed(self, *, timeout: float) -> bool:
        """See `asyncbucket.stores.store.Ledger.changed`."""
        loop = asyncio.get_running_loop()
        until, self._seen = loop.time() + timeout, None
        while (left := until - loop.time()) > 0:
            due = await self._in_time(self._store.run(self._turn_at), self.patience)
            if due <= self._store.file.clock.now():
                return True
            await asyncio.sleep(min(_POLL_INTERVAL, left))
        return False

    def _turn_at(self) -> int:
        """Return when this worker's turn comes; cheap if nothing has changed."""
        changes = self._store.file.changes()
        if changes != self._seen:
            with self._store.file.transaction("BEGIN") as connection:
                state = self._store.read(connection, self.name)
            self._seen = changes
            place = None if state is None else state.place_of(self.worker)
            is_told = state is None or state.config != self.config
            self._due = 0 if is_told else NEVER if place is None else place.due
        return self._due

    async def peek(self) -> Snapshot:
        """See `asyncbucket.stores.store.Ledger.peek`."""
        snapshot = await self._store.peek(self.name)
        if snapshot is None:
            raise StoreError(f"the file no longer has a limiter {self.name!r}")
        return snapshot

    async def _leave(self) -> None:
        await self._store.run(self._forget)

    def _forget(self) -> None:
        with self._store.changing(self.name, self._known, self.config) as (state, now, _):
            state.leave(self.worker, now)

    def __repr__(self) -> str:
        return f"<SQLiteLedger {self.name!r}, worker {self.worker}>"


def from_url(url: str) -> SQLiteStore:
    """Return the store that ``url`` names; ``?patience=5`` waits up to 5 seconds for the lock.

    Raises:
        ValueError: the URL names no file, or contains something unknown.
    """
    from asyncbucket.stores import without_password

    parts, shown = urlsplit(url), without_password(url)
    path = unquote(parts.path.removeprefix("/"))
    if parts.netloc:
        raise ValueError(f"{shown!r} names a host, and a file has none: {_HOW}")
    if path in ("", ":memory:") or parts.fragment:
        raise ValueError(
            f"{shown!r} names no file that processes could share: {_HOW}; for one process no store "
            f"is needed"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    patience = options.pop("patience", str(PATIENCE))
    if options:
        raise ValueError(f"{shown!r} sets {', '.join(sorted(options))}: only patience can be set")
    try:
        return SQLiteStore(path, patience=float(patience))
    except ValueError as error:
        raise ValueError(
            f"{shown!r}: patience must be a positive number of seconds, e.g. 0.2, not {patience!r}"
        ) from error
