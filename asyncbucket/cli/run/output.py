"""What is written for a line: its answer, or why it has none, in the form of OpenAI's batches."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

PREFIX: Final = "batch_req_"


def answer(  # noqa: PLR0913 - the members of a line
    *,
    key: bytes,
    line: int,
    custom_id: str,
    status: int,
    request_id: str,
    body: Any,
    usage: Mapping[str, Any] | None,
    attempts: int,
    waited: float,
) -> bytes:
    """Return the line of a request that the provider answered."""
    return _line(
        {
            "id": PREFIX + key.hex(),
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
            "usage": usage,
            "attempts": attempts,
            "waited": round(waited, 3),
            "line": line,
        }
    )


def failure(
    *,
    line: int,
    custom_id: str | None,
    code: str,
    message: str,
    response: Mapping[str, Any] | None = None,
    attempts: int = 0,
    waited: float = 0.0,
) -> bytes:
    """Return the line of a request that failed, or of a line that is not a request."""
    return _line(
        {
            "id": None,
            "custom_id": custom_id,
            "response": response,
            "error": {"code": code, "message": message},
            "usage": None,
            "attempts": attempts,
            "waited": round(waited, 3),
            "line": line,
        }
    )


def _line(members: dict[str, Any]) -> bytes:
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def append(line: bytes, file: BinaryIO, path: Path) -> None:
    """Append a line to an unbuffered file, or nothing of it.

    Raises:
        OSError: with the path, which the system's own error lacks.
    """
    view = memoryview(line)
    try:
        while view:  # a signal may interrupt a write
            view = view[file.write(view) or 0 :]
    except OSError as error:
        if path.is_file() and len(view) < len(line):  # half a line would spoil the next one
            os.truncate(path, path.stat().st_size - (len(line) - len(view)))
        raise OSError(error.errno, error.strerror, str(path)) from error


class Errors:
    """Write failures to a file that is made with the first one; without a file, discard them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        # No device, nor a link to one such as /dev/stderr: it could not be made again.
        if path is not None and path.is_file() and not path.is_symlink():
            path.unlink()

    def write(self, line: bytes) -> None:
        """Append a line."""
        if self._path is not None:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            append(line, self._file, self._path)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def to_standard_output(line: bytes) -> bool:
    """Write an answer to a pipe; return whether anyone still reads it."""
    try:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # Otherwise the interpreter would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
