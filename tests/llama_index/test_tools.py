"""A paced tool is still the tool, is admitted once per call, and never waits for itself."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import Settings
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import Response
from llama_index.core.llms import MockLLM
from llama_index.core.tools import FunctionTool, QueryEngineTool, ToolMetadata, ToolOutput
from llama_index.core.tools.calling import acall_tool, call_tool
from llama_index.core.tools.types import AsyncBaseTool, BaseTool, adapt_to_async_tool
from llama_index.core.workflow import Context

from asyncbucket import AcquireTimeout, Limiter
from asyncbucket.testing import VirtualTime
from tests.llama_index.conftest import Instrumentation, admitted, in_flight


def add(a: int, b: int) -> int:
    return a + b


async def multiply(a: int, b: int) -> int:
    return a * b


class Engine(BaseQueryEngine):
    """A query engine that answers with the question."""

    def __init__(self) -> None:
        super().__init__(callback_manager=Settings.callback_manager)

    def _query(self, query_bundle: Any) -> Response:
        return Response(query_bundle.query_str)

    async def _aquery(self, query_bundle: Any) -> Response:
        return Response(query_bundle.query_str)

    def _get_prompt_modules(self) -> Any:
        return {}


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


def tools() -> list[Any]:
    return [
        FunctionTool.from_defaults(add),
        FunctionTool.from_defaults(async_fn=multiply),
        QueryEngineTool.from_defaults(Engine()),
        Plain(),
        Threaded(),
    ]


@pytest.mark.parametrize("inner", tools(), ids=lambda tool: type(tool).__name__)
async def test_wrapped_tool_is_still_the_tool_and_admitted_once_by_any_method(
    inner: Any, instrumentation: Instrumentation
) -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    paced = limiter.wrap(inner)
    assert isinstance(paced, type(inner))
    assert paced.metadata.to_openai_tool() == inner.metadata.to_openai_tool()
    assert hasattr(paced, "acall") == hasattr(inner, "acall")
    assert {name: vars(paced)[name] for name in vars(inner)} == vars(inner)
    assert getattr(paced, "real_fn", None) is getattr(inner, "real_fn", None)
    given = {"a": 2, "b": 3} if isinstance(inner, FunctionTool) else {"input": "hi"}
    outputs = [
        await asyncio.to_thread(paced, **given),
        await asyncio.to_thread(call_tool, paced, given),
    ]
    if isinstance(inner, AsyncBaseTool):
        outputs += [await asyncio.to_thread(paced.call, **given), await paced.acall(**given)]
    outputs += [await acall_tool(paced, given), await adapt_to_async_tool(paced).acall(**given)]
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
    with pytest.raises(
        ValueError, match=r"function of <.*FunctionTool object .* acquires from <Limiter 'default'"
    ):
        chat.wrap([limiter.paced(multiply)])
    other: Any = Limiter("100 RPM").wrap([limiter.paced(multiply)])
    assert str(await other[0].acall(a=2, b=3)) == "6"


def test_failing_tool_gives_its_slot_back_and_is_not_retried() -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    calls: list[int] = []

    # Two arguments: older LlamaIndex itself retries a tool of one argument, without its keyword.
    def fail(number: int, unit: str) -> None:
        """Fail."""
        calls.append(number)
        raise TimeoutError(unit)

    paced = limiter.wrap(FunctionTool.from_defaults(fail))
    with pytest.raises(TimeoutError):
        paced.call(number=1, unit="m")
    output = asyncio.run(acall_tool(paced, {"number": 2, "unit": "m"}))
    assert output.is_error
    assert calls == [1, 2]
    assert in_flight(limiter) == 0


async def test_tool_waits_and_a_timeout_becomes_its_error_output(virtual_time: VirtualTime) -> None:
    limiter = Limiter("1 RPM", timeout=65, clock=virtual_time.clock)
    paced = limiter.child("tools").wrap(FunctionTool.from_defaults(async_fn=multiply))

    given = {"a": 2, "b": 3}
    first, second, third = await asyncio.gather(*(acall_tool(paced, given) for _ in range(3)))
    assert (str(first), str(second)) == ("6", "6")
    assert virtual_time.now >= 60
    assert isinstance(third.exception, AcquireTimeout)
    assert "within 65 s: requests bind for" in str(third)
    assert admitted(limiter.children["tools"]) == 2


def test_paced_tool_receives_workflow_context() -> None:
    async def greet(ctx: Context, name: str) -> str:
        """Greet."""
        return f"{ctx} {name}"

    paced = Limiter("100 RPM").wrap(FunctionTool.from_defaults(async_fn=greet))
    assert paced.requires_context
    assert paced.ctx_param_name == "ctx"
    with pytest.raises(ValueError, match="Context is required"):
        asyncio.run(paced.acall(name="Ada"))
    assert str(asyncio.run(paced.acall(name="Ada", ctx="hello"))) == "hello Ada"


@pytest.mark.parametrize("depth", [0, 2])
async def test_tool_calling_paced_models_and_itself_keeps_its_child_and_does_not_deadlock(
    virtual_time: VirtualTime, depth: int
) -> None:
    root = Limiter("1000/s", concurrency=1, clock=virtual_time.clock)
    tools = root.child("tools", concurrency=1)
    llm = root.child("chat").wrap(MockLLM())
    tool: Any = None

    async def ask(depth: int) -> str:
        """Ask."""
        await llm.acomplete("a b")
        await asyncio.sleep(1)
        return "bottom" if depth == 0 else str(await tool.acall(depth=depth - 1))

    tool = tools.wrap(FunctionTool.from_defaults(async_fn=ask))

    async with asyncio.timeout(60):
        replies = await asyncio.gather(*(tool.acall(depth=depth) for _ in range(5)))
    assert [str(reply) for reply in replies] == ["bottom"] * 5
    if depth == 0:
        assert virtual_time.now >= 5  # one tool at a time, whatever it asks
    assert (admitted(tools), admitted(root)) == (5 * (depth + 1), 10 * (depth + 1))
    for limiter in (root, tools, root.children["chat"]):
        assert (in_flight(limiter), limiter.statistics().waiting) == (0, 0)


@dataclass(frozen=True)
class Plan:
    """What one tool call does: its child, how long it takes, and what it asks inside."""

    child: str
    seconds: int
    asks: "tuple[Plan, ...]" = ()


PLANS = st.recursive(
    st.builds(Plan, st.sampled_from("abc"), st.integers(0, 3)),
    lambda inner: st.builds(
        Plan, st.sampled_from("abc"), st.integers(0, 3), st.lists(inner, max_size=3).map(tuple)
    ),
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
    plans: list[Plan],
    slots: list[int],
    cancelled: list[tuple[int, int]],
    models: bool,  # noqa: FBT001 - a case
) -> None:
    with VirtualTime() as time:
        root = Limiter("1000/s", concurrency=slots[0], clock=time.clock)
        children = {
            name: root.child(name, concurrency=size)
            for name, size in zip("abc", slots[1:], strict=True)
        }
        llm = root.wrap(MockLLM())
        tools: dict[str, Any] = {}

        async def run(plan: Plan) -> str:
            """Run; never ask a tool of a child before its own, for a circle may wait for itself."""
            await asyncio.sleep(plan.seconds)
            if models:
                await llm.acomplete("hi")
            asks = [replace(each, child=max(each.child, plan.child)) for each in plan.asks]
            await asyncio.gather(*(tools[each.child].acall(plan=each) for each in asks))
            return "done"

        for name, child in children.items():
            tool = FunctionTool.from_defaults(async_fn=run, name=name)
            tools[name] = child.wrap(tool)

        async def main() -> None:
            tasks = [asyncio.create_task(tools[plan.child].acall(plan=plan)) for plan in plans]
            for number, seconds in cancelled:
                await asyncio.sleep(seconds)
                tasks[number % len(tasks)].cancel()
            async with asyncio.timeout(10_000):
                await asyncio.gather(*tasks, return_exceptions=True)

        time.run(main())
        for limiter in (root, *children.values()):
            assert (in_flight(limiter), limiter.statistics().waiting) == (0, 0)
