"""The provider as an ASGI application.

Starlette handles the control endpoints (`/statistics`, `/arrivals`, `/reconfigure`, `/fail_next`).
The metered endpoints are one plain ASGI application mounted beside them, because routing, request
and response objects would take longer than the answer.
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from asyncbucket.testing.provider import headers as provider_headers
from asyncbucket.testing.provider import prompt as prompts
from asyncbucket.testing.provider import responses, wire
from asyncbucket.testing.provider.admission import Admission, Refusal
from asyncbucket.testing.provider.charging import charge
from asyncbucket.testing.provider.exchange import Exchange
from asyncbucket.testing.provider.model import Reply, answer
from asyncbucket.testing.provider.prompt import InvalidRequestError, Json, Prompt
from asyncbucket.testing.provider.settings import Failure, draw_latency


class _Endpoint(NamedTuple):
    """How one endpoint that generates text reads and writes."""

    read: Callable[[Json], Prompt]
    whole: Callable[..., bytes]
    chunks: Callable[..., list[bytes]]


class _Answer(NamedTuple):
    """What to reply if the call is admitted."""

    model: str
    tokens: int
    whole: Callable[[], bytes]
    chunks: Callable[[], list[bytes]] | None


_GENERATING: Mapping[str, _Endpoint] = {
    "chat/completions": _Endpoint(prompts.read_chat, wire.chat_completion, wire.chat_chunks),
    "completions": _Endpoint(prompts.read_completion, wire.completion, wire.completion_chunks),
    "responses": _Endpoint(prompts.read_responses, responses.response, responses.response_events),
}


def make_app(admission: Admission) -> Starlette:
    """Make the application whose calls are decided and counted by `admission`."""

    async def statistics(_: Request) -> JSONResponse:
        return JSONResponse(asdict(admission.statistics()))

    async def arrivals(_: Request) -> JSONResponse:
        return JSONResponse(admission.arrivals())

    async def reconfigure(request: Request) -> JSONResponse:
        options = await request.json()
        if isinstance(options.get("latency"), list):
            options["latency"] = tuple(options["latency"])
        return _control(lambda: admission.reconfigure(**options))

    async def fail_next(request: Request) -> JSONResponse:
        command = await request.json()
        return _control(lambda: admission.fail_next(command.pop("count"), Failure(**command)))

    return Starlette(
        routes=[
            Route("/statistics", statistics),
            Route("/arrivals", arrivals),
            Route("/reconfigure", reconfigure, methods=["POST"]),
            Route("/fail_next", fail_next, methods=["POST"]),
            Mount("/", app=_Api(admission)),
        ]
    )


def _control(command: Callable[[], None]) -> JSONResponse:
    try:
        command()
    except (TypeError, ValueError) as exc:
        return JSONResponse({"error": str(exc)}, status_code=400)
    return JSONResponse({})


class _Api:
    """The endpoints of OpenAI, at any prefix: `/v1/...` or Azure's `/openai/deployments/x/...`."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._numbers = count(1)
        self._rng = random.Random(admission.settings.seed)  # noqa: S311 - repeatable, not secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            exchange = Exchange(scope, receive, send, f"{next(self._numbers):08x}")
            try:
                await self._serve(exchange)
            finally:
                exchange.close()

    async def _serve(self, exchange: Exchange) -> None:
        if not exchange.has_key:
            await self._reject(exchange, 401, "You didn't provide an API key.")
            return
        endpoint = exchange.endpoint
        if endpoint == "models" and exchange.method == "GET":
            await exchange.reply(200, wire.models(), self._limits())
            return
        if exchange.method != "POST" or endpoint not in (*_GENERATING, "embeddings"):
            message = f"Invalid URL ({exchange.method} {exchange.path})"
            await self._reject(exchange, 404, message)
            return
        try:
            prepared = self._prepare(endpoint, await exchange.body(), exchange.number)
        except InvalidRequestError as exc:
            await self._reject(exchange, 400, str(exc), parameter=exc.parameter)
            return
        outcome = self._admission.enter(
            endpoint, prepared.tokens, request_id=exchange.header(b"x-request-id")
        )
        if isinstance(outcome, Refusal):
            body, extra = provider_headers.refusal_reply(outcome, prepared.model)
            await exchange.reply(429, body, self._limits() + extra)
        elif outcome is not None and outcome.status == 429:  # noqa: PLR2004 - HTTP
            await self._send_failure(exchange, outcome)
        else:
            await self._answer(exchange, prepared, outcome)

    def _prepare(self, endpoint: str, body: Json, call_id: str) -> _Answer:
        """Read the request, compose its reply and determine its charge."""
        settings = self._admission.settings
        try:
            if endpoint == "embeddings":
                texts = prompts.read_embeddings(body)
                write = functools.partial(wire.embeddings, texts, dimensions=settings.dimensions)
                return _Answer(texts.model, texts.tokens, write, None)
            handler = _GENERATING[endpoint]
            prompt = handler.read(body)
            reply: Reply = answer(prompt, reply_tokens=settings.reply_tokens)
        except (AttributeError, KeyError, RecursionError, TypeError) as exc:
            # A part of the wrong JSON type, anywhere: the code above takes the types for granted.
            raise InvalidRequestError(f"the request can't be understood: {exc!r}") from exc
        tokens = charge(
            settings.charge, prompt, reply, default_max_tokens=settings.default_max_tokens
        )
        whole = functools.partial(handler.whole, prompt, reply, call_id=call_id)
        chunks = functools.partial(handler.chunks, prompt, reply, call_id=call_id)
        return _Answer(prompt.model, tokens, whole, chunks if prompt.stream else None)

    async def _answer(self, exchange: Exchange, prepared: _Answer, failure: Failure | None) -> None:
        slot = _Slot(self._admission)
        try:
            seconds = draw_latency(self._admission.settings.latency, self._rng)
            if failure is not None and (failure.after_chunks is None or prepared.chunks is None):
                slot.release()
                await self._send_failure(exchange, failure)
            elif prepared.chunks is not None:
                await self._stream(exchange, slot, prepared.chunks(), seconds, failure)
            elif await exchange.pause(seconds):
                slot.release()
                await exchange.reply(200, prepared.whole(), self._limits())
        finally:
            slot.release(disconnected=True)

    async def _stream(
        self,
        exchange: Exchange,
        slot: "_Slot",
        chunks: Sequence[bytes],
        seconds: float,
        failure: Failure | None,
    ) -> None:
        """Send chunks over `seconds`; a stream that fails just ends, and the server cuts it off."""
        pause = seconds / len(chunks)
        if failure is not None:
            chunks = chunks[: failure.after_chunks]
        await exchange.start_stream(self._limits())
        for left, chunk in zip(reversed(range(len(chunks))), chunks, strict=True):
            if not await exchange.pause(pause):
                return
            if left == 0:
                slot.release()
            await exchange.send_chunk(chunk, more=left > 0 or failure is not None)
        slot.release()

    async def _send_failure(self, exchange: Exchange, failure: Failure) -> None:
        body, extra = provider_headers.failure_reply(failure)
        await exchange.reply(failure.status, body, self._limits() + extra)

    async def _reject(
        self, exchange: Exchange, status: int, message: str, *, parameter: str | None = None
    ) -> None:
        self._admission.note_invalid()
        body = provider_headers.error_body(status, message, parameter=parameter)
        await exchange.reply(status, body, self._limits())

    def _limits(self) -> provider_headers.Headers:
        return provider_headers.limit_headers(self._admission.budget())


class _Slot:
    """The slot of an admitted call.

    It ends once, right before the last bytes are sent, so that a client that has them may rely on
    it.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._released = False

    def release(self, *, disconnected: bool = False) -> None:
        if not self._released:
            self._released = True
            self._admission.leave(disconnected=disconnected)
