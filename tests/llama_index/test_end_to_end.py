"""What LlamaIndex builds on a model is paced, against a provider that counts for itself.

These run on the machine's clock, because the provider is real HTTP in a thread of its own. Limits
are wide where a test only counts, so that they take a fraction of a second.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from llama_index.core import Document, SummaryIndex, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI
from llama_index.llms.openai_like import OpenAILike

from asyncbucket import Limit, Limiter
from asyncbucket.testing import RateLimitedProvider

if TYPE_CHECKING:
    from asyncbucket.testing.pytest_plugin import ProviderFactory

DOCUMENTS = [
    Document(text=f"Document {number} is about the number {number}.") for number in range(5)
]


def add(a: int, b: int) -> int:
    return a + b


class Bench:
    """A provider, and models of OpenAI's classes behind one limiter."""

    def __init__(self, provider: RateLimitedProvider) -> None:
        self.provider = provider
        self.limiter = Limiter("60k RPM", concurrency=3)
        self.http_client = httpx.Client()
        self.async_http_client = httpx.AsyncClient()
        options: Any = {
            "api_key": "k",
            "api_base": provider.base_url,
            "http_client": self.http_client,
            "async_http_client": self.async_http_client,
        }
        self.llm = self.limiter.wrap(OpenAI(model="gpt-4o-mini", **options))
        self.like = self.limiter.wrap(OpenAILike(model="m", is_chat_model=True, **options))
        self.embed_model = self.limiter.wrap(OpenAIEmbedding(embed_batch_size=2, **options))

    async def aclose(self) -> None:
        self.http_client.close()
        await self.async_http_client.aclose()

    def assert_paced(self, *, at_least: int = 1) -> None:
        here, there = self.limiter.statistics(), self.provider.statistics()
        assert here.admitted == there.requests >= at_least
        assert there.refused == 0
        assert there.peak_in_flight <= 3
        assert (here.in_flight, here.waiting) == (0, 0)


@pytest.fixture
async def bench(rate_limited_provider: "ProviderFactory") -> AsyncIterator[Bench]:
    made = Bench(rate_limited_provider())
    yield made
    await made.aclose()


def ask(agent: Any, question: str) -> Any:
    memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
    return agent.run(user_msg=question, memory=memory)


async def test_index_built_asynchronously_in_a_running_loop_is_paced() -> None:
    provider = RateLimitedProvider()
    limiter = Limiter("60k RPM", concurrency=3)
    # No sockets, for those of a loop that has gone can't be closed on another.
    async with httpx.AsyncClient(transport=httpx.ASGITransport(provider.app)) as client:
        embed_model = limiter.wrap(
            OpenAIEmbedding(
                api_key="k", api_base="http://asgi/v1", embed_batch_size=2, async_http_client=client
            )
        )

        index = VectorStoreIndex.from_documents(DOCUMENTS, embed_model=embed_model, use_async=True)
        await embed_model.aget_text_embedding("and on this loop again")

    assert len(index.index_struct.nodes_dict) == 5
    assert limiter.statistics().admitted == provider.statistics().requests == 4


async def test_index_build_does_not_deadlock_on_slot_of_the_loop_it_blocks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limiter = Limiter("60k RPM", concurrency=1)
    model = limiter.wrap(MockEmbedding(embed_dim=2))
    async with limiter.acquire():
        VectorStoreIndex.from_documents(DOCUMENTS[:1], embed_model=model, use_async=True)

    assert limiter.statistics().overridden >= 1
    assert limiter.statistics().in_flight == 0
    assert "a call passed without a slot" in caplog.text


async def test_query_and_chat_engines_are_paced(bench: Bench) -> None:
    index = VectorStoreIndex.from_documents(DOCUMENTS, embed_model=bench.embed_model)
    summary = SummaryIndex.from_documents(DOCUMENTS).as_query_engine(
        llm=bench.llm, response_mode="tree_summarize", use_async=True
    )
    streaming = index.as_query_engine(llm=bench.llm, streaming=True)
    memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
    chat = index.as_chat_engine(chat_mode=ChatMode.CONTEXT, llm=bench.llm, memory=memory)

    streamed: Any = await streaming.aquery("second?")
    chatted = await chat.astream_chat("again")
    replies = [
        await index.as_query_engine(llm=bench.llm).aquery("first?"),
        "".join([token async for token in streamed.async_response_gen()]),
        await summary.aquery("third?"),
        streaming.query("which number?"),
        await chat.achat("hello"),
        "".join([token async for token in chatted.async_response_gen()]),
    ]

    assert all("You said" in str(reply) for reply in replies)
    bench.assert_paced(at_least=3 + 2 + 2 + 1 + 2 + 2 + 2)


async def test_ingestion_pipeline_is_paced(bench: Bench) -> None:
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(), bench.embed_model])

    nodes = await pipeline.arun(documents=DOCUMENTS)
    await pipeline.arun(documents=DOCUMENTS)

    assert len(nodes) == 5
    bench.assert_paced(at_least=3)
    assert bench.limiter.statistics().admitted == 3


async def test_cancelled_agent_run_gives_its_streams_slot_back(bench: Bench) -> None:
    bench.provider.reconfigure(latency=0.3)
    handler = ask(FunctionAgent(tools=[add], llm=bench.llm), "add 1 and 2")
    while not bench.limiter.statistics().in_flight:  # noqa: ASYNC110 - nobody sets an event
        await asyncio.sleep(0.01)

    await handler.cancel_run()
    for _ in range(100):
        if not bench.limiter.statistics().in_flight:
            break
        await asyncio.sleep(0.01)

    assert bench.limiter.statistics().in_flight == 0


async def test_waiting_call_of_a_cancelled_agent_run_leaves_the_line(bench: Bench) -> None:
    async with bench.limiter.acquire(), bench.limiter.acquire(), bench.limiter.acquire():
        handler = ask(FunctionAgent(tools=[add], llm=bench.llm), "add 1 and 2")
        while not bench.limiter.statistics().waiting:  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(0.01)

        await handler.cancel_run()
        while bench.limiter.statistics().waiting:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)

    assert bench.provider.statistics().requests == 0


@pytest.mark.real_clock
async def test_mixed_load_at_limit_gets_no_429(rate_limited_provider: "ProviderFactory") -> None:
    provider = rate_limited_provider(
        rpm=180,
        tpm=60_000,
        minute=6.0,
        concurrency=8,
        latency=(0.01, 0.05),
        policy="sliding_window",
    )
    # Ours is a little longer, for on a busy machine one call may be on its way for a while.
    limits = Limit("requests", 180, per=6.25), Limit("tokens", 60_000, per=6.25)
    limiter = Limiter(*limits, concurrency=8)
    http_client = httpx.AsyncClient()
    options: Any = {
        "api_key": "k",
        "api_base": provider.base_url,
        "async_http_client": http_client,
    }
    llm = limiter.wrap(OpenAI(model="gpt-4o-mini", max_tokens=50, **options))
    embed_model = limiter.wrap(OpenAIEmbedding(embed_batch_size=5, **options))

    async def stream(n: int) -> str:
        return "".join([c.delta or "" async for c in await llm.astream_complete(f"stream {n}")])

    async def chat(n: int) -> str:
        return str(await llm.acomplete(f"chat {n}"))

    agents = [ask(FunctionAgent(tools=[add], llm=llm), f"agent {n}") for n in range(30)]
    others = [each(n) for n in range(60) for each in (stream, chat)]
    *replies, vectors = await asyncio.gather(
        *agents, *others, embed_model.aget_text_embedding_batch([f"text {n}" for n in range(100)])
    )
    await http_client.aclose()

    seen = provider.statistics()
    assert (seen.refused_429, seen.errors, seen.invalid) == ({}, 0, 0)
    assert seen.requests == limiter.statistics().admitted == 60 + 120 + 20
    assert seen.peak_in_flight <= 8
    assert len(vectors) == 100
    expected = [f"agent {n}" for n in range(30)]
    expected += [f"{kind} {n}" for n in range(60) for kind in ("stream", "chat")]
    assert [e for e, reply in zip(expected, replies, strict=True) if e not in str(reply)] == []
