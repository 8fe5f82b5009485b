"""The OpenAI SDK behaves over the transport exactly as it does without, byte for byte."""

from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

CALL: dict[str, Any] = {
    "model": "gpt-4o-mini",
    "messages": [{"role": "user", "content": "What is 6 times 7?"}],
    "max_tokens": 50,
}
#: The library that this version of the SDK is built on.
FAMILY: Any = "httpx" if openai.VERSION < "3" else "httpx2"

Script = Callable[[AsyncOpenAI, RateLimitedProvider], Awaitable[Any]]


async def stream(client: AsyncOpenAI, _: RateLimitedProvider) -> Any:
    """Stream a chat call; return its parsed chunks, and the raw lines of another one."""
    chat = client.chat.completions
    usage = {"include_usage": True}
    options: dict[str, Any] = {**CALL, "stream": True, "stream_options": usage}
    parts = [part.model_dump_json() async for part in await chat.create(**options)]
    async with chat.with_streaming_response.create(**CALL, stream=True) as reply:
        return parts, [line async for line in reply.iter_lines()]


async def responses_and_embeddings(client: AsyncOpenAI, _: RateLimitedProvider) -> Any:
    whole = await client.responses.create(model="m", input="Hello", max_output_tokens=50)
    raw = await client.embeddings.with_raw_response.create(model="e", input=["one", "two"])
    return whole.model_dump_json(), raw.content, raw.parse().usage.total_tokens


async def retries(client: AsyncOpenAI, provider: RateLimitedProvider) -> Any:
    provider.fail_next(2, status=503, retry_after=0.001)
    raw = await client.chat.completions.with_raw_response.create(**CALL)
    provider.fail_next(3, status=500, retry_after=0.001)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(**CALL)
    return raw.content, raw.retries_taken, caught.value.body, provider.statistics().requests


async def broken_stream(client: AsyncOpenAI, provider: RateLimitedProvider) -> Any:
    provider.fail_next(status=500, after_chunks=2)
    parts: list[str] = []

    async def collect() -> None:
        async for part in await client.chat.completions.create(**CALL, stream=True):
            parts.append(part.model_dump_json())  # noqa: PERF401 - it ends in an error

    with pytest.raises(Exception, match=r"incomplete chunked read|Connection error") as caught:
        await collect()
    return parts, type(caught.value), str(caught.value)


async def outcome(script: Script, http_client: Any) -> Any:
    with RateLimitedProvider() as provider:
        client = AsyncOpenAI(base_url=provider.base_url, api_key="k", http_client=http_client)
        async with client:
            return await script(client, provider)


@pytest.mark.parametrize("script", [stream, responses_and_embeddings, retries, broken_stream])
async def test_async_openai_sdk_behaves_as_without_transport(script: Script) -> None:
    limiter = Limiter("10k RPM", "10M TPM", concurrency=1)
    plain = await outcome(script, None)
    assert await outcome(script, limiter.http_client(family=FAMILY, retries=0)) == plain
    assert limiter.statistics().admitted > 0
    assert limiter.statistics().in_flight == 0


def test_sync_openai_sdk_behaves_as_without_transport() -> None:
    limiter, seen = Limiter("10k RPM", "10M TPM", concurrency=1), []
    for http_client in (None, limiter.http_client(family=FAMILY, sync=True)):
        with (
            RateLimitedProvider() as provider,
            OpenAI(base_url=provider.base_url, api_key="k", http_client=http_client) as client,
        ):
            parts = client.chat.completions.create(**CALL, stream=True)
            seen.append([part.model_dump_json() for part in parts])
    assert seen[0] == seen[1]
    assert limiter.statistics().in_flight == 0
