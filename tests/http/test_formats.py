"""Calls are settled by their usage in every provider's own format, over real HTTP on loopback."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import pytest

from asyncbucket import Limiter

MESSAGES = [{"role": "user", "content": "x" * 400}]
WHOLE = {"model": "m", "messages": MESSAGES, "max_tokens": 300}


def events(*objects: dict[str, Any], end: str = "") -> str:
    """Return server-sent events, named by their types as Cohere names them."""
    sent = (
        f"event: {each.get('type', 'message')}\ndata: {json.dumps(each)}\n\n" for each in objects
    )
    return "".join(sent) + end


def lines(*objects: dict[str, Any]) -> str:
    """Return an object on each line, written as Go writes it."""
    return "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in objects)


@dataclass(frozen=True)
class Format:
    """What a provider is sent, how it answers, and what the call is charged before and after."""

    path: str
    body: dict[str, Any]
    answer: str
    reserved: tuple[int, int]
    used: tuple[int, int]


#: What Cohere bills, and, beside it, what its limits count.
COHERE_USAGE = {
    "billed_units": {"input_tokens": 80, "output_tokens": 5},
    "tokens": {"input_tokens": 90, "output_tokens": 7},
}
#: docs.litellm.ai/docs/completion/usage, docs.cohere.com/v2/reference/chat-stream and /embed, /v1/reference/chat,
#: docs.ollama.com/api/chat, /generate and /embed; read in 2026.
FORMATS = {
    "a stream of LiteLLM": Format(
        "/chat/completions",
        {**WHOLE, "stream": True, "stream_options": {"include_usage": True}},
        events(
            {"choices": [{"index": 0, "delta": {"content": 'Say "usage": {.'}}]},
            {
                "choices": [{"index": 0, "delta": {}}],
                "usage": {"completion_tokens": 7, "prompt_tokens": 90, "total_tokens": 97},
            },
            end="data: [DONE]\n\n",
        ),
        (100, 300),
        (90, 7),
    ),
    "a reply of Cohere": Format(
        "/v2/chat",
        WHOLE,
        json.dumps(
            {
                "id": "1",
                "message": {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
                "finish_reason": "COMPLETE",
                "usage": COHERE_USAGE,
            }
        ),
        (100, 300),
        (90, 7),
    ),
    "a stream of Cohere": Format(
        "/v2/chat",
        {**WHOLE, "stream": True},
        events(
            {"type": "message-start", "delta": {"message": {"role": "assistant", "content": []}}},
            {"type": "content-delta", "delta": {"message": {"content": {"text": 'a "usage": {'}}}},
            {
                "type": "message-end",
                "delta": {
                    "finish_reason": "COMPLETE",
                    "usage": COHERE_USAGE,
                },
            },
        ),
        (100, 300),
        (90, 7),
    ),
    "a reply of Cohere's first version": Format(
        "/v1/chat",
        {"message": "x" * 200, "chat_history": [{"message": "x" * 200}], "max_tokens": 300},
        json.dumps({"text": "Hi.", "finish_reason": "COMPLETE", "meta": COHERE_USAGE}),
        (100, 300),
        (90, 7),
    ),
    "a stream of Cohere's first version": Format(
        "/v1/chat",
        {"message": "x" * 400, "max_tokens": 300, "stream": True},
        lines(
            {"event_type": "text-generation", "text": 'a "meta": {'},
            {"event_type": "stream-end", "response": {"text": "Hi.", "meta": COHERE_USAGE}},
        ),
        (100, 300),
        (90, 7),
    ),
    "Cohere's embeddings": Format(
        "/v2/embed",
        {"model": "m", "texts": ["x" * 400], "input_type": "search_document"},
        '{"embeddings":{"float":[[0.5,0.5]]},"meta":{"billed_units":{"input_tokens":90}}}',
        (100, 0),
        (90, 0),
    ),
    "a stream of Ollama": Format(
        "/api/chat",
        {"model": "m", "messages": MESSAGES, "options": {"num_predict": 300}},
        lines(
            {"message": {"role": "assistant", "content": 'a "eval_count": 9,'}, "done": False},
            {
                "message": {"role": "assistant", "content": ""},
                "done": True,
                "total_duration": 4_883_583_458,
                "prompt_eval_count": 90,
                "prompt_eval_duration": 130_079_000,
                "eval_count": 7,
                "eval_duration": 4_232_710_000,
            },
        ),
        (100, 300),
        (90, 7),
    ),
    "a reply of Ollama": Format(
        "/api/generate",
        {"model": "m", "prompt": "x" * 400, "stream": False, "options": {"num_predict": 300}},
        lines(
            {
                "response": "Hi.",
                "done": True,
                "context": list(range(30_000)),
                "prompt_eval_count": 90,
                "eval_count": 7,
            }
        ),
        (100, 300),
        (90, 7),
    ),
    "Ollama's embeddings": Format(
        "/api/embed",
        {"model": "m", "input": ["x" * 400]},
        lines({"model": "m", "embeddings": [[0.5] * 20_000], "prompt_eval_count": 90}),
        (100, 0),
        (90, 0),
    ),
}


@contextlib.asynccontextmanager
async def answering(answer: str, *, ends: bool = True) -> AsyncGenerator[str]:
    """Yield the URL of a server that sends ``answer`` in chunks, and then ends the reply or waits."""
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        data = answer.encode()
        for at in range(0, len(data), 1_000):
            part = data[at : at + 1_000]
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await writer.drain()
        if ends:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        await over.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    host, port = server.sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        over.set()
        server.close()
        await server.wait_closed()


def used(limiter: Limiter) -> tuple[int, int]:
    """Return the input and the output tokens that are charged."""
    given, received = (limit.used for limit in limiter.statistics().limits)
    return given, received


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
async def test_call_is_settled_from_usage_in_each_provider_format(
    library: Any, form: Format
) -> None:
    limiter = Limiter("10k ITPM", "10k OTPM")
    async with (
        answering(form.answer) as url,
        limiter.http_client(family=library.__name__) as client,
        client.stream("POST", url + form.path, json=form.body) as reply,
    ):
        assert used(limiter) == form.reserved
        assert await reply.aread() == form.answer.encode()

    assert used(limiter) == form.used


@pytest.mark.parametrize("name", [name for name in FORMATS if "stream" in name])
async def test_stream_is_settled_when_the_client_stops_at_its_last_event(
    library: Any, name: str
) -> None:
    """Clients read no further than the event that says so, though the reply may go on."""
    form = FORMATS[name]
    limiter = Limiter("10k ITPM", "10k OTPM")
    async with (
        answering(form.answer, ends=False) as url,
        limiter.http_client(family=library.__name__) as client,
        client.stream("POST", url + form.path, json=form.body) as reply,
    ):
        seen = b""
        async for chunk in reply.aiter_raw():
            seen += chunk
            if len(seen) == len(form.answer):
                break

    assert used(limiter) == form.used


@pytest.mark.parametrize("name", [name for name in FORMATS if "stream" in name])
async def test_stream_cut_off_early_stays_charged_as_reserved(library: Any, name: str) -> None:
    form = FORMATS[name]
    cut = form.answer[: form.answer.index("90") + 1]
    limiter = Limiter("10k ITPM", "10k OTPM")
    async with (
        answering(cut, ends=False) as url,
        limiter.http_client(family=library.__name__) as client,
        client.stream("POST", url + form.path, json=form.body) as reply,
    ):
        seen = b""
        async for chunk in reply.aiter_raw():
            seen += chunk
            if len(seen) == len(cut):
                break

    assert used(limiter) == form.reserved
