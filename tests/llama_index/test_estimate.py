import asyncio
import base64
import threading
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
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

from asyncbucket.llama_index.estimate import (
    DefaultEstimator,
    Estimate,
    Estimator,
    Observer,
)
from asyncbucket.llama_index.tokens import bundled_tokenizer
from asyncbucket.providers.forecast import OutputForecast
from asyncbucket.providers.usage import usage_of
from asyncbucket.testing.provider import RateLimitedProvider

FRAME = 4 + 3
"""What one message and the reply's opening cost."""


class City(BaseModel):
    """A city."""

    name: str
    inhabitants: int


def weather(city: str, days: int = 1) -> str:
    """Tell what the weather in a city will be like."""
    return f"{city}: {days}"


def words(text: str) -> Sequence[str]:
    """Tokenize so that everybody can check the count: half a token per character."""
    return text[::2]


@pytest.fixture(name="llm")
def make_llm() -> LLM:
    """Return a model without a limit of its output."""
    return MockLLM()


def input_of(*blocks: ContentBlock, **options: Any) -> int:
    """Return the input tokens of a chat of one message, without the frame."""
    message = ChatMessage(role=MessageRole.USER, blocks=list(blocks), **options)
    return DefaultEstimator(words).chat(MockLLM(), [message], {}).input_tokens - FRAME


def test_chat_estimate_counts_text_and_framing_of_each_message(llm: LLM) -> None:
    """The messages cost their tokens and 4 each, and the reply costs 3."""
    messages = [
        ChatMessage(role="system", content="You are terse."),
        ChatMessage(role="user", content="What is the capital of France?"),
        ChatMessage(role="assistant", content="Paris."),
    ]
    estimator = DefaultEstimator()
    text_tokens = estimator.count(*(str(message.content) for message in messages))

    assert estimator.chat(llm, messages, {}).input_tokens == text_tokens + 3 * 4 + 3


def test_count_is_larger_of_tokens_and_quarter_of_characters() -> None:
    """OpenAI's limits count characters; where tokens are fewer, the characters decide."""
    estimator = DefaultEstimator()
    encode = bundled_tokenizer()
    assert encode is not None
    long_words = "internationalization responsibility " * 20
    dense = "我能吞下玻璃而不伤身体。" * 20

    assert len(encode(long_words)) < len(long_words) / 4
    assert estimator.count(long_words) == len(long_words) // 4
    assert estimator.count(dense) == len(encode(dense)) > len(dense)


@pytest.mark.parametrize(
    ("block", "tokens"),
    [
        (TextBlock(text="x" * 40), 20),
        (ImageBlock(url="http://provider.test/cat.png"), 765),
        (ImageBlock(url="http://provider.test/cat.png", detail="high"), 765),
        (ImageBlock(url="http://provider.test/cat.png", detail="low"), 85),
        (AudioBlock(url="http://provider.test/song.mp3"), 256),
        (AudioBlock(audio=b"\x00" * 500_000, format="mp3"), 1000),
        (VideoBlock(url="http://provider.test/film.mp4"), 2048),
        (VideoBlock(video=b"\x00" * 9_500_000, video_mimetype="video/mp4"), 10_000),
        (
            DocumentBlock(url="http://provider.test/a.pdf", document_mimetype="application/pdf"),
            2048,
        ),
        (DocumentBlock(data=b"\x00" * 200_000, document_mimetype="application/pdf"), 10_000),
        (DocumentBlock(data=b"note " * 12, document_mimetype="text/plain"), 15),
        (CachePoint(cache_control=CacheControl(type="ephemeral")), 0),
        (ThinkingBlock(content="x" * 40), 20),
        (ThinkingBlock(), 0),
        (CitableBlock(title="ab", source="cd", content=[TextBlock(text="x" * 40)]), 22),
        (
            CitationBlock(
                title="ab",
                source="cd",
                cited_content=TextBlock(text="x" * 40),
                additional_location_info={},
            ),
            22,
        ),
    ],
)
def test_every_content_block_kind_is_counted(block: ContentBlock, tokens: int) -> None:
    """Texts cost their tokens, pictures and other media the constants in the docs."""
    assert input_of(block) == pytest.approx(tokens, abs=1)


def test_tool_call_counts_once_wherever_message_stores_it() -> None:
    """As a block, as text in a block, beside the blocks, or both, a call costs the same."""
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
    }
    block = ToolCallBlock(tool_call_id="call_1", tool_name="weather", tool_kwargs={"city": "Paris"})
    text_block = ToolCallBlock(
        tool_call_id="call_1", tool_name="weather", tool_kwargs='{"city": "Paris"}'
    )
    as_block = input_of(block)

    assert as_block > 40
    assert input_of(text_block) == as_block
    assert input_of(block, additional_kwargs={"tool_calls": [call]}) == as_block
    assert input_of(additional_kwargs={"tool_calls": [call]}) == pytest.approx(as_block, abs=2)


def test_speaker_name_of_message_counts() -> None:
    """A message may name which of several users it is from."""
    assert input_of(TextBlock(text="x" * 40), additional_kwargs={"name": "Ada"}) == 22


def test_unknown_block_kind_counts_as_its_text(llm: LLM) -> None:
    """A block type of a later LlamaIndex does not make a call fail."""

    class NewBlock(BaseModel):
        block_type: str = "new"
        text: str = "x" * 40

    blocks: list[Any] = [NewBlock()]
    message = ChatMessage()
    message.blocks = blocks

    assert DefaultEstimator(words).chat(llm, [message], {}).input_tokens == 20 + FRAME


def test_tools_and_response_format_count_as_input(llm: LLM) -> None:
    """Whatever LlamaIndex sends along counts as JSON, whether spec or object."""
    estimator = DefaultEstimator()
    tool = FunctionTool.from_defaults(weather)
    messages = [ChatMessage(content="?")]

    def costs(**kwargs: Any) -> int:
        bare = estimator.chat(llm, messages, {}).input_tokens
        return estimator.chat(llm, messages, kwargs).input_tokens - bare

    spec = tool.metadata.to_openai_tool()
    assert costs(tools=[spec]) > 60
    assert costs(tools=[tool]) == costs(tools=[spec])
    assert costs(tools=[spec] * 3) > 2.5 * costs(tools=[spec])
    schema = {"type": "json_schema", "json_schema": City.model_json_schema()}
    assert costs(response_format=schema) > 40
    assert costs(response_format=City) > 40
    assert costs(response_format=City(name="Paris", inhabitants=2)) > 5
    assert costs(tools=[], response_format=None, temperature=0.5) == 0


def test_model_level_instructions_and_tools_count() -> None:
    """OpenAIResponses has instructions and tools in fields; a call may replace the instructions."""
    search = {"type": "web_search_preview", "search_context_size": "high"}

    def cost(model: dict[str, Any], call: dict[str, Any]) -> int:
        llm = OpenAIResponses(model="gpt-4o-mini", api_key="test-key", **model)
        return DefaultEstimator(words).chat(llm, [], call).input_tokens

    bare = cost({}, {})
    assert cost({"instructions": "Be brief." * 100}, {}) == bare + 450
    assert cost({"instructions": "Be brief." * 100}, {"instructions": "No!!"}) == bare + 2
    assert cost({"built_in_tools": [search]}, {}) == cost({}, {"tools": [search]}) > bare
    both = cost({"built_in_tools": [search]}, {"tools": [search]})
    assert both - bare == 2 * (cost({}, {"tools": [search]}) - bare)


def test_tools_that_are_not_json_do_not_fail_the_estimate(llm: LLM) -> None:
    """Rings, sets and generators count as their text, and are not consumed."""
    ring: list[object] = []
    ring.append(ring)
    numbers = iter(range(3))
    estimator = DefaultEstimator()
    for odd in (ring, {1, 2}, numbers, object(), City, int, b"\x00"):
        assert estimator.chat(llm, [], {"tools": [odd]}).input_tokens > 3

    assert list(numbers) == [0, 1, 2]


def test_overlong_tool_description_does_not_fail_the_estimate(llm: LLM) -> None:
    """LlamaIndex will refuse it, but not before the call is made."""
    tool = FunctionTool.from_defaults(weather, description="long " * 300)

    assert DefaultEstimator().chat(llm, [], {"tools": [tool]}).input_tokens > 300


def test_structured_llm_is_estimated_as_inner_model_plus_schema() -> None:
    """The inner model's `max_tokens` counts, and so does the schema that it is sent."""
    inner = OpenAI(model="gpt-4o-mini", api_key="test-key", max_tokens=77)
    messages = [ChatMessage(content="Name a city.")]
    plain = DefaultEstimator().chat(inner, messages, {})
    structured = DefaultEstimator().chat(inner.as_structured_llm(City), messages, {})

    assert structured.output_tokens == plain.output_tokens == 77
    assert structured.input_tokens > plain.input_tokens + 30


def test_completion_is_estimated_as_one_message(llm: LLM) -> None:
    """A chat model gets the prompt in a message."""
    expected = Estimate(20 + FRAME, 256, foreseen=True)

    assert DefaultEstimator(words).completion(llm, "x" * 40, {}) == expected


def test_embedding_estimate_sums_its_texts_and_is_at_least_one() -> None:
    """One batch is one request with all its texts; an empty text still costs something."""
    assert DefaultEstimator(words).embedding(["x" * 40, "y" * 20]) == 30
    assert DefaultEstimator(words).embedding([""]) == 1


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_output_limit_of_call_is_reserved_under_any_name(llm: LLM, name: str) -> None:
    """A limit under any of its names is what a provider may charge, and not a guess."""
    estimate = DefaultEstimator().completion(llm, "?", {name: 40})

    assert estimate.output_tokens == 40
    assert not estimate.foreseen


def test_output_limit_of_call_takes_precedence_over_models() -> None:
    """The call's own limit comes first, then the model's extra arguments, then its field."""
    field = OpenAI(api_key="test-key", max_tokens=100)
    extra = OpenAI(
        api_key="test-key", max_tokens=100, additional_kwargs={"max_completion_tokens": 50}
    )
    responses = OpenAIResponses(api_key="test-key", max_output_tokens=60)
    estimate = DefaultEstimator().completion

    assert estimate(field, "?", {}).output_tokens == 100
    assert estimate(extra, "?", {}).output_tokens == 50
    assert estimate(extra, "?", {"max_tokens": 7}).output_tokens in {7, 50}
    assert estimate(field, "?", {"max_tokens": 7}).output_tokens == 7
    assert estimate(responses, "?", {}).output_tokens == 60


@pytest.mark.parametrize("value", [None, 0, -5, True, "many", 1.5])
def test_invalid_max_tokens_falls_back_to_forecast(llm: LLM, value: object) -> None:
    """A `max_tokens` that sets no limit leaves the output to the forecast."""
    expected = Estimate(1 + FRAME, 256, foreseen=True)

    assert DefaultEstimator().completion(llm, "?", {"max_tokens": value}) == expected


def test_output_limit_is_multiplied_by_number_of_replies(llm: LLM) -> None:
    """`n` asks for that number of replies, each up to the limit."""
    estimate = DefaultEstimator().completion

    assert estimate(llm, "?", {"max_tokens": 10, "n": 3}).output_tokens == 30
    assert estimate(llm, "?", {"max_tokens": 10, "best_of": 2, "n": 1}).output_tokens == 20


def test_output_forecast_learns_from_observed_replies(llm: LLM) -> None:
    """After a dozen short replies, calls no longer reserve the forecast's start value."""
    estimator = DefaultEstimator()
    for _ in range(12):
        estimator.observe(20)

    assert estimator.completion(llm, "?", {}).output_tokens == 20
    assert repr(estimator) == "<DefaultEstimator <OutputForecast 20 tokens from 13 replies>>"


def test_forecast_for_several_replies_is_their_observed_total(llm: LLM) -> None:
    """A call for four replies reserves what such calls took in all, not four times that."""
    estimator = DefaultEstimator()
    estimator.observe(4_000)

    assert estimator.completion(llm, "?", {"n": 4}).output_tokens == 4_000


def test_forecast_starts_at_256_tokens_or_given_start() -> None:
    """Before any reply it is 256 tokens, or the given start."""
    assert OutputForecast().foresee() == 256
    assert OutputForecast(start=1000).foresee() == 1000


def test_one_longer_reply_raises_forecast_at_once() -> None:
    """After one reply longer than foreseen, the next calls reserve that much."""
    forecast = OutputForecast()
    forecast.observe(2000)

    assert forecast.foresee() == 2000


def test_forecast_drops_once_nine_of_ten_replies_are_shorter() -> None:
    """Eight short replies may be chance; with the ninth, nine of ten are short."""
    forecast = OutputForecast()
    foreseen: list[int] = []
    for _ in range(10):
        forecast.observe(20)
        foreseen.append(forecast.foresee())

    assert foreseen == [256] * 8 + [20] * 2


def test_rare_long_replies_do_not_raise_forecast() -> None:
    """If one reply in twenty is forty times as long, the forecast stays with the others."""
    forecast = OutputForecast()
    for number in range(200):
        forecast.observe(4000 if number % 20 == 0 else 100)

    assert forecast.foresee() == 100


def test_forecast_forgets_replies_older_than_its_window() -> None:
    """Replies from before the window are forgotten."""
    forecast = OutputForecast(window=50)
    for _ in range(500):
        forecast.observe(3000)
    for _ in range(50):
        forecast.observe(10)

    assert forecast.foresee() == 10


@given(
    st.lists(st.integers(min_value=0, max_value=10_000), max_size=120),
    st.integers(min_value=1, max_value=30),
    st.floats(min_value=0.01, max_value=1.0),
)
def test_forecast_is_nearest_rank_quantile_of_window(
    replies: list[int], window: int, quantile: float
) -> None:
    """The forecast is one of the latest replies; the stated share of them is at most as long."""
    forecast = OutputForecast(start=256, quantile=quantile, window=window)
    for reply in replies:
        forecast.observe(reply)
    latest = [256, *replies][-window:]
    foreseen = forecast.foresee()

    assert foreseen in latest
    assert sum(reply <= foreseen for reply in latest) >= quantile * len(latest)
    assert sum(reply < foreseen for reply in latest) < quantile * len(latest)


def test_forecast_is_thread_safe() -> None:
    """No reply is lost or counted twice."""
    forecast = OutputForecast(window=100)

    def feed(length: int) -> None:
        for _ in range(2000):
            forecast.observe(length)

    threads = [threading.Thread(target=feed, args=(length,)) for length in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(forecast._latest) == forecast._sorted


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"quantile": 0}, "quantile must be above 0 and at most 1, not 0"),
        ({"quantile": 1.1}, "quantile must be above 0 and at most 1, not 1.1"),
        ({"start": -1}, "start must be at least 0 and window at least 1, not -1 and 200"),
        ({"window": 0}, "start must be at least 0 and window at least 1, not 256 and 0"),
    ],
)
def test_invalid_forecast_parameters_are_refused(wrong: dict[str, Any], message: str) -> None:
    """The message names the wrong value and what would be right."""
    with pytest.raises(ValueError) as caught:
        _ = OutputForecast(**wrong)

    assert str(caught.value) == message


def test_default_estimator_satisfies_observer_protocol() -> None:
    """It observes replies, which an estimator need not do."""
    estimator: Estimator = DefaultEstimator()

    assert isinstance(estimator, Observer)
    assert not isinstance(object(), Observer)


async def test_estimates_are_at_least_what_the_provider_charges() -> None:
    """With text, tools, tool calls and pictures, usage over HTTP never exceeds the estimate."""
    tool = FunctionTool.from_defaults(weather).metadata.to_openai_tool()
    call = ToolCallBlock(tool_call_id="call_1", tool_name="weather", tool_kwargs={"city": "Rom"})
    question = ChatMessage(content="What will the weather in Rom be like tomorrow? " * 20)
    conversations: list[tuple[list[ChatMessage], dict[str, Any]]] = [
        ([question], {}),
        ([ChatMessage(role="system", content="Answer briefly."), question], {"tools": [tool]}),
        (
            [
                question,
                ChatMessage(role="assistant", blocks=[call]),
                ChatMessage(
                    role="tool", content="sunny", additional_kwargs={"tool_call_id": "call_1"}
                ),
            ],
            {"tools": [tool] * 5},
        ),
        (
            [
                ChatMessage(
                    blocks=[
                        TextBlock(text="What is this?"),
                        ImageBlock(
                            image=base64.b64encode(b"\x89PNG\r\n\x1a\n"),
                            image_mimetype="image/png",
                            detail="low",
                        ),
                    ]
                )
            ],
            {"max_tokens": 50},
        ),
        ([ChatMessage(content="人人生而自由,在尊严和权利上一律平等。" * 20)], {}),
    ]
    async with RateLimitedProvider(charge="usage") as provider, httpx.AsyncClient() as client:
        llm = OpenAI(
            model="gpt-4o-mini",
            api_base=provider.base_url,
            api_key="test-key",
            async_http_client=client,
        )
        replies = await asyncio.gather(
            *(llm.achat(messages, **kwargs) for messages, kwargs in conversations)
        )
    for (messages, kwargs), reply in zip(conversations, replies, strict=True):
        usage, estimate = usage_of(reply), DefaultEstimator().chat(llm, messages, kwargs)
        assert usage is not None
        assert usage.input_tokens <= estimate.input_tokens
        assert usage.output_tokens <= estimate.output_tokens
