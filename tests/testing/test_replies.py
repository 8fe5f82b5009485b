"""The provider's replies as OpenAI's and Anthropic's SDKs read them."""

import json
import struct
from base64 import b64decode
from collections.abc import AsyncIterator
from enum import Enum
from typing import Any, Literal

import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from asyncbucket.testing.provider import RateLimitedProvider

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": ["integer", "null"]}, "b": {"type": "integer", "minimum": 3}},
    "required": ["a", "b"],
}
ARGUMENTS = {"a": None, "b": 3}
FUNCTION = {"name": "multiply", "description": "Multiply two numbers.", "parameters": PARAMETERS}
MULTIPLY: Any = {"type": "function", "function": FUNCTION}
HELLO: Any = [{"role": "user", "content": "Hello"}]


#: A reply that lacks what the SDK declares is an error.
STRICT: Any = {"api_key": "any", "max_retries": 0, "_strict_response_validation": True}


@pytest.fixture
async def provider() -> AsyncIterator[RateLimitedProvider]:
    async with RateLimitedProvider() as provider:
        yield provider


@pytest.fixture
async def client(provider: RateLimitedProvider) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=provider.base_url, **STRICT) as client:
        yield client


@pytest.fixture
async def anthropic(provider: RateLimitedProvider) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=provider.url, **STRICT) as client:
        yield client


async def chat(client: AsyncOpenAI, messages: Any = HELLO, **more: Any) -> Any:
    return await client.chat.completions.create(model="m", messages=messages, **more)


async def message(client: AsyncAnthropic, messages: Any = HELLO, **more: Any) -> Any:
    call: dict[str, Any] = {"model": "m", "max_tokens": 50, "messages": messages, **more}
    return await client.messages.create(**call)


async def test_chat_repeats_the_question_padded_to_reply_tokens_and_cut_at_max_tokens(
    provider: RateLimitedProvider, client: AsyncOpenAI
) -> None:
    reply = await chat(client)
    assert reply.choices[0].message.content == "You said: Hello"
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 4)
    provider.reply_tokens = 300
    assert (await chat(client)).usage.completion_tokens == 300
    for name in ("max_tokens", "max_completion_tokens"):
        cut = await chat(client, **{name: 5})
        assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 5)


async def test_stream_of_a_chat_joins_to_the_reply_and_ends_with_usage(client: AsyncOpenAI) -> None:
    stream = await chat(client, stream=True, stream_options={"include_usage": True})
    *parts, finish, last = [chunk async for chunk in stream]
    assert "".join(part.choices[0].delta.content for part in parts) == "You said: Hello"
    assert len(parts) > 3
    assert finish.choices[0].finish_reason == "stop"
    assert (last.choices, last.usage.total_tokens) == ([], 6)


async def test_model_calls_the_first_tool_once_and_then_answers(client: AsyncOpenAI) -> None:
    reply = await chat(client, tools=[MULTIPLY])
    called = reply.choices[0].message
    (call,) = called.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("multiply", ARGUMENTS)
    stream = await chat(client, tools=[MULTIPLY], stream=True)
    deltas = [chunk.choices[0].delta.tool_calls or [] async for chunk in stream]
    assert json.loads("".join(each.function.arguments for (each,) in filter(None, deltas)))
    result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    history = [*HELLO, called.model_dump(exclude_none=True), result]
    answer = await chat(client, history, tools=[MULTIPLY])
    assert answer.choices[0].message.content == "You said: Hello"
    again = await chat(client, [*history, *HELLO], tools=[MULTIPLY])
    assert again.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "called"),
    [("none", None), ("required", "multiply"), ("other", "other"), ("unknown", None)],
)
async def test_tool_choice_is_obeyed(client: AsyncOpenAI, choice: str, called: str | None) -> None:
    other: Any = {"type": "function", "function": {"name": "other", "parameters": {}}}
    named = {"type": "function", "function": {"name": choice}}
    asked = choice if choice in ("none", "required") else named
    reply = await chat(client, tools=[MULTIPLY, other], tool_choice=asked)
    calls = reply.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ([called] if called else [])


class Color(Enum):
    """An enumeration."""

    RED = "red"


class Tree(BaseModel):
    """Refers to itself."""

    value: int
    left: "Tree | None" = None


class Everything(BaseModel):
    """What pydantic writes into schemas."""

    text: str
    least: int = Field(ge=10)
    positive: int = Field(gt=4)
    negative: float = Field(lt=-0.5)
    flag: bool
    color: Color
    kind: Literal["this"]
    either: int | str
    maybe: int | None
    pair: list[Color] = Field(min_length=2)
    tree: Tree


async def test_response_format_yields_valid_json(client: AsyncOpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": Everything.model_json_schema()}}
    plain = await chat(client, response_format=schema)
    ask = client.chat.completions.parse
    strict = await ask(model="m", messages=HELLO, response_format=Everything)
    response = await client.responses.parse(model="m", input="Hello", text_format=Everything)
    made = Everything.model_validate_json(plain.choices[0].message.content)
    assert made == strict.choices[0].message.parsed == response.output_parsed
    any_object = await chat(client, response_format={"type": "json_object"})
    assert json.loads(any_object.choices[0].message.content) == {}


async def test_embeddings_are_unit_vectors_that_depend_on_the_text(client: AsyncOpenAI) -> None:
    client._strict_response_validation = False  # asks for base64, which it doesn't declare
    made = await client.embeddings.create(model="e", input=["a", "b", "a"])
    short = await client.embeddings.create(model="e", input=[[1, 2, 3], [4]], dimensions=3)
    asked = {"model": "e", "input": "a", "encoding_format": "base64"}
    coded: Any = await client.post("/embeddings", cast_to=object, body=asked)
    vectors = [item.embedding for item in made.data]
    assert list(struct.unpack("<64f", b64decode(coded["data"][0]["embedding"]))) == vectors[0]
    assert vectors[0] == vectors[2] != vectors[1]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1)
    assert (len(vectors[0]), len(short.data[0].embedding)) == (64, 3)
    assert (made.usage.total_tokens, short.usage.total_tokens) == (3, 4)


async def test_responses_give_text_calls_and_usage_whole_or_streamed(client: AsyncOpenAI) -> None:
    """OpenAI's own helper puts text and arguments together from the events."""
    tool: Any = {"type": "function", "strict": False, **FUNCTION}
    async with client.responses.stream(model="m", input="Hello") as stream:
        events = [event async for event in stream]
        said = await stream.get_final_response()
    async with client.responses.stream(model="m", input=HELLO, tools=[tool]) as stream:
        called: Any = await stream.get_final_response()
    result: Any = {"type": "function_call_output", "call_id": "1", "output": "3"}
    answer = await client.responses.create(model="m", input=[*HELLO, result], tools=[tool])
    cut = await client.responses.create(model="m", input="Hello " * 50, max_output_tokens=16)
    parts = [event.delta for event in events if event.type == "response.output_text.delta"]
    (done,) = (event.text for event in events if event.type == "response.output_text.done")
    assert "".join(parts) == done == said.output_text == answer.output_text == "You said: Hello"
    assert said.usage is not None
    assert said.usage.total_tokens == 6
    assert json.loads(called.output[0].arguments) == ARGUMENTS
    assert cut.usage is not None
    assert (cut.status, cut.usage.output_tokens) == ("incomplete", 16)


async def test_azure_client_finds_its_deployment(provider: RateLimitedProvider) -> None:
    async with openai.AsyncAzureOpenAI(
        azure_endpoint=provider.url, api_key="test-key", api_version="2024-10-21"
    ) as client:
        assert (await chat(client)).choices[0].message.content == "You said: Hello"


async def test_message_gives_text_and_usage_whole_or_in_a_stream(anthropic: AsyncAnthropic) -> None:
    reply = await message(anthropic, system="Be kind.")
    image = {"type": "image", "source": {"type": "base64", "data": "x" * 10_000}}
    content = [image, {"type": "text", "text": "Hello"}]
    cut = await message(anthropic, [{"role": "user", "content": content}], max_tokens=2)
    async with anthropic.messages.stream(model="m", max_tokens=9, messages=HELLO) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final: Any = await stream.get_final_message()
    assert text == final.content[0].text == reply.content[0].text == "You said: Hello"
    assert final.stop_reason == reply.stop_reason == "end_turn"
    assert final.usage.output_tokens == reply.usage.output_tokens == 4
    assert (reply.usage.input_tokens, cut.usage.input_tokens) == (4, 87)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)


async def test_message_uses_a_tool_once_or_as_told(anthropic: AsyncAnthropic) -> None:
    tool: Any = {"name": "multiply", "input_schema": PARAMETERS}
    stream = await message(anthropic, tools=[tool], stream=True)
    deltas = [event.delta async for event in stream if event.type == "content_block_delta"]
    use = {"type": "tool_use", "id": "toolu_1", "name": "multiply", "input": ARGUMENTS}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "3"}
    asked = {"role": "assistant", "content": [use]}
    history = [*HELLO, asked, {"role": "user", "content": [result]}]
    answer = await message(anthropic, history, tools=[tool], tool_choice={"type": "auto"})
    assert json.loads("".join(delta.partial_json for delta in deltas)) == ARGUMENTS
    assert answer.content[0].text == "You said: Hello"
    for choice in ({"type": "any"}, {"type": "tool", "name": "multiply"}):
        told = await message(anthropic, history, tools=[tool], tool_choice=choice)
        assert told.stop_reason == "tool_use"
        assert (told.content[0].name, told.content[0].input) == ("multiply", ARGUMENTS)
