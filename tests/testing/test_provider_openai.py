"""The provider as the OpenAI SDK sees it, over real HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionToolParam
from pydantic import BaseModel, Field

from asyncbucket.testing.provider import RateLimitedProvider
from asyncbucket.testing.pytest_plugin import ProviderFactory

MODEL = "gpt-4o-mini"

Until: TypeAlias = Callable[[Callable[[], bool]], Awaitable[None]]

MULTIPLY: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "minimum": 3}},
            "required": ["a", "b"],
        },
    },
}


@pytest.fixture
async def provider() -> AsyncIterator[RateLimitedProvider]:
    async with RateLimitedProvider() as provider:
        yield provider


@pytest.fixture
async def client(provider: RateLimitedProvider) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(provider) as client:
        yield client


def client_of(provider: RateLimitedProvider) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=provider.base_url, api_key="test-key", max_retries=0)


async def ask(client: AsyncOpenAI, text: str = "Hello", **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return await client.chat.completions.create(model=MODEL, messages=messages, **more)


async def test_chat_repeats_the_question_padded_to_reply_tokens_and_cut_at_max_tokens(
    provider: RateLimitedProvider, client: AsyncOpenAI
) -> None:
    reply = await ask(client, "What is 6 x 7?")
    assert reply.choices[0].message.content == "You said: What is 6 x 7?"
    assert reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 6, 10)
    provider.reconfigure(reply_tokens=300)
    assert (await ask(client)).usage.completion_tokens == 300
    for name in ("max_tokens", "max_completion_tokens"):
        reply = await ask(client, "Hello " * 50, **{name: 5})
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.completion_tokens == 5


async def test_stream_joins_to_reply_and_ends_with_usage(client: AsyncOpenAI) -> None:
    stream = await ask(client, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    *parts, finish, last = chunks
    assert "".join(part.choices[0].delta.content for part in parts) == "You said: Hello"
    assert len(parts) > 3
    assert finish.choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.total_tokens == 2 + 4
    assert {chunk.usage for chunk in chunks[:-1]} == {None}


async def test_stream_of_a_response_joins_to_the_whole(client: AsyncOpenAI) -> None:
    """OpenAI's own helper puts text and arguments together from the events."""
    tool: Any = {"type": "function", "strict": False, **MULTIPLY["function"]}
    async with client.responses.stream(model=MODEL, input="Hello") as stream:
        text = "".join(
            [event.delta async for event in stream if event.type == "response.output_text.delta"]
        )
        said = await stream.get_final_response()
    async with client.responses.stream(model=MODEL, input="Hello", tools=[tool]) as stream:
        called = await stream.get_final_response()
    assert text == said.output_text == "You said: Hello"
    assert said.usage is not None
    assert said.usage.total_tokens == 2 + 4
    (call,) = called.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"a": 1, "b": 3}


async def test_model_calls_the_first_tool_once_and_then_answers(client: AsyncOpenAI) -> None:
    reply = await ask(client, tools=[MULTIPLY])
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert call.function.name == "multiply"
    assert json.loads(call.function.arguments) == {"a": 1, "b": 3}
    history: Any = [
        {"role": "user", "content": "Hello"},
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    answer = await client.chat.completions.create(model=MODEL, messages=history, tools=[MULTIPLY])
    assert answer.choices[0].message.content == "You said: Hello"
    history += [{"role": "assistant", "content": "3"}, {"role": "user", "content": "Again"}]
    again = await client.chat.completions.create(model=MODEL, messages=history, tools=[MULTIPLY])
    assert again.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "called"),
    [("none", None), ("required", "multiply"), ("other", "other"), ("unknown", None)],
)
async def test_tool_choice_is_obeyed(client: AsyncOpenAI, choice: str, called: str | None) -> None:
    other: Any = {"type": "function", "function": {"name": "other", "parameters": {}}}
    named = {"type": "function", "function": {"name": choice}}
    asked = choice if choice in ("none", "required") else named
    reply = await ask(client, tools=[MULTIPLY, other], tool_choice=asked)
    calls = reply.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ([called] if called else [])


async def test_response_format_yields_valid_json(client: AsyncOpenAI) -> None:
    class Point(BaseModel):
        x: int = Field(ge=10)
        label: str
        neighbours: list["Point"]

    messages: Any = [{"role": "user", "content": "Hello"}]
    parsed = await client.chat.completions.parse(
        model=MODEL, messages=messages, response_format=Point
    )
    plain = await ask(client, response_format={"type": "json_object"})
    assert parsed.choices[0].message.parsed == Point(x=10, label="text", neighbours=[])
    assert json.loads(plain.choices[0].message.content) == {}


async def test_embeddings_are_unit_vectors_that_depend_on_the_text(client: AsyncOpenAI) -> None:
    made = await client.embeddings.create(model="e", input=["a", "b", "a"])
    short = await client.embeddings.create(model="e", input=[[1, 2, 3], [4]], dimensions=3)
    vectors = [item.embedding for item in made.data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1)
    assert (len(vectors[0]), len(short.data[0].embedding)) == (64, 3)
    assert (made.usage.total_tokens, short.usage.total_tokens) == (3, 4)


async def test_responses_give_text_usage_tools_and_formats(client: AsyncOpenAI) -> None:
    class City(BaseModel):
        name: str

    tool: Any = {"type": "function", **MULTIPLY["function"], "strict": False}
    question: Any = {"role": "user", "content": "Hello " * 50}
    cut = await client.responses.create(model=MODEL, input=[question], max_output_tokens=16)
    parsed = await client.responses.parse(
        model=MODEL, input="Hello", instructions="Be kind.", text_format=City
    )
    result: Any = {"type": "function_call_output", "call_id": "1", "output": "3"}
    answer = await client.responses.create(model=MODEL, input=[question, result], tools=[tool])
    assert cut.usage is not None
    assert (cut.status, cut.usage.output_tokens) == ("incomplete", 16)
    assert (parsed.status, parsed.output_parsed) == ("completed", City(name="text"))
    assert answer.output_text.startswith("You said: Hello")


async def test_azure_client_finds_its_deployment(provider: RateLimitedProvider) -> None:
    async with openai.AsyncAzureOpenAI(
        azure_endpoint=provider.url, api_key="test-key", api_version="2024-10-21"
    ) as client:
        reply = await ask(client)
    assert reply.choices[0].message.content == "You said: Hello"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat/completions", {"model": "m"}, "KeyError('messages')"),
        ("chat/completions", {"model": ""}, "you must provide a model parameter"),
        ("chat/completions", {"model": "m", "messages": []}, "there are no messages"),
        ("chat/completions", {"model": "m", "messages": [{"content": 7}]}, "can't be understood"),
        ("chat/completions", {"model": "m", "messages": "x", "max_tokens": 0}, "from 1 to 1,000,"),
        ("embeddings", {"model": "m", "input": "x", "dimensions": 10**30}, "from 1 to 1,000,000"),
        ("embeddings", {"model": "m", "input": []}, "can't be understood"),
        ("embeddings", [], "can't be understood"),
    ],
)
async def test_bad_request_gets_400_and_costs_nothing(
    provider: RateLimitedProvider, path: str, body: object, message: str
) -> None:
    async with httpx.AsyncClient(headers={"authorization": "Bearer k"}) as client:
        reply = await client.post(f"{provider.base_url}/{path}", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert message in reply.json()["error"]["message"]
    assert (provider.statistics().admitted, provider.statistics().invalid) == (0, 1)


async def test_call_that_cannot_be_read_gets_400_401_or_404(provider: RateLimitedProvider) -> None:
    url, key = provider.base_url, {"authorization": "Bearer k"}
    async with httpx.AsyncClient() as client:
        unknown = await client.post(f"{url}/nonsense", json={}, headers=key)
        method = await client.get(f"{url}/chat/completions", headers=key)
        garbage = [
            await client.post(f"{url}/chat/completions", content=content, headers=key)
            for content in (b"{", b"[" * 100_000)
        ]
        strange = [
            await client.post(f"{url}/chat/completions", json={}, headers={"authorization": text})
            for text in ("", "Bearer", "Basic abc")
        ]
    assert (unknown.status_code, method.status_code) == (404, 404)
    assert unknown.json()["error"]["message"] == "Invalid URL (POST /v1/nonsense)"
    assert [reply.status_code for reply in garbage] == [400, 400]
    assert [reply.status_code for reply in strange] == [401, 401, 401]
    assert strange[0].json()["error"]["code"] == "invalid_api_key"
    assert (provider.statistics().requests, provider.statistics().invalid) == (0, 7)


async def test_replies_report_the_limits_and_429_says_when_to_retry(
    rate_limited_provider: ProviderFactory,
) -> None:
    provider = rate_limited_provider(rpm=1, tpm=6_000, policy="sliding_window")
    async with client_of(provider) as client:
        reply = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=600
        )
        with pytest.raises(openai.RateLimitError) as caught:
            await ask(client)
        provider.reconfigure(rpm=None, tpm=100)
        with pytest.raises(openai.RateLimitError, match="can never pass") as never:
            await ask(client, max_tokens=101)
    said = {
        name: reply.headers[f"x-ratelimit-{name}"]
        for name in ("limit-requests", "remaining-requests", "limit-tokens", "remaining-tokens")
    }
    assert list(said.values()) == ["1", "0", "6000", "5400"]
    assert reply.headers["x-ratelimit-reset-tokens"].startswith(("59.", "1m0s"))
    assert reply.headers["x-request-id"].startswith("req_")
    error: Any = caught.value
    assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
    assert "on requests per min (RPM): Limit 1, Used 1, Requested 1." in error.message
    assert "Please try again in 59." in error.message or "in 1m0s" in error.message
    assert error.response.headers["retry-after"] == "60"
    assert 59_000 < int(error.response.headers["retry-after-ms"]) <= 60_000
    assert "retry-after" not in never.value.response.headers


@pytest.mark.parametrize(("charge", "tokens"), [("openai", 50), ("usage", 3 + 6)], ids=str)
async def test_call_is_charged_by_the_configured_rule(
    rate_limited_provider: ProviderFactory, charge: Any, tokens: int
) -> None:
    provider = rate_limited_provider(charge=charge)
    async with client_of(provider) as client:
        reply = await ask(client, "Hello, world!"[:12], max_tokens=50)
    assert reply.usage.prompt_tokens == 3
    assert provider.statistics().tokens == tokens


async def test_scripted_failures_have_given_status_code_and_retry_after(
    provider: RateLimitedProvider, client: AsyncOpenAI
) -> None:
    provider.fail_next(status=503, retry_after=1.5)
    provider.fail_next(status=429, code="insufficient_quota")
    with pytest.raises(openai.InternalServerError) as overloaded:
        await ask(client)
    with pytest.raises(openai.RateLimitError) as quota:
        await ask(client)
    await ask(client)
    assert overloaded.value.status_code == 503
    assert overloaded.value.response.headers["retry-after-ms"] == "1500"
    assert (quota.value.code, getattr(quota.value, "type", None)) == ("insufficient_quota",) * 2
    seen = provider.statistics()
    assert (seen.admitted, seen.errors, seen.refused_429) == (2, 1, {"scripted": 1})


@pytest.mark.real_clock
async def test_stream_spreads_its_latency(rate_limited_provider: ProviderFactory) -> None:
    """This runs in real time, as the server does: the first chunk comes long before the last."""
    provider = rate_limited_provider(latency=lambda: 0.6)
    loop = asyncio.get_running_loop()
    async with client_of(provider) as client:
        arrived = [loop.time() async for _ in await ask(client, stream=True)]
    assert arrived[-1] - arrived[0] > 0.1


@pytest.mark.real_clock
@pytest.mark.parametrize("stream", [True, False])
async def test_slot_comes_back_when_client_disconnects(
    rate_limited_provider: ProviderFactory, until: Until, *, stream: bool
) -> None:
    """It runs in real time, because a socket must close: an abandoned call frees its slot early."""
    provider = rate_limited_provider(latency=60.0)

    async def consume(client: AsyncOpenAI) -> None:
        reply = await ask(client, stream=stream)
        async with reply:
            async for _ in reply:
                pass

    async with client_of(provider) as client:
        call = asyncio.create_task(consume(client))
        await until(lambda: provider.statistics().in_flight == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await until(lambda: provider.statistics().in_flight == 0)
    assert provider.statistics().disconnected == 1
