"""The provider as LlamaIndex sees it: agents and structured output work with its fake model."""

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import httpx
import pytest
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI, OpenAIResponses
from pydantic import BaseModel

from asyncbucket.testing.provider import RateLimitedProvider
from asyncbucket.testing.pytest_plugin import ProviderFactory

Connect: TypeAlias = Callable[[RateLimitedProvider], dict[str, Any]]


def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Give a function that returns the options for a model on a provider; close their client."""
    async with httpx.AsyncClient() as client:
        yield lambda provider: {
            "api_base": provider.base_url,
            "api_key": "test-key",
            "max_retries": 0,
            "async_http_client": client,
        }


@pytest.mark.parametrize("model", [OpenAI, OpenAIResponses])
@pytest.mark.parametrize("streaming", [True, False])
async def test_function_agent_calls_its_tool_once_and_answers(
    rate_limited_provider: ProviderFactory, connect: Connect, model: Any, *, streaming: bool
) -> None:
    provider = rate_limited_provider()
    llm = model(model="gpt-4o-mini", **connect(provider))
    agent: Any = FunctionAgent(tools=[multiply], llm=llm, streaming=streaming)

    run = agent.run(user_msg="What is 6 x 7?")
    results = [event async for event in run.stream_events() if isinstance(event, ToolCallResult)]

    assert str(await run) == "You said: What is 6 x 7?"
    assert [result.tool_output.raw_output for result in results] == [1]
    assert provider.statistics().admitted == 2


async def test_structured_output_is_valid(
    rate_limited_provider: ProviderFactory, connect: Connect
) -> None:
    class Song(BaseModel):
        title: str
        seconds: int

    provider = rate_limited_provider()
    for name in ("gpt-4o-mini", "gpt-4"):
        llm = OpenAI(model=name, **connect(provider)).as_structured_llm(Song)
        reply = await llm.achat([ChatMessage("Write a song")])
        assert isinstance(reply.raw, Song)


async def test_each_embedding_batch_is_one_request(
    rate_limited_provider: ProviderFactory, connect: Connect
) -> None:
    provider = rate_limited_provider()
    model = OpenAIEmbedding(embed_batch_size=10, **connect(provider))

    vectors = await model.aget_text_embedding_batch([f"text {number}" for number in range(25)])

    assert len(vectors) == 25
    assert provider.statistics().endpoints == {"embeddings": 3}
