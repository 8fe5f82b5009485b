"""Limits shared by the processes of one machine, in a file: ``store="sqlite:///limits.db"``.

No server, nothing to install. Bookings survive restarts, so limits of a day or a month still hold.
`asyncbucket.stores.state` is the arithmetic, pure. Here is the file: one connection, on a thread for
each store.

A limiter is one row: its state as text, and until when it is kept. Every change is one transaction
begun by BEGIN IMMEDIATE. In WAL mode, a process killed at any instant leaves whole transactions only.
The same holds with ``synchronous=NORMAL``; after a power failure the last seconds may be missing,
fewer than a boot takes.

The wall clock jumps, when people or time servers set it. So it is read once for each boot of the
machine. From then on, time is the machine's steady clock, which all processes share, plus an offset
that the file keeps with the boot that it belongs to. A new boot continues from the last instant in the
file, or from the wall clock if that is later: limits of a day survive a restart.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import random
import sqlite3
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from asyncbucket.engine.errors import StoreError
from asyncbucket.stores import without_password
from asyncbucket.stores.state import State
from asyncbucket.stores.store import (
    OPEN_PATIENCE,
    PATIENCE,
    Batch,
    Ledger,
    LimitConfig,
    Receipt,
    Snapshot,
    in_time,
    spawn,
)

__all__ = ["SQLiteLedger", "SQLiteStore", "from_url"]

#: How often (s) a worker in line looks whether its turn has come.
_POLL_INTERVAL: Final = 0.005
#: The range of sleeps (s) before another attempt at a lock that is held.
_NAP: Final = (0.0002, 0.002)
#: Marks the file as ours: "abkt".
_APPLICATION: Final = 0x61626B74
#: The version of the tables, and of what a state means.
SCHEMA: Final = 7
_TABLES: Final = (
    """CREATE TABLE limiters (
        name TEXT PRIMARY KEY, until INTEGER NOT NULL, state TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE TABLE clock (boot TEXT NOT NULL, ahead INTEGER NOT NULL, last INTEGER NOT NULL)",
    "INSERT INTO clock VALUES ('', 0, 0)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {SCHEMA}",
)
_HOW: Final = (
    "write sqlite:///limits.db for a file in this folder, sqlite:////var/lib/limits.db for another"
)
#: What SQLite knows about locks on a file belongs to a process: a child that inherits it believes
#: that it holds the locks. So a file that was open at a fork cannot be opened in the child, and what
#: the child inherited must not even be closed there.
_OPEN: Final[dict[sqlite3.Connection, tuple[int, Path]]] = {}


def _steady() -> int:
    """Return nanoseconds that all processes of this machine share; suspended time is included."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic_ns() if clock_id is None else time.clock_gettime_ns(clock_id)


def _boot_id() -> str:
    """Return a name for this boot of the machine, or "" if there is none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return ""


@dataclass(frozen=True)
class MachineClock:
    """Read the clocks of the machine, in ns; tests set them."""

    wall: Callable[[], int] = time.time_ns
    steady: Callable[[], int] = _steady
    boot: str = field(default_factory=_boot_id)


class SQLiteStore:
    """Keep limiters in the file at ``path``, for any number of processes of this machine.

    Nothing is opened before it is used. The file, and SQLite's ``-wal`` and ``-shm`` files beside
    it, must be on a local disk: network file systems share no memory between machines.

    Args:
        path: the file; it is made if necessary, its folder is not.
        patience: seconds until the file counts as gone, because of its disk or of its write lock, which
            others hold for well under a millisecond.
        clock: what the machine's clocks show, for tests.

    Raises:
        ValueError: ``patience`` is not a positive number of seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        patience: float = PATIENCE,
        clock: MachineClock | None = None,
    ) -> None:
        if not 0 < patience < float("inf"):
            raise ValueError(f"patience must be a positive number of seconds, not {patience!r}")
        self.path = Path(path).absolute()
        self.patience = patience
        self.silence = (
            f"{self.path}: the file does not answer: find who holds its write lock with `fuser {self.path}`, see "
            f"what keeps the disk busy, or allow more with ?patience={max(5, patience * 4):g}"
        )
        self._clock = clock or MachineClock()
        #: The file's clock minus the steady clock, as last read.
        self._ahead = self._clock.wall() - self._clock.steady()
        #: The connection, of which file, and what closes it.
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._disconnect: Callable[[], object] = int
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "asyncbucket sqlite")
        self._is_closed = False

    @property
    def url(self) -> str:
        """A URL that leads to the same file from any working directory."""
        patience = "" if self.patience == PATIENCE else f"?patience={self.patience}"
        return f"sqlite:///{quote(str(self.path))}{patience}"

    async def open(
        self, name: str, config: LimitConfig, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> "SQLiteLedger":
        """See `asyncbucket.stores.store.Store.open`."""
        life = round(slot_ttl * 1_000_000_000)
        return await SQLiteLedger(self, name, worker, life=life).join(config)

    async def peek(self, name: str) -> Snapshot | None:
        """See `asyncbucket.stores.store.Store.peek`; it makes no file if there is none."""
        return await self._look(self._peek, name) if self.path.exists() else None

    async def names(self) -> list[str]:
        """See `asyncbucket.stores.store.Store.names`; it makes no file if there is none."""
        return await self._look(self._names) if self.path.exists() else []

    async def _look(self, work: Callable[..., Any], *args: Any) -> Any:
        return await in_time(self.run(work, *args), OPEN_PATIENCE, self.silence)

    async def aclose(self) -> None:
        """Finish what is in progress, and close the file."""
        self._is_closed = True
        await asyncio.to_thread(self._thread.shutdown)
        self._disconnect()

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do ``work`` on the store's thread, however long it takes.

        Raises:
            StoreError: it failed; the message has the path, the numbers and the remedy.
        """
        if self._is_closed:
            raise StoreError(f"{self.path}: this store has been closed: open another")
        if any(path == self.path and pid != os.getpid() for pid, path in list(_OPEN.values())):
            raise StoreError(
                f"{self.path} was open when this process forked, and SQLite files cannot be shared with a "
                f"fork: make the limiter in the child, or close it before with `await limiter.aclose()`"
            )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except StoreError:
            raise
        except sqlite3.Error as error:
            raise StoreError(self._explained(error)) from error
        except Exception as error:  # of the state, or the interpreter is ending
            raise StoreError(f"{self.path}: {type(error).__name__}: {error}") from error

    def _explained(self, error: sqlite3.Error) -> str:
        if _code_of(error) == sqlite3.SQLITE_BUSY:
            return self.silence
        return (
            f"{self.path}: SQLite failed ({error}), and nothing was booked: see that the folder {self.path.parent} "
            f"exists and this user may write there, and that the disk has space; if the file is no such "
            f"database or is damaged, move it away, and a new one is made"
        )

    # --- on its thread ---

    @contextlib.contextmanager
    def changing(self, name: str, config: LimitConfig) -> Generator[tuple[State, int]]:
        """Change the state of a limiter in one step, or a new one with these limits; yield it, and now."""
        with self.transaction() as connection:
            now = self._now(connection)
            state = self.read(connection, name)
            if state is None:
                connection.execute("DELETE FROM limiters WHERE until < ?", (now,))
                state = State(config, now)
            state.ahead = self._clock.wall() - now
            yield state, now
            row = (name, state.expires_at(now), state.to_text())
            connection.execute("INSERT OR REPLACE INTO limiters VALUES (?, ?, ?)", row)

    @contextlib.contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """Read and write in one step, or not at all."""
        connection = self.connection()
        self._retry_while_busy(lambda: connection.execute("BEGIN IMMEDIATE"))
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            raise

    def read(self, connection: sqlite3.Connection, name: str) -> State | None:
        """Return the state of a limiter as it is in the file; None if there is none."""
        find = "SELECT state FROM limiters WHERE name = ?"
        row = connection.execute(find, (name,)).fetchone()
        return None if row is None else State.from_text(*row)

    def now(self) -> int:
        """Return the current instant as this process knows it, without reading the file."""
        return self._clock.steady() + self._ahead

    def _now(self, connection: sqlite3.Connection) -> int:
        """Return the current instant, and keep it in the file."""
        boot, ahead, last = connection.execute("SELECT * FROM clock").fetchone()
        steady = self._clock.steady()
        if boot and boot == self._clock.boot:
            self._ahead = ahead
        self._ahead = max(self._ahead, last - steady)
        reading = self._clock.boot, self._ahead, steady + self._ahead
        connection.execute("UPDATE clock SET boot = ?, ahead = ?, last = ?", reading)
        return reading[-1]

    def _peek(self, name: str) -> Snapshot | None:
        with self.transaction() as connection:
            now = self._now(connection)
            state = self.read(connection, name)
        if state is None:
            return None
        state.ahead = self._clock.wall() - now
        return state.peek(now)

    def _names(self) -> list[str]:
        with self.transaction() as connection:
            find = (
                "SELECT name FROM limiters WHERE until >= ? AND name NOT LIKE '%/*%' ORDER BY name"
            )
            return [name for (name,) in connection.execute(find, (self._now(connection),))]

    def connection(self) -> sqlite3.Connection:
        """Return the connection to the file that is there now."""
        if self._connection is None or self._inode != self._current_inode():
            self._disconnect()
            connection: sqlite3.Connection = self._retry_while_busy(self._connect)
            self._connection, self._inode = connection, self._current_inode()
        return self._connection

    def _current_inode(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_dev, stat.st_ino

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        _OPEN[connection] = os.getpid(), self.path
        finalizer = weakref.finalize(self, _close, connection)
        finalizer.atexit = False
        self._disconnect = finalizer
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the tables if the file is new; refuse a file that is not ours."""
        connection.execute("BEGIN IMMEDIATE")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application not in (0, _APPLICATION) or (application == 0 and (tables or version)):
            raise StoreError(
                f"{self.path} is a database of another program ({tables} tables, application id "
                f"{application:#x}): give asyncbucket a file of its own"
            )
        if version not in (0, SCHEMA):
            raise StoreError(
                f"{self.path} has schema version {version}, and this asyncbucket needs version "
                f"{SCHEMA}: use one version of asyncbucket for one file, or another file"
            )
        if version == 0:
            for statement in _TABLES:
                connection.execute(statement)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    def _retry_while_busy(self, attempt: Callable[[], Any]) -> Any:
        """Try until nobody else holds the lock, long beyond the patience: see `Ledger`.

        SQLite can wait by itself, but sleeps longer and longer, up to 0.1 s. If many processes are
        busy, those that have just come are then always faster. What a sleep takes longer than it should
        does not count: the machine is busy, and so is whoever holds the lock.
        """
        left = max(self.patience, OPEN_PATIENCE)
        while True:
            try:
                return attempt()
            except sqlite3.Error as error:
                if _code_of(error) != sqlite3.SQLITE_BUSY or left <= 0:
                    raise
            nap = random.uniform(*_NAP)  # noqa: S311 - no secret
            left -= nap
            time.sleep(nap)

    def __repr__(self) -> str:
        return f"<SQLiteStore {self.path}>"


class SQLiteLedger(Ledger):
    """Keep one limiter in a file, for one worker; made by `SQLiteStore.open`."""

    def __init__(self, store: SQLiteStore, name: str, worker: str | None, *, life: int) -> None:
        super().__init__(store, name, worker, store.silence)
        self.patience = store.patience
        self._store = store
        self._life = life
        #: The file's changes when it was last looked at, and when it was this worker's turn.
        self._seen: object = None
        self._due = 0
        self._watcher: asyncio.Task[None] | None = None

    async def _send(self, number: int, batch: Batch) -> Receipt:  # noqa: ARG002 - what failed was not applied
        receipt: Receipt
        self._stop_watching()
        receipt, self.config = await self._store.run(self._apply, batch)
        if receipt.in_line:
            self._seen = None
            self._watcher = spawn(self._watch())
        return receipt

    def _apply(self, batch: Batch) -> tuple[Receipt, LimitConfig]:
        with self._store.changing(self.name, self.config) as (state, now):
            receipt = state.apply(self.worker, batch, now, life=self._life)
        return receipt, state.config

    async def _watch(self) -> None:
        """Look whether its turn has come, until it has."""
        with contextlib.suppress(StoreError):  # the next batch finds out
            while await self._store.run(self._turn_at) > self._store.now():  # noqa: ASYNC110 - a file rings no bell
                await asyncio.sleep(_POLL_INTERVAL)
        self.on_turn()

    def _stop_watching(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def aclose(self, last: Batch | None = None) -> None:
        """See `asyncbucket.stores.store.Ledger.aclose`."""
        self._stop_watching()
        await super().aclose(last)

    def _turn_at(self) -> int:
        """Return when this worker's turn comes; cheap if nothing has changed."""
        connection = self._store.connection()
        (others,) = connection.execute("PRAGMA data_version").fetchone()
        changes = connection, others, connection.total_changes
        if changes != self._seen:
            state = self._store.read(connection, self.name)
            self._seen = changes
            is_told = state is None or state.config != self.config
            self._due = 0 if is_told or state is None else state.due(self.worker)
        return self._due

    async def _leave(self) -> None:
        await self._store.run(self._forget)

    def _forget(self) -> None:
        with self._store.changing(self.name, self.config) as (state, now):
            state.leave(self.worker, now)


def from_url(url: str) -> SQLiteStore:
    """Return the store that ``url`` names; ``?patience=5`` waits up to 5 seconds for the lock.

    Raises:
        ValueError: the URL names no file, or contains something unknown.
    """
    parts, shown = urlsplit(url), without_password(url)
    path = unquote(parts.path.removeprefix("/"))
    if parts.netloc or path in ("", ":memory:") or parts.fragment:
        raise ValueError(f"{shown!r} names no file that processes could share: {_HOW}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := ", ".join(sorted(options.keys() - {"patience"})):
        raise ValueError(f"{shown!r} sets {unknown}: only patience can be set")
    try:
        patience = float(options.get("patience", PATIENCE))
    except ValueError:
        patience = float("nan")  # which is refused
    return SQLiteStore(path, patience=patience)


def _close(connection: sqlite3.Connection) -> None:
    """Close a connection, unless it is the parent's."""
    if _OPEN[connection][0] == os.getpid():
        del _OPEN[connection]
        with contextlib.suppress(sqlite3.Error):
            connection.close()


def _code_of(error: sqlite3.Error) -> int:
    """Return the primary result code; 0 for errors of the module itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
