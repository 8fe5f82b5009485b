"""Limits change while calls wait."""

import asyncio

import pytest

from asyncbucket import CostExceedsLimit, Limit, Limiter, LimitSyntaxError, WouldBlock
from asyncbucket.testing import VirtualTime
from tests.core.conftest import used


async def test_raised_limit_admits_waiting_call_at_once(virtual_time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    await limiter.acquire(tokens=100)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=80))
    await asyncio.sleep(5)
    limiter.reconfigure(tpm=200)
    assert (await waiting).waited == 5.0
    assert limiter.limits == (Limit("tokens", 200),)


async def test_lowered_limit_counts_earlier_admissions_at_once(virtual_time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    (await limiter.acquire(tokens=70)).release()
    limiter.reconfigure("50 TPM")
    assert limiter.statistics().limits[0].available == -20
    await limiter.acquire(tokens=1)
    assert virtual_time.now == 60 * 515 / 512


async def test_lowered_limit_fails_waiting_call_that_can_never_pass(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    first = await limiter.acquire(tokens=100)
    costly = asyncio.ensure_future(limiter.acquire(tokens=80))
    cheap = asyncio.ensure_future(limiter.acquire(tokens=50))
    await virtual_time.all_blocked()
    limiter.reconfigure(tpm=60)
    with pytest.raises(CostExceedsLimit) as error:
        await costly
    assert str(error.value) == (
        "cost of 80 tokens exceeds the limit of 60 tokens per 60 s and can never pass; "
        "raise tpm or split the request"
    )
    assert virtual_time.now == 0
    first.settle(tokens=0)
    await cheap
    assert virtual_time.now == 0
    now = limiter.statistics()
    assert (now.refused, now.cancelled, now.waiting) == (1, 0, 0)


async def test_call_cancelled_while_being_refused_counts_only_as_cancelled(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    events: list[str] = []
    limiter.observe(lambda event: events.append(type(event).__name__))
    await limiter.acquire(tokens=100)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=80))
    await virtual_time.all_blocked()
    limiter.reconfigure(tpm=60)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    now = limiter.statistics()
    assert (now.refused, now.cancelled, now.waiting) == (0, 1, 0)
    assert (events.count("Refused"), events.count("Cancelled")) == (0, 1)


async def test_refusal_counts_once_however_often_limits_change(virtual_time: VirtualTime) -> None:
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    await limiter.acquire(tokens=100)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=80))
    await virtual_time.all_blocked()
    limiter.reconfigure(tpm=60)
    limiter.reconfigure(tpm=50)
    limiter.pause(1)
    with pytest.raises(CostExceedsLimit):
        await waiting
    now = limiter.statistics()
    assert (now.refused, now.cancelled, now.waiting) == (1, 0, 0)


async def test_call_at_its_deadline_is_told_that_it_can_never_pass(
    virtual_time: VirtualTime,
) -> None:
    """A limit is lowered at the instant of a deadline, before the waiting call's task runs."""
    limiter = Limiter("100 TPM", clock=virtual_time.clock)
    await limiter.acquire(tokens=100)
    late = asyncio.ensure_future(limiter.acquire(tokens=80, timeout=70))
    await virtual_time.all_blocked()
    limiter.pause(100)
    asyncio.get_running_loop().call_at(70, lambda: limiter.reconfigure(tpm=50))
    with pytest.raises(CostExceedsLimit, match="80 tokens exceeds the limit of 50 tokens per 60 s"):
        await late
    assert virtual_time.now == 70
    assert limiter.statistics().refused == 1


async def test_newly_set_slots_count_calls_in_flight(virtual_time: VirtualTime) -> None:
    """At each level at most the new number run at once; a new limit counts from now on."""
    limiter = Limiter(clock=virtual_time.clock)
    child = limiter.child("child")
    early = [await each.acquire(tokens=10) for each in (limiter, child, child)]
    assert limiter.concurrency is None
    child.reconfigure(concurrency=1)
    limiter.reconfigure("2/s burst 1", concurrency=2)
    assert limiter.concurrency == 2
    shown = "<Limiter 'default', 2 requests per 1 s, concurrency 3/2, 1 waiting>"
    waiting = asyncio.ensure_future(limiter.acquire())
    for lease in early[1:]:
        await virtual_time.all_blocked()
        assert not waiting.done()
        assert repr(limiter) == shown
        lease.settle(tokens=0)
        lease.release()
        shown = "<Limiter 'default', 2 requests per 1 s, concurrency 2/2, 1 waiting>"
    (await waiting).release()
    (await child.acquire()).release()
    early[0].release()
    assert repr(limiter) == ("<Limiter 'default', 2 requests per 1 s, concurrency 0/2, 0 waiting>")
    assert repr(child) == "<Limiter 'default/child', concurrency 0/1, 0 waiting>"


async def test_newly_set_slots_count_calls_just_admitted(virtual_time: VirtualTime) -> None:
    """The change comes after they were admitted and before they run, at either level."""
    limiter = Limiter(clock=virtual_time.clock)
    child = limiter.child("child")
    limiter.pause(1)
    waiting = [asyncio.create_task(child.acquire()) for _ in range(3)]
    await virtual_time.all_blocked()
    virtual_time.advance(1)
    pacer = limiter._node.pacer
    (seat,) = pacer.seats.values()
    pacer.look(seat)
    assert not any(call.done() for call in waiting)
    assert (limiter.statistics().in_flight, limiter.statistics().waiting) == (3, 0)
    limiter.reconfigure(concurrency=2)
    leases = await asyncio.gather(*waiting)
    leases.pop().release()
    with pytest.raises(WouldBlock, match="all 2 slots are taken"):
        child.acquire_nowait()
    leases.pop().release()
    child.acquire_nowait().release()
    leases.pop().release()
    assert limiter.statistics().in_flight == 0


async def test_lowered_concurrency_waits_until_enough_slots_come_back(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter(concurrency=3, clock=virtual_time.clock)
    held = [await limiter.acquire() for _ in range(3)]
    limiter.reconfigure(concurrency=2)
    waiting = asyncio.ensure_future(limiter.acquire())
    held.pop().release()
    await virtual_time.all_blocked()
    assert not waiting.done()
    held.pop().release()
    (await waiting).release()


async def test_pacing_follows_changed_limit(virtual_time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 2", clock=virtual_time.clock)
    for _ in range(2):
        await limiter.acquire()
    limiter.reconfigure("30 RPM burst 1")
    assert (await limiter.acquire()).waited == 4.0
    limiter.reconfigure("600 RPM burst 600")
    for _ in range(500):
        await limiter.acquire()
    assert virtual_time.now == 4.0
    limiter.reconfigure("600 RPM")
    assert limiter.statistics().limits[0].available == 60
    await limiter.acquire()


async def test_refund_of_booking_before_change_admits_waiting_call(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter("60k TPM burst 10k", clock=virtual_time.clock)
    lease = await limiter.acquire(tokens=10_000)
    waiting = asyncio.create_task(limiter.acquire(tokens=10_000))
    await asyncio.sleep(2)
    limiter.reconfigure("66k TPM burst 11k")
    await virtual_time.all_blocked()
    assert not waiting.done()
    lease.settle(tokens=0)
    assert (await waiting).waited == 2.0


def test_iteration_over_limits_is_not_disturbed_by_reconfigure() -> None:
    limiter = Limiter("500 RPM")
    looking = iter(limiter._node.limits)
    limiter.reconfigure("200k TPM")
    assert list(looking) == [("requests", 60)]
    assert len(limiter.limits) == 2


def test_invalid_reconfigure_changes_nothing(virtual_time: VirtualTime) -> None:
    limiter = Limiter("60 RPM", concurrency=2, clock=virtual_time.clock)
    with pytest.raises(LimitSyntaxError):
        limiter.reconfigure("30 RPM", "nonsense")
    with pytest.raises(ValueError, match="concurrency must be a whole number"):
        limiter.reconfigure("30 RPM", concurrency=0)
    assert limiter.limits == (Limit("requests", 60),)
    assert limiter.concurrency == 2


def test_invalid_reconfigure_keeps_weight_of_child(virtual_time: VirtualTime) -> None:
    """The weight is changed together with everything else, or not at all."""
    limiter = Limiter("60 RPM", clock=virtual_time.clock)
    child = limiter.child("a")
    with pytest.raises(ValueError, match="concurrency must be a whole number"):
        child.reconfigure(weight=9, concurrency=0)

    async def share() -> list[str]:
        went: list[str] = []

        async def call(of: Limiter) -> None:
            await of.acquire()
            went.append(of.name)

        children = [child] * 12 + [limiter.child("b")] * 12
        await asyncio.gather(*(call(of) for of in children))
        return went

    went = virtual_time.run(share())
    assert went[6:12].count(child.name) == 3


@pytest.mark.parametrize("how", ["reconfigure", "learn"])
@pytest.mark.parametrize("path", [(), ("child",)])
@pytest.mark.parametrize("pause", [0, 1])
def test_call_from_before_limit_was_set_gives_it_nothing_back(
    virtual_time: VirtualTime, how: str, path: tuple[str, ...], pause: int
) -> None:
    """A new limit counts from now on: it never had what such a call returns."""
    limiter = key = Limiter(clock=virtual_time.clock)
    for name in path:
        limiter = limiter.child(name)
    virtual_time.advance(1)
    early = limiter.acquire_nowait(tokens=40)
    virtual_time.advance(pause)
    if how == "learn":
        key.learn(Limit("tokens", 100))
    else:
        key.reconfigure("100 TPM")
    virtual_time.advance(1)
    late = limiter.acquire_nowait(tokens=50)
    early.settle(tokens=0)
    assert used(key) == [50]
    early.settle(tokens=30)
    assert used(key) == [80]
    late._undo()
    assert used(key) == [30]
