"""A call is booked for a quarter of what is sent, and settled by the usage wherever a reply keeps it."""

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    AudioBlock,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    VideoBlock,
)
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAI, OpenAIResponses
from pydantic import BaseModel

from asyncbucket.llama_index.estimate import DefaultEstimator
from asyncbucket.providers.usage import Usage, usage_of
from tests.llama_index.conftest import API_BASE, FakeAPI, Person


def weather(city: str, days: int = 1) -> str:
    """Forecast the weather."""
    return f"{city}: {days}"


TOOL = FunctionTool.from_defaults(weather)


@pytest.fixture(name="llm")
def make_llm() -> LLM:
    return MockLLM()


def chat_tokens(llm: LLM, messages: Sequence[ChatMessage] = (), **kwargs: Any) -> int:
    return DefaultEstimator().chat(llm, list(messages), kwargs).input_tokens


def input_of(*blocks: ContentBlock, **options: Any) -> int:
    llm = MockLLM()
    bare = chat_tokens(llm, [ChatMessage(role=MessageRole.USER, blocks=[])])
    message = ChatMessage(role=MessageRole.USER, blocks=list(blocks), **options)
    return chat_tokens(llm, [message]) - bare


@pytest.mark.parametrize(
    ("cls", "text", "kwargs"),
    [
        (OpenAI, "Hi", {}),
        (OpenAI, "Write:\n" * 500, {"max_tokens": 300, "temperature": 0.5, "seed": 7}),
        (OpenAI, '"Quoted" text with \\ and \t' * 200, {"tools": [TOOL.metadata.to_openai_tool()]}),
        (OpenAI, "我能吞下玻璃而不伤身体。" * 200, {"response_format": {"type": "json_object"}}),
        (OpenAIResponses, "Write:\n" * 500, {"temperature": 0.5}),
    ],
)
async def test_estimate_covers_bytes_sent(api: FakeAPI, cls: Any, text: str, kwargs: Any) -> None:
    llm = cls(model="gpt-4o-mini", api_key="k", api_base=API_BASE, max_retries=0)
    messages = [ChatMessage("Be brief.", role="system"), ChatMessage(text), ChatMessage("?")]
    await llm.achat(messages, **kwargs)
    estimate = chat_tokens(llm, messages, **kwargs)
    sent = len(api.requests[0].content) / 4
    assert sent <= estimate <= sent + 64


@pytest.mark.parametrize(
    ("block", "tokens"),
    [
        (TextBlock(text="x" * 40), 17),
        (ImageBlock(url="http://provider.test/cat.png"), 765),
        (ImageBlock(url="http://provider.test/cat.png", detail="low"), 85),
        (AudioBlock(audio=b"\x00" * 500_000, format="mp3"), 1000),
        (VideoBlock(url="http://provider.test/film.mp4"), 2048),
        (DocumentBlock(url="http://p.test/a.pdf", document_mimetype="application/pdf"), 2048),
        (DocumentBlock(data=b"\x00" * 200_000, document_mimetype="application/pdf"), 10_000),
        (DocumentBlock(data=b"note " * 12, document_mimetype="text/plain"), 15),
        (ThinkingBlock(content="x" * 400), 121),  # like all others
    ],
)
def test_every_content_block_kind_is_counted(block: ContentBlock, tokens: int) -> None:
    assert input_of(block) == pytest.approx(tokens, abs=10)


def test_tool_call_counts_once_wherever_message_stores_it() -> None:
    function = {"name": "weather", "arguments": '{"city":"Paris"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    block = ToolCallBlock(tool_call_id="call_1", tool_name="weather", tool_kwargs={"city": "Paris"})
    as_block = input_of(block)
    assert as_block >= len(json.dumps(call)) // 4 - 1
    assert input_of(block, additional_kwargs={"tool_calls": [call]}) == as_block
    assert input_of(additional_kwargs={"tool_calls": [call]}) == pytest.approx(as_block, abs=5)


def test_response_format_counts_as_its_schema(llm: LLM) -> None:
    assert chat_tokens(llm, response_format=Person) > chat_tokens(llm) + 25


def test_model_level_instructions_and_tools_count() -> None:
    options: dict[str, Any] = {"model": "gpt-4o-mini", "api_key": "k"}
    search = {"type": "web_search_preview", "search_context_size": "high"}
    bare = chat_tokens(OpenAIResponses(**options))
    assert chat_tokens(OpenAIResponses(**options, instructions="Be brief." * 100)) > bare + 220
    assert chat_tokens(OpenAIResponses(**options, built_in_tools=[search])) > bare + 10


def test_arguments_that_are_not_json_do_not_fail_the_estimate(llm: LLM) -> None:
    ring: list[object] = []
    ring.append(ring)
    for odd in (ring, {1, 2}, object(), Person, int, b"\x00", TOOL):
        assert chat_tokens(llm, tools=[odd]) > 3


def test_tokenizer_counts_where_it_finds_more(llm: LLM) -> None:
    dense = DefaultEstimator(tokenizer=list).completion(llm, "x" * 400, {})
    sparse = DefaultEstimator(tokenizer=str.split).completion(llm, "x" * 400, {})
    assert dense.input_tokens > 400 > sparse.input_tokens
    assert sparse == DefaultEstimator().completion(llm, "x" * 400, {})


def test_embedding_estimate_sums_its_texts_and_is_at_least_one() -> None:
    assert DefaultEstimator().embedding(["x" * 40, "y" * 21]) == 16
    assert DefaultEstimator().embedding([""]) == 1


@pytest.mark.parametrize(
    ("of_model", "of_call", "output"),
    [
        ({}, {"max_completion_tokens": 40}, 40),
        ({}, {"max_new_tokens": 40}, 40),
        ({"max_tokens": 100}, {}, 100),
        ({"max_tokens": 100}, {"max_tokens": 7}, 7),
        ({"max_tokens": 100, "additional_kwargs": {"max_completion_tokens": 50}}, {}, 50),
        ({}, {"max_tokens": 10, "n": 3}, 30),
        ({}, {"max_tokens": 10, "best_of": 2}, 20),
        *(({}, {"max_tokens": value}, None) for value in (None, 0, -5, True, "many", 1.5)),
        ({}, {"n": 4}, None),
    ],
)
def test_output_is_limited_or_foreseen(of_model: Any, of_call: Any, output: int | None) -> None:
    estimate = DefaultEstimator().completion(OpenAI(api_key="k", **of_model), "?", of_call)
    assert (estimate.output_tokens, estimate.foreseen) == (output or 256, output is None)


def test_output_forecast_is_what_nine_of_ten_replies_stayed_under(llm: LLM) -> None:
    estimator = DefaultEstimator()
    for foreseen in [256] * 8 + [20] * 3:
        estimator.observe(20)
        assert estimator.completion(llm, "?", {}).output_tokens == foreseen


# --- what a call used ---

OPENAI = {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20}
RESPONSES = {"input_tokens": 12, "output_tokens": 8, "total_tokens": 20}
ANTHROPIC = {"input_tokens": 2, "output_tokens": 8, "cache_creation_input_tokens": 10}
ANTHROPIC["cache_read_input_tokens"] = 5000
GEMINI = {"prompt_token_count": 12, "candidates_token_count": 3, "total_token_count": 20}
BEDROCK = {"inputTokens": 12, "outputTokens": 8, "totalTokens": 20}
#: The total includes what was read from the cache and written to it; the input does not.
CACHE = {"cacheWriteInputTokens": 10, "cacheReadInputTokens": 5000}
BEDROCK_CACHED = BEDROCK | CACHE | {"inputTokens": 2, "totalTokens": 5020}
#: LiteLLM reports Anthropic's usage this way: the prompt includes both.
GATEWAY = OPENAI | {"cache_creation_input_tokens": 10, "cache_read_input_tokens": 1}
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
        CompletionResponse(text="Fine.", additional_kwargs=OPENAI),
        Unknown.model_validate({"usage": OPENAI}),
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
