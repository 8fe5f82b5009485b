"""The provider as Anthropic's SDK sees it."""

import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from asyncbucket.testing import RateLimitedProvider

ADD: Any = {
    "name": "add",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}


@pytest.fixture
async def provider() -> AsyncIterator[RateLimitedProvider]:
    async with RateLimitedProvider(rpm=2, policy="sliding_window") as provider:
        yield provider


@pytest.fixture
async def client(provider: RateLimitedProvider) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=provider.url, api_key="any", max_retries=0) as client:
        yield client


async def ask(client: AsyncAnthropic, content: Any = "Hello", **more: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    call: dict[str, Any] = {"model": "claude", "max_tokens": 50, "messages": messages, **more}
    return await client.messages.create(**call)


async def test_message_repeats_the_question_and_reports_usage(client: AsyncAnthropic) -> None:
    reply = await ask(client, system="Be kind.")
    cut = await ask(client, [{"type": "text", "text": "Hello " * 50}], max_tokens=5)
    assert reply.content[0].text == "You said: Hello"
    assert reply.stop_reason == "end_turn"
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (4, 4)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)


async def test_message_streams_text_and_usage(client: AsyncAnthropic) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    async with client.messages.stream(model="m", max_tokens=9, messages=messages) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final: Any = await stream.get_final_message()
    assert text == final.content[0].text == "You said: Hello"
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 4)


async def test_message_uses_a_tool_once_and_then_answers(client: AsyncAnthropic) -> None:
    stream = await ask(client, tools=[ADD], stream=True)
    deltas = [event.delta async for event in stream if event.type == "content_block_delta"]
    use = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "3"}
    history = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    answer = await ask(client, messages=history, tools=[ADD], tool_choice={"type": "auto"})
    assert json.loads("".join(delta.partial_json for delta in deltas)) == {"a": 1}
    assert answer.content[0].text == "You said: Hello"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add"}])
async def test_tool_choice_is_obeyed(client: AsyncAnthropic, choice: Any) -> None:
    reply = await ask(client, tools=[ADD], tool_choice=choice)
    assert reply.stop_reason == "tool_use"
    assert (reply.content[0].name, reply.content[0].input) == ("add", {"a": 1})


async def test_429_and_headers_are_those_of_anthropic(client: AsyncAnthropic) -> None:
    for _ in range(2):
        await ask(client)
    with pytest.raises(anthropic.RateLimitError) as caught:
        await ask(client)
    body: Any = caught.value.body
    headers = caught.value.response.headers
    assert (body["type"], body["error"]["type"]) == ("error", "rate_limit_error")
    assert "Limit 2, Used 2, Requested 1." in body["error"]["message"]
    assert headers["retry-after"] == "60"
    assert headers["anthropic-ratelimit-requests-limit"] == "2"
    assert headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert datetime.fromisoformat(headers["anthropic-ratelimit-requests-reset"]).tzinfo is not None
    assert headers["request-id"].startswith("req_")


async def test_overload_is_anthropics_529(
    provider: RateLimitedProvider, client: AsyncAnthropic
) -> None:
    provider.fail_next(status=529)
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        await ask(client)
