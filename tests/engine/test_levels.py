"""What adapters ask of a limiter, and what can be put behind it: functions of any kind."""

import asyncio
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Cost, CostExceedsLimit, Limiter, Pool, Price
from asyncbucket.levels import counts_at, give_back, in_force, is_under, share_a_level, terms_of
from asyncbucket.testing import VirtualClock, VirtualTime
from tests.engine.conftest import HELD, nothing_is_left, start, used


def in_flight(*limiters: Limiter) -> list[int]:
    return [limiter.statistics().in_flight for limiter in limiters]


def make_tree() -> tuple[Limiter, Limiter, Limiter]:
    root = Limiter("1000/s", concurrency=3, clock=VirtualClock())
    return root, root.child("a", concurrency=3), root.child("b", concurrency=3)


def test_outer_call_gives_up_slots_of_common_levels_once() -> None:
    """Only in its own tree; a lease that was released would give up another call's slot."""
    root, a, b = make_tree()
    elsewhere = Limiter(concurrency=1)
    with a.acquire_nowait() as lease:
        give_back(lease, elsewhere)
        assert in_flight(root, a, b) == [1, 1, 0]
        for _ in range(2):
            give_back(lease, b)
            assert in_flight(root, a, b) == [0, 1, 0]
        give_back(lease, a)
        assert in_flight(root, a, b) == [0, 0, 0]
    over = a.acquire_nowait()
    over.release()
    with a.acquire_nowait():
        give_back(over, a)
        assert in_flight(root, a, b) == [1, 1, 0]
    assert in_flight(root, a, b) == [0, 0, 0]


async def test_inner_call_passes_when_outer_gives_up_slot(time: VirtualTime) -> None:
    """Also one that was there before the slots were bounded."""
    root = Limiter("1000/s", clock=time.clock)
    tools = root.child("tools")
    async with tools.acquire() as lease:
        root.reconfigure(concurrency=1)
        inside = await start(root.acquire())
        assert not inside.done()
        give_back(lease, root)
        (await inside).release()
        assert in_flight(root, tools) == [0, 1]
    assert in_flight(root, tools) == [0, 0]


async def test_slot_in_store_is_given_up_for_inner_call(tmp_path: Path) -> None:
    root = Limiter("1000/s", concurrency=1, store=f"sqlite:///{tmp_path}/limits.db?patience=5")
    async with root.acquire() as lease:
        give_back(lease, root.child("a"))
        async with root.acquire(timeout=5):
            pass
    await root.aclose()


def test_terms_of_limiter_make_another_like_it() -> None:
    prices = {"m": Price(input=1)}
    key = Limiter("5 RPM", concurrency=(2, 9), max_queue=7, timeout=3, prices=prices)
    terms = {"concurrency": (2, 9), "max_queue": 7, "timeout": 3}
    assert terms_of(key) == {**terms, "prices": prices}
    assert "prices" not in terms_of(Limiter())
    child = key.child("child", "1 RPM", concurrency=4, weight=2, priority="batch")
    terms = {"concurrency": 4, "max_queue": None, "timeout": 3}
    assert terms_of(child) == {**terms, "weight": 2.0, "priority": -1}


def test_call_of_a_pool_may_count_at_each_member_and_counts_at_the_one_that_takes_it() -> None:
    one, two = Limiter("5 RPM", name="one"), Limiter("9 RPM", name="two")
    pool = Pool(one, two, prefer="first")
    chat = pool.child("chat", "7 RPM")
    lease = chat.acquire_nowait()

    assert is_under(chat, one)
    assert not is_under(one, pool)
    assert [counts_at(lease, each) for each in (chat, pool, one, two)] == [True, True, True, False]
    assert share_a_level(chat, two.child("other"))
    assert share_a_level(Pool(Limiter(name="three"), Limiter(name="four")), one) is False
    assert in_force(chat).limits == (*chat.limits, *one.limits, *chat.limits, *two.limits)


def test_call_inside_one_of_a_pool_gets_its_slots_at_the_member_too() -> None:
    member = Limiter(name="one", concurrency=1)
    pool = Pool(member, Limiter(name="two", concurrency=1), prefer="first")
    around = member.acquire_nowait()
    give_back(around, pool)
    lease = pool.acquire_nowait()

    assert lease.limiter is member
    give_back(lease, member)
    assert member.acquire_nowait().cost == Cost(requests=1)


def test_states_of_a_pool_say_who_is_left_out_why_and_for_how_long() -> None:
    clock = VirtualClock()
    pool = Pool(*(Limiter(name=name, clock=clock) for name in ("one", "two")), prefer="first")
    failed = pool.acquire_nowait()
    failed.member_works()  # it never failed
    failed.member_failed("HTTP 401")
    left_out = ["'one': left out for 1 s more (HTTP 401)", "'two': in use"]
    assert [str(state) for state in pool.states()] == left_out
    clock.advance(1)
    probe = pool.acquire_nowait()
    assert str(pool.states()[0]) == "'one': in use, after a failure (HTTP 401)"
    assert pool.acquire_nowait().limiter.name == "two"
    probe.member_works()  # before it is over, so the others follow
    assert (pool.acquire_nowait().limiter.name, probe.released) == ("one", False)


# --- paced functions ---


async def test_each_call_of_paced_async_function_waits_for_admission(time: VirtualTime) -> None:
    """A cost that is a function gets the call's own arguments."""
    limiter = Limiter("100 TPM", "1/s", "50 images/m", concurrency=1, clock=time.clock)

    @limiter.paced(tokens=len, images=2)
    async def ask(prompt: str) -> str:
        """Ask."""
        assert limiter.statistics().in_flight == 1
        await asyncio.sleep(0)
        return prompt.upper()

    assert list(await asyncio.gather(ask("seven ch"), ask("two"))) == ["SEVEN CH", "TWO"]
    assert time.now == HELD
    assert used(limiter) == [11, 1, 4]
    nothing_is_left(limiter)
    with pytest.raises(CostExceedsLimit):
        await ask("x" * 101)
    assert (ask.__name__, ask.__doc__) == ("ask", "Ask.")
    assert inspect.iscoroutinefunction(ask)


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
    limiter = Limiter(concurrency=1, clock=time.clock)

    def size(_: object, prompt: str) -> int:
        return len(prompt)

    async def plain(one: int, other: int) -> int:
        return one + other

    class Agent:
        @limiter.paced(tokens=size)
        async def ask(self, prompt: str) -> str:
            assert limiter.statistics().in_flight == 1
            return prompt

        async def __call__(self, prompt: str) -> str:
            return prompt.upper()

    assert await Agent().ask("x") == "x"
    assert await limiter.paced(functools.partial(plain, 1))(2) == 3
    ask = limiter.paced(Agent())
    assert list(await asyncio.gather(ask("a"), ask("b"))) == ["A", "B"]
    assert limiter.statistics().admitted == 4


async def test_paced_function_gives_its_slot_to_the_paced_call_that_it_makes() -> None:
    limiter = Limiter("10 RPM burst 10", concurrency=1, timeout=0)
    inner, inner_sync = limiter.child("inner"), limiter.child("sync", concurrency=1)

    @inner_sync.paced
    def look_up() -> int:
        return limiter.statistics().in_flight

    @inner.paced
    async def ask() -> int:
        return look_up()

    @limiter.paced
    async def agent() -> int:
        return await ask()

    assert await agent() == 1
    nothing_is_left(limiter)
    assert used(limiter) == [3]


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


# --- tool calls of an MCP session; the frameworks' tests have the real package ---


class Session:
    """Look like the package's own."""

    async def call_tool(self, name: str) -> str:
        return f"called {name}"


Session.__module__ = "mcp.client.session"


async def test_tool_calls_count_at_the_child_of_the_tools_name() -> None:
    limiter = Limiter("10 RPM", concurrency=2)
    search = limiter.child("search", concurrency=1)
    session: Any = limiter.wrap(Session())
    called = [await session.call_tool(name) for name in ("search", "add")]
    assert called == ["called search", "called add"]
    assert (limiter.statistics().admitted, search.statistics().admitted) == (2, 1)
    assert isinstance(session, Session)
    assert limiter.wrap(session) is session
    with pytest.raises(ValueError, match=r"is paced by .* already: wrap what it was made of"):
        Limiter("5 RPM").wrap(session)
    with pytest.raises(TypeError, match="retry= is for LlamaIndex's models and agents, not for"):
        limiter.wrap(Session(), retry=3)
