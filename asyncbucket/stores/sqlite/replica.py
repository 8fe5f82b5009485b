"""A process's own copy of one limiter's books, kept up to date with the file.

Reading the whole books for each batch would cost more than the batch. So each process keeps a copy,
and applies what others have entered in the journal since. Each entry carries a checksum of the
books after it; a copy with another checksum was computed by other arithmetic, and is discarded.
"""

import secrets
import sqlite3
from typing import Any, Final

from asyncbucket.core.errors import StoreError
from asyncbucket.stores.sqlite import serialization, verbs
from asyncbucket.stores.sqlite.books import Books
from asyncbucket.stores.sqlite.verbs import Configure, Verb

#: After this many entries in the journal the books are written anew.
_MAX_ENTRIES: Final = 256


class Replica:
    """Keep the books of the limiter called ``name``; used inside transactions of one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.books: Books | None = None
        #: An identifier of the books that outlives the file: a copy that has it shares their past.
        self._lineage = ""
        #: The last entry applied to our copy, and the entry as of which the file has the books.
        self._seq = 0
        self._written = 0
        #: Which of the files at its path the copy belongs to.
        self._generation = 0
        #: Whether our copy differs from any file, or there is none.
        self._stale = True
        #: Whether this transaction has changed our copy.
        self._dirty = False

    def catch_up(self, connection: sqlite3.Connection, generation: int, now: int) -> None:
        """Bring our copy up to the file; if the file was lost and made anew, put our copy into it."""
        row = connection.execute(
            "SELECT lineage, seq, written FROM limiters WHERE name = ?", (self.name,)
        ).fetchone()
        if row is None:
            if self.books is not None:
                self._restore(connection, generation, now)
            return
        ours = self.books if generation != self._generation else None
        lineage, seq, self._written = row
        if ours is not None or self._stale or self._seq < self._written:
            self._read(connection)
        self._apply_journal(connection, seq)
        self._generation = generation
        if ours is not None:
            self._absorb(connection, ours, now, known=lineage == self._lineage)
        self._lineage = lineage

    def refresh(self, connection: sqlite3.Connection, generation: int) -> None:
        """Apply what others have entered, if our copy is of this file; write nothing."""
        if not self._stale and generation == self._generation:
            self.catch_up(connection, generation, 0)

    def apply(self, connection: sqlite3.Connection, generation: int, verb: Verb, now: int) -> Any:
        """Apply ``verb`` to the books, enter it in the journal, and return its answer."""
        self._dirty = True
        if self.books is None:
            assert isinstance(verb, Configure)
            self._create(connection, generation, Books(verb.terms), now)
        assert self.books is not None
        answer = verbs.apply(verb, self.books, now)
        self._seq += 1
        connection.execute(
            "INSERT INTO journal VALUES (?, ?, ?, ?, ?)",
            (self.name, self._seq, now, verbs.to_text(verb), self.books.checksum()),
        )
        return answer

    def save(self, connection: sqlite3.Connection, now: int) -> None:
        """Note how far the journal goes; write the books anew if it has grown long."""
        if not self._dirty:
            return
        assert self.books is not None
        connection.execute(
            "UPDATE limiters SET seq = ?, until = ? WHERE name = ?",
            (self._seq, self.books.expires_at(now), self.name),
        )
        if self._seq - self._written >= _MAX_ENTRIES:
            self._write(connection)

    def committed(self) -> None:
        """Note that the file has what our copy has."""
        self._dirty = False

    def failed(self) -> None:
        """Note that the transaction failed: what it did to our copy is void."""
        self._stale = self._stale or self._dirty
        self._dirty = False

    def _create(
        self, connection: sqlite3.Connection, generation: int, books: Books, now: int
    ) -> None:
        connection.execute("DELETE FROM limiters WHERE until < ?", (now,))
        connection.execute("DELETE FROM journal WHERE name NOT IN (SELECT name FROM limiters)")
        self.books, self._generation = books, generation
        self._lineage = secrets.token_hex(8)
        self._seq = self._written = 0
        self._insert(connection, "", now)
        self._stale = False

    def _restore(self, connection: sqlite3.Connection, generation: int, now: int) -> None:
        """Put our copy into the file, which was deleted, or had dropped it as outdated."""
        assert self.books is not None
        self._generation, self._dirty = generation, True
        self._insert(connection, serialization.to_text(self.books), now)
        self._written = self._seq
        self._stale = False

    def _insert(self, connection: sqlite3.Connection, origin: str, now: int) -> None:
        assert self.books is not None
        text, until = serialization.to_text(self.books), self.books.expires_at(now)
        connection.execute(
            "INSERT INTO limiters VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self.name, self._lineage, origin, until, self._seq, self._seq, text),
        )

    def _read(self, connection: sqlite3.Connection) -> None:
        (text,) = connection.execute(
            "SELECT books FROM limiters WHERE name = ?", (self.name,)
        ).fetchone()
        self.books = serialization.from_text(text)
        self._seq = self._written
        self._stale = False

    def _apply_journal(self, connection: sqlite3.Connection, seq: int) -> None:
        """Apply the entries up to ``seq`` that our copy lacks."""
        if self._seq == seq:
            return
        assert self.books is not None
        entries = connection.execute(
            "SELECT seq, at, entry, sum FROM journal WHERE name = ? AND seq > ? ORDER BY seq",
            (self.name, self._seq),
        )
        for number, at, entry, total in entries:
            verbs.apply(verbs.from_text(entry), self.books, at)
            self._seq = number
            if self.books.checksum() != total:
                self._stale = True
                raise StoreError(
                    f"entry {number:,} of limiter {self.name!r} was made by a version of "
                    f"asyncbucket that counts differently: use one version for one file"
                )

    def _absorb(
        self, connection: sqlite3.Connection, ours: Books, now: int, *, known: bool
    ) -> None:
        """Charge to the books begun since what only our copy of a lost file knows."""
        assert self.books is not None
        (origin,) = connection.execute(
            "SELECT origin FROM limiters WHERE name = ?", (self.name,)
        ).fetchone()
        origin_books = (
            serialization.from_text(origin) if known and origin else Books(self.books.terms)
        )
        self.books.absorb(ours, now, origin=origin_books)
        self._dirty = True
        self._seq += 1
        self._write(connection)

    def _write(self, connection: sqlite3.Connection) -> None:
        """Write the books as they are, and start the journal again."""
        assert self.books is not None
        connection.execute(
            "UPDATE limiters SET seq = ?, written = ?, books = ? WHERE name = ?",
            (self._seq, self._seq, serialization.to_text(self.books), self.name),
        )
        connection.execute("DELETE FROM journal WHERE name = ?", (self.name,))
        self._written = self._seq
