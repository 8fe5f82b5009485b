"""The lines that go in, and the answers that come out, one a line.

What goes in are requests of OpenAI's batch files, bodies, or prompts. The file of answers alone says
which of them are answered.

Its lines have the form of OpenAI's output files. At each start it is read from its beginning, so
nothing beside it can be damaged or lost. An incomplete last line, as a kill leaves it, is cut off. The
file itself is locked, by whatever name it is reached, so no two runs write it. (On Windows there is no
such lock.) What another program removes from it is asked again at the next start.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from asyncbucket.cli.run import PATHS, Job
from asyncbucket.plan.calls import read_line


class _Body(NamedTuple):
    """What bodies for a path have: members of which one must be there, and the reply's limit."""

    asked: dict[str, tuple[type, ...]]
    max_tokens: str | None = None


_BODIES: Final = {
    "/v1/chat/completions": _Body({"messages": (list,)}, "max_completion_tokens"),
    "/v1/responses": _Body(
        {"input": (str, list), "prompt": (dict,), "previous_response_id": (str,)},
        "max_output_tokens",
    ),
    "/v1/completions": _Body({"prompt": (str, list)}, "max_tokens"),
    "/v1/embeddings": _Body({"input": (str, list)}),
}
_MAX_TOKENS: Final = frozenset(body.max_tokens for body in _BODIES.values())
_PREFIX: Final = "batch_req_"
#: How each of our lines begins, complete or not.
_LINE_START: Final = b'{"id":"' + _PREFIX.encode()
#: Bytes that must fit on the disk before anything is paid for.
_ROOM: Final = 1 << 20
_APPENDING: Final = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)


class NoModelError(ValueError):
    """Say that a line names no model; probably none does."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call to be made.

    Attributes:
        line: the number of its line, from 1.
        custom_id: the user's id for it; made from the line number if there is none.
        path: such as ``/v1/chat/completions``.
        key: by which another run recognizes it, once equal ones before it are counted.
    """

    line: int
    custom_id: str
    path: str
    body: dict[str, Any]
    key: bytes


def read_request(number: int, data: bytes, job: Job) -> Request | None:
    """Read line ``number``; None for an empty one.

    A JSON object is a batch line if it has a ``body`` or a ``custom_id``, else a body. A JSON string,
    and every line that isn't JSON, is a prompt.

    Raises:
        ValueError: it is none of these; the message is for people.
    """
    if not data.strip():
        return None
    line, path, custom_id = read_line(data), PATHS[job.endpoint], None
    body: Any
    if isinstance(line, str):
        body = _prompt_body(line, job)
    elif not isinstance(line, dict):
        raise ValueError("JSON, but neither a text nor an object: put quotes around a prompt")  # noqa: TRY004 - of a file
    elif "custom_id" in line or "body" in line:
        custom_id, path, body = line.get("custom_id"), line.get("url", path), line.get("body")
        if not isinstance(custom_id, str) or not custom_id:
            raise ValueError("custom_id is missing, or not text")
        if not isinstance(path, str) or path not in _BODIES:
            raise ValueError(f"url is {path!r}, known: {', '.join(_BODIES)}")
        if not isinstance(body, dict):
            raise ValueError("body is missing, or not an object")  # noqa: TRY004 - of a file
    elif isinstance(line.get("prompt"), str) and line.keys().isdisjoint({"messages", "input"}):
        body = _prompt_body(line.pop("prompt"), job) | line
    else:
        body = line
    body = _completed(path, body, job)
    try:
        identity = json.dumps([custom_id, path, body], sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    key = hashlib.sha256(identity.encode()).digest()[:16]
    return Request(number, custom_id or f"line-{number}", path, body, key)


def _prompt_body(prompt: str, job: Job) -> dict[str, Any]:
    """Return the members of a body that ask ``prompt``."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if job.endpoint == "chat":
        system = [] if job.system is None else [{"role": "system", "content": job.system}]
        return {"messages": [*system, {"role": "user", "content": prompt}]}
    if job.endpoint == "responses" and job.system is not None:
        return {"input": prompt, "instructions": job.system}
    return {"input": prompt}


def _completed(path: str, body: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return a body with what the options say."""
    asked, limit = _BODIES[path]
    if not any(isinstance(body.get(name), types) and body[name] for name, types in asked.items()):
        raise ValueError(f"nothing to answer: a body for {path} needs {' or '.join(asked)}")
    if body.get("stream"):
        raise ValueError("the body asks for a stream, which cannot be a line of a file")
    if job.model is not None:
        body = {**body, "model": job.model}
    if not isinstance(body.get("model"), str):
        raise NoModelError("no model: give --model, or name one in the body")
    if job.max_tokens and limit and body.keys().isdisjoint(_MAX_TOKENS):
        body = {**body, limit: job.max_tokens}
    return body


class Answers:
    """The answers of a run, those of earlier runs included; locked and writable in a ``with`` block.

    Args:
        path: the file.
        settings: the settings on which answers depend; each line names them.

    Raises:
        ValueError: another run is writing the file, its answers were made with other settings, or
            other lines are in it. The message says the remedy.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = settings
        #: The keys of all answers, and how many lines had which content.
        self._answered = set[bytes]()
        self._times = Counter[bytes]()
        self._fd: int
        #: The size of the file after the last whole line.
        self._size = 0

    def __enter__(self) -> Self:
        self._fd = os.open(self._path, _APPENDING, 0o666)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._fd)
            _lock(self._fd, self._path)
            self.read()
            self._complete_last_line()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._size:  # a run without an answer leaves nothing behind
            self._path.resolve().unlink(missing_ok=True)
        os.close(self._fd)

    def read(self) -> None:
        """Index what is in the file, without changing or locking it."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                key, before = _parsed(line)
                if key is None and not _is_cut_off(line):
                    raise ValueError(
                        f"line {number} of {self._path} was not written by `asyncbucket run`: remove it, "
                        f"or give another -o"
                    )
                if before and before != self._settings:
                    raise ValueError(
                        f"{self._path} holds answers made with {before}, not {self._settings}: give "
                        f"another -o"
                    )
                if key is not None:
                    self._answered.add(key)

    def _complete_last_line(self) -> None:
        """Cut off half an answer, as a kill leaves it; complete any other line, of an editor."""
        self._size, last = 0, b"\n"
        with self._path.open("rb") as file:
            for last in file:
                self._size += len(last)
        if _is_cut_off(last):
            self._size -= len(last)
            os.ftruncate(self._fd, self._size)
        elif not last.endswith(b"\n"):
            self._append(b"\n")

    def look_up(self, request: Request) -> tuple[bytes, bool]:
        """Return the key of a line, which counts equal ones before it, and whether it is answered."""
        self._times[request.key] += 1
        key = request.key + self._times[request.key].to_bytes(4, "big")
        return key, key in self._answered

    def check_room(self) -> None:
        """See that answers can be written, before the first one is paid for.

        Raises:
            OSError: the disk is full, or almost.
        """
        # A kill in between leaves half an answer, which the next run cuts off.
        self._append(room := _LINE_START + b" " * _ROOM)
        self._size -= len(room)
        os.ftruncate(self._fd, self._size)

    def write(self, key: bytes, members: Mapping[str, Any]) -> None:
        """Append an answer, which from then on survives the end of this process."""
        self._append(line_of(key, members, run=self._settings))

    def _append(self, line: bytes) -> None:
        """Append a line, or nothing of it.

        Raises:
            OSError: with the path, which the system's own error lacks.
        """
        view = memoryview(line)
        try:
            while view:  # a signal may interrupt a write
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            os.ftruncate(self._fd, self._size)  # half a line would spoil the next one
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._size += len(line)


class Errors:
    """Write failures to a file, which is made with the first one; without a file, discard them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            path.unlink(missing_ok=True)

    def write(self, **members: Any) -> None:
        """Append a line of these members."""
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(line_of(None, members))


def line_of(key: bytes | None, members: Mapping[str, Any], **more: Any) -> bytes:
    """Return the line of an answer, or of a request without one."""
    name = None if key is None else _PREFIX + key.hex()
    default = {"custom_id": None, "response": None, "error": None, "usage": None}
    found = {"id": name, **default, **members, **more}
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _parsed(line: bytes) -> tuple[bytes | None, dict[str, Any]]:
    """Return the key of an answer, None if it is none, and the settings it was made with."""
    try:
        answer = json.loads(line)
        return bytes.fromhex(answer["id"].removeprefix(_PREFIX)), answer.get("run") or {}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None, {}


def _is_cut_off(line: bytes) -> bool:
    """Tell whether this is the beginning of an answer: a kill may end one anywhere."""
    is_ours = line.startswith(_LINE_START[: len(line)])
    return is_ours and not line.endswith(b"\n") and _parsed(line)[0] is None


def _lock(fd: int, path: Path) -> None:
    """Take an open file for this process alone; the lock is on the file, not on its name."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path} is being written by another run: let it end, or give another -o"
            ) from None
