"""Results on disk, so that a run that was killed continues where it was.

A checkpoint is one SQLite file. A result is committed to it before it is handed out, so a process
may be killed at any instant: what was committed is never called again, what was in flight is. An
item is recognized by a hash of what it holds, and by how many equal ones came before, so ten equal
prompts are ten calls. Failures are not kept: the next run tries them again.

The file is locked while it is in use, because two runs of the same items would pay twice.

Results are pickled. So treat a checkpoint like a pickle: do not open one that came from elsewhere.
"""

import contextlib
import hashlib
import json
import os
import pickle
import sqlite3
import threading
from collections.abc import Generator, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final, NamedTuple

from asyncbucket.engine.errors import AsyncBucketError

#: Marks our files, and their version: SQLite keeps it in the head of each file.
_APPLICATION_ID: Final = 0x6162_0003
_SCHEMA: Final = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, value BLOB NOT NULL);
CREATE TEMP TABLE seen (key BLOB PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
"""
#: Counts how often an item came in this run, on disk rather than in memory.
_COUNT: Final = """
INSERT INTO seen VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET times = times + 1 RETURNING times
"""
#: Bytes of a key; the chance that two of a billion items share one is under 1e-20.
_KEY_SIZE: Final = 16


class CheckpointError(AsyncBucketError):
    """Say that a checkpoint is in use, belongs to something else, or cannot keep a result."""


class Entry(NamedTuple):
    """One item on its way in."""

    number: int
    input: Any
    #: The key by which a checkpoint recognizes it.
    key: bytes = b""
    #: What the checkpoint has for it: a tuple of one result, because that may be None.
    stored: tuple[Any] | None = None


class Checkpoint:
    """A checkpoint in use. Its methods block while the disk works, and may run in any thread.

    Args:
        path: the file; it is made if it does not exist.
        name: what the results are of.

    Raises:
        CheckpointError: the file is in use, is not a checkpoint, or is of something else.
    """

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self._path = path
        #: A task that is cancelled leaves its thread at work here, perhaps until after `close`.
        self._lock = threading.Lock()
        with self._explained(), contextlib.ExitStack() as undo:
            self._database = sqlite3.connect(
                path, timeout=0.5, isolation_level=None, check_same_thread=False
            )
            undo.callback(self._database.close)
            self._open(name)
            undo.pop_all()

    def _open(self, name: str) -> None:
        database, path = self._database, self._path
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        ((mark,),) = database.execute("PRAGMA application_id")
        if mark != _APPLICATION_ID and database.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise CheckpointError(
                f"{path} is a database of another program, or a checkpoint of another version: give "
                f"another file"
            )
        database.executescript(_SCHEMA)
        database.execute("INSERT OR IGNORE INTO about VALUES ('of', ?)", (name,))
        ((found,),) = database.execute("SELECT value FROM about WHERE name = 'of'")
        if found != name:
            raise CheckpointError(
                f"{path} holds results of {found}, not of {name}: give another file"
            )

    @contextlib.contextmanager
    def _explained(self) -> Generator[None]:
        """Say what SQLite's errors mean, and what to do."""
        try:
            yield
        except sqlite3.Error as error:
            if "locked" in str(error):
                why = "is in use by another run: let it end, or give another file"
            elif type(error) is sqlite3.DatabaseError:
                why = f"is not a checkpoint, or is damaged ({error}): give another file"
            else:
                why = (
                    f"cannot be used as a checkpoint ({error}): give a writable file on a disk with "
                    f"free space"
                )
            raise CheckpointError(f"{self._path} {why}") from error

    def look_up(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the entries with their keys, and with their results if there are any.

        Raises:
            TypeError: an item has no key.
            CheckpointError: the file, or a result in it, cannot be read.
        """
        with self._lock, self._explained(), self._database:
            self._database.execute("BEGIN")
            return [self._with_result(entry) for entry in entries]

    def _with_result(self, entry: Entry) -> Entry:
        item = _key_of(entry.input)
        ((times,),) = self._database.execute(_COUNT, (item,)).fetchall()
        key = item + times.to_bytes(4, "big")
        query = "SELECT value FROM results WHERE key = ?"
        row = self._database.execute(query, (key,)).fetchone()
        if row is None:
            return entry._replace(key=key)
        try:
            return entry._replace(key=key, stored=(pickle.loads(row[0]),))  # noqa: S301 - our own
        except Exception as error:
            raise CheckpointError(
                f"a result in {self._path} cannot be read: {error}; its classes must be importable "
                f"as when it was kept, or give another file"
            ) from error

    def save(self, results: Mapping[bytes, Any]) -> None:
        """Keep results by the keys of their items, in one transaction.

        Raises:
            CheckpointError: one cannot be kept, but the others are; or none is: the disk is full.
        """
        failure, kind = None, ""
        with self._lock, self._explained(), self._database:
            self._database.execute("BEGIN")
            for key, result in results.items():
                try:
                    row = key, pickle.dumps(result)
                except Exception as error:  # noqa: BLE001 - raised when the others are kept
                    failure, kind = error, type(result).__name__
                else:
                    self._database.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", row)
        if failure is not None:
            raise CheckpointError(
                f"a result of type {kind} cannot be kept: {failure}; return what can be pickled, such "
                f"as its text"
            ) from failure

    def close(self, unsaved: Mapping[bytes, Any]) -> None:
        """Save what still has to be saved, as `save` does, and release the file for the next run."""
        try:
            self.save(unsaved)
        finally:
            with self._lock:
                self._database.close()


def _key_of(item: object) -> bytes:
    """Return a key that depends on what ``item`` holds, and on nothing else.

    It may be what JSON can hold, bytes, dataclasses and pydantic models, nested at will.

    Raises:
        TypeError: it holds something else, whose `repr` may differ from one process to the next.
    """
    try:
        text = json.dumps(item, sort_keys=True, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"a checkpoint cannot recognize an item of type {type(item).__name__} ({error}): give "
            f"plain data, such as an id, and look up the rest in the function"
        ) from error
    return hashlib.sha256(text.encode()).digest()[:_KEY_SIZE]


def _plain(part: Any) -> object:
    """Return what JSON cannot hold as a list of its type and its parts."""
    parts: object
    if hasattr(part, "__pydantic_fields_set__"):  # also what only a subclass of a field's type has
        parts = part.model_dump(mode="json", serialize_as_any=True)
    elif is_dataclass(part) and not isinstance(part, type):
        parts = {field.name: getattr(part, field.name) for field in fields(part)}
    elif isinstance(part, bytes):
        parts = part.hex()
    else:
        raise TypeError(f"it contains {type(part).__name__}")
    return [f"{type(part).__module__}.{type(part).__qualname__}", parts]
