"""The file: one SQLite connection, what its tables mean, and what its errors mean.

Tables. ``limiters`` has a row for each limiter: its books as of journal entry ``written``, as text;
``seq``, the number of its last journal entry; and ``until``, after which nothing needs to be
remembered. ``lineage`` and ``origin`` are needed if a file is lost: see `Replica`. ``journal`` holds
the entries since: what was done to the books, and when. A process that has the books as of some
entry applies the later ones to get them as they are now. After some hundred entries the books are
written anew, and the journal starts again. So a batch costs one short row, however much the meters
remember. ``clock`` has one row, see `SharedClock`.

Every change is one transaction begun by BEGIN IMMEDIATE, so that nothing changes between reading
and writing. In WAL mode, a process killed at any instant leaves whole transactions only. The same
holds with ``synchronous=NORMAL``; after a power failure the last seconds may be missing, fewer than
a boot takes.
"""

import contextlib
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final, TypeVar

from asyncbucket.core.errors import StoreError
from asyncbucket.stores.sqlite.faults import BUSY, code_of, explanation

T = TypeVar("T")

#: Marks the file as ours: "abkt".
_APPLICATION: Final = 0x61626B74
#: The version of the tables, and of the arithmetic behind the journal's entries.
VERSION: Final = 1

#: The range of sleeps (s) before another attempt at a lock that is held.
_NAP: Final = (0.0002, 0.002)

_TABLES: Final = (
    """CREATE TABLE limiters (
        name TEXT PRIMARY KEY, lineage TEXT NOT NULL, origin TEXT NOT NULL,
        until INTEGER NOT NULL,
        seq INTEGER NOT NULL, written INTEGER NOT NULL, books TEXT NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE journal (
        name TEXT NOT NULL, seq INTEGER NOT NULL,
        at INTEGER NOT NULL, entry TEXT NOT NULL, sum INTEGER NOT NULL, PRIMARY KEY (name, seq)
    ) WITHOUT ROWID""",
    """CREATE TABLE clock (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        boot TEXT NOT NULL, ahead INTEGER NOT NULL, last INTEGER NOT NULL
    )""",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)


class File:
    """Hold one connection to the file at ``path``; for one thread at a time.

    Every method raises `StoreError` with the path, the numbers and the remedy.
    """

    def __init__(self, path: Path, *, patience: float) -> None:
        self.path = path
        self._patience = patience
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        #: Counts the files found at this path: one may be deleted, and another made.
        self.generation = 0
        self._connections = 0

    @contextlib.contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """Read and write in one step, or not at all."""
        with self._explaining_errors(), self._in_transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextlib.contextmanager
    def read_transaction(self) -> Generator[sqlite3.Connection]:
        """Read as of one instant, without holding up anyone."""
        with self._explaining_errors(), self._in_transaction("BEGIN") as connection:
            yield connection

    def changes(self) -> int:
        """Return a number that changes whenever another connection has written."""
        with self._explaining_errors():
            (count,) = self._current_connection().execute("PRAGMA data_version").fetchone()
            return int(count) + (self._connections << 32)

    def details(self) -> dict[str, str]:
        """Describe the file, for people."""
        size = sum(
            part.stat().st_size
            for part in (self.path, self.path.with_name(self.path.name + "-wal"))
            if part.exists()
        )
        return {
            "path": str(self.path),
            "size": f"{size:,} bytes",
            "free": f"{shutil.disk_usage(self.path.parent).free:,} bytes",
            "sqlite": sqlite3.sqlite_version,
            "schema": str(VERSION),
        }

    def close(self) -> None:
        """Close the connection; the next transaction opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def abandon_connection(self) -> None:
        """Leave the connection to the process that this one was forked from."""
        # It must not even be closed here, so it must not be garbage-collected either.
        _INHERITED.append(self._connection)
        self._connection = None

    @contextlib.contextmanager
    def _in_transaction(self, begin: str) -> Generator[sqlite3.Connection]:
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

    def _current_connection(self) -> sqlite3.Connection:
        """Return the connection to the file that is there now."""
        if self._connection is not None and self._identity != self._current_identity():
            self.close()
        if self._connection is None:
            self._connection = self._retry_while_busy(self._connect)
            identity = self._current_identity()
            self.generation += identity != self._identity
            self._identity = identity
            self._connections += 1
        return self._connection

    def _current_identity(self) -> tuple[int, int] | None:
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
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the tables if the file is new; refuse a file that is not ours."""
        connection.execute("BEGIN")  # as of one instant: another process may be making the tables
        application, version = self._application_and_version(connection)
        self._refuse_foreign_file(connection, application, version)
        connection.execute("COMMIT")
        self._switch_to_wal(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            connection.execute("BEGIN IMMEDIATE")
            if self._application_and_version(connection)[1] == 0:  # nobody else was faster
                for statement in _TABLES:
                    connection.execute(statement)
            connection.execute("COMMIT")

    @staticmethod
    def _application_and_version(connection: sqlite3.Connection) -> tuple[int, int]:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        return application, version

    def _refuse_foreign_file(
        self, connection: sqlite3.Connection, application: int, version: int
    ) -> None:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application not in (0, _APPLICATION) or (application == 0 and (tables or version)):
            raise StoreError(
                f"{self.path} is a database of another program ({tables} tables, application id "
                f"{application:#x}): give asyncbucket a file of its own"
            )
        if version > VERSION:
            raise StoreError(
                f"{self.path} has schema version {version}, and this asyncbucket knows versions up "
                f"to {VERSION}: upgrade asyncbucket, or use another file"
            )

    def _switch_to_wal(self, connection: sqlite3.Connection) -> None:
        """Switch to WAL, which needs exclusive access for an instant."""
        (mode,) = self._retry_while_busy(
            lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone()
        )
        if mode != "wal":
            raise StoreError(
                f"{self.path} cannot be shared: its file system gives no shared memory for a "
                f"write-ahead log (journal mode {mode!r}); use a local disk, or a Redis store"
            )

    def _retry_while_busy(self, attempt: Callable[[], T]) -> T:
        """Try until nobody else holds the lock, as long as the patience lasts.

        SQLite can wait by itself, but sleeps longer and longer, up to 0.1 s. If many processes are
        busy, the one that has waited longest is then the least likely to find the lock free. Short
        naps of random lengths give each the same chance.
        """
        end = time.monotonic() + self._patience
        while True:
            try:
                return attempt()
            except sqlite3.OperationalError as error:
                if code_of(error) not in BUSY or time.monotonic() > end:
                    raise
            time.sleep(random.uniform(*_NAP))  # noqa: S311 - no secret

    @contextlib.contextmanager
    def _explaining_errors(self) -> Generator[None]:
        """Raise SQLite's errors as errors of the store."""
        try:
            yield
        except sqlite3.Error as error:
            if code_of(error) not in BUSY:  # its state is unknown, so start afresh
                self.close()
            raise StoreError(explanation(error, self.path, patience=self._patience)) from error


#: Connections of parent processes, kept so that they are never closed here.
_INHERITED: Final[list[sqlite3.Connection | None]] = []
