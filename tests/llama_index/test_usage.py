import math
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.llms import LLM, MockLLM
from llama_index.llms.openai import OpenAI, OpenAIResponses
from openai import AsyncOpenAI
from pydantic import BaseModel

from asyncbucket.providers.usage import Usage, usage_of
from asyncbucket.testing.provider import RateLimitedProvider

MESSAGES = [ChatMessage(content="How do you do?")]

OPENAI = {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20}
RESPONSES = {"input_tokens": 12, "output_tokens": 8, "total_tokens": 20}
ANTHROPIC = {
    "input_tokens": 2,
    "cache_creation_input_tokens": 10,
    "cache_read_input_tokens": 5000,
    "output_tokens": 8,
}
GEMINI = {
    "prompt_token_count": 12,
    "candidates_token_count": 3,
    "thoughts_token_count": 5,
    "total_token_count": 20,
}
BEDROCK = {"inputTokens": 12, "outputTokens": 8, "totalTokens": 20}
#: The total includes what was read from the cache and written to it; the input does not.
BEDROCK_CACHED = {
    "inputTokens": 2,
    "cacheWriteInputTokens": 10,
    "cacheReadInputTokens": 5000,
    "outputTokens": 8,
    "totalTokens": 5020,
}
#: LiteLLM reports Anthropic's usage this way: the prompt includes both.
GATEWAY = {
    "prompt_tokens": 12,
    "completion_tokens": 8,
    "total_tokens": 20,
    "cache_creation_input_tokens": 10,
    "cache_read_input_tokens": 1,
}
OLLAMA = {"prompt_eval_count": 12, "eval_count": 8, "eval_duration": 4_000_000}


class Unknown(BaseModel, extra="allow"):
    """A reply whose SDK does not know of usage, and keeps it as an extra field."""


class Slotted:
    """A reply that computes its usage."""

    __slots__ = ()

    @property
    def usage(self) -> dict[str, int]:
        """The usage."""
        return OPENAI


def chat(raw: object = None, **extra: Any) -> ChatResponse:
    """Make a reply as LlamaIndex passes it on."""
    return ChatResponse(message=ChatMessage(content="Fine."), raw=raw, additional_kwargs=extra)


@pytest.mark.parametrize(
    "reply",
    [
        chat({"usage": OPENAI}),
        chat(SimpleNamespace(usage=SimpleNamespace(**OPENAI))),
        chat({"usage": SimpleNamespace(**RESPONSES)}),
        chat({"usage": SimpleNamespace(**ANTHROPIC)}),
        chat({"usage_metadata": GEMINI}),
        chat({"usage": BEDROCK}),
        chat({"usage": BEDROCK_CACHED}),
        chat({"usage": GATEWAY}),
        chat(OLLAMA),
        chat(**OPENAI),
        chat(usage=SimpleNamespace(**RESPONSES)),
        chat(SimpleNamespace(type="response.completed", response=SimpleNamespace(usage=RESPONSES))),
        chat({"type": "message_start", "message": {"usage": ANTHROPIC}}),
        chat(SimpleNamespace(data=SimpleNamespace(usage=SimpleNamespace(**OPENAI)))),
        CompletionResponse(text="Fine.", raw={"usage": OPENAI}),
        CompletionResponse(text="Fine.", additional_kwargs=OPENAI),
        {"usage": OPENAI},
        Unknown.model_validate({"usage": OPENAI}),
        Slotted(),
        SimpleNamespace(usage=SimpleNamespace(**OPENAI)),
        OPENAI,
    ],
)
def test_usage_is_found_in_every_known_reply_format(reply: object) -> None:
    """Objects and dicts of all providers, from LlamaIndex or bare, give the same usage."""
    assert usage_of(reply) == Usage(12, 8, 20)


@pytest.mark.parametrize(
    "reply",
    [
        *(None, 5, "usage", [], {}, chat(), chat({}), chat({"usage": None}), chat("text")),
        chat({"usage": {}}),
        chat({"usage": dict.fromkeys(OPENAI, 0)}),
        chat({"usage": {"prompt_tokens": "12", "completion_tokens": True, "total_tokens": -1}}),
        chat({"usage": {"prompt_tokens": math.nan, "total_tokens": math.inf}}),
        chat({"usage": {"prompt_tokens": 10**12}}),
    ],
)
def test_missing_or_impossible_usage_is_none(reply: object) -> None:
    """With no usage, all zeros or impossible numbers there is nothing to settle by."""
    assert usage_of(reply) is None


def test_embedding_usage_has_only_input_tokens() -> None:
    """An embedding's total is its prompt."""
    assert usage_of({"usage": {"prompt_tokens": 12, "total_tokens": 12}}) == Usage(12, 0, 12)


def test_usage_of_two_stream_events_is_combined() -> None:
    """Anthropic's stream reports the input at its start, and a growing output as it goes on."""
    begin = usage_of({"message": {"usage": {"input_tokens": 12, "output_tokens": 1}}})
    end = usage_of({"usage": {"output_tokens": 8}})
    assert begin is not None
    assert end is not None

    assert begin | end == end | begin == Usage(12, 8, 20)
    assert begin | None == begin


def test_cached_tokens_are_merged_and_summed_like_other_tokens() -> None:
    """They stay part of the input; more of them than input is impossible."""
    details = {"prompt_tokens_details": {"cached_tokens": 10}}
    usage = usage_of({"usage": OPENAI | details})
    assert usage is not None

    assert usage == Usage(12, 8, 20, cached_tokens=10)
    assert usage | Usage(12, 8, 20) == usage
    assert usage + usage == Usage(24, 16, 40, 20)
    assert usage.without_cached() == Usage(2, 8, 10)
    assert usage_of({"usage": {"prompt_tokens": 4} | details}) == Usage(4, 0, 4, 4)


PLACES = ["usage", "raw", "response", "message", "prompt_tokens_details", "cached_tokens"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*PLACES, *OPENAI, *ANTHROPIC, *GEMINI]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_usage_total_is_sum_of_its_parts_for_any_reply(reply: object) -> None:
    """No reply raises an error, and the result is whole numbers whose sum is the total."""
    usage = usage_of(reply)
    if usage is not None:
        assert usage.total == usage.input_tokens + usage.output_tokens > 0
        assert min(usage.input_tokens, usage.output_tokens) >= 0
        assert 0 <= usage.cached_tokens <= usage.input_tokens


@pytest.mark.parametrize("model", [OpenAI, OpenAIResponses])
async def test_usage_of_real_replies_matches_charge(model: type[OpenAI | OpenAIResponses]) -> None:
    """Over HTTP, chat, completion and stream report what the provider charged."""
    async with RateLimitedProvider(charge="usage") as provider, httpx.AsyncClient() as client:
        options: dict[str, Any] = {
            "api_base": provider.base_url,
            "api_key": "test-key",
            "async_http_client": client,
        }
        if model is OpenAI:
            options["additional_kwargs"] = {"stream_options": {"include_usage": True}}
        streaming: LLM = model(model="gpt-4o-mini", **options)
        options.pop("additional_kwargs", None)
        llm: LLM = model(model="gpt-4o-mini", **options)

        seen = [usage_of(await llm.achat(MESSAGES)), usage_of(await llm.acomplete("How are you?"))]
        chunks = [usage_of(chunk) async for chunk in await streaming.astream_chat(MESSAGES)]
        charged = provider.statistics().tokens

    assert chunks[0] is None
    seen.append(chunks[-1])
    assert sum(usage.total for usage in seen if usage) == charged
    assert all(usage and usage.input_tokens and usage.output_tokens for usage in seen)


async def test_usage_is_read_from_real_embedding_reply() -> None:
    """The raw reply of an embedding has its usage, though LlamaIndex discards it."""
    async with (
        RateLimitedProvider() as provider,
        AsyncOpenAI(base_url=provider.base_url, api_key="test-key") as client,
    ):
        reply = await client.embeddings.create(model="m", input=["one", "two"])

        assert usage_of(reply) == Usage(2, 0, 2)


def test_mock_model_reply_has_no_usage() -> None:
    """A mock of LlamaIndex reports no tokens."""
    assert usage_of(MockLLM().chat(MESSAGES)) is None
