"""A call that waits for one made inside it gives back the slots that the inner call needs."""

from pathlib import Path

import pytest

from asyncbucket import Limit, Limiter, Price, tenant
from asyncbucket.core.levels import (
    can_give_slots_up,
    effective_limiter,
    give_back,
    in_force,
    provider_of,
    shown_name,
    terms_of,
)
from asyncbucket.testing import VirtualClock, VirtualTime
from tests.core.conftest import start


def in_flight(*limiters: Limiter) -> list[int]:
    """Return how many calls of each limiter count as in flight."""
    return [limiter.statistics().in_flight for limiter in limiters]


def make_tree() -> tuple[Limiter, Limiter, Limiter]:
    """Return a root and two children, with three slots each."""
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
async def test_inner_call_passes_when_outer_call_gives_up_its_slot(
    time: VirtualTime, slots: str
) -> None:
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


def test_level_whose_limits_are_the_providers_is_highest_with_any() -> None:
    """Levels above only group providers; what holds for calls is told from the bottom up."""
    group = Limiter(name="all")
    key = group.child("key", "500 RPM")
    chat = key.child("chat", "5 RPM")
    assert provider_of(chat) is provider_of(key) is key
    assert provider_of(group) is group
    assert in_force(chat) == (Limit("requests", 5), Limit("requests", 500))
    assert in_force(group) == ()


def test_only_limiter_that_finds_its_concurrency_can_give_slots_up() -> None:
    key = Limiter(concurrency=(2, 9))
    child = key.child("child", concurrency=5)
    assert can_give_slots_up(child)
    key.reconfigure(concurrency=(4, 4))
    assert not can_give_slots_up(child)
    assert not can_give_slots_up(Limiter(concurrency=5))


def test_tenant_of_context_is_limiter_that_admits() -> None:
    key = Limiter(name="key")
    assert effective_limiter(key) is key
    with tenant("acme"):
        assert effective_limiter(key) is key.key("acme")
        assert effective_limiter(key.key("other")) is key.key("other")
    assert shown_name(key.key("acme").child("chat")) == "key/*/chat"


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
