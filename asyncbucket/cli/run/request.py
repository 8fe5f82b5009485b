"""One line: a request of OpenAI's batch files, the body of one, or just a prompt."""

import json
from dataclasses import dataclass
from typing import Any, Final

from asyncbucket.batch.keys import digest
from asyncbucket.cli.run.job import PATHS, Job

#: The member of a body that holds the question, by path.
_PROMPT_BY_PATH: Final = {
    "/v1/chat/completions": "messages",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
    "/v1/completions": "prompt",
}
#: The member that limits the reply, by path, as this program writes it.
_MAX_TOKENS_BY_PATH: Final = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/completions": "max_tokens",
}
_MAX_TOKENS_MEMBERS: Final = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens"})
_MAX_ID_LENGTH: Final = 512


class BadLine(ValueError):  # noqa: N818 - it is about a line
    """Say why a line cannot be sent, with its ``custom_id`` if that can be read."""

    def __init__(self, why: str, custom_id: str | None = None) -> None:
        super().__init__(why)
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class Request:
    """One call to be made.

    Attributes:
        line: the number of its line, from 1.
        custom_id: the user's id for it; made from the line number if there is none.
        path: such as ``/v1/chat/completions``.
        key: by which another run recognizes it.
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

    A line that begins with ``{`` is JSON: a batch line if it has a ``body`` or a ``custom_id``, else
    a body. A JSON string, and every other line, is a prompt.

    Raises:
        BadLine: it is none of these; the message is for people.
    """
    try:
        text = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 text at byte {error.start}") from None
    if not text:
        return None
    try:
        return _request(number, text, job)
    except RecursionError:
        raise BadLine("its brackets are nested deeper than can be sent") from None


def _request(number: int, text: str, job: Job) -> Request:
    if not text.startswith("{"):
        return _build_request(
            number, None, PATHS[job.endpoint], _prompt_body(_unquoted(text), job), job
        )
    try:
        line = json.loads(text)
    except ValueError as error:
        raise BadLine(f"not JSON: {error}") from None
    if "custom_id" in line or "body" in line:
        return _batch_line(number, line, job)
    return _build_request(number, None, PATHS[job.endpoint], _body_of(line, job), job)


def _unquoted(text: str) -> str:
    """Return the text of a JSON string, or the line as it is."""
    if text.startswith('"'):
        try:
            inner = json.loads(text)
        except ValueError:
            return text
        return str(inner)
    return text


def _prompt_body(prompt: str, job: Job) -> dict[str, Any]:
    """Return the members of a body that ask ``prompt``."""
    if job.endpoint == "chat":
        messages = [{"role": "user", "content": prompt}]
        if job.system is not None:
            messages.insert(0, {"role": "system", "content": job.system})
        return {"messages": messages}
    if job.endpoint == "responses" and job.system is not None:
        return {"input": prompt, "instructions": job.system}
    return {"input": prompt}


def _body_of(line: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return the body in a line without an envelope; ``{"prompt": "..."}`` is a prompt."""
    if isinstance(line.get("prompt"), str) and _PROMPT_BY_PATH[PATHS[job.endpoint]] not in line:
        rest = {name: value for name, value in line.items() if name != "prompt"}
        return _prompt_body(line["prompt"], job) | rest
    return line


def _batch_line(number: int, line: dict[str, Any], job: Job) -> Request:
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine("custom_id is missing, or no text")
    if len(custom_id) > _MAX_ID_LENGTH:
        raise BadLine(f"custom_id has {len(custom_id):,} characters, more than {_MAX_ID_LENGTH}")
    try:
        return _build_request(number, custom_id, *_path_and_body(line, job), job)
    except BadLine as bad:
        bad.custom_id = custom_id
        raise


def _path_and_body(line: dict[str, Any], job: Job) -> tuple[str, dict[str, Any]]:
    """Return the path of a batch line, and its body."""
    if line.get("method", "POST") != "POST":
        raise BadLine(f"method is {line['method']!r}, only POST can be sent")
    path, body = line.get("url", PATHS[job.endpoint]), line.get("body")
    if not isinstance(path, str) or path not in _PROMPT_BY_PATH:
        raise BadLine(f"url is {path!r}, known: {', '.join(_PROMPT_BY_PATH)}")
    if not isinstance(body, dict):
        raise BadLine("body is missing, or no object")
    return path, body


def _build_request(
    number: int, custom_id: str | None, path: str, body: dict[str, Any], job: Job
) -> Request:
    if job.model is not None:
        body = {**body, "model": job.model}
    if not isinstance(body.get("model"), str):
        raise BadLine("no model: give --model, or name one in the body")
    if not body.get(_PROMPT_BY_PATH[path]):
        raise BadLine(f"the body has no {_PROMPT_BY_PATH[path]}, which {path} needs")
    if body.get("stream"):
        raise BadLine("the body asks for a stream, which cannot be a line of a file")
    if (
        job.max_tokens is not None
        and path in _MAX_TOKENS_BY_PATH
        and not _MAX_TOKENS_MEMBERS & body.keys()
    ):
        body = {**body, _MAX_TOKENS_BY_PATH[path]: job.max_tokens}
    content = json.dumps(body, sort_keys=True, separators=(",", ":"))
    identity = json.dumps([custom_id, path]) + content
    return Request(
        number,
        f"line-{number}" if custom_id is None else custom_id,
        path,
        body,
        digest(identity.encode("utf-8", "surrogatepass")),
        named=custom_id is not None,
    )
