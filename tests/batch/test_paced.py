"""Each call is admitted once: by the function itself if it is marked, else by the batch."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from llama_index.core.llms import MockLLM
from pydantic import BaseModel

from asyncbucket import Limiter, Pool
from asyncbucket.testing import VirtualTime

limiter = Limiter("1000 RPM", concurrency=2, name="openai")
llm = limiter.wrap(MockLLM(max_tokens=3))


class Word(BaseModel):
    """What a structured model is asked for."""

    word: str


async def plain(prompt: str) -> str:
    return prompt


decorated = limiter.paced(plain)


def logged(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:

    @functools.wraps(function)
    async def outer(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return outer


async def results(on: Limiter | Pool, function: Any, items: Any, **options: Any) -> list[Any]:
    found = on.amap(function, items, ordered=True, **options)
    return [item.result async for item in found]


@pytest.mark.parametrize(
    "function",
    [
        llm.acomplete,
        decorated,
        logged(decorated),
        functools.partial(decorated),
        limiter.child("chat").wrap(MockLLM()).acomplete,
        plain,
        MockLLM().acomplete,
    ],
)
async def test_call_is_charged_once_by_marks_or_the_batch(function: Any) -> None:
    before = limiter.statistics().admitted
    assert len(await results(limiter, function, ["a b c d", "e"])) == 2
    assert limiter.statistics().admitted == before + 2
    assert limiter.statistics().in_flight == 0


async def test_structured_model_of_a_paced_one_is_charged_once() -> None:
    before = limiter.statistics().admitted
    function = llm.as_structured_llm(Word).acomplete
    _ = [item async for item in limiter.amap(function, ["a"], errors="collect")]
    assert limiter.statistics().admitted == before + 1


@pytest.mark.parametrize("of", ["above", "beside"])
def test_function_paced_by_parent_or_sibling_is_refused(of: str) -> None:
    root = Limiter("1000 RPM", concurrency=1, name="key")
    batch = root.child("batch")
    model = (root if of == "above" else root.child("chat")).wrap(MockLLM())
    with pytest.raises(ValueError, match=r"is paced by .* and would be paced by 'key/batch', too"):
        batch.amap(model.acomplete, ["a"])
    batch.amap(model.acomplete, ["a"], paced=True)


def acquiring(here: Limiter) -> dict[str, Callable[[str], Awaitable[Any]]]:
    async def by_hand(prompt: str) -> str:
        async with here.acquire():
            return prompt

    async def by_a_batch(prompt: str) -> list[str]:
        return await results(here, plain, prompt.split())

    return {"by_hand": by_hand, "by_a_batch": by_a_batch}


@pytest.mark.parametrize("name", acquiring(Limiter("1 RPM")))
@pytest.mark.parametrize("errors", ["raise", "collect"])
async def test_unmarked_function_acquires_not(
    name: str, errors: Any, virtual_time: VirtualTime
) -> None:
    """With a single slot, it would also wait for itself forever."""
    here = Limiter("1000 RPM", concurrency=1, clock=virtual_time.clock, name="openai")
    with pytest.raises(ValueError, match=r"acquires from 'openai.*' itself.*: pass paced=True"):
        await results(here, acquiring(here)[name], ["a b"] * 100, errors=errors)
    assert here.statistics().admitted <= 4
    assert here.statistics().in_flight == 0


async def test_unmarked_function_in_threads_fails_without_waiting_for_itself() -> None:
    here = Limiter("1000 RPM", concurrency=1)
    model = here.wrap(MockLLM())

    async def ask(prompt: str) -> str:
        return str(await asyncio.to_thread(model.complete, prompt))

    with pytest.raises(ValueError, match=r"ask acquires from 'default' itself.*: pass paced=True"):
        await results(here, ask, ["a", "b", "c"])
    assert await results(here, ask, ["a"], paced=True) == ["a"]
    assert (here.statistics().in_flight, here.statistics().overridden) == (0, 0)


async def test_batch_inside_a_batch_is_no_second_acquisition(virtual_time: VirtualTime) -> None:
    """But a call of the inner batch that acquires from the outer limiter is one."""
    here, other = (Limiter(concurrency=1, clock=virtual_time.clock) for _ in range(2))

    async def words(text: str) -> list[Any]:
        return await results(other, ask, text.split())

    ask: Callable[[str], Awaitable[Any]] = plain
    assert await results(here, words, ["a b", "c"]) == [["a", "b"], ["c"]]
    ask = acquiring(here)["by_hand"]
    with pytest.raises(ValueError, match="words acquires from 'default' itself"):
        await results(here, words, ["a b", "c"])


@pytest.mark.parametrize(
    ("options", "charged"),
    [({"paced": False}, 2), ({"cost": {"requests": 3}}, 4), ({"paced": True}, 1)],
)
async def test_paced_and_cost_options_say_who_acquires(options: Any, charged: int) -> None:
    """A call that is charged twice on request still does not wait for its own slot."""
    here = Limiter("1000 RPM", concurrency=1)
    await results(here, acquiring(here)["by_hand"], ["once"], **options)
    assert here.statistics().limits[0].used == charged


@pytest.mark.parametrize("agents", [True, "chat"])
async def test_each_item_of_agents_is_one(*, agents: bool | str, virtual_time: VirtualTime) -> None:
    """Its calls acquire, not the batch; a wrong kind is refused at once."""
    here = Limiter("600 RPM burst 600", clock=virtual_time.clock)

    async def run(calls: int) -> int:
        for _ in range(calls):
            async with here.acquire():
                await asyncio.sleep(1)
        return calls

    assert await results(here, run, [1, 3, 2], agents=agents) == [1, 3, 2]
    now = here.statistics()
    assert now.admitted == 6
    assert now.agents is not None
    assert (now.agents.finished, now.agents.running) == (3, 0)
    assert now.agents.kinds.keys() == {None if agents is True else agents}
    with pytest.raises(ValueError, match="an agent's kind must be a non-empty string, not int"):
        here.amap(run, [1], agents=cast("Any", 3))


async def test_batches_and_decorated_functions_take_a_pool() -> None:
    pool = Pool(Limiter("60 RPM", name="one"), Limiter("60 RPM", name="two"))
    model = pool.wrap([MockLLM(), MockLLM()])
    for fn in (model.acomplete, pool.paced(plain, tokens=5), plain):
        assert [*map(str, await results(pool, fn, ["a", "b"]))] == ["a", "b"]
    assert pool.statistics().admitted == 6
    for asked, fn in (
        (pool, pool.members[0].paced(plain)),
        (pool.members[0].child("other"), pool.paced(plain)),
        (pool.child("other"), pool.paced(plain)),
    ):
        with pytest.raises(ValueError, match=r"is paced by '.*' already, and would be paced by"):
            asked.amap(fn, ["a"])
