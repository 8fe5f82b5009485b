"""The bundled provider as an ASGI application: endpoints, headers about limits, and errors.

Endpoints are known by the end of the path, at any prefix: `/v1/...`, or Azure's
`/openai/deployments/x/...`. Headers and errors are those of the profile, or of the endpoint's own
provider.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

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
from asyncbucket.testing.replies import DIALECTS, Answer, Json, answer, as_events, embeddings

_KEYS: Final = ("authorization", "api-key", "x-api-key", "x-goog-api-key")
#: Types of errors by their status, or by its first digit.
_OPENAI: Final = {429: "requests", 4: "invalid_request_error", 5: "server_error"}
_ANTHROPIC: Final = {
    401: "authentication_error",
    429: "rate_limit_error",
    529: "overloaded_error",
    4: "invalid_request_error",
    5: "api_error",
}
_GOOGLE: Final = {429: "RESOURCE_EXHAUSTED", 4: "INVALID_ARGUMENT", 5: "INTERNAL"}
_CODES: Final = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
#: What Google calls a quota.
_QUOTAS: Final = {"requests": "RequestsPerMinute", "daily_requests": "RequestsPerDay"}
_GOOGLE_TYPE: Final = "type.googleapis.com/google.rpc"


class Api:
    """Answer calls as `enforcer` decides."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._enforcer = enforcer
        self._numbers = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The server cuts off what is incomplete.
        with contextlib.suppress(ClientDisconnect):
            await self.serve(scope, receive, send)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call.

        Raises:
            ClientDisconnect: The client went away, or a failure says that the stream breaks off.
        """
        call = _Exchange(self._enforcer, Request(scope, receive), f"{next(self._numbers):08x}")
        try:
            response = await call.response()
            await response(scope, receive, send)
        finally:
            call.leave(None)


class _Exchange:
    """One request and its reply. An admitted call holds a slot until its last bytes are sent."""

    def __init__(self, enforcer: Enforcer, request: Request, number: str) -> None:
        path = request.url.path.rstrip("/")
        chat = path.endswith("/chat/completions")
        end = path.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
        self.endpoint = "chat/completions" if chat else end
        self._enforcer = enforcer
        own = "anthropic" if self.endpoint == "messages" else "openai"
        self._rules = enforcer.rules or RULES[own]
        self._request = request
        self._number = number
        self._is_admitted = False
        #: How the charge is corrected when the reply is done.
        self._corrections: Mapping[str, int] = {}

    def leave(self, corrections: Mapping[str, int] | None) -> None:
        """Give the slot back, once; None says that the client has gone away."""
        if self._is_admitted:
            self._is_admitted = False
            self._enforcer.leave(corrections)

    async def response(self) -> Response:
        """Return the reply, or an error."""
        try:
            model, costs, reply = self._read(await self._request.body())
            failure = self._enforcer.enter(self.endpoint, model, costs)
            self._is_admitted = True
            if failure is not None and (failure.after_chunks is None or isinstance(reply, dict)):
                self.leave({})
                raise failure.error()
        except CallError as error:
            return self._error(error)
        seconds = self._enforcer.draw_latency()
        if isinstance(reply, list):
            chunks = self._stream(reply, seconds / len(reply), failure)
            return StreamingResponse(chunks, 200, self._headers(), "text/event-stream")
        await self._pause(seconds)
        self.leave(self._corrections)
        return JSONResponse(reply, headers=self._headers())

    def _read(self, content: bytes) -> tuple[str, Mapping[str, int], Json | list[bytes]]:
        """Return the model, what the call costs, and the reply: whole or in chunks."""
        request, dialect = self._request, DIALECTS.get(self.endpoint)
        if not any(map(request.headers.get, _KEYS)):
            raise CallError(401, "You didn't provide an API key.")
        if request.method != "POST" or not (dialect or self.endpoint == "embeddings"):
            raise CallError(404, f"Invalid URL ({request.method} {request.url.path})")
        try:
            body = json.loads(content)
            if dialect is None:
                tokens, vectors = embeddings(body)
                return body["model"], {"tokens": tokens, "input_tokens": tokens}, vectors
            body = dialect.read(body, request.url.path)
            reply = answer(body, reply_tokens=self._enforcer.options.reply_tokens)
            costs = self._costs(reply)
            if dialect.events is None or not body.get("stream"):
                return reply.model, costs, dialect.whole(reply, self._number)
            return reply.model, costs, as_events(dialect.events(reply, self._number, body))
        except Exception as exc:
            # No JSON, or a part of the wrong type, anywhere: reading takes the types for granted.
            raise CallError(400, f"the request can't be understood: {exc!r}") from exc

    def _costs(self, reply: Answer) -> Mapping[str, int]:
        """Return what a call is charged at admission; note how that is corrected.

        OpenAI: "your rate limit is calculated as the maximum of max_tokens and the estimated number
        of tokens based on the character count of your request"
        (platform.openai.com/docs/guides/rate-limits, read in 2025). What the reply will use is known
        only to a fake model; it is for tests in which estimate and usage must agree.
        """
        rules = self._enforcer.rules or RULES["openai"]
        prompt, used = reply.prompt_tokens, reply.completion_tokens
        output = rules.unlimited_output if reply.max_tokens is None else reply.max_tokens
        charges = {
            "usage": prompt + used,
            "prompt": prompt,
            "larger": max(prompt, output),
            "sum": prompt + output,
        }
        reserves = "usage" if self._enforcer.options.charge == "usage" else rules.reserves
        tokens = charges[reserves]
        settled = prompt + rules.output_counts * used if rules.settles else tokens
        self._corrections = {"tokens": settled - tokens, "output_tokens": used}
        return {"tokens": tokens, "input_tokens": prompt}

    async def _stream(
        self, chunks: Sequence[bytes], pause: float, failure: Failure | None
    ) -> AsyncIterator[bytes]:
        for sent, chunk in enumerate(chunks):
            if failure is not None and sent >= (failure.after_chunks or 0):
                raise ClientDisconnect
            await asyncio.sleep(pause)
            if sent == len(chunks) - 1:
                self.leave(self._corrections)
            yield chunk

    async def _pause(self, seconds: float) -> None:
        """Sleep until the reply is due, or until the client goes away."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (await self._request.receive())["type"] != "http.disconnect":
                    pass
                raise ClientDisconnect

    def _error(self, error: CallError) -> Response:
        """Write an error as the provider does."""
        rules, nanoseconds = self._rules, error.wait or 0
        form = rules.refusal if error.refused and rules.refusal else rules.error
        waits = {
            "retry-after": error.seconds,
            "retry-after-ms": -(-nanoseconds // MILLISECOND),
            "x-ratelimit-reset": round(time.time() * 1_000) + nanoseconds // MILLISECOND,
        }
        headers = {**self._headers(), **(rules.refusal_headers if error.refused else {})}
        if error.wait is not None:
            headers |= {name: str(waits[name]) for name in rules.waits}
        return JSONResponse(error_body(form, error), error.status, headers)

    def _headers(self) -> dict[str, str]:
        """Return the request's id, and what the headers say about each limit."""
        rules = self._rules
        prefix = "" if rules.error == "anthropic" else "x-"
        headers = {f"{prefix}request-id": f"req_{self._number}"}
        for name, limit, remaining, reset in self._enforcer.budget():
            template, slices = rules.headers.get(name), rules.slices.get(name, 1)
            values = {
                "limit": -(-limit // slices),
                "remaining": remaining,
                "reset": _reset(reset, rules),
                "renewalperiod": round(self._enforcer.options.minute / slices),
            }
            if template:
                headers |= {template.format(part=part): str(values[part]) for part in rules.parts}
        return headers


def error_body(form: str, error: CallError) -> Json:
    """Return the body of an error in one of the forms that `Rules` name."""
    status, message = error.status, error.message
    google: Json = {"code": status, "message": message, "status": _type(_GOOGLE, status)}
    match form:
        case "message":
            return {"message": message}
        case "anthropic":
            what = {"type": _type(_ANTHROPIC, status), "message": message}
            return {"type": "error", "error": what}
        case "google":
            return {"error": google}
        case "google_quota":
            quota = f"Generate{_QUOTAS.get(error.refused, 'ContentInputTokensPerMinute')}PerProject"
            failure = {"@type": f"{_GOOGLE_TYPE}.QuotaFailure", "violations": [{"quotaId": quota}]}
            retry = {"@type": f"{_GOOGLE_TYPE}.RetryInfo", "retryDelay": f"{error.seconds}s"}
            return {"error": {**google, "details": [failure, retry]}}
        case "openrouter":
            metadata = {"error_type": "rate_limit_exceeded"}
            return {"error": {"code": status, "message": message, "metadata": metadata}}
        case _:
            kind, code = error.kind or _type(_OPENAI, status), error.code or _CODES.get(status)
            return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _type(types: Mapping[int, str], status: int) -> str:
    return types.get(status, types[status // 100])


def _reset(nanoseconds: int, rules: Rules) -> str:
    """Return in how long a limit is full again, as the provider writes it."""
    if rules.reset == "go":
        return go_duration(nanoseconds)
    if rules.reset == "seconds":
        return str(-(-nanoseconds // NANOSECONDS))
    until = datetime.now(UTC) + timedelta(seconds=nanoseconds / NANOSECONDS)
    return until.isoformat(timespec="seconds").replace("+00:00", "Z")
