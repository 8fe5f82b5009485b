"""Urgent calls go first, and nobody starves."""

import asyncio
import itertools
import random
from typing import Any

import pytest

import asyncbucket
from asyncbucket import Limiter
from asyncbucket.core.context import Priority
from asyncbucket.testing import VirtualTime

#: Most seconds between calls of "10 RPS burst 1": the eleventh also waits for the window.
GAP = 515 / 512 - 0.9


async def ask(limiter: Limiter, priority: Priority | None, served: list[Any]) -> None:
    """Call once, and note the priority."""
    async with limiter.acquire(priority=priority):
        served.append(priority)


def served_to(
    priorities: tuple[Priority, ...], time: VirtualTime, *, callers: int, seconds: int
) -> list[Any]:
    """Return the priorities served at ten calls a second, if ``callers`` of each never stop."""
    served: list[Any] = []

    async def caller(limiter: Limiter, priority: Priority) -> None:
        while time.now < seconds:
            await ask(limiter, priority, served)

    async def main() -> None:
        limiter = Limiter("10 RPS burst 1", clock=time.clock)
        async with asyncio.TaskGroup() as group:
            for priority in priorities:
                for _ in range(callers):
                    group.create_task(caller(limiter, priority))

    time.run(main())
    return served


@pytest.mark.heavy
async def test_interactive_call_waits_one_gap_beside_10_000_batch_calls(
    virtual_time: VirtualTime,
) -> None:
    chance = random.Random(2)
    waits: list[float] = []
    limiter = Limiter("10 RPS burst 1", clock=virtual_time.clock)
    served: list[Any] = []
    batch = [asyncio.ensure_future(ask(limiter, "batch", served)) for _ in range(10_000)]
    await virtual_time.all_blocked()
    for _ in range(100):
        await asyncio.sleep(0.5 + chance.random())
        lease = await limiter.acquire(priority="interactive")
        waits.append(lease.waited)
        lease.release()
    await asyncio.gather(*batch)
    assert len(served) == 10_000
    assert max(waits) <= GAP + 1e-9
    assert virtual_time.now == pytest.approx(10_100 / 10, rel=0.01)


async def test_interactive_call_passes_costly_batch_call_at_head(virtual_time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    await limiter.acquire(tokens=50)
    costly = asyncio.ensure_future(limiter.acquire(tokens=90, priority="batch"))
    await virtual_time.all_blocked()
    assert (await limiter.acquire(tokens=10, priority="interactive")).waited == 0
    assert not costly.done()
    await costly


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
def test_each_priority_gets_its_guaranteed_share(
    virtual_time: VirtualTime, priorities: tuple[Priority, ...], parts: tuple[float, ...]
) -> None:
    """However many more urgent calls wait: 1/9 beside one class, 1/73 beside two."""
    served = served_to(priorities, virtual_time, callers=30, seconds=600)
    for priority, part in zip(priorities, parts, strict=True):
        assert served.count(priority) / len(served) == pytest.approx(part, abs=0.012)


def test_wait_of_least_urgent_call_is_bounded(virtual_time: VirtualTime) -> None:
    """Beside one class every ninth call is of the lowest one, beside two every 73rd."""
    served = served_to((-1, 0, 1), virtual_time, callers=5, seconds=100)[15:900]
    places = [place for place, priority in enumerate(served) if priority == -1]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert len(gaps) >= 10
    assert max(gaps) <= 74


async def test_calls_of_one_priority_pass_in_order_of_arrival(virtual_time: VirtualTime) -> None:
    """This holds whatever calls of other priorities wait."""
    limiter = Limiter("20 RPS burst 1", clock=virtual_time.clock)
    served: dict[int, list[int]] = {-1: [], 0: [], 1: []}

    async def call(number: int, priority: int) -> None:
        async with limiter.acquire(priority=priority):
            served[priority].append(number)

    chance = random.Random(4)
    async with asyncio.TaskGroup() as group:
        for number in range(300):
            group.create_task(call(number, chance.choice([-1, 0, 1])))
            if chance.random() < 0.3:
                await asyncio.sleep(0.1)
    assert sum(map(len, served.values())) == 300
    assert all(numbers == sorted(numbers) for numbers in served.values())


async def test_priority_outranks_shares_of_children(virtual_time: VirtualTime) -> None:
    """One tenant's urgent call passes before another's normal one, whatever their shares."""
    key = Limiter("10 RPS burst 1", clock=virtual_time.clock)
    busy, idle = key.child("busy"), key.child("idle", weight=100)
    served: list[Any] = []
    calls = [asyncio.ensure_future(ask(busy, None, served)) for _ in range(20)]
    await asyncio.sleep(1)
    calls += [asyncio.ensure_future(ask(idle, None, served)) for _ in range(20)]
    await virtual_time.all_blocked()
    before = len(served)
    await ask(busy, 1, served)
    assert served[before:] == [1]
    await asyncio.gather(*calls)


async def test_priority_comes_from_call_then_context_then_limiter(
    virtual_time: VirtualTime,
) -> None:
    """They count in this order; a child has its parent's default unless it is given its own."""
    key = Limiter("1 RPS burst 1", clock=virtual_time.clock)
    nightly = key.child("nightly", priority="batch")
    below = nightly.child("below")
    served: list[str] = []

    async def call(name: str, limiter: Limiter, priority: Priority | None = None) -> None:
        async with limiter.acquire(priority=priority):
            served.append(name)

    await key.acquire()
    async with asyncio.TaskGroup() as group:
        group.create_task(call("batch by its limiter", nightly))
        group.create_task(call("batch by the limiter above", below))
        with asyncbucket.priority("interactive"):
            group.create_task(call("inherited", nightly))
            group.create_task(call("normal by its own word", nightly, "normal"))
        group.create_task(call("urgent by its own word", nightly, 50))
        await virtual_time.all_blocked()
    assert served == [
        "urgent by its own word",
        "inherited",
        "normal by its own word",
        "batch by its limiter",
        "batch by the limiter above",
    ]


@pytest.mark.parametrize("value", ["urgent", 101, -101, 1.0, True, None])
def test_invalid_priority_is_refused(value: Any) -> None:
    """The context and the call refuse it."""
    message = (
        "priority must be 'interactive', 'normal', 'batch' or a whole number from -100 to 100, "
        f"not {value!r}"
    )
    with pytest.raises(ValueError, match=message), asyncbucket.priority(value):
        pass
    if value is not None:
        with pytest.raises(ValueError, match=message):
            Limiter().acquire(priority=value)
        with pytest.raises(ValueError, match=message):
            Limiter().acquire_sync(priority=value)
