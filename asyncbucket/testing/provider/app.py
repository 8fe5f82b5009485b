"""The provider as an ASGI application: endpoints, headers about limits, and errors.

OpenAI's and Anthropic's endpoints are known by the end of the path, at any prefix: `/v1/...`, or
Azure's `/openai/deployments/x/...`. Headers and errors are those of the endpoint's provider.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from asyncbucket.testing.provider.enforcer import Enforcer, RateRefusal, is_refusal
from asyncbucket.testing.provider.options import NANOSECONDS, Failure
from asyncbucket.testing.provider.prompt import Answer, Json, answer
from asyncbucket.testing.provider.replies import DIALECTS, as_events, embeddings

DEFAULT_MAX_TOKENS: Final = 16
"""What a call without `max_tokens` is charged for its output."""
_MILLISECOND: Final = 1_000_000
_QUOTA: Final = "You exceeded your current quota, please check your plan and billing details."
_UNITS: Final = {
    "requests": "requests per min (RPM)",
    "tokens": "tokens per min (TPM)",
    "concurrency": "concurrent requests",
}
#: Type and code of an error by its status, at OpenAI and at Anthropic.
_OPENAI: Final = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "unknown_url"),
    429: ("requests", "rate_limit_exceeded"),
    503: ("server_error", "overloaded"),
}
_ANTHROPIC: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    529: "overloaded_error",
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
        self.endpoint = "chat/completions" if chat else path.rsplit("/", 1)[-1]
        self._enforcer = enforcer
        self._request = request
        self._number = number
        self._is_admitted = False

    def leave(self, *, disconnected: bool = False) -> None:
        """Give the slot back, once."""
        if self._is_admitted:
            self._is_admitted = False
            self._enforcer.leave(disconnected=disconnected)

    async def response(self) -> Response:
        """Return the reply."""
        try:
            _check_key(self._request)
            model, tokens, reply = self._read(await self._request.body())
        except InvalidRequestError as exc:
            self._enforcer.count_invalid()
            return self._error(exc.status, str(exc))
        outcome = self._enforcer.enter(self.endpoint, tokens)
        self._is_admitted = not is_refusal(outcome)
        if isinstance(outcome, RateRefusal):
            return self._refuse(outcome, model)
        if outcome is not None and (outcome.after_chunks is None or isinstance(reply, dict)):
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
            if not body["model"]:
                raise InvalidRequestError("you must provide a model parameter")
            if dialect is None:
                return body["model"], *embeddings(body)
            reply = answer(body[dialect.asked], body, reply_tokens=options.reply_tokens)
            tokens = charge(options.charge, reply)
            if not body.get("stream"):
                return reply.model, tokens, dialect.whole(reply, self._number)
            return reply.model, tokens, as_events(dialect.events(reply, self._number, body))
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as exc:
            # No JSON, or a part of the wrong type, anywhere: reading takes the types for granted.
            raise InvalidRequestError(f"the request can't be understood: {exc!r}") from exc

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
        numbers = f"Limit {refusal.limit}, Used {refusal.used}, Requested {refusal.requested}."
        if refusal.wait is not None:
            advice = f"Please try again in {go_duration(refusal.wait)}."
        elif refusal.reason == "concurrency":
            advice = "Please try again when one of them is done."
        else:
            advice = "It is larger than the limit and can never pass."
        return self._error(
            429,
            f"Rate limit reached for {model} on {_UNITS[refusal.reason]}: {numbers} {advice}",
            kind="tokens" if refusal.reason == "tokens" else "requests",
            retry_after=refusal.wait,
        )

    def _fail(self, failure: Failure) -> Response:
        """Answer as a failure says that was scripted or drawn."""
        message, kind = f"The provider was told to answer with {failure.status}.", None
        if failure.code == "insufficient_quota":
            message, kind = _QUOTA, failure.code
        seconds = failure.retry_after
        wait = None if seconds is None else round(seconds * NANOSECONDS)
        return self._error(failure.status, message, kind=kind, code=failure.code, retry_after=wait)

    def _error(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> Response:
        """Return an error; type and code default to those of its status."""
        if self.endpoint == "messages":
            error: Json = {"type": _ANTHROPIC.get(status, "api_error"), "message": message}
            body: Json = {"type": "error", "error": error}
        else:
            usual_kind, usual_code = _OPENAI.get(status, ("server_error", None))
            error = {"message": message, "type": kind or usual_kind, "param": None}
            body = {"error": {**error, "code": code or usual_code}}
        headers = self._headers()
        if retry_after is not None:
            headers["retry-after"] = str(-(-retry_after // NANOSECONDS))
            headers["retry-after-ms"] = str(-(-retry_after // _MILLISECOND))
        return JSONResponse(body, status, headers)

    def _headers(self) -> dict[str, str]:
        """Return the request's id, and limit, remainder and reset of each limit."""
        key, shown = "x-request-id", "x-ratelimit-{part}-{name}"
        if self.endpoint == "messages":
            key, shown = "request-id", "anthropic-ratelimit-{name}-{part}"
        headers = {key: f"req_{self._number}"}
        for name, limit, remaining, reset in self._enforcer.budget():
            full = go_duration(reset)
            if self.endpoint == "messages":
                until = datetime.now(UTC) + timedelta(seconds=reset / NANOSECONDS)
                full = until.isoformat(timespec="seconds").replace("+00:00", "Z")
            for part, value in {"limit": limit, "remaining": remaining, "reset": full}.items():
                headers[shown.format(part=part, name=name)] = str(value)
        return headers


def charge(rule: str, reply: Answer) -> int:
    """Return the tokens that a call costs when it is admitted, before its reply is known.

    OpenAI: "your rate limit is calculated as the maximum of max_tokens and the estimated number of
    tokens based on the character count of your request"
    (platform.openai.com/docs/guides/rate-limits, read in 2025). What the reply will use is known only
    to a fake model; it is for tests in which estimate and usage must agree.
    """
    if rule == "usage":
        return reply.prompt_tokens + reply.completion_tokens
    output = DEFAULT_MAX_TOKENS if reply.max_tokens is None else reply.max_tokens
    return max(reply.prompt_tokens, output)


def go_duration(nanoseconds: int) -> str:
    """Return a duration in Go's format, in whole milliseconds rounded up: 120ms, 8.64s, 6m0s."""
    minutes, milliseconds = divmod(-(-nanoseconds // _MILLISECOND), 60_000)
    if minutes:
        return f"{minutes}m{milliseconds / 1000:g}s"
    return f"{milliseconds}ms" if 0 < milliseconds < 1000 else f"{milliseconds / 1000:g}s"  # noqa: PLR2004 - a second


def _check_key(request: Request) -> None:
    """Refuse a call without any API key: OpenAI's, Azure's or Anthropic's."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    others = request.headers.get("api-key") or request.headers.get("x-api-key")
    if not others and not (scheme.lower() == "bearer" and key.strip()):
        raise InvalidRequestError("You didn't provide an API key.", status=401)
