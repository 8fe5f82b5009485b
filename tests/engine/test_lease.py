"""What a lease gives back, settles and owes: at once, once, and never more than it took."""

import asyncio
import contextlib
from typing import Any

import pytest

from asyncbucket import CostExceedsLimit, Lease, Limit, Limiter, WouldBlock
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import HELD, available, cancel, start, start_all, used


async def test_settling_below_reservation_refunds_at_once(time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", clock=time.clock)
    lease = await limiter.acquire(tokens=100)
    costs = (*[10] * 7, 5, 5, 10)
    calls = await start_all(limiter.acquire(tokens=each) for each in costs)
    await asyncio.sleep(7)
    lease.settle(requests=1, tokens=20)
    leases = await asyncio.gather(*calls)
    assert [lease.waited for lease in leases] == pytest.approx([7.0] * 9 + [60 * HELD])
    assert limiter.statistics().refunded == {"tokens": 80}


async def test_settling_above_reservation_leaves_debt(time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", clock=time.clock)
    lease = await limiter.acquire(tokens=10)
    lease.settle(tokens=10)
    lease.settle(tokens=11)
    assert used(limiter) == [11]
    await asyncio.sleep(3)
    lease.settle(tokens=160)
    assert available(limiter) == -60
    assert limiter.statistics().refunded == {}
    await limiter.acquire(tokens=50)
    assert time.now == 66  # 11 - 5 + 149 + 50 units, less 100, at 100 a minute


@pytest.mark.parametrize("limit", ["1k TPM", "1k TPM burst 100", "60k tokens/h burst 60k"])
async def test_debts_above_a_whole_window_are_paid_in_full(time: VirtualTime, limit: str) -> None:
    """Calls use a hundred times their estimate: in ten hours, no more than the limit and one call."""
    limiter = Limiter(limit, clock=time.clock)
    spent = 0
    await asyncio.sleep(1_000 * ("burst" not in limit))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(36_000):
            while True:
                async with limiter.acquire(tokens=100) as lease:
                    await asyncio.sleep(1)
                    lease.settle(tokens=10_000)
                    spent += 10_000
    assert 600_000 - 60_000 < spent <= 600_000 + 60_000 * ("h" in limit) + 10_000
    await asyncio.sleep(36_000)
    limiter.acquire_nowait(tokens=100)


async def test_lowered_limit_repays_only_what_calls_used_beyond_it(time: VirtualTime) -> None:
    """What was booked under the higher limit is no debt; nor is a debt lost when the limit changes."""
    limiter = Limiter("600 TPM", clock=time.clock)
    lease = await limiter.acquire(tokens=600)
    limiter.reconfigure("60 TPM")
    lease.settle(tokens=630)
    await limiter.acquire(tokens=60)
    assert time.now == 90
    limiter.reconfigure("120 TPM")
    lease.settle(tokens=870)
    await limiter.acquire(tokens=60)
    assert time.now == 90 + (60 + 240 + 60 - 120) / 2


#: Limits, what a call reserves, and then again and again: what it reports, and what is used.
SETTLED: dict[str, tuple[list[str], dict[str, int], list[tuple[dict[str, Any], list[int]]]]] = {
    "no requests": (["100 RPM"], {"requests": 2}, [({"requests": 0}, [0])]),
    "the last replaces earlier ones": (
        ["100 TPM"],
        {"tokens": 50},
        [({"tokens": tokens}, [tokens]) for tokens in (20, 20, 45, 10, 0, 7)],
    ),
    "None stays as reserved": (
        ["100 TPM", "10 RPM"],
        {"tokens": 40},
        [({"requests": 1, "tokens": 30, "output_tokens": None}, [30, 1])],
    ),
    "input and output tokens correct their sum, and it leaves them alone": (
        ["1k ITPM", "1k OTPM", "2k TPM", "5 images/s"],
        {"input_tokens": 100, "output_tokens": 50, "images": 2},
        [
            ({"output_tokens": 10}, [100, 10, 110, 2]),
            ({"input_tokens": 90}, [90, 10, 100, 2]),
            ({"input_tokens": 90, "tokens": 70, "images": 1}, [90, 10, 70, 1]),
            ({}, [90, 10, 70, 1]),
            ({"requests": 3}, [90, 10, 70, 1]),
        ],
    ),
    "one part alone does not count the whole twice": (
        ["1k ITPM", "1k OTPM", "2k TPM"],
        {"tokens": 100},
        [
            ({"input_tokens": 130}, [130, 100, 130]),
            ({"input_tokens": 90}, [90, 100, 100]),
            ({"output_tokens": 30}, [90, 30, 120]),
        ],
    ),
    "what was not reserved": (
        ["1k ITPM", "1k OTPM", "2k TPM", "5 images/s"],
        {},
        [({"output_tokens": 7}, [0, 7, 7, 0]), ({"images": 3}, [0, 7, 7, 3])],
    ),
}


@pytest.mark.parametrize("name", SETTLED)
def test_settlement_corrects_what_it_names(time: VirtualTime, name: str) -> None:
    limits, reserved, reports = SETTLED[name]
    limiter = Limiter(*limits, clock=time.clock)
    lease = limiter.acquire_nowait(**reserved)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    for report, now in reports:
        lease.settle(**report)
        assert used(limiter) == now
        lease.release()  # usage may be reported later
    lease._undo()
    assert used(limiter) == [0] * len(limits)


@pytest.mark.parametrize("limit", ["100 TPM", "100 TPM burst 100", "100 TPM burst 60"])
async def test_corrected_debt_leaves_no_trace(time: VirtualTime, limit: str) -> None:
    limiter, as_told = (Limiter(limit, clock=time.clock) for _ in range(2))
    lease, told = [each.acquire_nowait(tokens=10) for each in (limiter, as_told)]
    for tokens in (40, 70, 50):
        await asyncio.sleep(1)
        lease.settle(tokens=tokens)
    await asyncio.sleep(1)
    lease.settle(tokens=7)
    told.settle(tokens=7)
    assert limiter.statistics().limits == as_told.statistics().limits
    lease.settle(tokens=9)
    lease.settle(tokens=2)
    told.settle(tokens=2)
    assert limiter.statistics().limits == as_told.statistics().limits


async def test_lease_stays_small_when_settled_chunk_by_chunk(time: VirtualTime) -> None:
    """Only the last few settlements are undone exactly; older ones err on the safe side."""
    limiter = Limiter("1k TPM", clock=time.clock)
    lease = limiter.acquire_nowait(tokens=10)
    for tokens in range(11, 511):
        await asyncio.sleep(0.2)
        lease.settle(tokens=tokens)
    before = used(limiter)[0]
    lease.settle(tokens=500)
    assert used(limiter) == [before - 10]
    lease.settle(tokens=0)
    assert 0 < used(limiter)[0] < before - 10


async def test_lease_released_twice_gives_back_one_slot(time: VirtualTime) -> None:
    limiter = Limiter(concurrency=2, clock=time.clock)
    one, other = await limiter.acquire(), await limiter.acquire()
    async with one:
        one.release()
        with one:
            one.release()
    assert limiter.statistics().in_flight == 1
    del one
    assert limiter.statistics().in_flight == 1
    other.release()


async def test_sending_call_redates_its_booking_and_its_debt(time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", "9 images/s", concurrency=1, clock=time.clock)
    lease = limiter.acquire_nowait(tokens=10)
    await asyncio.sleep(1)
    lease._sent()
    lease._sent()
    assert used(limiter) == [10, 0]
    lease.settle(tokens=40)
    await asyncio.sleep(58)
    lease._sent()
    lease._sent()
    await asyncio.sleep(59)
    assert used(limiter) == [40, 0]
    lease.settle(tokens=30)
    lease.release()
    await limiter.acquire(tokens=80)
    assert time.now == 59 + 60 * HELD


async def test_redating_call_above_burst_does_not_charge_it_twice(time: VirtualTime) -> None:
    """What it had earned is no debt, even if another call left before it."""
    limiter = Limiter("6000 TPM burst 100", clock=time.clock)
    for number in range(5):
        lease = await limiter.acquire(tokens=300)
        assert time.now == pytest.approx(2 + 3 * number)
        lease._sent()
        lease.release()
    lease = await limiter.acquire(tokens=300)
    assert (await limiter.acquire(tokens=5)).waited == pytest.approx(0.05)
    lease._sent()
    assert available(limiter) == -5  # a burst and the other call's five
    assert (await limiter.acquire(tokens=100)).waited == pytest.approx(1.05)


async def test_call_above_burst_earns_the_rest_while_it_is_first(time: VirtualTime) -> None:
    """Neither before, nor anew whenever others come."""
    limiter = Limiter("600 TPM burst 10", concurrency=1, clock=time.clock)
    holder = await limiter.acquire()
    first = await start(limiter.acquire())
    costly = await start(limiter.acquire(tokens=110))
    await asyncio.sleep(100)
    holder.release()
    (await first).release()
    others: list[asyncio.Future[Lease]] = []
    for _ in range(9):
        await asyncio.sleep(1)
        others += [await start(limiter.acquire(tokens=1))]
        limiter.pause(0)  # look
    assert (await costly).waited == 110
    cancel(*others)
    (await costly).release()
    await asyncio.sleep(100)
    late = await start(limiter.acquire(tokens=110))
    limiter.pause(0)
    assert (await late).waited == 10


async def test_call_above_learned_limit_goes_out_alone(time: VirtualTime) -> None:
    """A limit that was announced once holds it back, and its reply corrects what was learned."""
    limiter = Limiter(clock=time.clock)
    limiter.learn(Limit("tokens", 5))
    held = await limiter.acquire(tokens=3)
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait(tokens=2_000)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=2_000))
    await asyncio.sleep(30)
    assert not waiting.done()
    held.release()
    lease = await waiting
    assert time.now == 60 * HELD
    limiter.learn(Limit("tokens", 200_000))
    assert (await limiter.acquire(tokens=190_000)).waited == 0
    lease.settle(tokens=10)
    given = Limiter("5 TPM", clock=time.clock)
    given.learn(Limit("tokens", 200_000))
    with pytest.raises(CostExceedsLimit):
        given.acquire_nowait(tokens=6)


async def test_forked_process_does_not_settle_lease_of_its_parent(time: VirtualTime) -> None:
    """Otherwise less than nothing would be lent there, and calls refused that can pass.

    Nor does a call that waits in the parent hold up its own.
    """
    limiter = Limiter("100 TPM", clock=time.clock)
    child = limiter.child("chat")
    inherited = child.acquire_nowait(tokens=40)
    stuck = await start(child.acquire(tokens=90))
    limiter._node.pacer.after_fork()
    assert (limiter.statistics().in_flight, child.statistics().in_flight) == (0, 0)
    inherited.settle(tokens=0)
    inherited._undo()
    assert used(limiter) == [40]
    async with limiter.acquire(tokens=60) as lease:
        hopeful = asyncio.ensure_future(limiter.acquire(tokens=60, timeout=5))
        await asyncio.sleep(1)
        lease.settle(tokens=0)
        assert (await hopeful).waited == 1
    stuck.cancel()


async def test_task_that_holds_the_only_slot_is_refused_another(time: VirtualTime) -> None:
    """At once; not if another task waits, or another call has the slot by now."""
    limiter = Limiter(concurrency=1, name="key", clock=time.clock)
    inner = limiter.child("inner")
    later = asyncio.get_running_loop().call_later
    async with limiter.acquire() as outer:
        other = await start(limiter.acquire(priority=1))
        with pytest.raises(RuntimeError, match=r"the only slot of 'key' .*, or raise concurrency"):
            await inner.acquire()
        now = limiter.statistics()
        assert (now.waiting, now.in_flight, now.cancelled, time.now) == (1, 1, 0, 0)
        later(1, outer.release)
        await other
        later(1, other.result().release)
        await limiter.acquire()
