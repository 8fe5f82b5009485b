"""Usage is found wherever a reply keeps it, and replies teach how long the next may be."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from pydantic import BaseModel

from asyncbucket.providers.request import OutputForecast
from asyncbucket.providers.usage import Usage, usage_of

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


def chat(raw: object = None, **extra: Any) -> ChatResponse:
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
        Unknown.model_validate({"usage": OPENAI}),
        SimpleNamespace(usage=SimpleNamespace(**OPENAI)),
        OPENAI,
    ],
)
def test_usage_is_found_in_every_known_reply_format(reply: object) -> None:
    usage = usage_of(reply)
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total) == (12, 8, 20)


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
    assert usage_of(reply) is None


def test_usage_of_two_stream_events_is_combined() -> None:
    begin = usage_of({"message": {"usage": {"input_tokens": 12, "output_tokens": 1}}})
    end = usage_of({"usage": {"output_tokens": 8}})
    assert begin is not None
    assert end is not None
    assert begin | end == end | begin == Usage(12, 8, 20)
    assert begin | None == begin


def test_cached_tokens_are_merged_and_summed_like_other_tokens() -> None:
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
            st.sampled_from([*PLACES, *OPENAI, *ANTHROPIC, *GEMINI]), inner, max_size=5
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(JSON)
def test_usage_total_is_sum_of_its_parts_for_any_reply(reply: object) -> None:
    usage = usage_of(reply)
    if usage is not None:
        assert usage.total == usage.input_tokens + usage.output_tokens > 0
        assert min(usage.input_tokens, usage.output_tokens) >= 0
        assert 0 <= usage.cached_tokens <= usage.input_tokens


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(min_value=0, max_value=10_000), max_size=240))
def test_forecast_is_ninth_decile_of_latest_replies(replies: list[int]) -> None:
    forecast = OutputForecast()
    assert forecast.foresee() == 256
    for reply in replies:
        forecast.observe(reply)
    latest = [256, *replies][-200:]
    foreseen = forecast.foresee()
    assert foreseen in latest
    assert sum(reply <= foreseen for reply in latest) >= 0.9 * len(latest)
    assert sum(reply < foreseen for reply in latest) < 0.9 * len(latest)
