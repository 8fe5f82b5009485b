"""The OpenAI SDK behaves over the transport exactly as it does without, byte for byte."""

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

MODEL = "gpt-4o-mini"
HELLO: list[Any] = [{"role": "user", "content": "What is 6 times 7?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            },
        },
    }
]
#: The library that this version of the SDK is built on.
FAMILY: Any = "httpx" if openai.VERSION < "3" else "httpx2"

Outcome = tuple[Any, ...]
Script = Callable[[AsyncOpenAI, RateLimitedProvider], Awaitable[Any]]


async def chat(client: AsyncOpenAI, _: RateLimitedProvider) -> Outcome:
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=50
    )
    return raw.status_code, raw.content, raw.retries_taken


async def stream(client: AsyncOpenAI, _: RateLimitedProvider) -> Outcome:
    """Stream a chat call; return its parsed chunks, and the raw lines of another one."""
    options: Any = {"model": MODEL, "messages": HELLO, "stream": True, "max_tokens": 50}
    parts = [
        part.model_dump_json()
        async for part in await client.chat.completions.create(
            **options, stream_options={"include_usage": True}
        )
    ]
    async with client.chat.completions.with_streaming_response.create(**options) as reply:
        raw = [line async for line in reply.iter_lines()]
    return parts, raw


async def responses_and_embeddings(client: AsyncOpenAI, _: RateLimitedProvider) -> Outcome:
    whole = await client.responses.create(model=MODEL, input="Hello", max_output_tokens=50)
    raw = await client.embeddings.with_raw_response.create(
        model="text-embedding-3-small", input=["one", "two"]
    )
    return whole.model_dump_json(), raw.content, raw.parse().usage.total_tokens


async def errors(client: AsyncOpenAI, provider: RateLimitedProvider) -> Outcome:
    seen = []
    for make in (
        lambda: client.chat.completions.create(model="m", messages=[]),
        lambda: client.post("/nothing", cast_to=httpx.Response, body={}),
        lambda: client.models.retrieve("unknown"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            await make()
        seen.append((type(caught.value), caught.value.status_code, caught.value.body))
    provider.fail_next(status=429, code="insufficient_quota")
    with pytest.raises(openai.RateLimitError) as quota:
        await client.with_options(max_retries=0).chat.completions.create(
            model=MODEL, messages=HELLO
        )
    return seen, quota.value.code, str(quota.value)


async def retries(client: AsyncOpenAI, provider: RateLimitedProvider) -> Outcome:
    provider.fail_next(2, status=503, retry_after=0.001)
    done = await chat(client, provider)
    provider.fail_next(3, status=500, retry_after=0.001)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=MODEL, messages=HELLO)
    return done, caught.value.body, provider.statistics().requests


async def broken_stream(client: AsyncOpenAI, provider: RateLimitedProvider) -> Outcome:
    provider.fail_next(status=500, after_chunks=2)
    parts: list[str] = []

    async def collect() -> None:
        got = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        async for part in got:
            parts.append(part.model_dump_json())  # noqa: PERF401 - it ends in an error

    with pytest.raises(Exception, match=r"incomplete chunked read|Connection error") as caught:
        await collect()
    return parts, type(caught.value), str(caught.value)


async def outcome(script: Script, http_client: Any) -> Any:
    with RateLimitedProvider() as provider:
        client = AsyncOpenAI(base_url=provider.base_url, api_key="k", http_client=http_client)
        async with client:
            return await script(client, provider)


@pytest.mark.parametrize(
    "script", [stream, responses_and_embeddings, errors, retries, broken_stream]
)
async def test_async_openai_sdk_behaves_as_without_transport(script: Script) -> None:
    limiter = Limiter("10k RPM", "10M TPM", concurrency=1)
    plain = await outcome(script, None)
    assert await outcome(script, limiter.http_client(family=FAMILY, retries=0)) == plain
    statistics = limiter.statistics()
    assert statistics.admitted > 0
    assert statistics.in_flight == 0


def test_sync_openai_sdk_behaves_as_without_transport() -> None:
    limiter = Limiter("10k RPM", "10M TPM", concurrency=1)
    seen = []
    for http_client in (None, limiter.http_client(family=FAMILY, sync=True)):
        with (
            RateLimitedProvider() as provider,
            OpenAI(base_url=provider.base_url, api_key="k", http_client=http_client) as client,
        ):
            parts = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            seen.append(
                [
                    *(part.model_dump_json() for part in parts),
                    client.embeddings.create(model="e", input="a").model_dump_json(),
                ]
            )
    assert seen[0] == seen[1]
    assert limiter.statistics().in_flight == 0
