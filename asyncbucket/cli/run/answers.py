"""The file of answers, which alone says what is answered.

Its lines have the form of OpenAI's output files. At each start it is read from its beginning into a
temporary index, so nothing beside it can be damaged or lost. An incomplete last line, as a kill leaves
it, is cut off. The file itself is locked, by whatever name it is reached, so no two runs write it.

Other programs can change it in spite of the lock. So before each write, name and size of the file are
compared with what was written. If they differ, this answer and all later ones go to another file,
``out.rescued.jsonl``, and the run ends. At the end all answers are looked for once more.
"""

import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from asyncbucket.cli.run.lines import BadLine, Request
from asyncbucket.core.wording import counted

_PREFIX: Final = "batch_req_"
#: How each of our lines begins, complete or not.
_LINE_START: Final = b'{"id":"' + _PREFIX.encode()
_SCHEMA: Final = """
CREATE TABLE answered (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE seen (key BLOB PRIMARY KEY, line INTEGER, times INTEGER) WITHOUT ROWID;
BEGIN;
"""
_NOTE_ANSWERED: Final = "INSERT OR IGNORE INTO answered VALUES (?)"
_NOTE_SEEN: Final = """
INSERT INTO seen VALUES (?, ?, 1) ON CONFLICT (key) DO UPDATE SET times = times + 1
RETURNING line, times
"""
_APPENDING: Final = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)


class Answers:
    """The answers of a run, those of earlier runs included.

    Args:
        path: the file; None if answers go to standard output.
        settings: the settings on which answers depend; each line names them.
        restart: delete the answers so far.
        read_only: change nothing and lock nothing, for a dry run.

    Raises:
        ValueError: another run is writing the file, its answers were made with other settings, or
            other lines are in it. The message says the remedy.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        *,
        restart: bool = False,
        read_only: bool = False,
    ) -> None:
        self._path = path or Path()
        self._rescue_path = self._path.parent / f"{self._path.stem}.rescued{self._path.suffix}"
        self._settings = settings
        self._index = sqlite3.connect("", isolation_level=None)  # a file that SQLite removes
        self._index.executescript(_SCHEMA)
        self._fd: int | None = None
        self._rescue_fd: int | None = None
        self._size = 0
        self._is_new = False
        #: What is wrong with the file, if another program changed it.
        self.trouble: str | None = None
        if path is None or (read_only and (restart or not path.exists())):
            return
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            if self._rescue_path.exists():
                raise ValueError(f"an earlier run could not write all answers; {self._remedy()}")
            self._is_new = not path.exists()
            if not read_only:
                self._fd = _open_locked(path)
                if restart:
                    os.ftruncate(self._fd, 0)
            self._read(path)
            undo.pop_all()

    def _remedy(self) -> str:
        rescued, path = self._rescue_path, self._path
        return (
            f"{rescued} holds answers, too: append them (cat {rescued} >> {path}), remove it, and run the "
            f"same command again"
        )

    def _read(self, path: Path) -> None:
        """Index what is in the file, and make its last line a complete one."""
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                key, before = _parsed(line)
                if key is not None:
                    self._check_settings(before)
                    self._index.execute(_NOTE_ANSWERED, (key,))
                    self._size += len(line)
                    if not line.endswith(b"\n") and self._fd is not None:  # by an editor
                        self._size += os.write(self._fd, b"\n")
                        return
                elif line.endswith(b"\n") or not _LINE_START.startswith(line[: len(_LINE_START)]):
                    raise ValueError(
                        f"line {number} of {path} was not written by `asyncbucket run`: remove it, or "
                        f"give another -o"
                    )
                elif self._fd is not None:  # cut off by a kill
                    os.ftruncate(self._fd, self._size)

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        for name in sorted((before.keys() | self._settings.keys()) if before else ()):
            if before.get(name) != self._settings.get(name):
                raise ValueError(
                    f"{self._path} holds answers with {name.replace('_', '-')} {before.get(name)!r}, "
                    f"not {self._settings.get(name)!r}: give another -o"
                )

    def look_up(self, request: Request) -> tuple[bytes, bool]:
        """Return the key of a line, which counts equal ones before it, and whether it is answered.

        Raises:
            BadLine: another line has its ``custom_id``.
        """
        known = request.custom_id.encode("utf-8", "surrogatepass") if request.named else request.key
        row = (b"n" + known if request.named else b"k" + known, request.line)
        ((line, times),) = self._index.execute(_NOTE_SEEN, row).fetchall()
        if request.named and times > 1:
            why = f"custom_id {request.custom_id!r} is that of line {line} already"
            raise BadLine(why, request.custom_id)
        key = request.key + (1 if request.named else times).to_bytes(4, "big")
        query = "SELECT 1 FROM answered WHERE key = ?"
        return key, self._index.execute(query, (key,)).fetchone() is not None

    def write(self, key: bytes, members: Mapping[str, Any]) -> bool:
        """Append an answer, which from then on survives the end of this process.

        Return False if answers go to standard output and nobody reads it any more.
        """
        line = line_of(key, members, run=self._settings)
        if self._fd is None:
            return _to_standard_output(line)
        if self._rescue_fd is None and not self._is_intact(self._fd):
            self._rescue_fd = self._begin_rescue(self._fd)
        if self._rescue_fd is None:
            append(line, self._fd, self._path)
            self._size += len(line)
        else:
            append(line, self._rescue_fd, self._rescue_path)
        self._index.execute(_NOTE_ANSWERED, (key,))
        return True

    def _is_intact(self, fd: int) -> bool:
        return _is_at(fd, self._path) and os.fstat(fd).st_size == self._size

    def _begin_rescue(self, fd: int) -> int:
        """Return a file for all later answers, and for those before that are not at the path any more."""
        self.trouble = f"{self._path} was changed by another program during the run"
        present, size = set[bytes | None](), 0
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    present.add(_parsed(line)[0])
                    size += len(line)
        if _is_at(fd, self._path):
            os.ftruncate(fd, size)  # without half a line, others can be appended
        rescue_fd = os.open(self._rescue_path, _APPENDING, 0o666)
        os.lseek(fd, 0, os.SEEK_SET)
        with open(fd, "rb", closefd=False) as held:
            for line in held:
                if _parsed(line)[0] not in present:
                    append(line, rescue_fd, self._rescue_path)
        return rescue_fd

    def check(self) -> None:
        """Look for all answers, at the end of a run; `trouble` says what is wrong, if anything."""
        if self._fd is None:
            return
        for path in (self._path, self._rescue_path):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                keys = ((_parsed(line)[0],) for line in file if line.endswith(b"\n"))
                self._index.executemany("DELETE FROM answered WHERE key = ?", keys)
        ((missing,),) = self._index.execute("SELECT count(*) FROM answered").fetchall()
        if self.trouble is not None or missing or not self._is_intact(self._fd):
            self.trouble = f"{self._path} was changed by another program during the run"
            if missing:
                self.trouble += f", and {counted(missing, 'answers')} in it went lost"
            again = "the same command asks again for what is missing"
            self.trouble += f"; {again if self._rescue_fd is None else self._remedy()}"

    def close(self) -> None:
        """Close the files, which ends the lock."""
        for fd in (self._fd, self._rescue_fd):
            if fd is not None:
                os.close(fd)
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        is_empty = self._fd is not None and not self._size and self._is_intact(self._fd)
        if error is not None and self._is_new and is_empty:
            self._path.resolve().unlink()  # a run that was refused leaves nothing behind
        self.close()


class Errors:
    """Write failures to a file that is made with the first one; without a file, discard them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._fd: int | None = None
        if path is not None:
            path.unlink(missing_ok=True)

    def write(self, *, hide: Callable[[str], str] = str, **members: Any) -> None:
        """Append a line of these members, without what ``hide`` removes from its text."""
        if self._path is not None:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            append(hide(line_of(None, members).decode()).encode(), self._fd, self._path)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)


def line_of(key: bytes | None, members: Mapping[str, Any], **more: Any) -> bytes:
    """Return the line of an answer, or of a request without one."""
    name = None if key is None else _PREFIX + key.hex()
    default = {"custom_id": None, "response": None, "error": None, "usage": None}
    found = {"id": name, **default, **members, **more}
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def append(line: bytes, fd: int, path: Path) -> None:
    """Append a line to a file, or nothing of it.

    Raises:
        OSError: with the path, which the system's own error lacks.
    """
    size, view = os.fstat(fd).st_size, memoryview(line)
    try:
        while view:  # a signal may interrupt a write
            view = view[os.write(fd, view) :]
    except OSError as error:
        with contextlib.suppress(OSError):  # a pipe cannot be shortened
            os.ftruncate(fd, size)  # half a line would spoil the next one
        raise OSError(error.errno, error.strerror, str(path)) from error


def _to_standard_output(line: bytes) -> bool:
    try:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # Otherwise the interpreter would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _parsed(line: bytes) -> tuple[bytes | None, dict[str, Any]]:
    """Return the key of an answer, None if it is none, and the settings it was made with."""
    try:
        answer = json.loads(line)
        return bytes.fromhex(answer["id"].removeprefix(_PREFIX)), answer.get("run") or {}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None, {}


def _open_locked(path: Path) -> int:
    """Open the file at ``path`` for this process alone; the lock is on the file, not on its name."""
    while True:
        fd = os.open(path, _APPENDING, 0o666)
        try:
            if sys.platform == "win32":
                import msvcrt

                os.lseek(fd, 1 << 62, os.SEEK_SET)  # where nobody reads
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            raise ValueError(
                f"{path} is being written by another run: let it end, or give another -o"
            ) from None
        if _is_at(fd, path):
            return fd
        os.close(fd)  # it was removed in between


def _is_at(fd: int, path: Path) -> bool:
    """Tell whether ``path`` leads to the open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
