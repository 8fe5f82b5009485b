"""Tools, and what LlamaIndex builds on models, are paced, against a provider that counts for itself.

The agents are real, and so is the provider, but without sockets: everything is on virtual time.
"""

import asyncio
import copy
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import Document, SummaryIndex, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.tools import FunctionTool, ToolMetadata, ToolOutput
from llama_index.core.tools.calling import acall_tool, call_tool
from llama_index.core.tools.types import AsyncBaseTool, BaseTool, adapt_to_async_tool
from llama_index.core.workflow import Context, StartEvent, StopEvent, Workflow, step

import asyncbucket
from asyncbucket import AcquireTimeout, Limiter, agent
from asyncbucket.engine.context import Inherited, inherited
from asyncbucket.engine.statistics import AgentStatistics
from asyncbucket.llama_index import limiter_of
from asyncbucket.testing import RateLimitedProvider, VirtualTime
from tests.llama_index.conftest import Bench, Instrumentation, admitted, ask, in_flight

DOCUMENTS = [Document(text=f"Document {number} is about {number}.") for number in range(5)]


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
    index = VectorStoreIndex.from_documents(DOCUMENTS, embed_model=wide.embed_model)
    summary = SummaryIndex.from_documents(DOCUMENTS)
    memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
    chat = index.as_chat_engine(chat_mode=ChatMode.CONTEXT, llm=wide.llm, memory=memory)
    engines = [
        index.as_query_engine(llm=wide.llm),
        summary.as_query_engine(llm=wide.llm, response_mode="tree_summarize", use_async=True),
    ]
    streaming = index.as_query_engine(llm=wide.llm, streaming=True)

    async def main() -> list[Any]:
        streamed: Any = await streaming.aquery("second?")
        tokens = [token async for token in streamed.async_response_gen()]
        return ["".join(tokens), await chat.achat("hello"), *[await e.aquery("?") for e in engines]]

    replies = [*wide.time.run(main()), engines[0].query("which?"), streaming.query("which number?")]
    assert all("You said" in str(reply) for reply in replies)
    assert_paced(wide, requests=3 + 2 + 2 + 2 + 1 + 2 + 2)


def test_ingestion_pipeline_is_paced(wide: Bench) -> None:
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(), wide.embed_model])
    for _ in range(2):  # the second one finds everything in the cache
        nodes = wide.time.run(pipeline.arun(documents=DOCUMENTS))
        assert len(nodes) == 5
        assert_paced(wide, requests=3)


async def test_index_build_does_not_deadlock_on_its_slot(caplog: pytest.LogCaptureFixture) -> None:
    limiter = Limiter("60k RPM", concurrency=1)
    model = limiter.wrap(MockEmbedding(embed_dim=2))
    async with limiter.acquire():
        VectorStoreIndex.from_documents(DOCUMENTS[:1], embed_model=model, use_async=True)
    assert limiter.statistics().overridden >= 1
    assert in_flight(limiter) == 0
    assert "a call passed without a slot" in caplog.text


async def test_mixed_load_at_the_limits_gets_no_429(virtual_time: VirtualTime) -> None:
    limits: Any = {"rpm": 90, "tpm": 30_000, "concurrency": 8, "clock": virtual_time.clock}
    provider = RateLimitedProvider(**limits, latency=(0.1, 0.5), policy="sliding_window")
    bench = Bench(virtual_time, provider, Limiter(**limits))

    async def stream(n: int) -> str:
        stream = await bench.llm.astream_complete(f"call {n}", max_tokens=50)
        return "".join([chunk.delta or "" async for chunk in stream])

    async def chat(n: int) -> str:
        return str(await bench.llm.acomplete(f"call {n}", max_tokens=50))

    replies: list[Any] = await asyncio.gather(
        *(each(n) for n in range(30) for each in (stream, chat)),
        *(ask(bench.agent(timeout=None)) for _ in range(15)),
        bench.embed_model.aget_text_embedding_batch([f"text {n}" for n in range(20)]),
    )
    assert replies[:60] == [f"You said: call {n}" for n in range(30) for _ in range(2)]
    seen = provider.statistics()
    assert (seen.refused_429, seen.errors) == ({}, 0)
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
async def test_agents_inherit_priority_tenant_deadline(bench: Bench, *, streaming: bool) -> None:
    await under(lambda: ask(bench.agent(streaming=streaming)))
    kinds = "chat", "tools", "embeddings", "chat"
    assert [name for name, _ in bench.seen] == [f"openai/{kind}/*" for kind in kinds]
    assert {terms for _, terms in bench.seen} == {GIVEN}
    for name, calls in {"chat": 2, "tools": 1, "embeddings": 1}.items():
        child = bench.limiter.children[name]
        assert child.key("acme").statistics().admitted == child.statistics().admitted == calls
    assert bench.provider.statistics().requests == 3


async def test_stream_is_admitted_on_the_terms_of_its_request_not_its_reader(bench: Bench) -> None:
    with asyncbucket.tenant("acme"), asyncbucket.priority(3):
        stream = await bench.llm.astream_complete("hi")
    with asyncbucket.tenant("other"):
        assert [part.delta async for part in stream]
        assert inherited.get() == Inherited(tenant="other")
    assert bench.seen == [("openai/chat/*", Inherited(priority=3, tenant="acme"))]


@pytest.mark.parametrize("kind", ["agent", "engine"])
def test_run_that_cannot_meet_its_deadline_fails_at_once(bench: Bench, kind: str) -> None:
    index = VectorStoreIndex.from_documents([Document(text="a")], embed_model=bench.embed_model)
    engine = index.as_query_engine(llm=bench.llm)

    async def main() -> None:
        with pytest.raises(AcquireTimeout) as caught, asyncbucket.deadline(0.5):
            await (ask(bench.agent()) if kind == "agent" else engine.aquery("which?"))
        assert "cannot pass within 0.5 s: requests bind for 1 s more" in str(caught.value)
        assert bench.time.now == 0

    bench.time.run(main())
    assert bench.provider.statistics().requests == 1  # for the index


# --- each run of an agent or workflow is one agent to the limiters that it calls ---


async def agents_of(limiter: Limiter) -> AgentStatistics:
    for _ in range(3):  # until it knows that a run is over
        await asyncio.sleep(0)
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


@pytest.fixture
def many(virtual_time: VirtualTime) -> Limiter:
    return Limiter("600 RPM burst 600", clock=virtual_time.clock)


async def test_each_run_of_a_workflow_or_its_copy_is_one_agent(many: Limiter) -> None:
    workflow = Research(Limiter())
    paced = copy.copy(many.wrap(workflow, kind="research"))
    workflow.limiter = paced.limiter = many
    assert isinstance(paced, Research)
    assert limiter_of(paced.llm) is many
    handler: Any = paced.run()
    other = workflow.run()
    await asyncio.sleep(0.5)
    assert (await agents_of(many)).running == 1
    assert [await handler, await other] == ["done", "done"]
    now = await agents_of(many)
    assert (now.running, now.finished) == (0, 1)
    assert now.kinds["research"].size == pytest.approx(0.2)


async def test_run_that_a_class_has_made_a_coroutine_is_one_agent(many: Limiter) -> None:
    class Coroutine(Research):
        async def run(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
            self, **options: Any
        ) -> Any:
            return await super().run(**options)

    assert await asyncio.create_task(many.wrap(Coroutine(many)).run()) == "done"
    assert (await agents_of(many)).finished == 1


class Empty(Workflow):
    """A workflow whose step is a function outside of it, and whose agents are its own affair."""

    agents = property(lambda _: {})


@step(workflow=Empty)  # pyright: ignore[reportUntypedFunctionDecorator]  # LlamaIndex's
async def answer(_: StartEvent) -> StopEvent:
    return StopEvent(result="done")


async def test_steps_that_are_functions_outside_a_workflow_run(many: Limiter) -> None:
    assert await many.wrap(Empty()).run() == "done"


async def test_run_that_fails_or_is_cancelled_teaches_no_size(many: Limiter) -> None:
    paced = many.wrap(Research(many), kind="research")
    with pytest.raises(ZeroDivisionError):
        await paced.run(fails=True)
    cancelled = paced.run()
    await asyncio.sleep(0.5)
    await cancelled.cancel_run()
    await asyncio.wait([asyncio.ensure_future(cancelled.stop_event_result())])
    now = await agents_of(many)
    assert (now.running, now.finished, in_flight(many)) == (0, 0, 0)


async def test_run_inside_an_agents_scope_belongs_to_that_agent(many: Limiter) -> None:
    paced = many.wrap(Research(many), kind="research")
    with agent(kind="team"):
        await asyncio.gather(paced.run(), paced.run())
        assert (await agents_of(many)).kinds.keys() == {"team"}
    assert (await agents_of(many)).kinds["team"].size == pytest.approx(0.4)


@pytest.mark.parametrize("is_team", [False, True])
async def test_agent_or_team_is_wrapped_with_its_models(bench: Bench, *, is_team: bool) -> None:
    worker: Any = FunctionAgent(tools=[bench.tool], llm=bench.plain_llm, timeout=None)
    whole: Any = AgentWorkflow([worker]) if is_team else worker
    paced: Any = bench.limiter.wrap(whole, kind="weather")
    assert isinstance(paced, type(whole))
    assert limiter_of((paced.agents["Agent"] if is_team else paced).llm) is bench.limiter

    await asyncio.gather(ask(paced), ask(paced))
    now = await agents_of(bench.limiter)
    assert (now.running, now.finished, now.kinds["weather"].known) == (0, 2, 2)
    assert not hasattr(worker.llm, "limiter")


# --- tools: admitted once per call, and none waits for itself ---


def add(a: int, b: int) -> int:
    return a + b


async def multiply(a: int, b: int) -> int:
    return a * b


class Plain(BaseTool):
    """A tool that is only synchronous."""

    @property
    def metadata(self) -> ToolMetadata:
        return ToolMetadata("plain", name="plain")

    def __call__(self, input: Any) -> ToolOutput:  # noqa: A002 - LlamaIndex's name
        return ToolOutput("plain", content=str(input), raw_input={})


class Threaded(Plain, AsyncBaseTool):
    """A tool whose asynchronous call is its synchronous one, in a thread."""

    def call(self, input: Any) -> ToolOutput:  # noqa: A002 - LlamaIndex's name
        return ToolOutput("threaded", content=str(input), raw_input={})

    __call__ = AsyncBaseTool.__call__  # pyright: ignore[reportAssignmentType]

    async def acall(self, input: Any) -> ToolOutput:  # noqa: A002 - LlamaIndex's name
        return await asyncio.to_thread(self.call, input)


@pytest.mark.parametrize(
    "inner",
    [
        *(FunctionTool.from_defaults(add), FunctionTool.from_defaults(async_fn=multiply)),
        *(Plain(), Threaded()),
    ],
    ids=lambda tool: type(tool).__name__,
)
async def test_wrapped_tool_is_still_the_tool_and_admitted_once_by_any_method(
    limiter: Limiter, inner: Any, instrumentation: Instrumentation
) -> None:
    paced = limiter.wrap(inner)
    assert isinstance(paced, type(inner))
    assert paced.metadata.to_openai_tool() == inner.metadata.to_openai_tool()
    assert hasattr(paced, "acall") == hasattr(inner, "acall")
    assert {name: vars(paced)[name] for name in vars(inner)} == vars(inner)
    assert getattr(paced, "real_fn", None) is getattr(inner, "real_fn", None)
    given = {"a": 2, "b": 3} if isinstance(inner, FunctionTool) else {"input": "hi"}
    outputs = [await asyncio.to_thread(call_tool, paced, given), await acall_tool(paced, given)]
    outputs.append(await adapt_to_async_tool(paced).acall(**given))
    if isinstance(inner, AsyncBaseTool):
        outputs += [await asyncio.to_thread(paced.call, **given), await paced.acall(**given)]
    assert {str(output) for output in outputs} == {str(inner(**given))}
    assert (admitted(limiter), in_flight(limiter)) == (len(outputs), 0)
    instrumentation.take()
    await acall_tool(inner, given)
    plain = instrumentation.take()
    await acall_tool(paced, given)
    assert instrumentation.take() == plain


async def test_tool_of_a_function_that_acquires_is_not_paced_twice() -> None:
    limiter = Limiter("100 RPM", concurrency=1, timeout=5)
    chat = limiter.child("chat")
    tools = limiter.wrap([limiter.paced(multiply), FunctionTool.from_defaults(chat.paced(add))])
    assert [str(await tool.acall(a=2, b=3)) for tool in tools] == ["6", "5"]
    assert (admitted(limiter), in_flight(limiter)) == (2, 0)
    for other in (chat, Limiter("100 RPM")):
        with pytest.raises(
            ValueError, match=r"is paced by <Limiter 'default'.* already and can't be"
        ):
            other.wrap([limiter.paced(multiply)])


def test_failing_tool_gives_its_slot_back_and_is_not_retried(limiter: Limiter) -> None:
    calls: list[int] = []

    # Two arguments: older LlamaIndex itself retries a tool of one argument, without its keyword.
    def fail(number: int, unit: str) -> None:
        """Fail."""
        calls.append(number)
        raise TimeoutError(unit)

    paced = limiter.wrap(FunctionTool.from_defaults(Mock(side_effect=fail), "fail", "Fail."))
    assert asyncio.run(acall_tool(paced, {"number": 2, "unit": "m"})).is_error
    assert (calls, in_flight(limiter)) == ([2], 0)


async def test_tool_waits_and_a_timeout_becomes_its_error_output(virtual_time: VirtualTime) -> None:
    limiter = Limiter("1 RPM", timeout=65, clock=virtual_time.clock)
    paced = limiter.child("tools").wrap(FunctionTool.from_defaults(async_fn=multiply))

    given = {"a": 2, "b": 3}
    first, second, third = await asyncio.gather(*(acall_tool(paced, given) for _ in range(3)))
    assert (str(first), str(second)) == ("6", "6")
    assert virtual_time.now >= 60
    assert isinstance(third.exception, AcquireTimeout)
    assert "gave up after 65 s in line: requests bind for" in str(third)
    assert admitted(limiter.children["tools"]) == 2


async def test_tool_that_calls_a_paced_model_gives_up_its_slot(virtual_time: VirtualTime) -> None:
    root = Limiter("1000/s", concurrency=1, clock=virtual_time.clock)
    tools = root.child("tools", concurrency=1)
    llm = root.child("chat").wrap(MockLLM())

    async def ask(question: str) -> str:
        """Ask."""
        await llm.acomplete(question)
        await asyncio.sleep(1)
        return "done"

    tool: Any = tools.wrap(FunctionTool.from_defaults(async_fn=ask))
    async with asyncio.timeout(60):
        replies = await asyncio.gather(*(tool.acall(question="?") for _ in range(5)))
    assert [str(reply) for reply in replies] == ["done"] * 5
    assert virtual_time.now >= 5  # one tool at a time, whatever it asks
    assert (admitted(tools), admitted(root)) == (5, 10)


#: What a call of a tool does: its child, the seconds it takes, and the calls that it makes itself.
PLANS: st.SearchStrategy[Any] = st.recursive(
    st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.just([])),
    lambda inner: st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.lists(inner, max_size=3)),
    max_leaves=8,
)


@pytest.mark.heavy
@settings(max_examples=50, deadline=None)
@given(
    plans=st.lists(PLANS, min_size=1, max_size=6),
    slots=st.lists(st.integers(1, 2), min_size=4, max_size=4),
    cancelled=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=4),
    models=st.booleans(),
)
def test_nested_and_cancelled_tools_never_hang_or_leak_slots(
    plans: list[Any], slots: list[int], cancelled: list[tuple[int, int]], *, models: bool
) -> None:
    with VirtualTime() as time:
        root = Limiter("1000/s", concurrency=slots[0], clock=time.clock)
        sizes = zip("abc", slots[1:], strict=True)
        children = [root.child(name, concurrency=size) for name, size in sizes]
        llm = root.wrap(MockLLM())
        tools: dict[str, Any] = {}

        async def run(child: str, seconds: int, asks: list[Any]) -> None:
            """Run; never ask a tool of a child before its own, for a circle may wait for itself."""
            await asyncio.sleep(seconds)
            if models:
                await llm.acomplete("hi")
            await asyncio.gather(*(call(max(each[0], child), *each[1:]) for each in asks))

        async def call(child: str, seconds: int, asks: list[Any]) -> None:
            await tools[child].acall(child=child, seconds=seconds, asks=asks)

        for name, child in zip("abc", children, strict=True):
            tools[name] = child.wrap(FunctionTool.from_defaults(async_fn=run, name=name))

        async def main() -> None:
            tasks = [asyncio.create_task(call(*plan)) for plan in plans]
            for number, seconds in cancelled:
                await asyncio.sleep(seconds)
                tasks[number % len(tasks)].cancel()
            async with asyncio.timeout(10_000):
                await asyncio.gather(*tasks, return_exceptions=True)

        time.run(main())
        for limiter in (root, *children):
            assert (in_flight(limiter), limiter.statistics().waiting) == (0, 0)
