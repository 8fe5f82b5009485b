"""Limits shared by the processes of one machine, in a file: ``store="sqlite:///limits.db"``.

No server, nothing to install. Bookings survive restarts, so limits of a day or a month still hold.
A process may be killed at any instant: the file holds whole batches only, and the slots of dead
processes come back when they expire. `state` is the arithmetic, pure; `file` the SQLite file, its
errors, and the clock of all processes; here is what workers use, on a thread for each store.
"""

import asyncio
import concurrent.futures
import os
import secrets
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from asyncbucket.core.errors import StoreError
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
    wait_patiently,
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
        #: The states that this process last read or wrote: epoch, sequence number, state.
        self.known: dict[str, tuple[str, int, State]] = {}
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
        return await self.run(self._peek, name) if self._path.exists() else None

    async def names(self) -> list[str]:
        """See `asyncbucket.stores.store.Store.names`; it makes no file if there is none."""
        return await self.run(self._names) if self._path.exists() else []

    async def aclose(self) -> None:
        """Finish what is in progress, and close the file."""
        self._is_closed = True
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
        self.file.close()

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Do ``work`` on the store's thread.

        Raises:
            StoreError: it failed, or took too long.
        """
        job = asyncio.wrap_future(self.submit(work, *args))
        try:
            answer: T = await wait_patiently(job, max(self.patience + _GRACE, OPEN_PATIENCE))
        except TimeoutError:
            raise StoreError(self.too_late(OPEN_PATIENCE)) from None
        finally:
            job.cancel()
        return answer

    def submit(self, work: Callable[..., T], *args: Any) -> "concurrent.futures.Future[T]":
        """Have ``work`` done on the store's thread."""
        if self._is_closed:
            raise StoreError(f"{self._path}: this store has been closed: open another")
        self.file.refuse_fork()
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "asyncbucket sqlite")
        try:
            return self._thread.submit(self._do, work, *args)
        except RuntimeError as error:  # the interpreter is ending
            raise StoreError(f"{self._path}: {error}") from error

    def too_late(self, patience: float) -> str:
        """Return what to say if there was no answer within ``patience`` seconds."""
        return (
            f"the disk has not answered for {in_seconds(patience)}: see what keeps it busy, or allow "
            f"more with ?patience={max(5, patience * 4):g}"
        )

    def _do(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return work(*args)
        except StoreError:
            self.known.clear()
            raise
        except Exception as error:
            self.known.clear()
            raise StoreError(f"{self._path}: {type(error).__name__}: {error}") from error

    def change(
        self,
        name: str,
        change: Callable[[State, int], T],
        epoch: tuple[str, int],
        config: LimitConfig,
    ) -> tuple[T, tuple[str, int], bool]:
        """Change the state of a limiter in one step, or a new one with these limits.

        Return what ``change`` does, the epoch with the instant until which the state is kept, and
        whether the state of the ``epoch`` that the caller knows is lost.
        """
        with self.file.transaction() as connection:
            now = self.file.now(connection)
            current, seq, state = self._read(connection, name)
            if not current:
                connection.execute("DELETE FROM limiters WHERE until < ?", (now,))
                current, state = secrets.token_hex(8), State(config, now)
            state.ahead = self.file.clock.wall() - now
            known, kept_until = epoch
            is_lost = now < kept_until and known.split()[0] not in current
            if is_lost:
                state.drain(now)
                current = f"{current.split()[0]} {known.split()[0]}"
            answer = change(state, now)
            until = state.expires_at(now)
            connection.execute(
                "INSERT OR REPLACE INTO limiters VALUES (?, ?, ?, ?, ?)",
                (name, current, seq + 1, until, state.to_text()),
            )
        self.known[name] = current, seq + 1, state
        return answer, (current, until), is_lost

    def _read(self, connection: Any, name: str) -> tuple[str, int, State]:
        """Return epoch, number and state of a limiter; an empty epoch if there is none."""
        find = "SELECT epoch, seq FROM limiters WHERE name = ?"
        row = connection.execute(find, (name,)).fetchone()
        if row is None:
            return "", 0, State(LimitConfig())
        known = self.known.pop(name, None)
        if known is None or known[:2] != row:
            find = "SELECT state FROM limiters WHERE name = ?"
            (text,) = connection.execute(find, (name,)).fetchone()
            known = (*row, State.from_text(text))
        return known

    def look(self, name: str, connection: Any) -> State | None:
        """Return the state of a limiter as it is in the file; None if there is none."""
        known = self._read(connection, name)
        if not known[0]:
            return None
        self.known[name] = known
        return known[2]

    def _peek(self, name: str) -> Snapshot | None:
        with self.file.transaction() as connection:
            now = self.file.now(connection)
            state = self.look(name, connection)
            self.known.pop(name, None)  # looking makes it forget, unlike what is in the file
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
        self._epoch = ("", 0)
        #: The file's changes when it was last looked at.
        self._seen: object = None

    async def _send(self, number: int, batch: Batch) -> Receipt:  # noqa: ARG002 - what failed was not applied
        job = self._store.submit(self._apply, batch)
        receipt, config = await asyncio.wrap_future(job)
        changed = None if config in (self.config, batch.config) else config
        self.config = config
        return replace(receipt, changed=changed)

    def _too_late(self, patience: float) -> str:
        return self._store.too_late(patience - _GRACE)

    def _apply(self, batch: Batch) -> tuple[Receipt, LimitConfig]:
        def change(state: State, now: int) -> tuple[Receipt, LimitConfig]:
            receipt = state.apply(self.worker, batch, now, life=self._life)
            return receipt, state.config

        (receipt, config), self._epoch, is_lost = self._store.change(
            self.name, change, self._epoch, self.config
        )
        return replace(receipt, lost=is_lost), config

    async def changed(self, *, timeout: float) -> bool:
        """See `asyncbucket.stores.store.Ledger.changed`."""
        loop = asyncio.get_running_loop()
        until, self._seen = loop.time() + timeout, None
        while not await self._store.run(self._is_called):
            left = until - loop.time()
            if left <= 0:
                return False
            await asyncio.sleep(min(_POLL_INTERVAL, left))
        return True

    def _is_called(self) -> bool:
        """Look whether this worker's turn has come; cheap if nothing has changed."""
        store = self._store
        changes = store.file.changes()
        if changes != self._seen or self.name not in store.known:
            with store.file.transaction("BEGIN") as connection:
                store.look(self.name, connection)
            self._seen = changes
        if self.name not in store.known:
            return True
        state = store.known[self.name][2]
        if state.config != self.config:
            return True
        place = state.place_of(self.worker)
        return place is not None and place.due <= store.file.clock.now()

    async def peek(self) -> Snapshot:
        """See `asyncbucket.stores.store.Ledger.peek`."""
        snapshot = await self._store.peek(self.name)
        if snapshot is None:
            raise StoreError(f"the file no longer has a limiter {self.name!r}")
        return snapshot

    async def _leave(self) -> None:
        def change(state: State, now: int) -> None:
            state.leave(self.worker, now)

        await self._store.run(self._store.change, self.name, change, self._epoch, self.config)

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
