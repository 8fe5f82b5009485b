"""First come, first served: no call is overtaken, however cheap the others are."""

import asyncio
import random

import pytest

from asyncbucket import Limiter, TokenBucket
from asyncbucket.testing import VirtualTime


async def test_calls_pass_in_order_of_arrival(virtual_time: VirtualTime) -> None:
    """This holds whatever they cost, and whatever they wait for."""
    chance = random.Random(3)
    limiter = Limiter("20 RPS", "500 tokens/s", concurrency=5, clock=virtual_time.clock)
    served: list[int] = []

    async def call(number: int) -> None:
        async with limiter.acquire(tokens=chance.randint(1, 200)):
            served.append(number)
            await asyncio.sleep(chance.random())

    async with asyncio.TaskGroup() as group:
        for number in range(400):
            group.create_task(call(number))
            if chance.random() < 0.5:
                await asyncio.sleep(chance.random() / 10)
    assert served == list(range(400))


async def test_costly_call_waits_no_longer_than_its_turn(virtual_time: VirtualTime) -> None:
    """It costs 90 % of the burst, among cheap calls that ask for twice the rate."""
    rate, burst = 100.0, 100
    bucket = TokenBucket(rate=rate, burst=burst, clock=virtual_time.clock)
    ahead = 0

    async def cheap() -> None:
        nonlocal ahead
        ahead += 1
        await bucket.acquire()
        ahead -= 1

    async def flood() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(2000):
                group.create_task(cheap())
                await asyncio.sleep(0.5 / rate)

    flooding = asyncio.create_task(flood())
    for _ in range(5):
        await asyncio.sleep(1)
        before, turn = virtual_time.now, (ahead + 90) / rate
        await bucket.acquire(90)
        assert virtual_time.now - before <= turn + 1e-9
    await flooding


async def test_call_above_burst_waits_no_longer_than_its_turn(virtual_time: VirtualTime) -> None:
    """It earns the rest while it is head, and no other call takes that."""
    limiter = Limiter("6000 TPM burst 100", clock=virtual_time.clock)
    served: list[str] = []

    async def call(name: str, tokens: int) -> None:
        async with limiter.acquire(tokens=tokens) as lease:
            served.append(name)
            assert lease.waited <= 4.0

    async with asyncio.TaskGroup() as group:
        group.create_task(call("first", 100))
        group.create_task(call("costly", 300))
        group.create_task(call("cheap", 1))
    assert served == ["first", "costly", "cheap"]
    assert virtual_time.now == pytest.approx(3.01)


async def test_newcomer_never_passes_waiting_calls(virtual_time: VirtualTime) -> None:
    """There is room for its one token, but a call for 99 came first."""
    limiter = Limiter("100 tokens/s", clock=virtual_time.clock)
    bucket = TokenBucket(rate=100.0, burst=100, clock=virtual_time.clock)
    served: list[str] = []

    async def call(name: str, tokens: int) -> None:
        async with limiter.acquire(tokens=tokens):
            await bucket.acquire(tokens)
            served.append(name)

    async with asyncio.TaskGroup() as group:
        for name, tokens in (("first", 50), ("costly", 99), ("newcomer", 1)):
            group.create_task(call(name, tokens))
            await virtual_time.all_blocked()
    assert served == ["first", "costly", "newcomer"]


async def test_refund_admits_all_calls_that_fit_at_once(virtual_time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    lease = await limiter.acquire(tokens=100)
    calls = [asyncio.ensure_future(limiter.acquire(tokens=10)) for _ in range(9)]
    await asyncio.sleep(7)
    lease.settle(tokens=20)
    await virtual_time.all_blocked()
    assert [call.done() for call in calls] == [True] * 8 + [False]
    assert virtual_time.now == 7
    await calls[-1]
    assert virtual_time.now == 60 * 515 / 512
