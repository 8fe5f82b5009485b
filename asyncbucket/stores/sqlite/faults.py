"""What SQLite's errors mean for the reader: what happened, the numbers, the remedy."""

import os
import shutil
import sqlite3
from pathlib import Path
from typing import Final

#: Another connection holds the lock.
BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

_LOCKED: Final = (
    "another process has held the write lock for over {patience:g} s; find it with `fuser {path}`, "
    "or allow more with ?patience={more:g}"
)
_RIGHTS: Final = "give this user the right to write the file and its folder {folder}"
_DAMAGED: Final = (
    "it is not a SQLite file, or is damaged ({error}): move it away, and a new one is made"
)
_MEANINGS: Final = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_FULL: (
        "no space is left ({free} free), so nothing was booked; free some, or move the file to "
        "another disk"
    ),
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: {trouble}, or give another path",
    sqlite3.SQLITE_READONLY: _RIGHTS,
    sqlite3.SQLITE_PERM: _RIGHTS,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_IOERR: (
        "the disk failed to read or write ({error}; {free} free): look at the disk, or move the "
        "file to another"
    ),
}
_UNKNOWN: Final = "SQLite failed ({error}), and nothing was booked; please report this"


def code_of(error: sqlite3.Error) -> int:
    """Return the primary result code; 0 for errors of the module itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def explanation(error: sqlite3.Error, path: Path, *, patience: float) -> str:
    """Return what ``error`` means for the file at ``path``."""
    return f"{path}: " + _MEANINGS.get(code_of(error), _UNKNOWN).format(
        path=path,
        folder=path.parent,
        error=error,
        patience=patience,
        more=max(5, patience * 4),
        free=_free(path.parent),
        trouble=_trouble(path.parent),
    )


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes"
    except OSError:
        return "an unknown amount"


def _trouble(folder: Path) -> str:
    if not folder.exists():
        return f"there is no folder {folder}; make the folder"
    if not os.access(folder, os.W_OK):
        return f"the folder {folder} is not writable; give this user the right to write there"
    return "it is not a plain file, or may not be read; see what it is"
