"""Results on disk, so that a run that was killed continues where it was.

A checkpoint is one SQLite file. A result is committed to it before it is handed out, so a process
may be killed at any instant: what was committed is never called again, what was in flight is. An
item is recognized by a hash of what it holds, and by how many equal ones came before, so ten equal
prompts are ten calls. Failures are not kept: the next run tries them again.

The file is locked while it is in use, because two runs of the same items would pay twice.

Results that JSON returns unchanged are kept as JSON, others are pickled. So treat a checkpoint like
a pickle: do not open one that came from elsewhere. `Checkpoint` takes functions of your own
instead.
"""

import contextlib
import copy
import json
import os
import pickle
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from asyncbucket.batch.item import Entry
from asyncbucket.batch.keys import digest, is_plain, key_of
from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.wording import shown

_JSON, _PICKLE, _OWN = 0, 1, 2
_VERSION: Final = "1"
_SCHEMA: Final = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, kind INTEGER NOT NULL, value BLOB NOT NULL);
CREATE TEMP TABLE seen (key BLOB PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
"""
_TABLES: Final = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
_OURS: Final = frozenset({"about", "results"})
#: Counts how often an item came in this run, on disk rather than in memory.
_COUNT: Final = """
INSERT INTO seen VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET times = times + 1 RETURNING times
"""


def other_tables(database: sqlite3.Connection, ours: frozenset[str]) -> frozenset[str]:
    """Return the tables of a database that are not ``ours``: it belongs to another program."""
    return frozenset(table for (table,) in database.execute(_TABLES)) - ours


class CheckpointError(AsyncBucketError):
    """Say that a checkpoint is in use, belongs to something else, or cannot keep a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Codec:
    dump: Callable[[Any], bytes]
    load: Callable[[bytes], Any]


class Checkpoint:
    """Say where results are kept, and how; a path alone is enough for ``checkpoint=``.

    Args:
        path: the file; it is made if it does not exist.
        key: returns a text by which to recognize an item, if that is not plain data.
        dump: turns a result into bytes, instead of JSON or pickle.
        load: turns these bytes into the result; required with ``dump``.
        name: what the results are of; a checkpoint of another name is refused. By default the
            function's name, for a model's method with that of the model.

    Raises:
        TypeError: only one of ``dump`` and ``load`` is given, or one of the three is no function.
    """

    __slots__ = ("codec", "key", "name", "path")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        key: Callable[[Any], str] | None = None,
        dump: Callable[[Any], bytes] | None = None,
        load: Callable[[bytes], Any] | None = None,
        name: str | None = None,
    ) -> None:
        if (dump is None) != (load is None):
            raise TypeError("dump and load belong together: give both, or neither")
        for what, given in (("key", key), ("dump", dump), ("load", load)):
            if given is not None and not callable(given):
                raise TypeError(f"{what} must be a function, not {shown(given)}")
        self.path = Path(path)
        self.key = key
        self.codec = None if dump is None or load is None else _Codec(dump=dump, load=load)
        self.name = name

    @classmethod
    def of(cls, value: "str | os.PathLike[str] | Checkpoint", *, name: str) -> "Checkpoint":
        """Return what is passed as ``checkpoint=`` as a checkpoint that has a name."""
        if not isinstance(value, Checkpoint):
            return cls(value, name=name)
        named = copy.copy(value)
        named.name = value.name or name
        return named

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}>"


class Ledger:
    """A checkpoint in use. Its methods block while the disk works, and may run in any thread.

    Args:
        checkpoint: where it is, and what the results are of.

    Raises:
        CheckpointError: the file is in use, is not a checkpoint, or is of something else.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(
                checkpoint.path, timeout=0.5, isolation_level=None, check_same_thread=False
            )
            with contextlib.ExitStack() as undo:
                undo.callback(self._database.close)
                self._open(checkpoint.name or "")
                undo.pop_all()
        except sqlite3.Error as error:
            raise CheckpointError(self._reason(error)) from error

    def _open(self, name: str) -> None:
        database = self._database
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        if other_tables(database, _OURS):
            raise CheckpointError(
                f"{self._checkpoint.path} is a database of another program: give another file"
            )
        database.executescript(_SCHEMA)
        database.execute("BEGIN EXCLUSIVE")
        about = dict(database.execute("SELECT name, value FROM about"))
        found = about.get("of", name)
        if about.get("version", _VERSION) != _VERSION:
            raise CheckpointError(
                f"{self._checkpoint.path} is a checkpoint of version {about['version']}, "
                f"this is version {_VERSION}: give another file"
            )
        if found != name:
            raise CheckpointError(
                f"{self._checkpoint.path} holds results of {found}, not of {name}: give another "
                f"file, or Checkpoint(..., name={found!r}) if they are the same"
            )
        database.executemany(
            "INSERT OR IGNORE INTO about VALUES (?, ?)", [("version", _VERSION), ("of", name)]
        )
        database.execute("COMMIT")

    def _reason(self, error: sqlite3.Error) -> str:
        path = self._checkpoint.path
        if "locked" in str(error):
            return f"{path} is in use by another run: let it end, or give another file"
        if type(error) is sqlite3.DatabaseError:  # it is not a database, or damaged
            return f"{path} is not a checkpoint, or is damaged ({error}): give another file"
        return (
            f"{path} cannot be used as a checkpoint ({error}): give a file that may be written, "
            f"where there is room for it"
        )

    def look_up(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the entries with their keys, and with their results if there are any.

        Raises:
            TypeError: an item has no key.
            CheckpointError: the file cannot be read.
        """
        with self._lock, self._transaction():
            return [self._with_result(entry) for entry in entries]

    def _with_result(self, entry: Entry) -> Entry:
        item = self._key(entry.input)
        ((times,),) = self._database.execute(_COUNT, (item,)).fetchall()
        key = item + times.to_bytes(4, "big")
        query = "SELECT kind, value FROM results WHERE key = ?"
        row = self._database.execute(query, (key,)).fetchone()
        stored = None if row is None else (self._load(*row),)
        return entry._replace(key=key, stored=stored)

    def _key(self, item: Any) -> bytes:
        key_function = self._checkpoint.key
        if key_function is None:
            return key_of(item)
        text: object = key_function(item)
        if not isinstance(text, str):
            raise TypeError(f"key= of a checkpoint must return a string, not {shown(text)}")
        return digest(b"k" + text.encode("utf-8", "surrogatepass"))

    def save(self, results: Iterable[tuple[bytes, Any]]) -> None:
        """Keep results by their keys, all that can be.

        Raises:
            CheckpointError: one of them cannot be kept; or the disk is full, and none is.
        """
        rows: list[tuple[bytes, int, bytes]] = []
        failure: CheckpointError | None = None
        for key, result in results:
            try:
                rows.append((key, *self._dump(result)))
            except CheckpointError as error:  # the others were paid for, too
                failure = error
        with self._lock, self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", rows)
        if failure is not None:
            raise failure

    def _dump(self, result: Any) -> tuple[int, bytes]:
        codec = self._checkpoint.codec
        try:
            if codec is not None:
                return _OWN, codec.dump(result)
            if is_plain(result):
                return _JSON, json.dumps(result, separators=(",", ":")).encode()
            return _PICKLE, pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise CheckpointError(
                f"a result of type {type(result).__name__} cannot be kept: {error}; give "
                f"Checkpoint(..., dump=, load=), or return what can be pickled"
            ) from error

    def _load(self, kind: int, value: bytes) -> Any:
        codec = self._checkpoint.codec
        if (kind == _OWN) != (codec is not None):
            raise CheckpointError(
                f"{self._checkpoint.path} was written {'with' if kind == _OWN else 'without'} "
                f"dump= and load=: read it likewise, or give another file"
            )
        if kind == _JSON:
            return json.loads(value)
        try:
            return pickle.loads(value) if codec is None else codec.load(value)  # noqa: S301 - said above
        except Exception as error:
            raise CheckpointError(
                f"a result in {self._checkpoint.path} cannot be read: {error}; its classes must be "
                f"importable as when it was kept, or give another file"
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Generator[None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise CheckpointError(self._reason(error)) from error

    def close(self) -> None:
        """Release the file for the next run."""
        with self._lock:
            self._database.close()
