"""The provider as an ASGI application: endpoints, headers about limits, and errors.

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

from asyncbucket.testing.provider.enforcer import Enforcer, RateRefusal, is_refusal
from asyncbucket.testing.provider.options import NANOSECONDS, RULES, Failure, Rules
from asyncbucket.testing.provider.replies import (
    DIALECTS,
    Answer,
    Json,
    answer,
    as_events,
    embeddings,
    error_body,
)

_MILLISECOND: Final = 1_000_000
_QUOTA: Final = "You exceeded your current quota, please check your plan and billing details."
_NOT_UNDERSTOOD: Final = (
    *(ArithmeticError, AttributeError, LookupError),
    *(RecursionError, TypeError, ValueError),
)
_UNITS: Final = {
    "requests": "requests per min (RPM)",
    "tokens": "tokens per min (TPM)",
    "input_tokens": "input tokens per min (ITPM)",
    "output_tokens": "output tokens per min (OTPM)",
    "daily_requests": "requests per day (RPD)",
    "concurrency": "concurrent requests",
}


class InvalidRequestError(Exception):
    """The request is not what the endpoint takes; it becomes an error with this status."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class StreamBrokenError(Exception):
    """A stream is broken off, as a failure was scripted."""


class Api:
    """Answer calls as `enforcer` decides."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._enforcer = enforcer
        self._numbers = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # The server cuts off what is incomplete.
            with contextlib.suppress(ClientDisconnect, StreamBrokenError):
                await self.serve(scope, receive, send)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call.

        Raises:
            StreamBrokenError: Its stream was scripted to break off.
            ClientDisconnect: The client went away.
        """
        call = _Exchange(self._enforcer, Request(scope, receive), f"{next(self._numbers):08x}")
        try:
            response = await call.response()
            await response(scope, receive, send)
        finally:
            call.leave(disconnected=True)


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
        #: What the call costs besides tokens, and how the charge is corrected when the reply is done.
        self._amounts: Mapping[str, int] = {}
        self._corrections: Mapping[str, int] = {}

    def leave(self, *, disconnected: bool = False) -> None:
        """Give the slot back, once."""
        if self._is_admitted:
            self._is_admitted = False
            if not disconnected:
                self._enforcer.settle(self._corrections)
            self._enforcer.leave(disconnected=disconnected)

    async def response(self) -> Response:
        """Return the reply."""
        try:
            _check_key(self._request)
            model, tokens, reply = self._read(await self._request.body())
        except InvalidRequestError as exc:
            self._enforcer.count_invalid()
            return self._error(exc.status, str(exc))
        outcome = self._enforcer.enter(self.endpoint, tokens, self._amounts)
        self._is_admitted = not is_refusal(outcome)
        if isinstance(outcome, RateRefusal):
            return self._refuse(outcome, model)
        if outcome is not None and (outcome.after_chunks is None or isinstance(reply, dict)):
            self._corrections = {}
            self.leave()
            return self._fail(outcome)
        seconds = self._enforcer.draw_latency()
        if isinstance(reply, list):
            chunks = self._stream(reply, seconds / len(reply), outcome)
            return StreamingResponse(chunks, 200, self._headers(), "text/event-stream")
        await self._pause(seconds)
        self.leave()
        return JSONResponse(reply, headers=self._headers())

    def _read(self, content: bytes) -> tuple[str, int, Json | list[bytes]]:
        """Return the model, what the call is charged, and the reply: whole or in chunks."""
        request, options = self._request, self._enforcer.options
        dialect = DIALECTS.get(self.endpoint)
        if request.method != "POST" or not (dialect or self.endpoint == "embeddings"):
            url = f"{request.method} {request.url.path}"
            raise InvalidRequestError(f"Invalid URL ({url})", status=404)
        try:
            body = json.loads(content)
            if dialect is not None:
                body = dialect.read(body, request.url.path)
            if not body["model"]:
                raise InvalidRequestError("you must provide a model parameter")
            if dialect is None:
                tokens, vectors = embeddings(body)
                self._amounts = {"input_tokens": tokens}
                return body["model"], tokens, vectors
            reply = answer(body, reply_tokens=options.reply_tokens)
            tokens = self._charge(reply)
            if not body.get("stream"):
                return reply.model, tokens, dialect.whole(reply, self._number)
            return reply.model, tokens, as_events(dialect.events(reply, self._number, body))
        except _NOT_UNDERSTOOD as exc:
            # No JSON, or a part of the wrong type, anywhere: reading takes the types for granted.
            raise InvalidRequestError(f"the request can't be understood: {exc!r}") from exc

    def _charge(self, reply: Answer) -> int:
        """Return the tokens that a call costs at admission; note what it costs besides.

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
        self._amounts = {"input_tokens": prompt}
        self._corrections = {"tokens": settled - tokens, "output_tokens": used}
        return tokens

    async def _stream(
        self, chunks: Sequence[bytes], pause: float, failure: Failure | None
    ) -> AsyncIterator[bytes]:
        for sent, chunk in enumerate(chunks):
            if failure is not None and sent >= (failure.after_chunks or 0):
                raise StreamBrokenError
            await asyncio.sleep(pause)
            if sent == len(chunks) - 1:
                self.leave()
            yield chunk

    async def _pause(self, seconds: float) -> None:
        """Sleep until the reply is due, or until the client goes away."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (await self._request.receive())["type"] != "http.disconnect":
                    pass
                raise ClientDisconnect

    def _refuse(self, refusal: RateRefusal, model: str) -> Response:
        """Answer 429 for rate."""
        advice = "It is larger than the limit and can never pass."
        if refusal.wait is not None:
            advice = f"Please try again in {go_duration(refusal.wait)}."
        elif refusal.reason == "concurrency":
            advice = "Please try again when one of them is done."
        message = (
            f"Rate limit reached for {model} on {_UNITS[refusal.reason]}: Limit {refusal.limit}, "
            f"Used {refusal.used}, Requested {refusal.requested}. {advice}"
        )
        kind = "tokens" if refusal.reason == "tokens" else "requests"
        return self._error(429, message, kind=kind, wait=refusal.wait, refused=refusal.reason)

    def _fail(self, failure: Failure) -> Response:
        """Answer as a failure says that was scripted or drawn."""
        message, kind = f"The provider was told to answer with {failure.status}.", None
        if failure.code == "insufficient_quota":
            message, kind = _QUOTA, failure.code
        seconds = failure.retry_after
        wait = None if seconds is None else round(seconds * NANOSECONDS)
        return self._error(failure.status, message, kind=kind, code=failure.code, wait=wait)

    def _error(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        code: str | None = None,
        wait: int | None = None,
        refused: str = "",
    ) -> Response:
        """Return an error; type and code default to those of its status, `wait` is nanoseconds."""
        rules, nanoseconds = self._rules, wait or 0
        form = rules.refusal if refused and rules.refusal else rules.error
        waits = {
            "retry-after": -(-nanoseconds // NANOSECONDS),
            "retry-after-ms": -(-nanoseconds // _MILLISECOND),
            "x-ratelimit-reset": round(time.time() * 1_000) + nanoseconds // _MILLISECOND,
        }
        body = error_body(form, status, message, kind, code, refused, waits["retry-after"])
        headers = {**self._headers(), **(rules.refusal_headers if refused else {})}
        if wait is not None:
            headers |= {name: str(waits[name]) for name in rules.waits}
        return JSONResponse(body, status, headers)

    def _headers(self) -> dict[str, str]:
        """Return the request's id, and what the headers say about each limit."""
        rules = self._rules
        prefix = "" if rules.error == "anthropic" else "x-"
        headers = {f"{prefix}request-id": f"req_{self._number}"}
        for name, limit, remaining, reset in self._enforcer.budget():
            slices = rules.slices.get(name, 1)
            values = {
                "limit": -(-limit // slices),
                "remaining": remaining,
                "reset": _reset(reset, rules),
                "renewalperiod": round(self._enforcer.options.minute / slices),
            }
            template = rules.headers.get(name)
            for part in rules.parts if template else ():
                headers[str(template).format(part=part)] = str(values[part])
        return headers


def _reset(nanoseconds: int, rules: Rules) -> str:
    """Return in how long a limit is full again, as the provider writes it."""
    if rules.reset == "go":
        return go_duration(nanoseconds)
    if rules.reset == "seconds":
        return str(-(-nanoseconds // NANOSECONDS))
    until = datetime.now(UTC) + timedelta(seconds=nanoseconds / NANOSECONDS)
    return until.isoformat(timespec="seconds").replace("+00:00", "Z")


def go_duration(nanoseconds: int) -> str:
    """Return a duration in Go's format, in whole milliseconds rounded up: 120ms, 8.64s, 6m0s."""
    minutes, milliseconds = divmod(-(-nanoseconds // _MILLISECOND), 60_000)
    if minutes:
        return f"{minutes}m{milliseconds / 1000:g}s"
    return f"{milliseconds}ms" if 0 < milliseconds < 1000 else f"{milliseconds / 1000:g}s"  # noqa: PLR2004 - a second


def _check_key(request: Request) -> None:
    """Refuse a call without any API key: OpenAI's, Azure's, Anthropic's, Google's or Amazon's."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    has_key = any(map(request.headers.get, ("api-key", "x-api-key", "x-goog-api-key")))
    signed = scheme.lower() in ("bearer", "aws4-hmac-sha256") and key.strip()
    if not has_key and not signed:
        raise InvalidRequestError("You didn't provide an API key.", status=401)
