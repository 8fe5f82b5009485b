import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbucket import Cost, CostExceedsLimit, Limit, Limiter, WouldBlock
from asyncbucket.testing import VirtualTime, virtual_time
from tests.core.conftest import available, used


async def test_settling_below_reservation_refunds_at_once(virtual_time: VirtualTime) -> None:
    """A waiting call passes at that instant."""
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    lease = await limiter.acquire(tokens=90)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=60))
    await asyncio.sleep(3)
    lease.settle(tokens=40)
    assert (await waiting).waited == 3.0
    assert limiter.statistics().refunded == {"tokens": 50}


def test_amounts_settled_as_none_stay_as_reserved() -> None:
    limiter = Limiter("100 TPM", "10 RPM")
    limiter.acquire_nowait(tokens=40).settle(requests=1, tokens=30, output_tokens=None)
    assert [use.used for use in limiter.statistics().limits] == [30, 1]


async def test_settling_above_reservation_leaves_debt(virtual_time: VirtualTime) -> None:
    """Later calls wait until the debt has left the window."""
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    lease = await limiter.acquire(tokens=10)
    await asyncio.sleep(3)
    lease.settle(tokens=160)
    assert limiter.statistics().limits[0].available == -60
    assert limiter.statistics().refunded == {}
    await limiter.acquire(tokens=50)
    assert virtual_time.now == 3 + 60 * 515 / 512


def test_settling_one_token_above_reservation_counts_it(virtual_time: VirtualTime) -> None:
    """A single token is the smallest debt."""
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    limiter.acquire_nowait(tokens=10).settle(tokens=11)
    assert limiter.statistics().limits[0].used == 11
    assert limiter.statistics().refunded == {}


@pytest.mark.parametrize(("used", "refunded"), [(0, {"requests": 2}), (3, {})])
def test_requests_can_be_settled_like_tokens(
    virtual_time: VirtualTime, used: int, refunded: dict[str, int]
) -> None:
    """A call may turn out to have made no requests, or several."""
    limiter = Limiter("100 RPM burst 10", clock=virtual_time.clock)
    limiter.acquire_nowait(requests=2).settle(requests=used)
    assert limiter.statistics().limits[0].used == used
    assert limiter.statistics().limits[0].available == 10 - used
    assert limiter.statistics().refunded == refunded


def test_last_settlement_replaces_earlier_ones(virtual_time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    lease = limiter.acquire_nowait(tokens=50)
    used: list[int] = []
    for tokens in (20, 20, 45, 10):
        lease.settle(tokens=tokens)
        used.append(limiter.statistics().limits[0].used)
    lease.release()
    lease.settle(tokens=7)
    used.append(limiter.statistics().limits[0].used)
    assert used == [20, 20, 45, 10, 7]


@pytest.mark.parametrize("limit", ["100 TPM", "100 TPM burst 100", "100 TPM burst 60"])
async def test_corrected_debt_leaves_no_trace(virtual_time: VirtualTime, limit: str) -> None:
    limiter, as_told = (Limiter(limit, clock=virtual_time.clock) for _ in range(2))
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


@pytest.mark.parametrize("reserved", [0, 10, 60])
def test_debt_above_burst_comes_back_in_full_when_corrected(
    virtual_time: VirtualTime, reserved: int
) -> None:
    limiter = Limiter("100 TPM burst 60", clock=virtual_time.clock)
    lease = limiter.acquire_nowait(tokens=reserved)
    virtual_time.advance(0.6)
    lease.settle(tokens=400)
    virtual_time.advance(0.6)
    lease.settle(tokens=250)
    lease.settle(tokens=reserved)
    flowed_in = min(reserved, 2)
    assert limiter.statistics().limits[0].available == 60 - reserved + flowed_in


async def test_lease_stays_small_when_settled_chunk_by_chunk(virtual_time: VirtualTime) -> None:
    """However many settlements there are, a lease stays small, and the last few undo exactly."""
    limiter = Limiter("1k TPM", clock=virtual_time.clock)
    lease = limiter.acquire_nowait(tokens=10)
    for tokens in range(11, 511):
        await asyncio.sleep(0.2)
        lease.settle(tokens=tokens)
    assert len((lease._parts or {})["tokens"]) == 16
    used = limiter.statistics().limits[0].used
    lease.settle(tokens=500)
    assert limiter.statistics().limits[0].used == used - 10
    lease.settle(tokens=0)
    assert 0 <= limiter.statistics().limits[0].used < used - 10


async def test_sending_call_redates_its_debt_along_with_its_booking(
    virtual_time: VirtualTime,
) -> None:
    """It gets the new date once, together with all else that the call has booked."""
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    lease = limiter.acquire_nowait(tokens=10)
    await asyncio.sleep(1)
    lease.settle(tokens=40)
    await asyncio.sleep(58)
    lease._sent()
    assert limiter.statistics().limits[0].used == 40
    await asyncio.sleep(59)
    assert limiter.statistics().limits[0].used == 40
    lease.settle(tokens=30)
    await limiter.acquire(tokens=80)
    assert virtual_time.now == 59 + 60 * 515 / 512


def test_settlement_changes_only_named_resources_and_token_sum(virtual_time: VirtualTime) -> None:
    """Input or output tokens correct the sum; the sum leaves them alone."""
    limiter = Limiter("1k ITPM", "1k OTPM", "2k TPM", "5 images/s", clock=virtual_time.clock)

    lease = limiter.acquire_nowait(Cost(input_tokens=100, output_tokens=50, images=2))
    lease.settle(output_tokens=10)
    assert used(limiter) == [100, 10, 110, 2]
    lease.settle(input_tokens=90)
    assert used(limiter) == [90, 10, 100, 2]
    images: Any = {"images": 1}
    lease.settle(tokens=70, **images)
    assert used(limiter) == [90, 10, 70, 1]
    lease.settle()
    assert used(limiter) == [90, 10, 70, 1]
    other = limiter.acquire_nowait(input_tokens=100, output_tokens=50)
    other.settle(requests=1)
    other.settle(output_tokens=10)
    assert used(limiter) == [190, 20, 180, 1]
    other._undo()
    lease.settle(requests=3)
    assert used(limiter) == [90, 10, 70, 1]


def test_settling_one_part_alone_does_not_count_the_total_twice(virtual_time: VirtualTime) -> None:
    """An embedding that reserved tokens and reports its input has not used both."""
    limiter = Limiter("1k ITPM", "1k OTPM", "2k TPM", clock=virtual_time.clock)

    lease = limiter.acquire_nowait(tokens=100)
    lease.settle(input_tokens=130)
    assert used(limiter) == [130, 100, 130]
    lease.settle(input_tokens=90)
    assert used(limiter) == [90, 100, 100]
    lease.settle(output_tokens=30)
    assert used(limiter) == [90, 30, 120]
    lease._undo()
    lease = limiter.acquire_nowait(Cost(requests=1))
    lease.settle(output_tokens=7)
    assert used(limiter) == [0, 7, 7]


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "5"])
def test_invalid_settlement_is_refused(virtual_time: VirtualTime, value: float) -> None:
    """Anything else is refused, and changes nothing."""
    limiter = Limiter("100 TPM", "5 RPS", clock=virtual_time.clock)
    lease = limiter.acquire_nowait(tokens=50)
    with pytest.raises((TypeError, ValueError), match="tokens must be"):
        lease.settle(requests=0, tokens=value)
    assert [use.used for use in limiter.statistics().limits] == [50, 1]


@pytest.mark.parametrize("unknown", ["concurrency", "token", "images"])
def test_settling_unknown_resource_is_refused(virtual_time: VirtualTime, unknown: str) -> None:
    """A slot is not an amount to settle, and a misspelt resource would settle nothing."""
    limiter = Limiter("100 TPM", concurrency=2, clock=virtual_time.clock)
    lease = limiter.acquire_nowait(tokens=50)
    with pytest.raises(TypeError, match=f"no limit counts {unknown}: this limiter counts input"):
        lease.settle(tokens=5, **{unknown: 0})
    assert limiter.statistics().limits[0].used == 50
    lease.release()
    assert "concurrency 0/2" in repr(limiter)


async def test_forked_process_does_not_settle_lease_of_its_parent(
    virtual_time: VirtualTime,
) -> None:
    """Otherwise less than nothing would be lent there, and calls refused that can pass."""
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    inherited = limiter.acquire_nowait(tokens=40)
    limiter._node.pacer.after_fork()
    inherited.settle(tokens=0)
    inherited._undo()
    assert limiter.statistics().limits[0].used == 40
    async with limiter.acquire(tokens=60) as lease:
        hopeful = asyncio.create_task(limiter.acquire(tokens=60, timeout=5))
        await asyncio.sleep(1)
        lease.settle(tokens=0)
        assert (await hopeful).waited == 1


async def test_lease_released_twice_gives_back_one_slot(virtual_time: VirtualTime) -> None:
    """However it is released, and even if it is collected afterwards."""
    limiter = Limiter(concurrency=2, clock=virtual_time.clock)
    one, other = await limiter.acquire(), await limiter.acquire()
    async with one:
        one.release()
        with one:
            one.release()
    assert limiter.statistics().in_flight == 1
    del one
    assert limiter.statistics().in_flight == 1
    other.release()


async def test_error_inside_with_block_releases_lease(virtual_time: VirtualTime) -> None:
    """The slot comes back; the cost stays counted."""
    limiter = Limiter("100 TPM", concurrency=1, clock=virtual_time.clock)
    with pytest.raises(ZeroDivisionError):
        async with limiter.acquire(tokens=30):
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), limiter.acquire_nowait(tokens=30):
        raise ZeroDivisionError
    now = limiter.statistics()
    assert now.in_flight == 0
    assert now.limits[0].used == 60


async def test_undo_gives_everything_back_once(virtual_time: VirtualTime) -> None:
    """This is for a call that was never made; it works once, and the admission stays counted."""
    limiter = Limiter("5 RPS burst 5", "100 TPM", concurrency=1, clock=virtual_time.clock)
    lease = await limiter.acquire(tokens=100)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=100))
    await virtual_time.all_blocked()
    lease._undo()
    lease._undo()
    other = await waiting
    assert other.waited == 0
    other._undo()
    assert [use.used for use in limiter.statistics().limits] == [0, 0]
    assert limiter.statistics().admitted == 2
    limiter.acquire_nowait(requests=0, tokens=1)._undo()


def test_undo_gives_back_resource_that_was_only_settled(virtual_time: VirtualTime) -> None:
    limiter = Limiter("5 images/s", clock=virtual_time.clock)
    lease = limiter.acquire_nowait()
    images: Any = {"images": 3}
    lease.settle(**images)
    lease._undo()
    assert limiter.statistics().limits[0].used == 0


async def test_sending_call_redates_its_booking(virtual_time: VirtualTime) -> None:
    """Sent three seconds after its admission, it stays in the window for three seconds longer."""
    limiter = Limiter("1 requests/10s", "9 images/s", concurrency=1, clock=virtual_time.clock)
    lease = await limiter.acquire()
    await asyncio.sleep(3)
    lease._sent()
    lease._sent()
    lease.release()
    await limiter.acquire()
    assert virtual_time.now == 3 + 10 * 515 / 512


async def test_redating_call_above_burst_does_not_charge_it_twice(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter("6000 TPM burst 100", clock=virtual_time.clock)
    for number in range(5):
        lease = await limiter.acquire(tokens=300)
        assert virtual_time.now == pytest.approx(2 + 3 * number)
        lease._sent()
        lease.release()


async def test_redating_after_others_passed_does_not_charge_call_twice(
    virtual_time: VirtualTime,
) -> None:
    """What a call above the burst had earned is no debt, even if another one left before it."""
    limiter = Limiter("6000 TPM burst 100", clock=virtual_time.clock)
    lease = await limiter.acquire(tokens=300)
    assert (await limiter.acquire(tokens=5)).waited == 0.05
    lease._sent()
    assert limiter.statistics().limits[0].available == -5  # a burst and the other call's five
    assert (await limiter.acquire(tokens=100)).waited == 1.05


async def test_partial_refund_of_call_above_burst_leaves_actual_use_booked(
    virtual_time: VirtualTime,
) -> None:
    """If 300 were reserved and 50 used, another 50 may pass at once, not 100."""
    limiter = Limiter("6000 TPM burst 100", clock=virtual_time.clock)
    lease = await limiter.acquire(tokens=300)
    lease.settle(tokens=50)
    assert limiter.statistics().limits[0].available == 50
    lease._undo()
    assert limiter.statistics().limits[0].available == 100


async def test_settling_after_window_has_passed_refunds_nothing(virtual_time: VirtualTime) -> None:
    """What has left the window is not given back again."""
    limiter = Limiter("10 tokens/s", clock=virtual_time.clock)
    slow = await limiter.acquire(tokens=10)
    await asyncio.sleep(2)
    await limiter.acquire(tokens=10)
    slow.settle(tokens=0)
    assert limiter.statistics().limits[0].available == 0


@settings(deadline=None, max_examples=100)
@given(
    reserved=st.integers(1, 60),
    words=st.lists(st.tuples(st.integers(0, 90), st.sampled_from([0.0, 0.3, 5.0])), max_size=8),
    early=st.booleans(),
)
def test_at_least_last_settlement_is_counted(
    *, reserved: int, words: list[tuple[int, float]], early: bool
) -> None:
    with virtual_time() as time:
        limiter = Limiter("1000 tokens/100s", "10/100s", concurrency=1, clock=time.clock)
        lease = limiter.acquire_nowait(tokens=reserved)
        said = [reserved]
        for tokens, delay in words:
            time.advance(delay)
            lease.settle(tokens=tokens)
            said.append(tokens)
            if early:
                lease.release()
        used = limiter.statistics().limits[0].used
        assert used >= said[-1]
        if said == sorted(said, reverse=True):
            assert used == said[-1]
        lease.release()
        assert limiter.statistics().in_flight == 0


@pytest.mark.parametrize("pause", [0.0, 0.1])
async def test_settling_call_above_burst_counts_by_burst_of_its_day(
    virtual_time: VirtualTime, pause: float
) -> None:
    """It took the seven of a full bucket: settled to seven, it gives nothing back."""
    limiter = Limiter(Limit("tokens", 50, per=10, burst=7), clock=virtual_time.clock)
    lease = await limiter.acquire(tokens=20)
    await asyncio.sleep(pause)
    limiter.reconfigure(Limit("tokens", 50, per=10, burst=12))
    before = available(limiter)
    assert before == 5 + round(5 * pause - 0.4)
    lease.settle(tokens=7)
    assert available(limiter) == before


async def test_call_above_learned_limit_goes_out_alone(virtual_time: VirtualTime) -> None:
    """A limit that was announced once holds it back, and its reply corrects what was learned."""
    limiter = Limiter(clock=virtual_time.clock)
    limiter.learn(Limit("tokens", 5))
    held = await limiter.acquire(tokens=3)
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait(tokens=2_000)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=2_000))
    await asyncio.sleep(30)
    assert not waiting.done()
    held.release()
    lease = await waiting
    assert virtual_time.now == 60 * 515 / 512
    limiter.learn(Limit("tokens", 200_000))
    assert (await limiter.acquire(tokens=190_000)).waited == 0
    lease.settle(tokens=10)
    given = Limiter("5 TPM", clock=virtual_time.clock)
    given.learn(Limit("tokens", 200_000))
    with pytest.raises(CostExceedsLimit):
        given.acquire_nowait(tokens=6)
