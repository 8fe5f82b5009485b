"""Each run of an agent or workflow is one agent to the limiters that it calls."""

import asyncio
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import MockLLM
from llama_index.core.workflow import Context, StartEvent, StopEvent, Workflow, step

from asyncbucket import Limiter, agent
from asyncbucket.core.statistics import AgentStatistics
from asyncbucket.llama_index import limiter_of
from asyncbucket.testing import VirtualTime
from tests.llama_index.conftest import Bench, ask


def look_up_weather(city: str) -> str:
    return f"{city}: sunny"


def agents_of(limiter: Limiter) -> AgentStatistics:
    now = limiter.statistics().agents
    assert now is not None
    return now


class Research(Workflow):
    """Make two calls, or fail after the first."""

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
    handler: Any = paced.run()
    other = workflow.run()
    await asyncio.sleep(0.5)
    assert agents_of(limiter).running == 1
    assert [await handler, await other] == ["done", "done"]
    await asyncio.sleep(0)
    now = agents_of(limiter)
    assert (now.running, now.finished) == (0, 1)
    assert now.kinds["research"].size == pytest.approx(0.2)


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
    assert type(paced) is FunctionAgent
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
