"""`@limiter.paced`: functions of any kind, and what cannot be paced."""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Iterator

import pytest

from asyncbucket import CostExceedsLimit, Limiter
from asyncbucket.testing import VirtualTime
from tests.core.conftest import HELD, nothing_is_left, used


async def test_each_call_of_paced_async_function_waits_for_admission(time: VirtualTime) -> None:
    limiter = Limiter("1/s", concurrency=1, clock=time.clock)

    @limiter.paced
    async def ask(prompt: str, *, loud: bool = False) -> str:
        """Ask."""
        assert limiter.statistics().in_flight == 1
        await asyncio.sleep(0)
        return prompt.upper() if loud else prompt

    assert list(await asyncio.gather(ask("a"), ask("b", loud=True))) == ["a", "B"]
    assert time.now == HELD
    nothing_is_left(limiter)
    assert (ask.__name__, ask.__doc__) == ("ask", "Ask.")
    assert inspect.iscoroutinefunction(ask)


async def test_cost_given_as_function_is_computed_from_call_arguments(time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", "50 images/m", clock=time.clock)

    @limiter.paced(tokens=len, images=2)
    async def ask(prompt: str) -> str:
        return prompt

    await ask("seven ch")
    await ask("two")
    assert used(limiter) == [11, 4]
    await limiter.paced(asyncio.sleep, tokens=9, images=1)(0)
    assert used(limiter) == [20, 5]
    with pytest.raises(CostExceedsLimit):
        await ask("x" * 101)


def test_paced_plain_function_holds_its_slot_while_it_runs() -> None:
    limiter = Limiter("10 TPM burst 10", concurrency=1)

    @limiter.paced(tokens=3)
    def ask(number: int) -> float:
        assert limiter.statistics().in_flight == 1
        return 1 / number

    assert ask(2) == 0.5
    with pytest.raises(ZeroDivisionError):
        ask(0)
    nothing_is_left(limiter)
    assert used(limiter) == [6]


async def test_methods_partials_and_objects_can_be_paced(time: VirtualTime) -> None:
    """`self` is the first argument; a partial of an async function is async, and so is an object."""
    limiter = Limiter("1/s", concurrency=1, clock=time.clock)

    class Agent:
        @limiter.paced
        async def ask(self, prompt: str) -> str:
            return prompt

        async def __call__(self, prompt: str) -> str:
            return prompt.upper()

    async def plain(one: int, other: int) -> int:
        return one + other

    assert await Agent().ask("x") == "x"
    assert await limiter.paced(functools.partial(plain, 1))(2) == 3
    ask = limiter.paced(Agent())
    assert list(await asyncio.gather(ask("a"), ask("b"))) == ["A", "B"]
    assert limiter.statistics().admitted == 4
    assert time.now == pytest.approx(3 * HELD)


def test_paced_refuses_generator_functions() -> None:

    async def stream() -> AsyncIterator[int]:
        yield 1

    def items() -> Iterator[int]:
        yield 1

    for function in (stream, items):
        with pytest.raises(TypeError) as error:
            Limiter().paced(function)
        assert str(error.value) == (
            f"{function.__qualname__} is a generator: a call of it holds nothing yet; "
            f"acquire inside it, around what it iterates over"
        )


def test_paced_plain_function_that_returns_coroutine_is_refused_when_called() -> None:
    limiter = Limiter("10/s", concurrency=1)
    ran: list[int] = []

    async def work(number: int) -> None:
        ran.append(number)

    ask = limiter.paced(lambda: work(1))
    with pytest.raises(TypeError, match=r"is a plain function that returns a coroutine, .*async d"):
        _ = ask()
    nothing_is_left(limiter)
    assert (used(limiter), ran) == ([0], [])
