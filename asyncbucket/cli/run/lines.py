"""What goes in: each line a request of OpenAI's batch files, the body of one, or just a prompt.

Lines are read as they are wanted, from a file of a million or from a pipe that somebody types into.
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

from asyncbucket.cli.run.job import PATHS, STANDARD, Job
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


class BadLine(ValueError):  # noqa: N818 - it is about a line
    """Say why a line cannot be sent, with its ``custom_id`` if that can be read."""

    def __init__(self, why: str, custom_id: str | None = None) -> None:
        super().__init__(why)
        self.custom_id = custom_id


class NoModelError(BadLine):
    """Say that a line names no model; probably none does."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call to be made.

    Attributes:
        line: the number of its line, from 1.
        custom_id: the user's id for it; made from the line number if there is none.
        path: such as ``/v1/chat/completions``.
        key: by which another run recognizes it, once equal ones before it are counted.
        named: whether the line has an id of its own, which no other line may have.
    """

    line: int
    custom_id: str
    path: str
    body: dict[str, Any]
    key: bytes
    named: bool


def read_request(number: int, data: bytes, job: Job) -> Request | None:
    """Read line ``number``; None for an empty one.

    A JSON object is a batch line if it has a ``body`` or a ``custom_id``, else a body. A JSON string,
    and every line that isn't JSON, is a prompt.

    Raises:
        BadLine: it is none of these; the message is for people.
    """
    if not data.strip():
        return None
    try:
        return _request(number, read_line(data), job)
    except BadLine:
        raise
    except ValueError as error:
        raise BadLine(str(error)) from None
    except RecursionError:
        raise BadLine("its brackets are nested deeper than can be read") from None


def _request(number: int, line: object, job: Job) -> Request:
    path = PATHS[job.endpoint]
    if isinstance(line, str):
        return _build(number, None, path, _prompt_body(line, job), job)
    if not isinstance(line, dict):
        raise BadLine("JSON, but neither a text nor an object: put quotes around a prompt")
    if "custom_id" not in line and "body" not in line:
        prompt = line.get("prompt")
        if isinstance(prompt, str) and line.keys().isdisjoint({"messages", "input"}):
            rest = {name: value for name, value in line.items() if name != "prompt"}
            line = _prompt_body(prompt, job) | rest
        return _build(number, None, path, line, job)
    custom_id, path, body = line.get("custom_id"), line.get("url", path), line.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine("custom_id is missing, or no text")
    if not isinstance(path, str) or path not in _BODIES:
        raise BadLine(f"url is {path!r}, known: {', '.join(_BODIES)}", custom_id)
    if not isinstance(body, dict):
        raise BadLine("body is missing, or no object", custom_id)
    return _build(number, custom_id, path, body, job)


def _prompt_body(prompt: str, job: Job) -> dict[str, Any]:
    """Return the members of a body that ask ``prompt``."""
    if not prompt.strip():
        raise BadLine("the prompt is empty")
    if job.endpoint == "chat":
        system = [] if job.system is None else [{"role": "system", "content": job.system}]
        return {"messages": [*system, {"role": "user", "content": prompt}]}
    if job.endpoint == "responses" and job.system is not None:
        return {"input": prompt, "instructions": job.system}
    return {"input": prompt}


def _build(
    number: int, custom_id: str | None, path: str, body: dict[str, Any], job: Job
) -> Request:
    asked, limit = _BODIES[path]
    if not any(isinstance(body.get(name), types) and body[name] for name, types in asked.items()):
        raise BadLine(f"nothing to answer: a body for {path} needs {' or '.join(asked)}", custom_id)
    if body.get("stream"):
        raise BadLine("the body asks for a stream, which cannot be a line of a file", custom_id)
    if job.model is not None:
        body = {**body, "model": job.model}
    if not isinstance(body.get("model"), str):
        raise NoModelError("no model: give --model, or name one in the body", custom_id)
    if job.max_tokens and limit and body.keys().isdisjoint(_MAX_TOKENS):
        body = {**body, limit: job.max_tokens}
    identity = json.dumps([custom_id, path, body], sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(identity.encode()).digest()[:16]
    name = f"line-{number}" if custom_id is None else custom_id
    return Request(number, name, path, body, key, named=custom_id is not None)


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
