"""Urgent calls go first, and nobody starves."""

import asyncio
import itertools
from typing import Any

import pytest

import asyncbucket
from asyncbucket import Limiter
from asyncbucket.engine.context import Priority
from asyncbucket.testing import VirtualTime


async def ask(limiter: Limiter, priority: Priority | None, served: list[Any]) -> None:
    async with limiter.acquire(priority=priority):
        served.append(priority)


async def served_to(
    priorities: tuple[Priority, ...], time: VirtualTime, *, callers: int, seconds: int
) -> list[Any]:
    served: list[Any] = []
    limiter = Limiter("10 RPS burst 1", clock=time.clock)

    async def caller(priority: Priority) -> None:
        while time.now < seconds:
            await ask(limiter, priority, served)

    await asyncio.gather(*(caller(each) for each in priorities for _ in range(callers)))
    return served


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("priorities", "parts"),
    [
        (("batch", "interactive"), (1 / 9, 8 / 9)),
        (("batch", "normal"), (1 / 9, 8 / 9)),
        (("batch", "normal", "interactive"), (1 / 73, 8 / 73, 64 / 73)),
        ((-100, 100), (1 / 9, 8 / 9)),
    ],
)
async def test_each_priority_gets_its_guaranteed_share(
    time: VirtualTime, priorities: tuple[Priority, ...], parts: tuple[float, ...]
) -> None:
    served = await served_to(priorities, time, callers=5, seconds=200)
    for priority, part in zip(priorities, parts, strict=True):
        assert served.count(priority) / len(served) == pytest.approx(part, abs=0.012)
    places = [place for place, each in enumerate(served[15:1_900]) if each == priorities[0]]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert max(gaps) <= 1 / parts[0] + 1


async def test_priority_comes_from_call_then_context_then_limiter(time: VirtualTime) -> None:
    key = Limiter("1 RPS burst 1", clock=time.clock)
    nightly = key.child("nightly", priority="batch")
    served: list[str] = []

    async def call(name: str, limiter: Limiter, priority: Priority | None = None) -> None:
        async with limiter.acquire(priority=priority):
            served.append(name)

    await key.acquire()
    async with asyncio.TaskGroup() as group:
        group.create_task(call("batch by its limiter", nightly))
        group.create_task(call("batch by the limiter above", nightly.child("below")))
        with asyncbucket.priority("interactive"):
            group.create_task(call("inherited", nightly))
            group.create_task(call("normal by its own word", nightly, "normal"))
        group.create_task(call("urgent by its own word", nightly, 50))
        await time.all_blocked()
    assert served == [
        "urgent by its own word",
        "inherited",
        "normal by its own word",
        "batch by its limiter",
        "batch by the limiter above",
    ]
