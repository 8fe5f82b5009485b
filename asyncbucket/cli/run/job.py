"""What is to be done: the options, checked before anything begins, and the lines that go in.

A line is a request of OpenAI's batch files, the body of one, or just a prompt. Lines are read as they
are wanted, from a file of a million or from a pipe that somebody types into.
"""

import asyncio
import concurrent.futures
import hashlib
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal, NamedTuple

import typer

from asyncbucket.cli import options
from asyncbucket.core.cost import COMMON
from asyncbucket.core.limits import Limit, read_limits
from asyncbucket.core.wording import USD
from asyncbucket.plan.calls import read_line

#: Paths of the API by their short names.
PATHS: Final[dict[str, str]] = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "embeddings": "/v1/embeddings",
}
#: The window, in seconds, of the cap of dollars: a year and a month.
FOR_GOOD: Final = 400 * 86_400
#: Calls at once, by default.
CONCURRENCY: Final = 100
STANDARD: Final = "-"
_KEY: Final = "OPENAI_API_KEY"
#: Options that concern one provider, not the members of a pool.
_OF_ONE_PROVIDER: Final = (
    *("rpm", "tpm", "also", "preset", "concurrency"),
    *("max_usd", "prices", "api_base"),
)


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


@dataclass(kw_only=True)
class Job:
    """Hold the options of a run as they are typed, and what they mean.

    Attributes:
        limits: all limits but the cap of dollars.
        slots: the most calls in flight; None if the user did not say.
        base: where the provider is.
        api_key: the key in the environment, if one is needed.
    """

    source: Annotated[
        str, typer.Argument(metavar="FILE", help="Batch lines or prompts, one a line; - is stdin.")
    ]
    out: Annotated[str, options.file("Answers as JSONL; - is stdout.", "--out", "-o")] = STANDARD
    model: Annotated[str | None, options.name("The model; default: what the lines say.")] = None
    # What is allowed.
    rpm: options.Rpm = None
    tpm: options.Tpm = None
    also: options.Also = None
    preset: options.Preset = None
    concurrency: Annotated[
        str | None, options.text(f"Calls at once; default: {CONCURRENCY}.", metavar="N|auto")
    ] = None
    max_usd: Annotated[
        float | None, options.text("Stop before it costs more dollars than this.", metavar="USD")
    ] = None
    prices: options.PriceFile = None
    # Where requests go, and what is in them.
    api_base: Annotated[
        str | None, options.text("Any OpenAI-compatible server; default: OpenAI.", metavar="URL")
    ] = None
    endpoint: Annotated[str, options.name("Where prompts go: chat, responses, embeddings.")] = (
        "chat"
    )
    system: Annotated[str | None, options.text("The system message before each prompt.")] = None
    max_tokens: Annotated[int | None, options.count("For a reply, if the line sets none.")] = None
    pool: options.PoolFile = None
    # How often, and how.
    attempts: Annotated[int, options.count("Attempts for a line, the first included.")] = 5
    dry_run: Annotated[
        bool, options.flag("Send nothing; say how long it would take.", "--dry-run")
    ] = False
    restart: Annotated[
        bool, options.flag("Start over: delete the answers so far.", "--restart")
    ] = False
    # What is shown.
    quiet: Annotated[bool, options.flag("Show nothing but errors.", "--quiet", "-q")] = False
    as_json: Annotated[bool, options.flag("Print the summary as JSON on stdout.", "--json")] = False
    limits: tuple[Limit, ...] = field(init=False)
    slots: int | Literal["auto"] | None = field(init=False)
    base: str = field(init=False)
    api_key: str | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        """Read what was typed.

        Raises:
            ValueError: it cannot be understood; the message says what, and the remedy.
        """
        also = [*(self.also or ()), *options.preset_limits(self.preset)]
        self.limits = tuple(read_limits(also, {"rpm": self.rpm, "tpm": self.tpm}))
        self.slots = options.read_concurrency(self.concurrency)
        self.base = self.api_base or os.environ.get("OPENAI_BASE_URL") or options.OPENAI

    @property
    def all_limits(self) -> tuple[Limit, ...]:
        """The limits, with the cap of dollars as one over the longest time that there is."""
        if self.max_usd is None:
            return self.limits
        return (*self.limits, Limit(USD, self.max_usd, per=FOR_GOOD))

    @property
    def out_file(self) -> Path | None:
        """The file of answers; None if they go to standard output."""
        return None if self.out == STANDARD else Path(self.out)

    @property
    def limits_file(self) -> Path | None:
        """The store that remembers what was admitted lately, also for runs on a link to ``out``."""
        return None if self.out == STANDARD else Path(f"{Path(self.out).resolve()}.limits")

    @property
    def errors_file(self) -> Path | None:
        """The file of lines without an answer; None if the answers go to standard output."""
        out = self.out_file
        return None if out is None else out.parent / f"{out.stem}.errors{out.suffix}"

    @property
    def destination(self) -> str:
        """Where requests go, in a form that may be shown: without a password in the URL."""
        return options.shown_url(self.base) if self.pool is None else str(self.pool)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which answers depend: with others, it is another run."""
        system = self.system and hashlib.sha256(self.system.encode()).hexdigest()[:16]
        found = {
            "model": self.model,
            "api_base": None if self.pool else self.destination,
            "pool": self.pool and self.pool.name,
            "endpoint": self.endpoint,
            "system": system,
            "max_tokens": self.max_tokens,
        }
        return {name: value for name, value in found.items() if value is not None}

    def check(self) -> None:
        """Refuse options that do not fit together; find the key.

        Raises:
            ValueError: the message says what, and the remedy.
        """
        given = [name for name in _OF_ONE_PROVIDER if getattr(self, name) is not None]
        if self.pool is not None and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(
                f"{names} cannot go with --pool: write it into the members' tables in {self.pool}"
            )
        if self.as_json and self.out_file is None and not self.dry_run:
            raise ValueError("--json prints on standard output, where the answers go: give -o")
        if not self.limits and self.slots is None and self.pool is None:
            raise ValueError(
                "say what your key may do: --rpm and --tpm, e.g. --rpm 500 --tpm 200000; or, for a "
                "server without limits, --concurrency 20 or --concurrency auto; or, for several, --pool"
            )
        for limit in self.all_limits:  # which reads the cap, too
            if limit.resource not in COMMON:
                raise ValueError(
                    f"no request takes any {limit.resource}, so {limit} would hold up none: limit "
                    f"requests, tokens, input_tokens, output_tokens or usd"
                )
        options.check_url(self.base)
        if self.endpoint not in PATHS:
            raise ValueError(f"--endpoint must be one of {', '.join(PATHS)}, not {self.endpoint!r}")
        if (self.source == STANDARD and sys.stdin is None) or (self.out_file or sys.stdout) is None:
            raise ValueError("standard input or output is closed: name a file, and give -o")
        if self.source != STANDARD and not Path(self.source).is_file():
            raise ValueError(
                f"{self.source!r} is not a file that can be read: name one, or pipe the lines in and give -"
            )
        self._check_files()
        if not (self.dry_run or self.pool):
            self.api_key = api_key(self.base)

    def _check_files(self) -> None:
        """Refuse files that cannot be written, and one file for two purposes: it would be lost."""
        taken = {None if self.source == STANDARD else _identity(Path(self.source))}
        for path in (self.out_file, self.limits_file, self.errors_file):
            if path is None:
                continue
            if not path.parent.is_dir():
                raise ValueError(f"{path.parent} is not a folder: make it, or give another -o")
            if path.exists() and not path.is_file():  # answers are read again
                raise ValueError(f"{path} is not a file that can be written: give another -o")
            if _identity(path) in taken:
                raise ValueError(
                    f"{path} is read or written already: give another -o, or it would be lost"
                )
            taken.add(_identity(path))


def _identity(path: Path) -> object:
    """Return what all names of a file share: links, and cases if the file system ignores case."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return path.resolve()
    return found.st_dev, found.st_ino


def api_key(api_base: str) -> str | None:
    """Return the API key in the environment.

    Raises:
        ValueError: there is none, and the provider needs one; or it cannot be sent.
    """
    key = os.environ.get(_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{_KEY} holds characters that no key has: export the key alone in it")
    if not key and api_base == options.OPENAI:
        raise ValueError(
            f"{_KEY} is not set: export your key in it, or name another provider with --api-base"
        )
    return key or None


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
