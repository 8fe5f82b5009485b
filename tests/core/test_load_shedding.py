"""Refuse calls that would wait too long, and say when to come back."""

import asyncio

import pytest

from asyncbucket import AcquireTimeout, Limiter, QueueFull, WouldBlock
from asyncbucket.testing import VirtualTime


async def test_call_beyond_max_queue_is_refused_with_retry_after(virtual_time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 1", max_queue=2, clock=virtual_time.clock)
    await limiter.acquire()
    calls = [asyncio.ensure_future(limiter.acquire()) for _ in range(2)]
    await virtual_time.all_blocked()
    with pytest.raises(QueueFull) as error:
        await limiter.acquire()
    assert str(error.value) == (
        "a call of 1 request cannot pass behind 2 calls waiting already: requests bind for "
        "1 s more; try again later or raise max_queue=2"
    )
    assert (error.value.retry_after, error.value.bound_by) == (1.0, "requests")
    await calls[0]
    await asyncio.wait_for(limiter.acquire(), 10)
    assert limiter.statistics().refused == 1
    assert limiter.max_queue == 2


async def test_each_level_has_its_own_max_queue(virtual_time: VirtualTime) -> None:
    """A tenant's full queue refuses that tenant, and the key's full queue refuses all."""
    key = Limiter("60 RPM burst 1", max_queue=3, name="key", clock=virtual_time.clock)
    a, b = key.child("a", max_queue=2), key.child("b")
    below = a.child("below")
    await key.acquire()
    calls = [asyncio.ensure_future(each.acquire()) for each in (a, below)]
    await virtual_time.all_blocked()
    for limiter in (a, below):
        with pytest.raises(QueueFull, match=r"behind 2 calls .* raise max_queue=2$"):
            await limiter.acquire()
    calls.append(asyncio.ensure_future(b.acquire()))
    await virtual_time.all_blocked()
    with pytest.raises(QueueFull, match=r"behind 3 calls .* raise max_queue=3$"):
        await b.acquire()
    calls[0].cancel()
    await virtual_time.all_blocked()
    calls.append(asyncio.ensure_future(a.acquire()))
    await asyncio.gather(*calls[1:])
    assert key.statistics().refused == 3


async def test_max_queue_0_admits_only_calls_that_need_not_wait(virtual_time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 1", max_queue=0, clock=virtual_time.clock)
    await limiter.acquire()
    with pytest.raises(QueueFull):
        await limiter.acquire()
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait()
    await asyncio.sleep(1)
    await limiter.acquire()
    limiter = Limiter(concurrency=1, max_queue=0)
    with limiter.acquire_sync(), pytest.raises(QueueFull, match="the one slot is taken"):
        limiter.acquire_sync()


async def test_timeout_of_limiter_is_default_for_calls_and_children(
    virtual_time: VirtualTime,
) -> None:
    """A child has its parent's unless given one; `math.inf` means none; a call's own goes first."""
    key = Limiter("1 RPM", timeout=10, clock=virtual_time.clock)
    await key.acquire()
    patient = key.child("patient", timeout=20)
    for limiter, timeout, said in (
        (key, None, "10 s"),
        (key, 5, "5 s"),
        (key.child("like its parent"), None, "10 s"),
        (patient, None, "20 s"),
        (patient.child("below"), None, "20 s"),
        (patient, 30, "30 s"),
    ):
        with pytest.raises(AcquireTimeout, match=f"cannot pass within {said}"):
            await limiter.acquire(timeout=timeout)
    assert virtual_time.now == 0
    await key.acquire(timeout=float("inf"))
    assert virtual_time.now > 60


async def test_timeout_in_tree_admits_call_behind_at_same_instant(
    virtual_time: VirtualTime,
) -> None:
    key = Limiter("1000 TPM", clock=virtual_time.clock)
    child = key.child("child", tpm=100)
    lease = await child.acquire(tokens=50)
    costly = asyncio.ensure_future(child.acquire(tokens=100, timeout=7))
    cheap = asyncio.ensure_future(child.acquire(tokens=50))
    await asyncio.sleep(0.5)
    del lease
    with pytest.raises(AcquireTimeout) as error:
        await costly
    assert virtual_time.now == 7
    assert error.value.bound_by == "tokens"
    assert (await cheap).waited == 7
