"""Anthropic's SDK, on httpx or, from version 1 on, httpx2, behaves as without the transport.

LlamaIndex's integration needs an older version, which is among the development dependencies.
"""

import importlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from asyncbucket import Limiter

anthropic: Any = pytest.importorskip("anthropic")
FAMILY: Any = anthropic.APIStatusError.__init__.__annotations__["response"].split(".")[0]
http: Any = importlib.import_module(FAMILY)

MESSAGES = [{"role": "user", "content": "x" * 400}]
HEADERS = {
    "anthropic-ratelimit-requests-remaining": "40",
    "anthropic-ratelimit-requests-limit": "50",
    "anthropic-ratelimit-input-tokens-remaining": "29000",
    "anthropic-ratelimit-input-tokens-limit": "30000",
    "request-id": "req_1",
}
WHOLE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "Hi."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 80, "cache_creation_input_tokens": 10, "output_tokens": 7},
}
EVENTS: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": {**WHOLE, "content": [], "usage": {"input_tokens": 90, "output_tokens": 1}},
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi."}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {"output_tokens": 7},
    },
    {"type": "message_stop"},
]


class Events(http.AsyncByteStream):  # type: ignore[misc]
    """A stream as Anthropic sends it."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for event in EVENTS:
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def provider() -> Callable[[Any], Any]:
    """Return a handler for MockTransport that is overloaded at the first call, and then answers."""
    calls = 0

    def answer(request: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            error = {
                "type": "error",
                "error": {"type": "overloaded_error", "message": "Overloaded"},
            }
            return http.Response(529, json=error, headers={**HEADERS, "retry-after-ms": "1"})
        if json.loads(request.content).get("stream"):
            return http.Response(200, stream=Events(), headers=HEADERS)
        return http.Response(200, json=WHOLE, headers=HEADERS)

    return answer


async def script(http_client: Any) -> Any:
    """Make a call that is retried and two kinds of streams, and return their results."""
    async with anthropic.AsyncAnthropic(api_key="k", http_client=http_client) as client:
        options = {"model": "m", "max_tokens": 500, "messages": MESSAGES}
        raw = await client.messages.with_raw_response.create(**options)
        stream = await client.messages.create(**options, stream=True)
        events = [event.model_dump_json() async for event in stream]
        async with client.messages.stream(**options) as helper:
            text = [part async for part in helper.text_stream]
        return raw.http_response.text, raw.retries_taken, events, text


async def test_anthropic_sdk_behaves_as_without_transport() -> None:
    limiter = Limiter("50 RPM burst 50", "30k ITPM", "8k OTPM", concurrency=1)
    plain = http.AsyncClient(transport=http.MockTransport(provider()))
    paced = http.AsyncClient(transport=limiter.transport(http.MockTransport(provider())))

    assert await script(paced) == await script(plain)

    requests, given, received = limiter.statistics().limits
    assert limiter.statistics().in_flight == 0
    assert requests.used == 4
    assert requests.available <= 40
    # The failed attempt stays as reserved, 100 and 256; the three replies are settled.
    assert given.used == 100 + 3 * 90
    assert received.used == 256 + 3 * 7
