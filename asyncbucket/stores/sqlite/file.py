"""The file: a SQLite connection on a thread of its own, the clock that all its users share, errors.

A limiter is one row: its state as text, and until when it is kept. Every change is one transaction
begun by BEGIN IMMEDIATE. In WAL mode, a process killed at any instant leaves whole transactions only.
The same holds with ``synchronous=NORMAL``; after a power failure the last seconds may be missing,
fewer than a boot takes.

The clock. The wall clock jumps, when people or time servers set it. So it is read once for each boot
of the machine. From then on, time is the machine's steady clock, which all processes share, plus an
offset that the file keeps with the boot that it belongs to. A new boot continues from the last
instant in the file, or from the wall clock if that is later: limits of a day survive a restart.
"""

import contextlib
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final, TypeVar

from asyncbucket.core.errors import StoreError

T = TypeVar("T")

#: Marks the file as ours: "abkt".
_APPLICATION: Final = 0x61626B74
#: The version of the tables, and of what a state means.
SCHEMA: Final = 4
#: The range of sleeps (s) before another attempt at a lock that is held.
_NAP: Final = (0.0002, 0.002)
_TABLES: Final = (
    """CREATE TABLE limiters (
        name TEXT PRIMARY KEY, until INTEGER NOT NULL, state TEXT NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE clock (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        boot TEXT NOT NULL, ahead INTEGER NOT NULL, last INTEGER NOT NULL
    )""",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {SCHEMA}",
)
_BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_LOCKED: Final = (
    "another process has held the write lock for over {patience:g} s; find it with `fuser {path}`, "
    "or allow more with ?patience={more:g}"
)
_UNREADABLE: Final = (
    "it cannot be opened or written ({error}): see that the folder {folder} exists and this user may "
    "write there, or give another path"
)
_DAMAGED: Final = (
    "it is not a SQLite file, or is damaged ({error}): move it away, and a new one is made"
)
#: What SQLite's errors mean for the reader: what happened, the numbers, the remedy.
_MEANINGS: Final = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_CANTOPEN: _UNREADABLE,
    sqlite3.SQLITE_READONLY: _UNREADABLE,
    sqlite3.SQLITE_PERM: _UNREADABLE,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
}
_FAILED: Final = (
    "SQLite failed ({error}; {free} free), and nothing was booked: look at the disk, or move the "
    "file to another"
)
_FORKED: Final = (
    "{path} was open when this process forked, and SQLite files cannot be shared with a fork: make "
    "the limiter in the child, or close it before with `await limiter.aclose()`"
)
#: What SQLite knows about locks on a file belongs to a process: a child that inherits it believes
#: that it holds the locks. So a file that was open at a fork cannot be opened in the child, and what
#: the child inherited must not even be closed there.
_OPEN: Final[dict[sqlite3.Connection, tuple[int, Path]]] = {}


class SharedClock:
    """Tell the time that all users of a file share, in ns; it is close to the wall clock."""

    def __init__(
        self,
        *,
        wall: Callable[[], int] = time.time_ns,
        steady: Callable[[], int] | None = None,
        boot: str | None = None,
    ) -> None:
        self._steady = steady or _steady
        self._boot = _boot_id() if boot is None else boot
        self.wall = wall
        self._ahead = wall() - self._steady()

    def read(self, known: tuple[str, int, int] | None) -> tuple[str, int, int]:
        """Return what the file is to know of time: the boot, the offset, the current instant.

        ``known`` is what it knows so far.
        """
        now = self._steady()
        if known is not None:
            boot, ahead, last = known
            if self._boot and boot == self._boot:
                self._ahead = ahead
            self._ahead = max(self._ahead, last - now)
        return self._boot, self._ahead, now + self._ahead

    def now(self) -> int:
        """Return the current instant as this process knows it, without reading the file."""
        return self._steady() + self._ahead


class File:
    """Hold one connection to the file at ``path``; for one thread at a time.

    Every method raises `StoreError` with the path, the numbers and the remedy.
    """

    def __init__(self, path: Path, *, patience: float, clock: SharedClock) -> None:
        self.path = path
        self.clock = clock
        self._patience = patience
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._connections = 0

    @contextlib.contextmanager
    def transaction(self, begin: str = "BEGIN IMMEDIATE") -> Generator[sqlite3.Connection]:
        """Read and write in one step, or not at all; ``begin`` "BEGIN" reads as of one instant."""
        with self._explaining_errors():
            connection = self._current_connection()
            self._retry_while_busy(lambda: connection.execute(begin))
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                raise

    def now(self, connection: sqlite3.Connection) -> int:
        """Return the current instant, and keep it in the file."""
        known = connection.execute("SELECT boot, ahead, last FROM clock").fetchone()
        reading = self.clock.read(known)
        connection.execute("INSERT OR REPLACE INTO clock VALUES (1, ?, ?, ?)", reading)
        return reading[-1]

    def changes(self) -> tuple[int, ...]:
        """Return what changes whenever anybody has written."""
        with self._explaining_errors():
            connection = self._current_connection()
            (others,) = connection.execute("PRAGMA data_version").fetchone()
            return self._connections, others, connection.total_changes

    def details(self) -> dict[str, str]:
        """Describe the file, for people."""
        parts = (self.path, self.path.with_name(self.path.name + "-wal"))
        size = sum(part.stat().st_size for part in parts if part.exists())
        return {
            "path": str(self.path),
            "size": f"{size:,} bytes",
            "free": f"{shutil.disk_usage(self.path.parent).free:,} bytes",
            "sqlite": sqlite3.sqlite_version,
            "schema": str(SCHEMA),
        }

    def close(self) -> None:
        """Close the connection; the next transaction opens another."""
        connection, self._connection = self._connection, None
        if connection is not None and _OPEN[connection][0] == os.getpid():
            del _OPEN[connection]
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def refuse_fork(self) -> None:
        """Refuse to be used in the child of a process that had the file open.

        Raises:
            StoreError: it was open.
        """
        for pid, path in list(_OPEN.values()):
            if path == self.path and pid != os.getpid():
                raise StoreError(_FORKED.format(path=self.path))

    def _current_connection(self) -> sqlite3.Connection:
        """Return the connection to the file that is there now."""
        if self._connection is not None and self._inode != self._current_inode():
            self.close()
        if self._connection is None:
            self._connection = self._retry_while_busy(self._connect)
            self._inode = self._current_inode()
            self._connections += 1
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
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the tables if the file is new; refuse a file that is not ours."""
        connection.execute("BEGIN")  # as of one instant: another process may be making the tables
        version = self._version(connection)
        connection.execute("COMMIT")
        (mode,) = self._retry_while_busy(
            lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone()
        )
        if mode != "wal":
            raise StoreError(
                f"{self.path} cannot be shared: its file system gives no shared memory for a "
                f"write-ahead log (journal mode {mode!r}); use a local disk, or a Redis store"
            )
        connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            connection.execute("BEGIN IMMEDIATE")
            if self._version(connection) == 0:  # nobody else was faster
                for statement in _TABLES:
                    connection.execute(statement)
            connection.execute("COMMIT")

    def _version(self, connection: sqlite3.Connection) -> int:
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
        return int(version)

    def _retry_while_busy(self, attempt: Callable[[], T]) -> T:
        """Try until nobody else holds the lock, as long as the patience lasts.

        SQLite can wait by itself, but sleeps longer and longer, up to 0.1 s. If many processes are
        busy, those that have just come are then always faster.
        """
        until = time.monotonic() + self._patience
        while True:
            try:
                return attempt()
            except sqlite3.Error as error:
                if _code_of(error) not in _BUSY or time.monotonic() >= until:
                    raise
            time.sleep(random.uniform(*_NAP))  # noqa: S311 - no secret

    @contextlib.contextmanager
    def _explaining_errors(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            folder = self.path.parent
            try:
                free = f"{shutil.disk_usage(folder).free:,} bytes"
            except OSError:
                free = "an unknown amount"
            meaning = _MEANINGS.get(_code_of(error), _FAILED).format(
                path=self.path,
                folder=folder,
                error=error,
                patience=self._patience,
                more=max(5, self._patience * 4),
                free=free,
            )
            raise StoreError(f"{self.path}: {meaning}") from error


def _code_of(error: sqlite3.Error) -> int:
    """Return the primary result code; 0 for errors of the module itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _steady() -> int:
    """Return nanoseconds that all processes of this machine share; suspended time is included."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic_ns() if clock_id is None else time.clock_gettime_ns(clock_id)


def _boot_id() -> str:
    """Return a name for this boot of the machine, or "" if there is none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return ""
