"""Which lines are answered, and what was admitted: a run that was killed continues where it was.

The file of answers is authoritative: a complete line in it is answered. Beside it is a SQLite file,
the index: the keys of the lines that are answered up to a position in that file, and the limiter's
bookings. It is updated twice a second, and after a kill by reading the file from that position on.
Every admission is written down before its request leaves; so whatever is killed, what counts in the
provider's window is known.

SQLite does not wait for the disk here: a process may be killed at any time and nothing is lost. If
the machine loses power the index may be damaged; then it is made anew from the answers.
"""

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from asyncbucket.batch.checkpoint import other_tables
from asyncbucket.cli.run.books import Admission
from asyncbucket.cli.run.output import PREFIX, append
from asyncbucket.cli.run.request import BadLine, Request

#: How each of our lines begins, complete or not.
_LINE_START: Final = b'{"id":"' + PREFIX.encode()
_SCHEMA: Final = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answered (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS admissions (at INTEGER NOT NULL, cost TEXT NOT NULL);
CREATE TEMP TABLE seen (key BLOB PRIMARY KEY, line INTEGER NOT NULL, times INTEGER NOT NULL)
WITHOUT ROWID;
"""
_OUR_TABLES: Final = frozenset({"about", "answered", "admissions"})
#: How SQLite files begin, unless they were never flushed.
_SQLITE_MAGIC: Final = b"SQLite format 3\0"
_NOTE_SEEN: Final = """
INSERT INTO seen VALUES (?, ?, 1) ON CONFLICT (key) DO UPDATE SET times = times + 1
RETURNING line, times
"""


class Ledger:
    """Keep the answers of one run in ``out``, and know what is in it.

    Args:
        out: the file of answers; None if they go to standard output, and nothing is kept.
        checkpoint: the index beside it.
        settings: the settings on which answers depend.
        restart: forget what is in the files.

    Raises:
        ValueError: another run is using the files, they were made with other settings, or ``out``
            is a foreign file. The message says the remedy.
    """

    def __init__(
        self,
        out: Path | None,
        checkpoint: Path | None,
        settings: dict[str, Any],
        *,
        restart: bool = False,
    ) -> None:
        self._out = out
        self._settings = settings
        self._unindexed: list[tuple[bytes]] = []
        self._path = ":memory:" if checkpoint is None else str(checkpoint)
        self._database = self._connect()
        self._file: BinaryIO | None = None
        try:
            if restart:  # by now no other run uses the files
                self._delete_all()
            if out is not None:
                self._file = out.open("ab", buffering=0)
                if restart:
                    self._file.truncate(0)
                self._catch_up(out)
            self._check_settings()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        try:
            with contextlib.ExitStack() as undo:
                database = sqlite3.connect(self._path, timeout=0.5, isolation_level=None)
                undo.callback(database.close)
                self._lock(database)
                undo.pop_all()
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ValueError(
                    f"{self._out} is being written by another run: let it end, or give another -o"
                ) from None
            raise unusable_error(self._path, error) from None
        except sqlite3.DatabaseError:
            if not _is_broken(Path(self._path)):
                raise self._foreign_file_error(self._path) from None
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            return self._connect()
        return database

    def _lock(self, database: sqlite3.Connection) -> None:
        """Lock the file for this run, and make the tables in it."""
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        if other_tables(database, _OUR_TABLES):
            raise self._foreign_file_error(self._path)
        database.executescript(_SCHEMA)
        database.execute("BEGIN EXCLUSIVE")
        database.execute("COMMIT")

    def _delete_all(self) -> None:
        for table in _OUR_TABLES:
            self._database.execute(f"DELETE FROM {table}")  # noqa: S608 - names of our own

    def _read_about(self, name: str) -> Any:
        row = self._database.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def _write_about(self, name: str, value: Any) -> None:
        text = json.dumps(value)
        self._database.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, text))

    def _check_settings(self) -> None:
        before = self._read_about("settings")
        answered = self._database.execute("SELECT 1 FROM answered LIMIT 1").fetchone()
        if before is None or answered is None:
            self._write_about("settings", self._settings)
            return
        for name, value in self._settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{self._out} holds answers with {name.replace('_', '-')} {before.get(name)!r}, "
                    f"not {value!r}: give another -o, or --restart to begin anew"
                )

    def _catch_up(self, out: Path) -> None:
        """Index what was written after the last update, and cut off an incomplete line at the end."""
        indexed_size = self._read_about("size") or 0
        if indexed_size > out.stat().st_size:  # somebody shortened it: it is read again
            self._database.execute("DELETE FROM answered")
            indexed_size = 0
        complete_size = indexed_size
        with out.open("rb") as file:
            file.seek(indexed_size)
            for line in file:
                if not line.endswith(b"\n"):
                    if not (line.startswith(_LINE_START) or _LINE_START.startswith(line)):
                        raise self._foreign_file_error(out)
                    break
                self._unindexed.append((self._key_in(line),))
                complete_size += len(line)
                if len(self._unindexed) >= 10_000:  # noqa: PLR2004 - a transaction of some size
                    self._write(complete_size)
        os.truncate(out, complete_size)
        self._write(complete_size)

    def _key_in(self, line: bytes) -> bytes:
        try:
            found = json.loads(line)["id"]
            return bytes.fromhex(found.removeprefix(PREFIX))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._foreign_file_error(self._out) from None

    def _foreign_file_error(self, path: object) -> ValueError:
        remedy = ", or --restart to overwrite it" if path == self._out else ""
        return ValueError(
            f"{path} exists and was not written by `asyncbucket run`: give another -o{remedy}"
        )

    def look_up(self, request: Request) -> tuple[bytes, bool]:
        """Return the key of a line, which counts equal ones before it, and whether it is answered.

        Raises:
            BadLine: another line has its ``custom_id``.
        """
        known = request.custom_id.encode("utf-8", "surrogatepass") if request.named else request.key
        row = (b"n" + known if request.named else b"k" + known, request.line)
        ((line, times),) = self._database.execute(_NOTE_SEEN, row).fetchall()
        if request.named and times > 1:
            why = f"custom_id {request.custom_id!r} is that of line {line} already"
            raise BadLine(why, request.custom_id)
        key = request.key + (1 if request.named else times).to_bytes(4, "big")
        query = "SELECT 1 FROM answered WHERE key = ?"
        return key, self._database.execute(query, (key,)).fetchone() is not None

    @contextlib.contextmanager
    def looking_up(self) -> Generator[None]:
        """Look up several lines at once: one transaction is faster."""
        self._database.execute("BEGIN")
        try:
            yield
        finally:
            self._database.execute("COMMIT")

    def write(self, key: bytes, line: bytes) -> None:
        """Append an answer; from then on it survives the end of this process."""
        if self._file is not None and self._out is not None:
            append(line, self._file, self._out)
            self._unindexed.append((key,))

    def note_admission(self, cost: dict[str, int]) -> None:
        """Write down an admission, before its request leaves."""
        row = (time.time_ns(), json.dumps(cost))
        self._database.execute("INSERT INTO admissions VALUES (?, ?)", row)

    def admissions(self) -> list[Admission]:
        """Return the admissions since the limiter's bookings were last kept."""
        rows = self._database.execute("SELECT at, cost FROM admissions ORDER BY at").fetchall()
        return [Admission(at, json.loads(cost)) for at, cost in rows]

    def bookings(self) -> dict[str, Any] | None:
        """Return the limiter's bookings as they were kept."""
        found: dict[str, Any] | None = self._read_about("bookings")
        return found

    def save(self, bookings: dict[str, Any]) -> None:
        """Update the index, with the limiter's bookings of this very instant."""
        self._write(None if self._file is None else self._file.tell(), bookings)

    def _write(self, size: int | None, bookings: dict[str, Any] | None = None) -> None:
        database = self._database
        database.execute("BEGIN")
        database.executemany("INSERT OR IGNORE INTO answered VALUES (?)", self._unindexed)
        if size is not None:
            self._write_about("size", size)
        if bookings is not None:
            self._write_about("bookings", bookings)
            database.execute("DELETE FROM admissions")
        database.execute("COMMIT")
        self._unindexed.clear()

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def unusable_error(path: object, error: sqlite3.Error) -> ValueError:
    """Return the error for an index that cannot be read or written."""
    return ValueError(
        f"{path}, the index of the answers, cannot be written ({error}): make room and run the same "
        f"command again, or give another -o"
    )


def _is_broken(path: Path) -> bool:
    """Tell whether an unreadable file may have been a database: only then it is made anew."""
    with path.open("rb") as file:
        return file.read(len(_SQLITE_MAGIC)) in (_SQLITE_MAGIC, bytes(len(_SQLITE_MAGIC)))
