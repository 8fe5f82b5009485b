"""Results on disk, so that a run that was killed continues where it was.

A checkpoint is one SQLite file. A result is committed to it before it is handed out, so a process
may be killed at any instant: what was committed is never called again, what was in flight is. An
item is recognized by a hash of what it holds, and by how many equal ones came before, so ten equal
prompts are ten calls. Failures are not kept: the next run tries them again.

The file is locked while it is in use, because two runs of the same items would pay twice.

Results are pickled. So treat a checkpoint like a pickle: do not open one that came from elsewhere.
`Checkpoint` takes functions of your own instead.
"""

import contextlib
import hashlib
import json
import os
import pickle
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass, replace
from typing import Any, Final, NamedTuple

from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.wording import shown

_VERSION: Final = "2"
_SCHEMA: Final = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, value BLOB NOT NULL);
CREATE TEMP TABLE seen (key BLOB PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
"""
_FOREIGN_TABLES: Final = """
SELECT 1 FROM sqlite_master
WHERE type = 'table' AND name NOT LIKE 'sqlite%' AND name NOT IN ('about', 'results')
"""
#: Counts how often an item came in this run, on disk rather than in memory.
COUNT: Final = """
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


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """Say where results are kept, and how; a path alone is enough for ``checkpoint=``.

    Args:
        path: the file; it is made if it does not exist.
        key: returns a text by which to recognize an item, if that is not plain data.
        dump: turns a result into bytes, instead of pickle.
        load: turns these bytes into the result; required with ``dump``.
        name: what the results are of; a checkpoint of another name is refused. By default the
            function's name, for a model's method with that of the model.

    Raises:
        TypeError: only one of ``dump`` and ``load`` is given, or one of the three is no function.
    """

    path: str | os.PathLike[str]
    _: KW_ONLY
    key: Callable[[Any], str] | None = None
    dump: Callable[[Any], bytes] | None = None
    load: Callable[[bytes], Any] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if (self.dump is None) != (self.load is None):
            raise TypeError("dump and load belong together: give both, or neither")
        for what in ("key", "dump", "load"):
            given = getattr(self, what)
            if given is not None and not callable(given):
                raise TypeError(f"{what} must be a function, not {shown(given)}")

    @classmethod
    def of(cls, value: "str | os.PathLike[str] | Checkpoint", *, name: str) -> "Checkpoint":
        """Return what is passed as ``checkpoint=`` as a checkpoint that has a name."""
        checkpoint = value if isinstance(value, Checkpoint) else cls(value)
        return replace(checkpoint, name=checkpoint.name or name)

    def __repr__(self) -> str:
        return f"<Checkpoint {os.fspath(self.path)!r}>"


class OpenCheckpoint:
    """A checkpoint in use. Its methods block while the disk works, and may run in any thread.

    Args:
        checkpoint: where it is, and what the results are of.

    Raises:
        CheckpointError: the file is in use, is not a checkpoint, or is of something else.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._dump = checkpoint.dump or pickle.dumps
        self._load = checkpoint.load or pickle.loads
        self._lock = threading.Lock()
        with self._explained(), contextlib.ExitStack() as undo:
            self._database = sqlite3.connect(
                checkpoint.path, timeout=0.5, isolation_level=None, check_same_thread=False
            )
            undo.callback(self._database.close)
            self._open()
            undo.pop_all()

    def _open(self) -> None:
        database, path, name = self._database, self._checkpoint.path, self._checkpoint.name or ""
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        if database.execute(_FOREIGN_TABLES).fetchone():
            raise CheckpointError(f"{path} is a database of another program: give another file")
        database.executescript(_SCHEMA)
        database.execute("BEGIN EXCLUSIVE")
        wanted = {"version": _VERSION, "of": name}
        found = wanted | dict(database.execute("SELECT name, value FROM about"))
        if found["version"] != _VERSION:
            raise CheckpointError(
                f"{path} is a checkpoint of version {found['version']}, this is version {_VERSION}: "
                f"give another file"
            )
        if found["of"] != name:
            raise CheckpointError(
                f"{path} holds results of {found['of']}, not of {name}: give another "
                f"file, or Checkpoint(..., name={found['of']!r}) if they are the same"
            )
        database.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", wanted.items())
        database.execute("COMMIT")

    @contextlib.contextmanager
    def _explained(self) -> Generator[None]:
        """Say what SQLite's errors mean, and what to do."""
        path = self._checkpoint.path
        try:
            yield
        except sqlite3.Error as error:
            if "locked" in str(error):
                why = "is in use by another run: let it end, or give another file"
            elif type(error) is sqlite3.DatabaseError:
                why = f"is not a checkpoint, or is damaged ({error}): give another file"
            else:
                why = (
                    f"cannot be used as a checkpoint ({error}): give a file that may be written, "
                    f"where there is room for it"
                )
            raise CheckpointError(f"{path} {why}") from error

    def look_up(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the entries with their keys, and with their results if there are any.

        Raises:
            TypeError: an item has no key.
            CheckpointError: the file cannot be read.
        """
        with self._lock, self._explained(), self._database:
            self._database.execute("BEGIN")
            return [self._with_result(entry) for entry in entries]

    def _with_result(self, entry: Entry) -> Entry:
        item = self._key(entry.input)
        ((times,),) = self._database.execute(COUNT, (item,)).fetchall()
        key = item + times.to_bytes(4, "big")
        query = "SELECT value FROM results WHERE key = ?"
        row = self._database.execute(query, (key,)).fetchone()
        if row is None:
            return entry._replace(key=key)
        try:
            return entry._replace(key=key, stored=(self._load(row[0]),))
        except Exception as error:
            raise CheckpointError(
                f"a result in {self._checkpoint.path} cannot be read: {error}; its classes must be "
                f"importable as when it was kept, or give another file"
            ) from error

    def _key(self, item: Any) -> bytes:
        if self._checkpoint.key is None:
            return key_of(item)
        text: object = self._checkpoint.key(item)
        if not isinstance(text, str):
            raise TypeError(f"key= of a checkpoint must return a string, not {shown(text)}")
        return digest("k" + text)

    def save(self, results: Mapping[bytes, Any]) -> None:
        """Keep results by the keys of their items, in one transaction.

        Raises:
            CheckpointError: one cannot be kept, but the others are; or none is: the disk is full.
        """
        rows: list[tuple[bytes, bytes]] = []
        failure: CheckpointError | None = None
        for key, result in results.items():
            try:
                rows.append((key, self._dump(result)))
            except Exception as error:  # noqa: BLE001 - raised when the others are kept
                failure = CheckpointError(
                    f"a result of type {type(result).__name__} cannot be kept: {error}; give "
                    f"Checkpoint(..., dump=, load=), or return what can be pickled"
                )
                failure.__cause__ = error
        with self._lock, self._explained(), self._database:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT OR REPLACE INTO results VALUES (?, ?)", rows)
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Release the file for the next run."""
        with self._lock:
            self._database.close()


def key_of(item: object) -> bytes:
    """Return a key that depends on what ``item`` holds, and on nothing else.

    It may consist of text, bytes, numbers, None, lists, tuples, dicts, dataclasses and pydantic
    models, nested at will. Different types are different items; the order of a dict's keys does not
    matter.

    Raises:
        TypeError: it holds something else, whose `repr` may differ from one process to the next.
    """
    try:
        return digest(json.dumps(_with_types(item), separators=(",", ":")))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"a checkpoint cannot recognize an item of type {type(item).__name__} ({error}): give "
            f"Checkpoint(..., key=...), a function from the item to a string"
        ) from error


def digest(text: str) -> bytes:
    """Return the key of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_KEY_SIZE]


def _with_types(value: Any) -> object:
    """Return ``value`` in a form that JSON can hold: anything with parts as a list, its type first.

    JSON alone would not distinguish tuples from lists, or the key 1 from "1".
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    parts: Iterable[object]
    if hasattr(value, "__pydantic_fields_set__"):  # also what only a subclass of a field's type has
        parts = [_with_types(value.model_dump(mode="json", serialize_as_any=True))]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [[field.name, _with_types(getattr(value, field.name))] for field in fields(value)]
    elif isinstance(value, (bytes, bytearray)):
        parts = [value.hex()]
    elif isinstance(value, Mapping):
        pairs = ([_with_types(key), _with_types(part)] for key, part in value.items())
        parts = sorted(pairs, key=json.dumps)
    elif isinstance(value, (list, tuple)):
        parts = map(_with_types, value)
    else:
        raise TypeError(f"it contains {type(value).__name__}")
    return [f"{type(value).__module__}.{type(value).__qualname__}", *parts]
