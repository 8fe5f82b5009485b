"""The bundled provider's endpoints, headers about limits, and errors; over ASGI or called directly.

Endpoints are known by the end of the path, at any prefix: `/v1/...`, or Azure's
`/openai/deployments/x/...`. Headers and errors are those of the profile, or of the endpoint's own
provider.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any, Final

from asyncbucket.testing.counting import ceil
from asyncbucket.testing.enforcer import (
    MILLISECOND,
    NANOSECONDS,
    RULES,
    CallError,
    Enforcer,
    Failure,
    Rules,
    go_duration,
)
from asyncbucket.testing.prompt_cache import Prompt
from asyncbucket.testing.replies import (
    FORMS,
    READERS,
    Answer,
    Json,
    answer,
    as_events,
    blocks,
    embeddings,
    events,
    filled,
    whole,
)

_KEYS: Final = ("authorization", "api-key", "x-api-key", "x-goog-api-key")


class BrokenOffError(Exception):
    """A failure says that the stream breaks off here."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply that may have begun only.

    Attributes:
        status: The HTTP status.
        headers: Their names in lower case.
        chunks: Yields the body; raises `BrokenOffError` if it breaks off.
        leave: Says that the client reads no further.
    """

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]
    leave: Callable[[], None]


class Api:
    """Answer calls as `enforcer` decides."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._enforcer = enforcer
        self._numbers = count(1)

    async def respond(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes
    ) -> Reply:
        """Answer a call; if it is cancelled, its client has gone away."""
        call = _Exchange(self._enforcer, path.rstrip("/"), f"{next(self._numbers):08x}")
        try:
            return await call.reply(method, headers, content)
        except BaseException:
            call.leave(None)
            raise

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a call over ASGI, until its client goes away."""
        content, more = b"", True
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        answering = asyncio.ensure_future(self._send_reply(scope, content, send))
        leaving = asyncio.ensure_future(_client_gone(receive))
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        for task in (leaving, answering):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
        if not answering.cancelled() and (error := answering.exception()) is not None:
            raise error

    async def _send_reply(self, scope: Any, content: bytes, send: Any) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        reply = await self.respond(scope["method"], scope["path"], headers, content)
        try:
            pairs = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
            await send({"type": "http.response.start", "status": reply.status, "headers": pairs})
            async for chunk in reply.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body"})
        except BrokenOffError:
            pass  # the server cuts off what is incomplete
        finally:
            reply.leave()


async def _client_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Exchange:
    """One request and its reply. An admitted call holds a slot until its last bytes are sent."""

    def __init__(self, enforcer: Enforcer, path: str, number: str) -> None:
        chat = path.endswith("/chat/completions")
        end = path.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
        self.endpoint = "chat/completions" if chat else end
        self._enforcer = enforcer
        own = "anthropic" if self.endpoint == "messages" else "openai"
        self._rules = enforcer.rules or RULES[own]
        self._path = path
        self._number = number
        self._is_admitted = False
        #: How the charge is corrected when the reply is done.
        self._corrections: Mapping[str, int] = {}
        self._prompt = Prompt()

    def leave(self, corrections: Mapping[str, int] | None) -> None:
        """Give the slot back, once; None says that the client has gone away."""
        if self._is_admitted:
            self._is_admitted = False
            self._enforcer.leave(corrections)

    async def reply(self, method: str, headers: Mapping[str, str], content: bytes) -> Reply:
        """Return the reply, or an error."""
        try:
            model, costs, reply = self._read(method, headers, content)
            failure = self._enforcer.enter(self.endpoint, model, costs)
            self._is_admitted = True
            if failure is not None and (failure.after_chunks is None or isinstance(reply, dict)):
                self.leave({})
                raise failure.error()
        except CallError as error:
            return self._error(error)
        seconds, begins = self._enforcer.draw_latency(), self._enforcer.options.begins
        await asyncio.sleep(seconds * begins)
        self._begin()
        seconds *= 1 - begins
        if isinstance(reply, list):
            chunks = self._stream(reply, seconds / max(1, len(reply) - 1), failure)
            said = {"content-type": "text/event-stream; charset=utf-8", **self._headers()}
            return Reply(200, said, chunks, lambda: self.leave(None))
        await asyncio.sleep(seconds)
        self.leave(self._corrections)
        return self._whole(200, reply, self._headers())

    def _read(
        self, method: str, headers: Mapping[str, str], content: bytes
    ) -> tuple[str, Mapping[str, int], Json | list[bytes]]:
        """Return the model, what the call costs, and the reply: whole or in chunks."""
        read = READERS.get(self.endpoint)
        if not any(map(headers.get, _KEYS)):
            raise CallError(401, "You didn't provide an API key.")
        if method != "POST" or not (read or self.endpoint == "embeddings"):
            raise CallError(404, f"Invalid URL ({method} {self._path})")
        try:
            body = json.loads(content)
            if read is None:
                tokens, vectors = embeddings(body)
                return body["model"], {"tokens": tokens, "input_tokens": tokens}, vectors
            return self._chat(read(body, self._path))
        except Exception as exc:
            # No JSON, or a part of the wrong type, anywhere: reading takes the types for granted.
            raise CallError(400, f"the request can't be understood: {exc!r}") from exc

    def _chat(self, body: Json) -> tuple[str, Mapping[str, int], Json | list[bytes]]:
        reply = answer(body, reply_tokens=self._enforcer.options.reply_tokens)
        cache = self._enforcer.cache
        if cache is not None:
            self._prompt = cache.look_up(reply.model, blocks(body), self._now)
            reply = replace(reply, cached=self._prompt.read, written=self._prompt.written)
        rules = self._enforcer.rules or RULES["openai"]
        if self._rules.error == "anthropic":  # its own page says so, whoever else's rules hold
            rules = replace(rules, counts_cached=False)
        if self._enforcer.options.charge == "usage":
            rules = replace(rules, reserves="usage")
        costs, self._corrections = charges(rules, reply)
        stream = body.get("stream") and events(self.endpoint, reply, self._number, body)
        if stream:
            return reply.model, costs, as_events(stream)
        return reply.model, costs, whole(self.endpoint, reply, self._number)

    @property
    def _now(self) -> float:
        return self._enforcer.options.clock() / NANOSECONDS

    def _begin(self) -> None:
        """Let others read what this call writes to the cache."""
        if self._enforcer.cache is not None:
            self._enforcer.cache.begin(self._prompt, self._now)
            said = ("cache_reads", self._prompt.read), ("cache_writes", self._prompt.written)
            self._enforcer.count(*(name for name, tokens in said if tokens))

    async def _stream(
        self, chunks: Sequence[bytes], pause: float, failure: Failure | None
    ) -> AsyncIterator[bytes]:
        for sent, chunk in enumerate(chunks):
            if failure is not None and sent >= (failure.after_chunks or 0):
                raise BrokenOffError
            await asyncio.sleep(pause if sent else 0)
            if sent == len(chunks) - 1:
                self.leave(self._corrections)
            yield chunk

    def _whole(self, status: int, body: Json, headers: Mapping[str, str]) -> Reply:
        content = json.dumps(body, separators=(",", ":")).encode()

        async def chunks() -> AsyncIterator[bytes]:
            yield content

        said = {"content-type": "application/json", "content-length": str(len(content)), **headers}
        return Reply(status, said, chunks(), lambda: None)

    def _error(self, error: CallError) -> Reply:
        """Write an error as the provider does."""
        rules, nanoseconds = self._rules, error.wait or 0
        form = rules.refusal if error.refused and rules.refusal else rules.error
        waits = {
            "retry-after": error.seconds,
            "retry-after-ms": ceil(nanoseconds, MILLISECOND),
            "x-ratelimit-reset": round(time.time() * 1_000) + nanoseconds // MILLISECOND,
        }
        headers = {**self._headers(), **(rules.refusal_headers if error.refused else {})}
        if error.wait is not None:
            headers |= {name: str(waits[name]) for name in rules.waits}
        return self._whole(error.status, error_body(form, error), headers)

    def _headers(self) -> dict[str, str]:
        """Return the request's id, and what the headers say about each limit."""
        rules = self._rules
        prefix = "" if rules.error == "anthropic" else "x-"
        headers = {f"{prefix}request-id": f"req_{self._number}"}
        for name, limit, remaining, reset in self._enforcer.budget():
            template, slices = rules.headers.get(name), rules.slices.get(name, 1)
            if "tokens" in name:
                rounded = round(remaining / rules.rounding) * rules.rounding
            else:
                rounded = remaining
            values = {
                "limit": ceil(limit, slices),
                "remaining": rounded,
                "reset": _reset(reset, rules),
                "renewalperiod": round(self._enforcer.options.minute / slices),
            }
            if template:
                headers |= {template.format(part=part): str(values[part]) for part in rules.parts}
        return headers


def charges(rules: Rules, reply: Answer) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Return what a call is charged at admission, and how that is corrected when its reply is done.

    OpenAI: "your rate limit is calculated as the maximum of max_tokens and the estimated number of
    tokens based on the character count of your request" (platform.openai.com/docs/guides/rate-limits,
    read in 2025). What the reply will use is known only to a fake model.
    """
    prompt, used = reply.prompt_tokens, reply.completion_tokens
    prompt -= 0 if rules.counts_cached else reply.cached
    output = rules.unlimited_output if reply.max_tokens is None else reply.max_tokens
    tokens = {
        "usage": prompt + used,
        "prompt": prompt,
        "larger": max(prompt, output),
        "sum": prompt + output,
    }[rules.reserves]
    settled = prompt + rules.output_counts * used if rules.settles else tokens
    corrections = {"tokens": settled - tokens, "output_tokens": used}
    return {"tokens": tokens, "input_tokens": prompt}, corrections


def error_body(form: str, error: CallError) -> Json:
    """Return the body of an error in one of the forms that `Rules` name."""
    forms, status = FORMS["errors"], str(error.status)
    names = {name: of.get(status, of.get(status[0])) for name, of in forms["types"].items()}
    names |= {
        name: value for name, value in (("openai", error.kind), ("code", error.code)) if value
    }
    names |= {"message": error.message, "status": error.status, "seconds": error.seconds}
    names["quota"] = forms["quotas"].get(error.refused, "ContentInputTokensPerMinute")
    body: Json = filled(forms[form], names)
    return body


def _reset(nanoseconds: int, rules: Rules) -> str:
    """Return in how long a limit is full again, as the provider writes it."""
    if rules.reset == "go":
        return go_duration(nanoseconds)
    if rules.reset == "seconds":
        return str(ceil(nanoseconds, NANOSECONDS))
    now = datetime.fromtimestamp(time.time(), UTC)
    until = now + timedelta(seconds=nanoseconds / NANOSECONDS)
    return until.isoformat(timespec="seconds").replace("+00:00", "Z")
