"""Each call is admitted once: by the function itself if it is marked, else by the batch."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httpx
import pytest
from llama_index.core.llms import MockLLM
from openai import AsyncOpenAI
from pydantic import BaseModel

from asyncbucket import Limiter, Pool
from asyncbucket.batch import amap
from asyncbucket.testing import virtual_time

limiter = Limiter("1000 RPM", concurrency=2, name="openai")
llm = limiter.wrap(MockLLM(max_tokens=3))
child = limiter.child("chat")


class Word(BaseModel):
    """What a structured model is asked for."""

    word: str


@limiter.paced
async def decorated(prompt: str) -> str:
    return prompt


def logged(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:

    @functools.wraps(function)
    async def outer(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return outer


async def plain(prompt: str) -> str:
    return prompt


@pytest.mark.parametrize(
    "function",
    [
        llm.acomplete,
        llm.as_structured_llm(Word).acomplete,
        decorated,
        logged(decorated),
        logged(llm.acomplete),
        functools.partial(decorated),
        child.wrap(MockLLM()).acomplete,
        plain,
        MockLLM().acomplete,
    ],
)
async def test_call_is_charged_once_by_marked_functions_or_else_by_the_batch(
    function: Any,
) -> None:
    before = limiter.statistics().admitted
    results = limiter.amap(function, ["a b c d", "e"], errors="collect")
    items = [item async for item in results]
    assert len(items) == 2
    assert limiter.statistics().admitted == before + 2
    assert limiter.statistics().in_flight == 0


@pytest.mark.parametrize("of", ["above", "beside"])
def test_function_paced_by_parent_or_sibling_is_refused(of: str) -> None:
    root = Limiter("1000 RPM", concurrency=1, name="key")
    batch = root.child("batch")
    model = (root if of == "above" else root.child("chat")).wrap(MockLLM())
    with pytest.raises(ValueError, match=r"is paced by .* and would be paced by 'key/batch', too"):
        batch.amap(model.acomplete, ["a"])
    batch.amap(model.acomplete, ["a"], paced=True)


def acquiring(here: Limiter) -> dict[str, Callable[[str], Awaitable[Any]]]:
    model = here.wrap(MockLLM())
    client = AsyncOpenAI(
        api_key="any", max_retries=0, http_client=httpx.AsyncClient(transport=here.transport())
    )

    async def by_hand(prompt: str) -> str:
        async with here.acquire():
            return prompt

    async def by_a_model(prompt: str) -> str:
        return str(await model.acomplete(prompt))

    async def by_a_client(prompt: str) -> object:
        return await client.responses.create(model="m", input=prompt)

    async def by_a_batch(prompt: str) -> list[str]:
        return [item.result async for item in here.amap(plain, prompt.split())]

    return {
        function.__name__: function for function in (by_hand, by_a_model, by_a_client, by_a_batch)
    }


@pytest.mark.parametrize("name", acquiring(Limiter("1 RPM")))
@pytest.mark.parametrize("errors", ["raise", "collect"])
def test_unmarked_function_that_acquires_fails_with_remedy(name: str, errors: Any) -> None:
    """With a single slot, it would also wait for itself forever."""
    with virtual_time() as time:
        here = Limiter("1000 RPM", concurrency=1, clock=time.clock, name="openai")
        function = acquiring(here)[name]

        async def main() -> None:
            async for _ in amap(here, function, ["a b"] * 100, errors=errors):
                pass

        with pytest.raises(ValueError, match=r"acquires from 'openai.*' itself.*: pass paced=True"):
            time.run(main())
        assert here.statistics().admitted <= 4
        assert here.statistics().in_flight == 0


async def test_unmarked_function_in_threads_fails_without_waiting_for_itself() -> None:
    here = Limiter("1000 RPM", concurrency=1)
    model = here.wrap(MockLLM())

    async def ask(prompt: str) -> str:
        return str(await asyncio.to_thread(model.complete, prompt))

    with pytest.raises(ValueError, match=r"ask acquires from 'default' itself.*: pass paced=True"):
        _ = [item async for item in here.amap(ask, ["a", "b", "c"])]
    assert [item.result async for item in here.amap(ask, ["a"], paced=True)] == ["a"]
    assert (here.statistics().in_flight, here.statistics().overridden) == (0, 0)


@pytest.mark.parametrize("inner", ["other", "same"])
def test_batch_on_another_limiter_inside_a_batch_is_no_second_acquisition(inner: str) -> None:
    with virtual_time() as time:
        here, other = (Limiter(concurrency=1, clock=time.clock) for _ in range(2))

        async def ask(word: str) -> str:
            if inner == "same":
                (await here.acquire()).release()
            return word

        async def words(text: str) -> list[str]:
            return [item.result async for item in amap(other, ask, text.split(), ordered=True)]

        async def main() -> list[list[str]]:
            return [item.result async for item in amap(here, words, ["a b", "c"], ordered=True)]

        if inner == "other":
            assert time.run(main()) == [["a", "b"], ["c"]]
        else:
            with pytest.raises(ValueError, match="words acquires from 'default' itself"):
                time.run(main())


@pytest.mark.parametrize(
    ("options", "charged"),
    [({"paced": False}, 2), ({"cost": {"requests": 3}}, 4), ({"paced": True}, 1)],
)
async def test_paced_and_cost_options_say_who_acquires(options: Any, charged: int) -> None:
    """A call that is charged twice on request still does not wait for its own slot."""
    here = Limiter("1000 RPM", concurrency=1)
    async for _ in amap(here, acquiring(here)["by_hand"], ["once"], **options):
        pass
    assert here.statistics().limits[0].used == charged


async def test_batch_inside_a_paced_tool_gets_the_tools_slot() -> None:
    from llama_index.core.tools import FunctionTool

    here = Limiter("1000 RPM", concurrency=1)

    async def summarize(words: str) -> int:
        return len([item async for item in here.amap(plain, words.split())])

    tool = here.wrap(FunctionTool.from_defaults(async_fn=summarize))
    assert (await tool.acall(words="a b")).raw_output == 2


@pytest.mark.parametrize("agents", [True, "chat"])
def test_each_item_of_a_batch_of_agents_is_one_agent(*, agents: bool | str) -> None:
    """Its calls acquire, not the batch; a wrong kind is refused at once."""
    with virtual_time() as time:
        limiter = Limiter("600 RPM burst 600", clock=time.clock)

        async def run(calls: int) -> int:
            for _ in range(calls):
                async with limiter.acquire():
                    await asyncio.sleep(1)
            return calls

        async def main() -> list[int]:
            return [each.result async for each in limiter.amap(run, [1, 3, 2], agents=agents)]

        assert sorted(time.run(main())) == [1, 2, 3]
    now = limiter.statistics()
    assert now.admitted == 6
    assert now.agents is not None
    assert (now.agents.finished, now.agents.running) == (3, 0)
    assert now.agents.kinds.keys() == {None if agents is True else agents}
    with pytest.raises(ValueError, match="an agent's kind must be a non-empty string, not int"):
        limiter.amap(run, [1], agents=cast("Any", 3))


async def echo(question: str) -> str:
    return question


async def test_batches_and_decorated_functions_take_a_pool() -> None:
    pool = Pool(Limiter("60 RPM", name="one"), Limiter("60 RPM", name="two"))
    model = pool.wrap([MockLLM(), MockLLM()])

    for fn in (model.acomplete, pool.paced(echo, tokens=5), echo):
        assert [str(item.result) async for item in pool.amap(fn, ["a", "b"])] == ["a", "b"]

    assert pool.statistics().admitted == 6


async def test_batch_refuses_what_another_limiter_of_the_pool_paces() -> None:
    pool = Pool(Limiter("60 RPM", name="one"), Limiter("60 RPM", name="two"))
    for asked, fn in (
        (pool, pool.members[0].paced(echo)),
        (pool.members[0].child("other"), pool.paced(echo)),
        (Pool(*pool.members, name="second"), pool.paced(echo)),
    ):
        with pytest.raises(ValueError, match=r"is paced by '.*' already, and would be paced by"):
            asked.amap(fn, ["a"])
