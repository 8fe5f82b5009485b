"""A number of slots found by search: how a limiter tells it of calls, and follows it."""

import asyncio
import math
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.core.errors import AcquireTimeout
from asyncbucket.core.terms import AUTO, read_concurrency
from asyncbucket.testing import VirtualTime


async def test_auto_concurrency_starts_with_four_slots_and_shows_them(
    virtual_time: VirtualTime,
) -> None:
    """Statistics and the repr show the present number; the repr shows its bounds, too."""
    limiter = Limiter(concurrency="auto", clock=virtual_time.clock)
    leases = [limiter.acquire_nowait() for _ in range(4)]
    with pytest.raises(AcquireTimeout, match="all 4 slots are taken"):
        await limiter.acquire(timeout=1)
    assert limiter.statistics().concurrency == limiter.concurrency == 4
    assert repr(limiter) == "<Limiter 'default', concurrency 4/4 of 1 to 1,000, 0 waiting>"
    for lease in leases:
        lease.release()


async def test_raised_concurrency_admits_waiting_calls(virtual_time: VirtualTime) -> None:
    """A raise when a call ends admits several: one by the slot given back, others by new slots."""
    limiter = Limiter(concurrency=(1, 100), clock=virtual_time.clock)

    async def call() -> None:
        async with limiter.acquire():
            await asyncio.sleep(1)

    calls = [asyncio.create_task(call()) for _ in range(200)]
    sizes: list[int | None] = []
    while (now := limiter.statistics()).waiting or not sizes:
        await virtual_time.all_blocked()
        now = limiter.statistics()
        assert now.in_flight == now.concurrency or not now.waiting
        sizes.append(now.concurrency)
        await asyncio.sleep(0.25)
    assert sizes[0] == 4
    assert sizes[-1] is not None
    assert sizes[-1] >= 32
    await asyncio.gather(*calls)


async def test_waiting_for_child_slots_does_not_raise_size_of_parent(
    virtual_time: VirtualTime,
) -> None:
    """The limiter above has free slots, so it learns nothing about how many are too many."""
    limiter = Limiter(concurrency="auto", clock=virtual_time.clock)
    child = limiter.child("child", concurrency=2)

    async def agent() -> None:
        for _ in range(40):
            async with child.acquire():
                await asyncio.sleep(1)

    await asyncio.gather(*(agent() for _ in range(10)))
    assert limiter.concurrency == 4
    assert limiter.statistics().waits["concurrency"].count > 380


async def test_only_timeout_raised_in_with_block_counts_as_overload(
    virtual_time: VirtualTime,
) -> None:
    async def leave_by(limiter: Limiter, error: BaseException) -> int | None:
        await asyncio.sleep(1)
        with pytest.raises(type(error)):
            async with limiter.acquire():
                raise error
        with pytest.raises(type(error)), limiter.acquire_sync():
            raise error
        return limiter.concurrency

    limiter = Limiter(concurrency=(1, 100), clock=virtual_time.clock)
    assert await leave_by(limiter, ValueError()) == 4
    assert await leave_by(limiter, asyncio.CancelledError()) == 4
    assert await leave_by(limiter, AcquireTimeout("another limiter's")) == 4
    assert await leave_by(limiter, TimeoutError()) == 3
    assert limiter.statistics().in_flight == 0


def test_only_first_reported_outcome_of_call_counts(virtual_time: VirtualTime) -> None:
    """`overloaded` and `failed` release the lease; later calls on it change nothing."""
    limiter = Limiter(concurrency=(1, 100), clock=virtual_time.clock)
    lease = limiter.acquire_nowait()
    lease.failed()
    assert lease.released
    lease.overloaded()
    lease.release()
    assert (limiter.concurrency, limiter.statistics().in_flight) == (4, 0)
    plain = Limiter(concurrency=3, clock=virtual_time.clock).acquire_nowait()
    plain.overloaded()
    assert plain.released


async def test_calls_of_wave_sent_after_first_refusal_do_not_cut_again(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter(concurrency=(1, 100), clock=virtual_time.clock)
    wave = [await limiter.acquire() for _ in range(4)]
    for lease in wave:
        await asyncio.sleep(0.01)
        lease._sent()
        lease.overloaded()
    assert limiter.concurrency == 3


def test_undone_failed_and_dropped_leases_do_not_change_size(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=(1, 100), clock=virtual_time.clock)
    for _ in range(200):
        limiter.acquire_nowait()._undo()
        limiter.acquire_nowait().failed()
        limiter.acquire_nowait()
    assert limiter.concurrency == 4
    assert limiter.statistics().in_flight == 0


def test_reconfigure_switches_between_fixed_and_auto_concurrency(virtual_time: VirtualTime) -> None:
    """The search starts anew after a fixed number, and goes on if only its bounds change."""
    limiter = Limiter("60 RPM", clock=virtual_time.clock)
    lease = limiter.acquire_nowait()
    limiter.reconfigure(concurrency="auto")
    lease.release()
    assert limiter.concurrency == 4
    limiter.reconfigure(concurrency=(8, 20))
    assert limiter.concurrency == 8
    limiter.reconfigure(concurrency=(1, 20))
    assert limiter.concurrency == 8
    limiter.reconfigure(concurrency=7)
    assert repr(limiter).endswith("concurrency 0/7, 0 waiting>")
    limiter.reconfigure(concurrency=(1, 2))
    assert limiter.concurrency == 2
    assert limiter.statistics().in_flight == 0


def test_concurrency_must_be_number_auto_or_pair_of_bounds() -> None:
    """Anything else is refused, and the error shows the value that was given."""
    assert read_concurrency(None) is None
    assert read_concurrency(7) == (7, 7)
    assert read_concurrency("auto") == AUTO
    assert read_concurrency((2, 9)) == (2, 9)
    wrong: tuple[Any, ...] = ((1,), (0, 4), (1, 2, 3), (1, math.inf), "many", [1, 2], (True, 2))
    for bad in wrong:
        with pytest.raises(ValueError, match="or a pair of such numbers, not"):
            read_concurrency(bad)
    with pytest.raises(ValueError, match=r"concurrency=\(9, 2\) has its bounds in the wrong order"):
        read_concurrency((9, 2))
