"""Each call is admitted once: by the function itself, or by `amap`."""

import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import httpx
import pytest
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import MockLLM
from openai import AsyncOpenAI
from pydantic import BaseModel

from asyncbucket import Limiter
from asyncbucket.batch import amap
from asyncbucket.batch.paced import acquires_itself
from asyncbucket.testing import virtual_time

T = TypeVar("T")


class Word(BaseModel):
    """What a structured model is asked for."""

    word: str


limiter = Limiter("1000 RPM", concurrency=2, name="of the module")
other = Limiter("1000 RPM")
llm = limiter.wrap(MockLLM(max_tokens=3))
client = AsyncOpenAI(
    api_key="any", max_retries=0, http_client=httpx.AsyncClient(transport=limiter.transport())
)


async def plain(prompt: str) -> str:
    """Use no limiter."""
    return prompt


async def by_the_model(prompt: str) -> str:
    """Use a wrapped model by its name."""
    return str(await llm.acomplete(f"Please: {prompt}"))


async def by_the_client(prompt: str) -> object:
    """Use an SDK's client above a paced transport."""
    return await client.responses.create(model="m", input=prompt)


async def by_hand(prompt: str) -> str:
    """Acquire from the limiter."""
    async with limiter.acquire(tokens=len(prompt)):
        return prompt


async def for_the_looks(prompt: str) -> str:
    """Name the limiter, but acquire nothing from it."""
    return f"{prompt} {limiter.name}"


async def by_another(prompt: str) -> str:
    """Acquire from another limiter."""
    async with other.acquire():
        return prompt


async def by_a_batch(prompt: str) -> list[str]:
    """Make many calls, each of which is admitted."""
    return [item.result async for item in limiter.amap(plain, prompt.split())]


async def by_a_batch_in_threads(prompt: str) -> list[str]:
    """Do so without an event loop, as a function for `Limiter.map` does."""
    return [item.result for item in limiter.map(str.upper, prompt.split())]


async def by_the_map_of_python(prompt: str) -> str:
    """Name the limiter, and use Python's own `map`."""
    return limiter.name.join(map(str.upper, prompt))


def logged(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Wrap a method, as a decorator of any library does."""

    @functools.wraps(method)
    async def outer(*args: Any, **kwargs: Any) -> T:
        return await method(*args, **kwargs)

    return outer


class Pipeline:
    """A class with a model that some methods use, and some don't."""

    def __init__(self) -> None:
        self.model = llm
        self.limiter = limiter

    async def ask(self, prompt: str) -> str:
        """Use the model."""
        return str(await self.model.acomplete(prompt))

    async def ask_politely(self, prompt: str) -> str:
        """Use it through another method."""
        return await self.ask(prompt)

    async def by_hand(self, prompt: str) -> str:
        """Acquire from the limiter."""
        async with self.limiter.acquire():
            return prompt

    @logged
    @logged
    async def ask_loudly(self, prompt: str) -> str:
        """Use it below decorators."""
        return await self.ask(prompt)

    async def look_up(self, prompt: str) -> str:
        """Use neither model nor limiter."""
        return prompt

    @logged
    async def look_up_loudly(self, prompt: str) -> str:
        """Use neither, below a decorator."""
        return prompt

    async def __call__(self, prompt: str) -> str:
        """Make the object callable like a function."""
        return await self.ask(prompt)


def closure(model: Any) -> Callable[[str], Awaitable[str]]:
    """Return a function that gets its model from a closure."""

    async def ask(prompt: str) -> str:
        return str(await model.acomplete(prompt))

    return ask


async def prefixed(prefix: str, model: Any, prompt: str) -> str:
    """Take a model as an argument."""
    return str(await model.acomplete(prefix + prompt))


@limiter.paced
async def decorated(prompt: str) -> str:
    """Return the prompt; the decorator paces it."""
    return prompt


child = limiter.child("below")


async def by_a_child(prompt: str) -> str:
    """Acquire from a child, and so from the limiter."""
    async with child.acquire():
        return prompt


def paced_functions() -> Iterator[tuple[str, Callable[[str], Awaitable[object]]]]:
    """Yield functions that acquire from the limiter by themselves."""
    pipeline = Pipeline()
    yield "a model's method", llm.acomplete
    yield "names a model", by_the_model
    yield "names a client", by_the_client
    yield "acquires", by_hand
    yield "has a batch of its own", by_a_batch
    yield "has a batch in threads", by_a_batch_in_threads
    yield "is decorated", decorated
    yield "acquires from a child", by_a_child
    yield "a lambda", lambda prompt: decorated(prompt)  # noqa: PLW0108 - it is the point
    yield "a closure", closure(llm)
    yield "a partial", functools.partial(prefixed, "Please: ", llm)
    yield "a method", pipeline.ask
    yield "a method of a method", pipeline.ask_politely
    yield "a method that acquires", pipeline.by_hand
    yield "a decorated method", pipeline.ask_loudly
    yield "a structured model's method", llm.as_structured_llm(Word).acomplete
    yield "a chat engine's method", SimpleChatEngine.from_defaults(llm=llm).achat
    yield "an object", pipeline


def plain_functions() -> Iterator[tuple[str, Callable[[str], Awaitable[object]]]]:
    """Yield functions that do not acquire from it."""
    yield "uses no limiter", plain
    yield "only names the limiter", for_the_looks
    yield "uses the map of Python", by_the_map_of_python
    yield "another limiter", by_another
    yield "another model", closure(other.wrap(MockLLM()))
    yield "an unpaced model", MockLLM().acomplete
    yield "an unpaced structured model", MockLLM().as_structured_llm(Word).acomplete
    yield "a method beside the model", Pipeline().look_up
    yield "a decorated method beside it", Pipeline().look_up_loudly


@pytest.mark.parametrize(("what", "function"), list(paced_functions()))
def test_function_that_acquires_from_the_limiter_is_detected(
    what: str, function: Callable[[str], Awaitable[object]]
) -> None:
    """It would be charged twice, and with few slots wait for ever."""
    assert acquires_itself(function, limiter), what


@pytest.mark.parametrize(("what", "function"), list(plain_functions()))
def test_function_that_does_not_acquire_is_not_taken_for_paced(
    what: str, function: Callable[[str], Awaitable[object]]
) -> None:
    """Otherwise it would not be paced at all."""
    assert not acquires_itself(function, limiter), what


@pytest.mark.parametrize("of", ["above", "beside"])
def test_function_paced_by_parent_or_sibling_is_refused(of: str) -> None:
    """One call would have two leases, and the second might wait for the slot of the first."""
    root = Limiter("1000 RPM", concurrency=1, name="key")
    batch = root.child("batch")
    model = (root if of == "above" else root.child("chat")).wrap(MockLLM())

    with pytest.raises(
        ValueError, match=r"acomplete is paced by .* and would be paced by 'key/batch', too: pace"
    ):
        batch.amap(model.acomplete, ["a"])
    with pytest.raises(ValueError, match="would be paced by 'key/batch', too"):
        batch.map(model.complete, ["a"])
    batch.amap(model.acomplete, ["a"], paced=True)


async def test_wrapped_model_is_charged_once() -> None:
    """With a single slot, a second lease for the call would hang."""
    here = Limiter("1000 RPM", concurrency=1)
    model = here.wrap(MockLLM(max_tokens=3))

    items = [item async for item in amap(here, model.acomplete, ["a b c d", "e"])]

    assert len(items) == 2
    assert here.statistics().admitted == 2


async def test_batch_within_a_batch_does_not_wait_for_its_own_slot() -> None:
    """Each outer call would hold a slot while its inner calls wait for one."""
    here = Limiter("1000 RPM", concurrency=1)

    async def words(text: str) -> list[str]:
        return [item.result async for item in here.amap(plain, text.split(), ordered=True)]

    items = [item async for item in amap(here, words, ["a b", "c"], ordered=True)]

    assert [item.result for item in items] == [["a", "b"], ["c"]]
    assert here.statistics().admitted == 3


def test_undetected_paced_function_does_not_wait_for_its_own_slot() -> None:
    """The slot of its batch is given back first, even in a batch within a batch."""
    with virtual_time() as time:
        here = Limiter("1000 RPM", concurrency=1, clock=time.clock)

        def made_late() -> MockLLM:
            return here.wrap(MockLLM())

        async def ask(prompt: str) -> str:
            return str(await made_late().acomplete(prompt))

        async def both(words: str) -> list[str]:
            return [item.result async for item in amap(here, ask, words.split(), ordered=True)]

        async def main() -> list[list[str]]:
            return [item.result async for item in amap(here, both, ["a b", "c d"], ordered=True)]

        assert not acquires_itself(both, here)
        assert time.run(main()) == [["a", "b"], ["c", "d"]]
        assert (here.statistics().admitted, here.statistics().in_flight) == (10, 0)


def test_undetected_paced_sync_function_does_not_wait_for_its_own_slot() -> None:
    """Its call runs in a thread, and so does that of the model."""
    here = Limiter("1000 RPM", concurrency=1)

    def made_late() -> MockLLM:
        return here.wrap(MockLLM())

    def ask(prompt: str) -> str:
        return str(made_late().complete(prompt))

    assert sorted(item.result for item in here.map(ask, ["a", "b", "c"])) == ["a", "b", "c"]
    assert (here.statistics().admitted, here.statistics().overridden) == (6, 0)


async def test_paced_and_cost_options_override_detection() -> None:
    """`paced=` and `cost=` take precedence over what is found."""
    here = Limiter("1000 RPM")

    async def ask(prompt: str) -> str:
        async with here.acquire():
            return prompt

    said: list[tuple[dict[str, Any], int]] = [
        ({"paced": False}, 2),
        ({"cost": {"requests": 3}}, 4),
        ({}, 1),
    ]
    for options, charged in said:
        before = here.statistics().limits[0].used
        async for _ in amap(here, ask, ["once"], **options):
            pass
        assert here.statistics().limits[0].used - before == charged


def test_search_for_a_limiter_ends_in_cyclic_and_large_objects() -> None:
    """Nor does a large object make the search long."""

    class Ring:
        def __init__(self) -> None:
            self.ring = self
            self.many = {number: [number] for number in range(100_000)}

        async def __call__(self, prompt: str) -> str:
            return f"{prompt}{self.ring}{self.many}"

    assert not acquires_itself(Ring(), limiter)
