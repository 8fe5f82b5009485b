"""Limits change while calls wait."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbucket import CostExceedsLimit, Lease, Limit, Limiter, LimitSyntaxError, WouldBlock
from asyncbucket.core.lending import give_back
from asyncbucket.testing import VirtualTime, assert_never_over, virtual_time


def test_raised_limit_admits_waiting_call_at_once(virtual_time: VirtualTime) -> None:
    """A waiting call passes at that instant, even if no new call comes."""

    async def main() -> None:
        limiter = Limiter("100 TPM", clock=virtual_time.clock)
        await limiter.acquire(tokens=100)
        waiting = asyncio.ensure_future(limiter.acquire(tokens=80))
        await asyncio.sleep(5)
        limiter.reconfigure(tpm=200)
        assert (await waiting).waited == 5.0
        assert limiter.limits == (Limit("tokens", 200),)

    virtual_time.run(main())


def test_lowered_limit_counts_earlier_admissions_at_once(virtual_time: VirtualTime) -> None:
    """What was admitted before stays counted."""

    async def main() -> None:
        limiter = Limiter("100 TPM", clock=virtual_time.clock)
        (await limiter.acquire(tokens=70)).release()
        limiter.reconfigure("50 TPM")
        assert limiter.statistics().limits[0].available == -20
        await limiter.acquire(tokens=1)
        assert virtual_time.now == 60 * 515 / 512

    virtual_time.run(main())


def test_lowered_limit_fails_waiting_call_that_can_never_pass(virtual_time: VirtualTime) -> None:
    """It fails at once, with the new limit; the calls behind it go on."""

    async def main() -> None:
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

    virtual_time.run(main())


@pytest.mark.parametrize("turns", [0, 1])
def test_call_cancelled_while_being_refused_counts_only_as_cancelled(
    virtual_time: VirtualTime, turns: int
) -> None:
    """If a call is refused and cancelled at about the same step, it counts only as cancelled."""

    async def main() -> None:
        limiter = Limiter("100 TPM", clock=virtual_time.clock)
        events: list[str] = []
        limiter.observe(lambda event: events.append(type(event).__name__))
        await limiter.acquire(tokens=100)
        waiting = asyncio.ensure_future(limiter.acquire(tokens=80))
        await virtual_time.all_blocked()
        limiter.reconfigure(tpm=60)
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        now = limiter.statistics()
        assert (now.refused, now.cancelled, now.waiting) == (0, 1, 0)
        assert (events.count("Refused"), events.count("Cancelled")) == (0, 1)

    virtual_time.run(main())


def test_refusal_counts_once_however_often_limits_change(virtual_time: VirtualTime) -> None:
    """However often limits change before its task runs, the refusal counts once."""

    async def main() -> None:
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

    virtual_time.run(main())


def test_call_at_its_deadline_is_told_that_it_can_never_pass(virtual_time: VirtualTime) -> None:
    """A limit is lowered at the instant of a deadline, before the waiting call's task runs."""

    async def main() -> None:
        limiter = Limiter("100 TPM", clock=virtual_time.clock)
        await limiter.acquire(tokens=100)
        late = asyncio.ensure_future(limiter.acquire(tokens=80, timeout=70))
        await virtual_time.all_blocked()
        limiter.pause(100)
        asyncio.get_running_loop().call_at(70, lambda: limiter.reconfigure(tpm=50))
        with pytest.raises(
            CostExceedsLimit, match="80 tokens exceeds the limit of 50 tokens per 60 s"
        ):
            await late
        assert virtual_time.now == 70
        assert limiter.statistics().refused == 1

    virtual_time.run(main())


def test_newly_set_slots_count_calls_in_flight(virtual_time: VirtualTime) -> None:
    """At each level at most the new number run at once; a new limit counts from now on."""

    async def main() -> None:
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
        assert repr(limiter) == (
            "<Limiter 'default', 2 requests per 1 s, concurrency 0/2, 0 waiting>"
        )
        assert repr(child) == "<Limiter 'default/child', concurrency 0/1, 0 waiting>"

    virtual_time.run(main())


def test_newly_set_slots_count_calls_just_admitted(virtual_time: VirtualTime) -> None:
    """The change comes after they were admitted and before they run, at either level."""

    async def main() -> None:
        limiter = Limiter(clock=virtual_time.clock)
        child = limiter.child("child")
        limiter.pause(1)
        waiting = [asyncio.create_task(child.acquire()) for _ in range(3)]
        await virtual_time.all_blocked()
        virtual_time.advance(1)
        next(iter(limiter._budget.pacers.values()))._look()
        assert limiter.statistics().in_flight == limiter.statistics().waiting == 0
        limiter.reconfigure(concurrency=2)
        leases = await asyncio.gather(*waiting)
        leases.pop().release()
        with pytest.raises(WouldBlock, match="all 2 slots are taken"):
            child.acquire_nowait()
        leases.pop().release()
        child.acquire_nowait().release()
        leases.pop().release()
        assert limiter._account.slots is not None
        assert limiter._account.slots.used == 0

    virtual_time.run(main())


def test_newly_set_slot_of_outer_call_is_lent_to_inner_call_once(virtual_time: VirtualTime) -> None:
    """It is lent once to the call inside, however often the outer call gives it back."""

    async def main() -> None:
        limiter = Limiter(clock=virtual_time.clock)
        tools = limiter.child("tools")
        outer = await tools.acquire()
        limiter.reconfigure(concurrency=1)
        tools.reconfigure(concurrency=1)
        inner = asyncio.ensure_future(limiter.acquire())
        await virtual_time.all_blocked()
        give_back(outer, limiter)
        give_back(outer, limiter)
        (await inner).release()
        assert repr(limiter) == "<Limiter 'default', concurrency 0/1, 0 waiting>"
        assert repr(tools) == "<Limiter 'default/tools', concurrency 1/1, 0 waiting>"
        outer.release()
        assert repr(limiter) == "<Limiter 'default', concurrency 0/1, 0 waiting>"
        assert repr(tools) == "<Limiter 'default/tools', concurrency 0/1, 0 waiting>"

    virtual_time.run(main())


def test_lowered_concurrency_waits_until_enough_slots_come_back(virtual_time: VirtualTime) -> None:
    """Of three held slots two must come back before the next call passes."""

    async def main() -> None:
        limiter = Limiter(concurrency=3, clock=virtual_time.clock)
        held = [await limiter.acquire() for _ in range(3)]
        limiter.reconfigure(concurrency=2)
        waiting = asyncio.ensure_future(limiter.acquire())
        held.pop().release()
        await virtual_time.all_blocked()
        assert not waiting.done()
        held.pop().release()
        (await waiting).release()

    virtual_time.run(main())


def test_pacing_follows_changed_limit(virtual_time: VirtualTime) -> None:
    """A changed limit paces slower or faster; a burst equal to the limit turns pacing off."""

    async def main() -> None:
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

    virtual_time.run(main())


def test_refund_of_booking_before_change_admits_waiting_call(virtual_time: VirtualTime) -> None:
    """A refund from before the change counts in the bucket that paces the changed limit."""

    async def main() -> None:
        limiter = Limiter("60k TPM burst 10k", clock=virtual_time.clock)
        lease = await limiter.acquire(tokens=10_000)
        waiting = asyncio.create_task(limiter.acquire(tokens=10_000))
        await asyncio.sleep(2)
        limiter.reconfigure("66k TPM burst 11k")
        await virtual_time.all_blocked()
        assert not waiting.done()
        lease.settle(tokens=0)
        assert (await waiting).waited == 2.0

    virtual_time.run(main())


def test_iteration_over_limits_is_not_disturbed_by_reconfigure() -> None:
    """It may be iterating over the limits while one is added."""
    limiter = Limiter("500 RPM")
    looking = iter(limiter._account.limits)
    limiter.reconfigure("200k TPM")
    assert list(looking) == [("requests", 60)]
    assert len(limiter.limits) == 2


def test_invalid_reconfigure_changes_nothing(virtual_time: VirtualTime) -> None:
    """All of the changes are applied, or none."""
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


changes = st.lists(
    st.tuples(st.sampled_from([10, 20, 50, 100]), st.integers(1, 5), st.floats(0, 30)), max_size=8
)


@settings(deadline=None, max_examples=60)
@given(changes, st.randoms(use_true_random=False))
def test_changing_limits_never_admit_more_than_highest_of_them(
    limits: list[tuple[int, int, float]], chance: object
) -> None:
    """However limits change, no window admits more than the highest of them."""
    del chance
    trace: list[tuple[int, int]] = []
    leases: list[Lease] = []

    async def caller(limiter: Limiter, time: VirtualTime, tokens: int) -> None:
        with contextlib.suppress(CostExceedsLimit):
            while time.now < 300:
                async with limiter.acquire(tokens=tokens):
                    trace.append((time.clock(), tokens))
                    await asyncio.sleep(tokens / 10)

    async def main(time: VirtualTime) -> None:
        limiter = Limiter("50 TPM", concurrency=3, clock=time.clock)
        async with asyncio.TaskGroup() as group:
            for tokens in (1, 3, 7, 20, 2):
                group.create_task(caller(limiter, time, tokens))
            for amount, slots, delay in limits:
                await asyncio.sleep(delay)
                limiter.reconfigure(Limit("tokens", amount), concurrency=slots)
        now = limiter.statistics()
        assert (now.waiting, now.in_flight) == (0, 0)

    with virtual_time() as time:
        time.run(main(time))
    highest = max([50, *(amount for amount, _, _ in limits)])
    assert_never_over(trace, Limit("tokens", highest))
    assert not leases
