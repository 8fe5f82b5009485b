"""A call that waits for one made inside it gives back the slots that the inner call needs."""

from pathlib import Path

import pytest

from asyncbucket import Limiter, Price
from asyncbucket.core.levels import (
    give_back,
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
