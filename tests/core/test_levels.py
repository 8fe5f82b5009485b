"""A call that waits for one made inside it gives back the slots that the inner call needs."""

from pathlib import Path

import pytest

from asyncbucket import Cost, Limiter, Pool, Price
from asyncbucket.core.levels import (
    counts_at,
    give_back,
    in_force,
    is_under,
    share_a_level,
    terms_of,
)
from asyncbucket.testing import VirtualClock, VirtualTime
from tests.core.conftest import start


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
    with a.acquire_nowait():
        give_back(lease, a)
        assert in_flight(root, a, b) == [1, 1, 0]
    assert in_flight(root, a, b) == [0, 0, 0]


@pytest.mark.parametrize("slots", ["before", "after"])
async def test_inner_call_passes_when_outer_gives_up_slot(time: VirtualTime, slots: str) -> None:
    root = Limiter("1000/s", clock=time.clock)
    tools = root.child("tools")
    if slots == "before":
        root.reconfigure(concurrency=1)
    async with tools.acquire() as lease:
        if slots == "after":
            root.reconfigure(concurrency=1)
            tools.reconfigure(concurrency=1)
        inside = await start(root.acquire())
        assert not inside.done()
        give_back(lease, root)
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
    key = Limiter("5 RPM", concurrency=(2, 9), max_queue=7, timeout=3)
    assert terms_of(key) == {"concurrency": (2, 9), "max_queue": 7, "timeout": 3}
    prices = {"m": Price(input=1)}
    assert terms_of(Limiter("5 RPM", prices=prices))["prices"] == prices
    child = key.child("child", "1 RPM", concurrency=4, weight=2, priority="batch")
    assert terms_of(child) == {
        "concurrency": 4,
        "max_queue": None,
        "timeout": 3,
        "weight": 2.0,
        "priority": -1,
    }


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
    assert in_force(chat) == (*chat.limits, *one.limits, *chat.limits, *two.limits)


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
    members = [Limiter(name=name, clock=clock) for name in ("one", "two")]
    pool = Pool(*members, prefer="first")
    failed = pool.acquire_nowait()
    failed.member_works()  # it never failed
    failed.member_failed("HTTP 401")

    assert [str(state) for state in pool.states()] == [
        "'one': left out for 1 s more (HTTP 401)",
        "'two': in use",
    ]
    clock.advance(1)
    probe = pool.acquire_nowait()
    assert str(pool.states()[0]) == "'one': left out for 2 s more (HTTP 401)"
    probe.member_works()  # before it is over
    assert str(pool.states()[0]) == "'one': in use"
    assert not probe.released
