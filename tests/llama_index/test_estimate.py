"""A call is never booked below a quarter of what is sent, nor far above it."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    AudioBlock,
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
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
from tests.llama_index.conftest import API_BASE, ScriptedOpenAI


class City(BaseModel):
    """A city."""

    name: str
    inhabitants: int


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


CONVERSATIONS: list[tuple[str, dict[str, Any]]] = [
    ("Hi", {}),
    ("Write:\n" * 500, {"max_tokens": 300, "temperature": 0.5, "seed": 7}),
    ('"Quoted" text with a \\ and \t' * 200, {"tools": [TOOL.metadata.to_openai_tool()]}),
    ("我能吞下玻璃而不伤身体。" * 200, {"response_format": {"type": "json_object"}}),
]


@pytest.mark.parametrize(("text", "kwargs"), CONVERSATIONS)
@pytest.mark.parametrize("cls", [OpenAI, OpenAIResponses])
async def test_estimate_is_at_least_a_quarter_of_the_bytes_sent(
    openai_api: ScriptedOpenAI, cls: Any, text: str, kwargs: dict[str, Any]
) -> None:
    llm = cls(model="gpt-4o-mini", api_key="k", api_base=API_BASE, max_retries=0)
    if cls is OpenAIResponses:
        kwargs = {name: value for name, value in kwargs.items() if name == "temperature"}
    messages = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(text),
        ChatMessage("?"),
    ]
    await llm.achat(messages, **kwargs)
    if cls is OpenAI:
        async for _ in await llm.astream_chat(messages, **kwargs):
            pass
    estimate = chat_tokens(llm, messages, **kwargs)
    sent = max(len(request.content) for request in openai_api.requests) / 4
    assert sent <= estimate <= sent + 64


@pytest.mark.parametrize(
    ("block", "tokens"),
    [
        (TextBlock(text="x" * 40), 17),
        (ImageBlock(url="http://provider.test/cat.png"), 765),
        (ImageBlock(url="http://provider.test/cat.png", detail="low"), 85),
        (AudioBlock(url="http://provider.test/song.mp3"), 256),
        (AudioBlock(audio=b"\x00" * 500_000, format="mp3"), 1000),
        (VideoBlock(url="http://provider.test/film.mp4"), 2048),
        (VideoBlock(video=b"\x00" * 9_500_000, video_mimetype="video/mp4"), 10_000),
        (DocumentBlock(url="http://p.test/a.pdf", document_mimetype="application/pdf"), 2048),
        (DocumentBlock(data=b"\x00" * 200_000, document_mimetype="application/pdf"), 10_000),
        (DocumentBlock(data=b"note " * 12, document_mimetype="text/plain"), 15),
        (CachePoint(cache_control=CacheControl(type="ephemeral")), 17),
        (ThinkingBlock(content="x" * 400), 121),
        (CitableBlock(title="ab", source="cd", content=[TextBlock(text="x" * 400)]), 130),
        (
            CitationBlock(
                title="ab",
                source="cd",
                cited_content=TextBlock(text="x" * 400),
                additional_location_info={},
            ),
            140,
        ),
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


def test_tools_and_response_format_count_as_they_are_sent(llm: LLM) -> None:
    bare = chat_tokens(llm)
    spec = TOOL.metadata.to_openai_tool()
    assert chat_tokens(llm, tools=[TOOL]) == chat_tokens(llm, tools=[spec]) > bare + 60
    assert chat_tokens(llm, response_format=City) > bare + 30
    assert chat_tokens(llm, response_format=City(name="Paris", inhabitants=2)) > bare + 5


def test_model_level_instructions_and_tools_count() -> None:
    options: dict[str, Any] = {"model": "gpt-4o-mini", "api_key": "k"}
    search = {"type": "web_search_preview", "search_context_size": "high"}
    bare = chat_tokens(OpenAIResponses(**options))
    assert chat_tokens(OpenAIResponses(**options, instructions="Be brief." * 100)) > bare + 220
    assert chat_tokens(OpenAIResponses(**options, built_in_tools=[search])) > bare + 10


def test_arguments_that_are_not_json_do_not_fail_the_estimate(llm: LLM) -> None:
    ring: list[object] = []
    ring.append(ring)
    numbers = iter(range(3))
    long = FunctionTool.from_defaults(weather, description="long " * 300)
    for odd in (ring, {1, 2}, numbers, object(), City, int, b"\x00", long):
        assert chat_tokens(llm, tools=[odd]) > 3
    assert list(numbers) == [0, 1, 2]


def test_tokenizer_counts_where_it_finds_more(llm: LLM) -> None:
    dense = DefaultEstimator(tokenizer=list).completion(llm, "x" * 400, {})
    sparse = DefaultEstimator(tokenizer=str.split).completion(llm, "x" * 400, {})
    assert dense.input_tokens > 400 > sparse.input_tokens
    assert sparse == DefaultEstimator().completion(llm, "x" * 400, {})


def test_embedding_estimate_sums_its_texts_and_is_at_least_one() -> None:
    assert DefaultEstimator().embedding(["x" * 40, "y" * 21]) == 16
    assert DefaultEstimator().embedding([""]) == 1


@pytest.mark.parametrize(
    "name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens"]
)
def test_output_limit_of_call_is_reserved_under_any_name(llm: LLM, name: str) -> None:
    estimate = DefaultEstimator().completion(llm, "?", {name: 40})
    assert (estimate.output_tokens, estimate.foreseen) == (40, False)


def test_output_limit_of_call_takes_precedence_over_models() -> None:
    field = OpenAI(api_key="k", max_tokens=100)
    extra = OpenAI(api_key="k", max_tokens=100, additional_kwargs={"max_completion_tokens": 50})
    responses = OpenAIResponses(api_key="k", max_output_tokens=60)
    estimate = DefaultEstimator().completion
    assert estimate(field, "?", {}).output_tokens == 100
    assert estimate(extra, "?", {}).output_tokens == 50
    assert estimate(field, "?", {"max_tokens": 7}).output_tokens == 7
    assert estimate(responses, "?", {}).output_tokens == 60


@pytest.mark.parametrize("value", [None, 0, -5, True, "many", 1.5])
def test_invalid_max_tokens_falls_back_to_forecast(llm: LLM, value: object) -> None:
    estimate = DefaultEstimator().completion(llm, "?", {"max_tokens": value})
    assert (estimate.output_tokens, estimate.foreseen) == (256, True)


def test_output_of_several_replies_is_their_limits_or_what_they_took_together(llm: LLM) -> None:
    estimator = DefaultEstimator()
    estimator.observe(4_000)
    assert estimator.completion(llm, "?", {"max_tokens": 10, "n": 3}).output_tokens == 30
    assert estimator.completion(llm, "?", {"max_tokens": 10, "best_of": 2}).output_tokens == 20
    assert estimator.completion(llm, "?", {"n": 4}).output_tokens == 4_000


def test_output_forecast_learns_from_observed_replies(llm: LLM) -> None:
    estimator = DefaultEstimator()
    for _ in range(12):
        estimator.observe(20)
    assert estimator.completion(llm, "?", {}).output_tokens == 20
    assert repr(estimator) == "<DefaultEstimator <OutputForecast 20 tokens from 13 replies>>"
