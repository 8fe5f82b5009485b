"""A deadline is kept, a hopeless one is refused at once, and none that could be kept is refused."""

import asyncio

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncbucket import AcquireTimeout, Lease, Limiter, TokenBucket
from asyncbucket.testing import VirtualTime, virtual_time
from tests.engine.conftest import HELD, refused, start, start_all


async def test_call_that_would_be_late_is_refused_at_once(time: VirtualTime) -> None:
    limiter = Limiter("60 TPM", "100 requests/s burst 10", concurrency=1, clock=time.clock)
    (await limiter.acquire(requests=0, tokens=60)).release()
    says = (
        "a call of 1 request, 1 token cannot pass within 30 s: tokens bind for 60.4 s more; raise"
    )
    for timeout, deadline in ((30.0, None), (None, 30.0), (99, 30)):
        late = pytest.approx(60 * HELD)
        with refused(AcquireTimeout, says, retry_after=late, bound_by="tokens"):
            await limiter.acquire(tokens=1, timeout=timeout, deadline=deadline)
    with refused(AcquireTimeout, retry_after=pytest.approx(0.4)):
        await limiter.acquire(requests=50, timeout=0.3)
    with limiter.acquire_nowait(), refused(AcquireTimeout, "the one slot is taken"):
        await limiter.acquire(timeout=0)
    assert time.now == 0
    assert limiter.statistics().refused == 5
    assert (await limiter.acquire(requests=50, timeout=0.5)).waited == pytest.approx(0.41)


async def test_call_that_may_use_refund_of_open_call_is_not_refused(time: VirtualTime) -> None:
    limiter = Limiter("60 TPM", clock=time.clock)
    lease = await limiter.acquire(tokens=60)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=50, timeout=10))
    await asyncio.sleep(5)
    lease.settle(tokens=10)
    assert (await waiting).waited == 5.0
    lease.settle(tokens=60)
    # It is still open, and may be settled again. If not, 60 + 50 + 50 units pass at 60 and one a second.
    with refused(AcquireTimeout, "gave up after 1 s in line: tokens bind for 94 s more; raise the"):
        await limiter.acquire(tokens=50, timeout=1)
    assert time.now == 6.0
    lease.release()
    (await waiting).release()


async def test_each_call_times_out_at_its_own_deadline(time: VirtualTime) -> None:
    limiter = Limiter("1 RPS", concurrency=1, clock=time.clock)
    holder = await limiter.acquire()
    gone: list[tuple[float, float]] = []

    async def call(timeout: float) -> None:
        how = f"gave up after {timeout:g} s in line" if timeout else "cannot pass within 0 s"
        with refused(AcquireTimeout, f"a call of 1 request {how}: the one slot is taken; raise"):
            await limiter.acquire(timeout=timeout)
        gone.append((time.now, timeout))

    async with asyncio.TaskGroup() as group:
        for timeout in (5.0, 2.0, 0.0, 9.0, 2.0, 1.0):
            group.create_task(call(timeout))
    assert all(now == timeout for now, timeout in gone)
    assert [now for now, _ in gone] == [0.0, 1.0, 2.0, 2.0, 5.0, 9.0]
    holder.release()
    assert limiter.statistics().refused == 6
    assert limiter.statistics().waiting == 0


history = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "settle", "release", "more", "pause"]),
        st.integers(1, 30),
        st.floats(0, 8),
    ),
    max_size=14,
)


async def replay(
    time: VirtualTime, moves: list[tuple[str, int, float]]
) -> tuple[Limiter, list[Lease]]:
    limits = "30 tokens/20s burst 12", "50 tokens/60s", "6/20s"
    limiter = Limiter(*limits, concurrency=4, clock=time.clock)
    leases: list[Lease] = []
    for verb, amount, delay in moves:
        await asyncio.sleep(delay)
        if verb == "take":
            try:
                leases.append(await limiter.acquire(tokens=amount, timeout=0))
            except AcquireTimeout:
                continue
        elif verb == "pause":
            limiter.pause(amount / 4)
        elif leases and verb == "release":
            leases.pop(0).release()
        elif leases:
            leases[-1].settle(tokens=amount * (2 if verb == "more" else 0.3))
    return limiter, leases


@pytest.mark.heavy
@settings(deadline=None, max_examples=150)
@given(history, st.integers(1, 30), st.floats(0, 40))
@example([("take", 1, 0), ("more", 23, 0), *[("take", 1, 7)] * 3], 1, 1.0)  # a debt outlasts 20 s
def test_call_that_can_pass_in_time_does(
    moves: list[tuple[str, int, float]], tokens: int, timeout: float
) -> None:
    async def asked(time: VirtualTime) -> bool:
        limiter, _ = await replay(time, moves)
        before = time.now
        try:
            (await limiter.acquire(tokens=tokens, timeout=timeout)).release()
        except AcquireTimeout:
            return time.now == before
        return False

    async def undone(time: VirtualTime) -> float:
        limiter, leases = await replay(time, moves)
        before = time.now
        for lease in leases:
            lease._undo()
        await limiter.acquire(tokens=tokens)
        return time.now - before

    with virtual_time() as time:
        refused = time.run(asked(time))
    if refused and timeout:
        with virtual_time() as time:
            assert time.run(undone(time)) > timeout - 1e-6


async def test_calls_due_exactly_at_their_deadline_pass(time: VirtualTime) -> None:
    bucket = TokenBucket(rate=0.1, burst=1, clock=time.clock)
    await bucket.acquire()
    with pytest.raises(AcquireTimeout):
        await bucket.acquire(timeout=9.999_999_999)
    alone = asyncio.ensure_future(bucket.acquire(timeout=10))
    limiter = Limiter("1000/s burst 1000", clock=time.clock)
    limiter.pause(10)
    calls = [asyncio.ensure_future(limiter.acquire(timeout=10)) for _ in range(1_000)]
    leases = await asyncio.gather(*calls)
    assert {lease.waited for lease in leases} == {10.0}
    await alone
    assert time.now == 10.0


async def test_deadline_counts_on_what_open_calls_may_give_back(time: VirtualTime) -> None:
    """At most as many units as the largest call since the window was empty has taken."""
    limiter = Limiter("100 TPM", concurrency=3, clock=time.clock)
    holders = [limiter.acquire_nowait() for _ in range(3)]
    calls = await start_all(limiter.acquire(tokens=45) for _ in range(2))
    for each in holders:
        each.release()
    lease, other = await asyncio.gather(*calls)
    hopeful = await start(limiter.acquire(tokens=50, timeout=5))
    lease.settle(tokens=5)
    for each in (lease, other, await hopeful):
        each.release()
    await asyncio.sleep(60 * HELD)
    for _ in range(9):
        limiter.acquire_nowait(tokens=10).release()
    small = limiter.acquire_nowait(tokens=10)
    before = time.now
    with pytest.raises(AcquireTimeout):
        await limiter.acquire(tokens=50, timeout=5)
    assert time.now == before
    small.release()
