"""What LlamaIndex builds on a model is paced, against a provider that counts for itself."""

import asyncio
from typing import Any

import httpx
import pytest
from llama_index.core import Document, SummaryIndex, VectorStoreIndex
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.openai import OpenAIEmbedding

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider, VirtualTime
from tests.llama_index.conftest import Bench, admitted, ask, in_flight

DOCUMENTS = [
    Document(text=f"Document {number} is about the number {number}.") for number in range(5)
]


@pytest.fixture
def wide(bench: Bench) -> Bench:
    bench.limiter.reconfigure("60k RPM", concurrency=3)
    return bench


def assert_paced(bench: Bench, *, requests: int) -> None:
    here, there = bench.limiter.statistics(), bench.provider.statistics()
    assert here.admitted == there.requests == requests
    assert (there.refused, here.in_flight, here.waiting) == (0, 0, 0)
    assert there.peak_in_flight <= 3


def test_query_and_chat_engines_are_paced(wide: Bench) -> None:
    llm, embed_model = wide.llm, wide.embed_model
    index = VectorStoreIndex.from_documents(DOCUMENTS, embed_model=embed_model)
    summary = SummaryIndex.from_documents(DOCUMENTS).as_query_engine(
        llm=llm, response_mode="tree_summarize", use_async=True
    )
    engine = index.as_query_engine(llm=llm)
    streaming = index.as_query_engine(llm=llm, streaming=True)
    memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
    chat = index.as_chat_engine(chat_mode=ChatMode.CONTEXT, llm=llm, memory=memory)

    async def main() -> list[Any]:
        streamed: Any = await streaming.aquery("second?")
        chatted = await chat.astream_chat("again")
        return [
            await engine.aquery("first?"),
            "".join([token async for token in streamed.async_response_gen()]),
            await summary.aquery("third?"),
            await chat.achat("hello"),
            "".join([token async for token in chatted.async_response_gen()]),
        ]

    replies = [*wide.time.run(main()), engine.query("which?"), streaming.query("which number?")]
    assert all("You said" in str(reply) for reply in replies)
    assert_paced(wide, requests=3 + 2 + 2 + 1 + 2 + 2 + 2 + 2)


def test_ingestion_pipeline_is_paced(wide: Bench) -> None:
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(), wide.embed_model])
    for _ in range(2):  # the second one finds everything in the cache
        nodes = wide.time.run(pipeline.arun(documents=DOCUMENTS))
        assert len(nodes) == 5
        assert_paced(wide, requests=3)


def test_cancelled_agent_run_gives_its_streams_slot_back(wide: Bench) -> None:
    wide.provider.reconfigure(latency=0.3)

    async def main() -> None:
        handler = ask(wide.agent())
        await asyncio.sleep(0.1)
        assert in_flight(wide.limiter) == 1
        await handler.cancel_run()
        await asyncio.sleep(0.1)
        assert in_flight(wide.limiter) == 0

    wide.time.run(main())


async def test_index_built_asynchronously_in_a_running_loop_is_paced() -> None:
    provider = RateLimitedProvider()
    limiter = Limiter("60k RPM", concurrency=3)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(provider.app)) as client:
        embed_model = limiter.wrap(
            OpenAIEmbedding(
                api_key="k", api_base="http://asgi/v1", embed_batch_size=2, async_http_client=client
            )
        )
        index = VectorStoreIndex.from_documents(DOCUMENTS, embed_model=embed_model, use_async=True)
        await embed_model.aget_text_embedding("and on this loop again")
    assert len(index.index_struct.nodes_dict) == 5
    assert admitted(limiter) == provider.statistics().requests == 4


async def test_index_build_does_not_deadlock_on_slot_of_the_loop_it_blocks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limiter = Limiter("60k RPM", concurrency=1)
    model = limiter.wrap(MockEmbedding(embed_dim=2))
    async with limiter.acquire():
        VectorStoreIndex.from_documents(DOCUMENTS[:1], embed_model=model, use_async=True)
    assert limiter.statistics().overridden >= 1
    assert in_flight(limiter) == 0
    assert "a call passed without a slot" in caplog.text


def test_mixed_load_at_the_limits_gets_no_429(virtual_time: VirtualTime) -> None:
    provider = RateLimitedProvider(
        rpm=180,
        tpm=60_000,
        concurrency=8,
        latency=(0.1, 0.5),
        policy="sliding_window",
        clock=virtual_time.clock,
    )
    limiter = Limiter("180 RPM", "60k TPM", concurrency=8, clock=virtual_time.clock)
    bench = Bench(virtual_time, provider, limiter)

    async def stream(n: int) -> str:
        stream = await bench.llm.astream_complete(f"stream {n}", max_tokens=50)
        return "".join([chunk.delta or "" async for chunk in stream])

    async def chat(n: int) -> str:
        return str(await bench.llm.acomplete(f"chat {n}", max_tokens=50))

    async def main() -> None:
        texts = [f"text {n}" for n in range(40)]
        *replies, vectors = await asyncio.gather(
            *(ask(bench.agent(timeout=None)) for _ in range(30)),
            *(each(n) for n in range(60) for each in (stream, chat)),
            bench.embed_model.aget_text_embedding_batch(texts),
        )
        assert len(vectors) == 40
        expected = [f"{kind} {n}" for n in range(60) for kind in ("stream", "chat")]
        assert [e for e, r in zip(expected, replies[30:], strict=True) if e not in str(r)] == []

    virtual_time.run(main())
    bench.close()
    seen = provider.statistics()
    assert (seen.refused_429, seen.errors, seen.invalid) == ({}, 0, 0)
    assert seen.requests == 30 * 3 + 120 + 20
    assert seen.peak_in_flight <= 8
