"""The lines that go in: requests of OpenAI's batch files, bodies, or prompts.

They are read as they are wanted, from a file of a million or from a pipe that somebody types into.
"""

import asyncio
import concurrent.futures
import hashlib
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from asyncbucket.cli.run import PATHS, STANDARD, Job
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
_CHUNK: Final = 1 << 18


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
            raise ValueError("custom_id is missing, or no text")
        if not isinstance(path, str) or path not in _BODIES:
            raise ValueError(f"url is {path!r}, known: {', '.join(_BODIES)}")
        if not isinstance(body, dict):
            raise ValueError("body is missing, or no object")  # noqa: TRY004 - of a file
    elif isinstance(line.get("prompt"), str) and line.keys().isdisjoint({"messages", "input"}):
        body = _prompt_body(line.pop("prompt"), job) | line
    else:
        body = line
    body = _completed(path, body, job)
    try:
        identity = json.dumps([custom_id, path, body], sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise ValueError("its brackets are nested deeper than can be read") from None
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


def count_lines(path: str) -> int:
    """Return how many lines are not empty; a gigabyte takes about a second."""
    with Path(path).open("rb") as file:
        return sum(not line.isspace() for line in file)


async def read_lines(source: str) -> AsyncIterator[list[bytes]]:
    """Yield the lines in each read, without their ends."""
    file: BinaryIO = sys.stdin.buffer if source == STANDARD else Path(source).open("rb")  # noqa: ASYNC230, SIM115 - closed below
    rest = b""
    try:
        while chunk := await _read(file.fileno()):
            *lines, rest = (rest + chunk).split(b"\n")
            yield lines
        yield [rest]
    finally:
        if source != STANDARD:
            file.close()


async def _read(descriptor: int) -> bytes:
    """Return the next data; empty at the end.

    It may take as long as a person types, and cannot be cancelled. So it runs in a thread that
    nobody waits for when everything else has ended.
    """
    answer = concurrent.futures.Future[bytes]()
    answer.set_running_or_notify_cancel()  # so that it cannot be cancelled, either

    def read() -> None:
        try:
            answer.set_result(os.read(descriptor, _CHUNK))
        except OSError as error:
            answer.set_exception(error)

    threading.Thread(target=read, name="asyncbucket run", daemon=True).start()
    return await asyncio.wrap_future(answer)
