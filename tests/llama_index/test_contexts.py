"""Priority, tenant and deadline that are set around an agent's run reach each call in it.

The agents are real, and so is the provider, but without sockets: everything is on virtual time.
"""

import asyncio
import contextlib
from typing import Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow

import asyncbucket
from asyncbucket import AcquireTimeout
from asyncbucket.core.context import Inherited, inherited
from tests.llama_index.conftest import Bench, ask

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


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["agent", "workflow", "engine"])
def test_run_that_cannot_meet_its_deadline_fails_at_once(
    bench: Bench,
    kind: str,
    streaming: bool,  # noqa: FBT001 - a case
) -> None:
    index = VectorStoreIndex.from_documents([Document(text="a")], embed_model=bench.embed_model)
    agent = bench.agent(streaming=streaming)
    start: Any = {
        "agent": lambda: ask(agent),
        "workflow": lambda: ask(AgentWorkflow(agents=[agent], root_agent="f")),
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
