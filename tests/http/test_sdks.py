"""An SDK behaves over the transport exactly as it does without, and shows refusals of ours as such."""

import contextlib
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from asyncbucket import (
    AcquireTimeout,
    AsyncBucketError,
    BudgetExceeded,
    CostExceedsLimit,
    Limiter,
    QueueFull,
    UnknownPrice,
    budget,
)
from asyncbucket.http.exchange import family_of, library_named
from asyncbucket.testing import RateLimitedProvider
from tests.http.conftest import Server

QUESTION = [{"role": "user", "content": "?"}]
CALL: dict[str, Any] = {"model": "m", "messages": QUESTION, "max_tokens": 50}
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


# --- what the limiter refuses reaches the caller of an SDK as what it is, at once ---


@contextlib.contextmanager
def full(**terms: Any) -> Generator[Limiter]:
    limiter = Limiter(concurrency=1, **terms)
    with limiter.acquire_nowait():
        yield limiter


@contextlib.contextmanager
def broke() -> Generator[Limiter]:
    with budget(requests=0):
        yield Limiter("10 RPM")


REFUSALS: dict[type[AsyncBucketError], Callable[[], contextlib.AbstractContextManager[Limiter]]] = {
    AcquireTimeout: lambda: full(timeout=0),
    QueueFull: lambda: full(max_queue=0),
    BudgetExceeded: broke,
    CostExceedsLimit: lambda: contextlib.nullcontext(Limiter("9 TPM")),
    UnknownPrice: lambda: contextlib.nullcontext(Limiter("25 USD/day")),
}


def create_of(sdk: str, limiter: Limiter, server: Any, *, retries: int = 1, **hooks: Any) -> Any:
    """Return what calls a model by an SDK with its own retries, whose requests come to ``server``."""
    module: Any = openai if sdk.endswith("OpenAI") else anthropic
    library = library_named(family_of(module.DefaultHttpxClient) or "")
    make = library.AsyncClient if sdk.startswith("Async") else library.Client
    transport = limiter.transport(library.MockTransport(server), retries=0)
    inner = make(transport=transport, event_hooks=hooks)
    client = getattr(module, sdk)(api_key="k", max_retries=retries, http_client=inner)
    calls = client.messages if module is anthropic else client.chat.completions
    return calls.create


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sdk", ["AsyncOpenAI", "AsyncAnthropic", "OpenAI", "Anthropic"])
async def test_refusal_is_raised_as_what_it_is_and_not_tried_again(
    sdk: str, kind: type[AsyncBucketError], *, stream: bool
) -> None:
    server = Server()
    with REFUSALS[kind]() as limiter:
        with pytest.raises(kind):
            await create_of(sdk, limiter, server)(**CALL, stream=stream)
        assert limiter.statistics().refused == (kind is not UnknownPrice)
    assert server.requests == []


async def test_transport_above_another_gets_the_refusal_itself(library: Any) -> None:
    """It would take a reply for the provider's."""
    with full(timeout=0) as busy:
        outer, inner = Limiter(name="outer"), busy.transport(library.MockTransport(Server()))
        async with library.AsyncClient(transport=outer.transport(inner)) as client:
            for headers in ({}, {"x-stainless-lang": "python"}):
                with pytest.raises(AcquireTimeout):
                    _ = (await client.get("https://api.openai.com", headers=headers)).is_success
    assert outer.statistics().upstream_429 == 0


@pytest.mark.parametrize("sdk", ["AsyncOpenAI", "AsyncAnthropic"])
async def test_error_of_an_sdk_shows_the_callers_own_request(sdk: str) -> None:
    seen: list[Any] = []

    def refuse(_: Any) -> Any:
        raise httpx.ConnectError("refused")

    async def see(request: Any) -> None:
        seen.append(request)

    with pytest.raises((openai.APIConnectionError, anthropic.APIConnectionError)) as caught:
        await create_of(sdk, Limiter(), refuse, retries=0, request=[see])(**CALL)
    error: Any = caught.value
    assert error.request is error.__cause__.request is seen[-1]
