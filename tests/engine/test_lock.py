"""What happens while the lock is held: the collector may run at any point, also in its holder.

It may then drop a lease, or close a generator or coroutine that holds one: no deadlock, nothing lost.
"""

from typing import Any

import pytest

from asyncbucket import Lease, Limiter
from asyncbucket.engine.events import Released, Settled
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import all_blocked, nothing_is_left, start, used


def locked(limiter: Limiter) -> Any:
    return limiter._node.pacer.lock


@pytest.mark.parametrize("is_locked", [False, True])
async def test_dropped_lease_serves_waiting_call(time: VirtualTime, *, is_locked: bool) -> None:
    limiter, other = (Limiter(concurrency=1, clock=time.clock) for _ in range(2))
    lease: Lease | None = await limiter.acquire()
    waiting = await start(limiter.acquire())
    with locked(limiter if is_locked else other):
        del lease
    (await waiting).release()
    nothing_is_left(limiter)


def test_settlements_and_outcomes_told_while_lock_is_held_apply_in_order() -> None:
    """Of several settlements of one lease, the last holds; each event says what it corrects."""
    limiter = Limiter("100 ITPM", "100 OTPM", "100 TPM", concurrency=3)
    heard: list[Any] = []
    limiter.observe(heard.append)
    leases = [limiter.acquire_nowait(input_tokens=30, output_tokens=40)]
    leases += [limiter.acquire_nowait() for _ in range(2)]
    with locked(limiter):
        leases[0].settle(input_tokens=10)
        leases[0].settle(output_tokens=5)
        leases[0].release()
        leases[1].overloaded()
        leases[2].failed()
    leases[0].settle(input_tokens=20)
    assert used(limiter) == [20, 5, 25]
    corrected = [dict(event.corrects) for event in heard if isinstance(event, Settled)]
    assert corrected == [{}, {"tokens": 50}, {"input_tokens": 10, "tokens": 15}]
    outcomes = [event.outcome for event in heard if isinstance(event, Released)]
    assert outcomes == ["ok", "overloaded", "failed"]


async def test_call_that_joins_the_line_while_a_slot_returns_gets_it(time: VirtualTime) -> None:
    """It may come from another thread, after `release` has seen that nobody waits."""
    limiter = Limiter(concurrency=2, clock=time.clock)
    lease, other, late = await limiter.acquire(), await limiter.acquire(), limiter.acquire()
    waiting = late.__await__()

    class Racing(int):
        def __sub__(self, _: int) -> int:
            waiting.send(None)
            return 1

    limiter._node.slots.in_flight = Racing(2)
    lease.release()
    await all_blocked()
    with pytest.raises(StopIteration):
        waiting.send(None)
    late.release()
    other.release()
    nothing_is_left(limiter)


@pytest.mark.parametrize("settles", [False, True])
async def test_lease_dropped_meanwhile_serves_waiter(time: VirtualTime, *, settles: bool) -> None:
    leases: list[Lease] = []

    def clock() -> int:
        leases.clear()
        return time.clock()

    limiter = Limiter("100 TPM", clock=clock)
    chat = limiter.child("chat", concurrency=1)
    holder = [chat.acquire_nowait()]
    waiting = await start(chat.acquire())
    held = [limiter.acquire_nowait()]
    leases.append(holder.pop())
    if settles:
        held[0].settle(tokens=1)
    else:
        held.append(limiter.acquire_nowait())
    (await waiting).release()
    held.clear()
    nothing_is_left(limiter)


@pytest.mark.parametrize("read", range(2))
async def test_lease_dropped_while_call_joins_line_serves_it(time: VirtualTime, read: int) -> None:
    """The collector may drop it whenever the clock is read, with the lock held or not."""
    leases: list[Lease] = []

    def clock() -> int:
        nonlocal read
        if leases:
            read -= 1
            if read < 0:
                leases.clear()
        return time.clock()

    limiter = Limiter(concurrency=1, clock=clock)
    leases.append(limiter.acquire_nowait())
    async with limiter.acquire() as lease:
        assert lease.waited == 0
    nothing_is_left(limiter)
