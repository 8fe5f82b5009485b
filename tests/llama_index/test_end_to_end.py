"""What LlamaIndex builds on a model is paced, against a provider that counts for itself.

The agents are real, and so is the provider, but without sockets: everything is on virtual time.
"""

import asyncio
import contextlib
import copy
from typing import Any

import httpx
import pytest
from llama_index.core import Document, SummaryIndex, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.workflow import Context, StartEvent, StopEvent, Workflow, step
from llama_index.embeddings.openai import OpenAIEmbedding

import asyncbucket
from asyncbucket import AcquireTimeout, Limiter, agent
from asyncbucket.core.context import Inherited, inherited
from asyncbucket.core.statistics import AgentStatistics
from asyncbucket.llama_index import limiter_of
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
        rpm=90,
        tpm=30_000,
        concurrency=8,
        latency=(0.1, 0.5),
        policy="sliding_window",
        clock=virtual_time.clock,
    )
    limiter = Limiter("90 RPM", "30k TPM", concurrency=8, clock=virtual_time.clock)
    bench = Bench(virtual_time, provider, limiter)

    async def stream(n: int) -> str:
        stream = await bench.llm.astream_complete(f"stream {n}", max_tokens=50)
        return "".join([chunk.delta or "" async for chunk in stream])

    async def chat(n: int) -> str:
        return str(await bench.llm.acomplete(f"chat {n}", max_tokens=50))

    async def main() -> None:
        texts = [f"text {n}" for n in range(20)]
        *replies, vectors = await asyncio.gather(
            *(ask(bench.agent(timeout=None)) for _ in range(15)),
            *(each(n) for n in range(30) for each in (stream, chat)),
            bench.embed_model.aget_text_embedding_batch(texts),
        )
        assert len(vectors) == 20
        expected = [f"{kind} {n}" for n in range(30) for kind in ("stream", "chat")]
        assert [e for e, r in zip(expected, replies[15:], strict=True) if e not in str(r)] == []

    virtual_time.run(main())
    bench.close()
    seen = provider.statistics()
    assert (seen.refused_429, seen.errors, seen.invalid) == ({}, 0, 0)
    assert seen.requests == 15 * 3 + 60 + 10
    assert seen.peak_in_flight <= 8


# --- what is set around a run reaches each call in it ---

GIVEN = Inherited(priority=1, tenant="acme", deadline=1_000.0)


async def under(start: Any) -> Any:
    with (
        asyncbucket.tenant("acme"),
        asyncbucket.priority("interactive"),
        asyncbucket.deadline(1_000 - asyncio.get_running_loop().time()),
    ):
        started = asyncio.ensure_future(start())
    return await started  # its tasks were created inside


@pytest.mark.parametrize("streaming", [True, False])
def test_function_agent_calls_inherit_priority_tenant_and_deadline(
    bench: Bench,
    streaming: bool,  # noqa: FBT001 - a case
) -> None:
    bench.time.run(under(lambda: ask(bench.agent(streaming=streaming))))
    assert [name for name, _ in bench.seen] == [
        "openai/chat/*",
        "openai/tools/*",
        "openai/embeddings/*",
        "openai/chat/*",
    ]
    assert {terms for _, terms in bench.seen} == {GIVEN}
    for name, calls in {"chat": 2, "tools": 1, "embeddings": 1}.items():
        child = bench.limiter.children[name]
        assert child.key("acme").statistics().admitted == child.statistics().admitted == calls
    assert bench.provider.statistics().requests == 3


def test_query_engine_calls_inherit_priority_tenant_and_deadline(bench: Bench) -> None:
    index = VectorStoreIndex.from_documents([Document(text="a")], embed_model=bench.embed_model)
    bench.seen.clear()
    engine = index.as_query_engine(llm=bench.llm)
    streaming = index.as_query_engine(llm=bench.llm, streaming=True)

    async def stream() -> str:
        reply: Any = await streaming.aquery("which?")  # asks the model only when it is read
        return "".join([part async for part in reply.async_response_gen()])

    whole = bench.time.run(under(lambda: engine.aquery("which?")))
    assert "You said" in str(whole)
    assert "You said" in bench.time.run(under(stream))
    assert [name for name, _ in bench.seen] == ["openai/embeddings/*", "openai/chat/*"] * 2
    assert {terms for _, terms in bench.seen} == {GIVEN}


@pytest.mark.parametrize("given", [Inherited(priority=3, tenant="acme"), None])
def test_stream_is_admitted_on_the_terms_of_its_request_not_of_its_reader(
    bench: Bench, given: Inherited | None
) -> None:
    async def main() -> None:
        with contextlib.ExitStack() as terms:
            if given is not None:
                terms.enter_context(asyncbucket.tenant("acme"))
                terms.enter_context(asyncbucket.priority(3))
            stream = await bench.llm.astream_complete("hi")
        with asyncbucket.tenant("other"):
            assert [part.delta async for part in stream]
            assert inherited.get() == Inherited(tenant="other")
        assert inherited.get() is None

    bench.time.run(main())
    assert bench.seen == [("openai/chat" + ("/*" if given else ""), given)]


@pytest.mark.parametrize("kind", ["agent", "streaming agent", "workflow", "engine"])
def test_run_that_cannot_meet_its_deadline_fails_at_once(bench: Bench, kind: str) -> None:
    index = VectorStoreIndex.from_documents([Document(text="a")], embed_model=bench.embed_model)
    worker = bench.agent(streaming=kind == "streaming agent")
    start: Any = {
        "agent": lambda: ask(worker),
        "streaming agent": lambda: ask(worker),
        "workflow": lambda: ask(AgentWorkflow(agents=[worker], root_agent="f")),
        "engine": lambda: index.as_query_engine(llm=bench.llm).aquery("which?"),
    }[kind]

    async def main() -> None:
        with pytest.raises(AcquireTimeout) as caught, asyncbucket.deadline(0.5):
            await start()
        assert "cannot pass within 0.5 s: requests bind for 1 s more" in str(caught.value)
        assert caught.value.bound_by == "requests"
        assert caught.value.retry_after == pytest.approx(1)
        assert bench.time.now == 0

    bench.time.run(main())
    assert bench.provider.statistics().requests == 1  # for the index


# --- each run of an agent or workflow is one agent to the limiters that it calls ---


def look_up_weather(city: str) -> str:
    return f"{city}: sunny"


def agents_of(limiter: Limiter) -> AgentStatistics:
    now = limiter.statistics().agents
    assert now is not None
    return now


class Research(Workflow):
    """Make two calls, or fail after the first."""

    llm = MockLLM()

    def __init__(self, limiter: Limiter, **options: Any) -> None:
        super().__init__(timeout=None, **options)
        self.limiter = limiter

    @step
    async def work(self, _: Context, event: StartEvent) -> StopEvent:
        for number in range(2):
            async with self.limiter.acquire():
                await asyncio.sleep(1)
            if event.get("fails", default=False) and not number:
                raise ZeroDivisionError
        return StopEvent(result="done")


async def test_each_run_of_a_workflow_is_one_agent(virtual_time: VirtualTime) -> None:
    limiter = Limiter("600 RPM burst 600", clock=virtual_time.clock)
    workflow = Research(limiter)
    paced = limiter.wrap(workflow, kind="research")
    assert isinstance(paced, Research)
    assert limiter_of(paced.llm) is limiter
    handler: Any = paced.run()
    other = workflow.run()
    await asyncio.sleep(0.5)
    assert agents_of(limiter).running == 1
    assert [await handler, await other] == ["done", "done"]
    await asyncio.sleep(0)
    now = agents_of(limiter)
    assert (now.running, now.finished) == (0, 1)
    assert now.kinds["research"].size == pytest.approx(0.2)


async def test_copy_of_a_paced_workflow_runs_itself(virtual_time: VirtualTime) -> None:
    paced = Limiter(clock=virtual_time.clock).wrap(Research(Limiter()), kind="research")
    other = copy.copy(paced)
    other.limiter = Limiter("600 RPM burst 600", clock=virtual_time.clock)
    await other.run()
    await asyncio.sleep(0)
    assert agents_of(other.limiter).kinds["research"].known == 1


async def test_run_that_fails_or_is_cancelled_teaches_no_size(virtual_time: VirtualTime) -> None:
    limiter = Limiter("600 RPM burst 600", clock=virtual_time.clock)
    paced = limiter.wrap(Research(limiter), kind="research")
    with pytest.raises(ZeroDivisionError):
        await paced.run(fails=True)
    cancelled = paced.run()
    await asyncio.sleep(0.5)
    await cancelled.cancel_run()
    await asyncio.wait([asyncio.ensure_future(cancelled.stop_event_result())])
    await asyncio.sleep(0)
    now = agents_of(limiter)
    assert (now.running, now.finished, limiter.statistics().in_flight) == (0, 0, 0)


async def test_run_inside_an_agents_scope_belongs_to_that_agent(virtual_time: VirtualTime) -> None:
    limiter = Limiter("600 RPM burst 600", clock=virtual_time.clock)
    paced = limiter.wrap(Research(limiter), kind="research")
    with agent(kind="team"):
        await asyncio.gather(paced.run(), paced.run())
        assert agents_of(limiter).kinds.keys() == {"team"}
    assert agents_of(limiter).kinds["team"].size == pytest.approx(0.4)


def test_function_agent_is_wrapped_with_its_model(bench: Bench) -> None:
    limiter = bench.limiter
    worker: Any = FunctionAgent(tools=[bench.tool], llm=bench.plain_llm(), timeout=None)
    paced: Any = limiter.wrap(worker, kind="weather")
    assert isinstance(paced, FunctionAgent)
    assert limiter_of(paced.llm) is limiter

    async def main() -> None:
        await asyncio.gather(ask(paced), ask(paced))
        await asyncio.sleep(0)

    bench.time.run(main())
    now = agents_of(limiter)
    assert (now.running, now.finished, now.kinds["weather"].known) == (0, 2, 2)
    with pytest.raises(TypeError, match="is not paced"):
        limiter_of(worker.llm)


@pytest.mark.parametrize(
    ("obj", "error", "words"),
    [
        (MockLLM(), TypeError, "kind= is for agents and workflows"),
        (look_up_weather, TypeError, "tool or agent can be wrapped, not function"),
        (FunctionAgent(llm=MockLLM()), ValueError, "an agent's kind must be a non-empty string"),
    ],
)
def test_misplaced_kind_is_refused(obj: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Limiter("10 RPM").wrap(obj, kind="" if error is ValueError else "k")
