"""Limits shared by the processes of one machine, in a file: ``store="sqlite:///limits.db"``.

No server, nothing to install. Bookings survive restarts, so limits of a day or a month still hold.
A process may be killed at any instant: the file holds whole batches only, and the slots of dead
processes come back when they expire.

The modules, bottom up: `books` is the arithmetic, pure, with `admission`, a batch's way through it,
and `line`, who is next; `verbs` are the operations on it, as values; `serialization` is the books as
text; `clock` the one clock of all processes; `file` the SQLite file, and `faults` what its errors
mean; `replica` a process's copy of the books; `file_thread` the thread that works on the file;
`closing` decides when files must be closed; `ledger` is what a worker uses.
"""

import asyncio
import os
import secrets
import weakref
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from asyncbucket.stores.sqlite.clock import SharedClock
from asyncbucket.stores.sqlite.file import File
from asyncbucket.stores.sqlite.file_thread import FileThread
from asyncbucket.stores.sqlite.ledger import SQLiteLedger
from asyncbucket.stores.store import Snapshot, Terms, check_membership

__all__ = ["SQLiteLedger", "SQLiteStore", "from_url"]

#: Within this many seconds the store answers or says why not.
PATIENCE: Final = 0.2
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
        self._patience = patience
        self._file_thread = FileThread(
            File(self._path, patience=patience), SharedClock() if clock is None else clock
        )
        weakref.finalize(self, self._file_thread.stop).atexit = False

    @property
    def url(self) -> str:
        """A URL that leads to the same file from any working directory."""
        patience = "" if self._patience == PATIENCE else f"?patience={self._patience}"
        return f"sqlite:///{quote(str(self._path))}{patience}"

    def check(self, terms: Terms) -> None:
        """See `asyncbucket.stores.store.Store.check`: whole numbers of any size can be counted."""

    async def open(
        self, name: str, terms: Terms, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> SQLiteLedger:
        """See `asyncbucket.stores.store.Store.open`."""
        check_membership(name, slot_ttl)
        worker = worker or f"{os.getpid()}-{secrets.token_hex(6)}"
        ledger = self._ledger(name, terms, worker, life=round(slot_ttl * 1_000_000_000))
        await ledger.join()
        return ledger

    async def peek(self, name: str) -> Snapshot | None:
        """See `asyncbucket.stores.store.Store.peek`; it makes no file if there is none."""
        return await self._reader(name).look() if self._path.exists() else None

    async def names(self) -> list[str]:
        """See `asyncbucket.stores.store.Store.names`; it makes no file if there is none."""
        return await self._reader("").names() if self._path.exists() else []

    def _reader(self, name: str) -> SQLiteLedger:
        return self._ledger(name, Terms(limits=()), "", life=0)

    def _ledger(self, name: str, terms: Terms, worker: str, *, life: int) -> SQLiteLedger:
        ledger = SQLiteLedger(
            self._file_thread, name, terms, worker=worker, life=life, patience=self._patience
        )
        ledger.store = self
        return ledger

    async def aclose(self) -> None:
        """Finish what is in progress, and close the file."""
        thread = self._file_thread.stop()
        if thread is not None:
            await asyncio.to_thread(thread.join)

    def __repr__(self) -> str:
        return f"<SQLiteStore {self._path}>"


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
