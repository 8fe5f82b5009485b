"""One function admits: whoever asks it, newcomer, waiting call or bucket, gets the same answer."""

import asyncio
import copy
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbucket import Cost, Limit, Limiter, Pool, TokenBucket, WouldBlock
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.meters import NEVER, Bucket, Meter, Route, Window, admit
from asyncbucket.feedback.pause import Pause
from asyncbucket.levels import reprice
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import all_blocked, nothing_is_left, used

SECOND = 1_000_000_000
HOUR = 3_600
DAY = 24 * HOUR
#: One call after the other, on one of the ways to ask.
Way = Callable[[Limiter, int], Awaitable[None]]


async def as_newcomer(limiter: Limiter, tokens: int) -> None:
    """Ask again and again, each time as a newcomer, when the refusal says."""
    while True:
        try:
            limiter.acquire_nowait(tokens=tokens).release()
        except WouldBlock as error:
            await asyncio.sleep(error.retry_after or 0)
        else:
            return


async def in_line(limiter: Limiter, tokens: int) -> None:
    (await limiter.acquire(tokens=tokens)).release()


async def beside_another(limiter: Limiter, tokens: int) -> None:
    """Wait as a child, while a call of a sibling waits, too."""
    sibling = limiter.child("sibling", concurrency=1)
    image = Cost(requests=0, images=1)
    async with sibling.acquire(image):
        waiting = asyncio.ensure_future(sibling.acquire(image))
        async with limiter.child("own").acquire(tokens=tokens):
            pass
        waiting.cancel()


WAYS = (as_newcomer, in_line, beside_another)


def instants(way: Way, limits: tuple[str, ...], calls: list[tuple[float, int]]) -> list[float]:
    """Return when calls pass that come one after the other, each some time after the last."""
    with VirtualTime() as time:
        limiter = Limiter(*limits, "1M images/s", clock=time.clock)
        passed: list[float] = []

        async def main() -> None:
            for delay, tokens in calls:
                await asyncio.sleep(delay)
                await way(limiter, tokens)
                passed.append(round(time.now, 6))

        time.run(main())
    return passed


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.sampled_from(
            ["6 requests/s burst 2", "9 requests/10s", "90 tokens/3s burst 30", "500 TPM"]
        ),
        min_size=1,
        unique_by=lambda text: text.split()[1],
    ),
    st.lists(st.tuples(st.sampled_from([0, 0, 0.01, 0.4, 5]), st.integers(0, 30)), max_size=25),
)
def test_newcomer_and_waiter_pass_alike(limits: list[str], calls: list[tuple[float, int]]) -> None:
    first, *others = (instants(way, tuple(limits), calls) for way in WAYS)
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)  # a loop sleeps for at least 20 µs


@pytest.mark.parametrize("way", WAYS)
def test_wall_clock_that_is_set_back_delays_every_call_alike(way: Way) -> None:
    with VirtualTime() as time:
        ahead = 0

        def wall_clock() -> int:
            return 20_000 * DAY * SECOND + time.clock() + ahead

        limiter = Limiter(
            "10 RPD resets 00:00 UTC", "1M images/s", clock=time.clock, wall_clock=wall_clock
        )
        passed: list[float] = []

        async def main() -> None:
            nonlocal ahead
            for number in range(30):
                if number == 5:
                    await asyncio.sleep(HOUR)
                    ahead = -10 * DAY * SECOND - 12 * HOUR * SECOND
                await way(limiter, 0)
                passed.append(round(time.now / HOUR, 3))

        time.run(main())
    assert passed == [0.0] * 5 + [1.0] * 5 + [36.0] * 10 + [60.0] * 10


def meters(rng: random.Random) -> list[Meter]:
    pause = Pause()
    pause.begin(rng.randrange(5) * SECOND, 0, gradually=True)
    return [
        Bucket(rate=5, burst=9),
        Window(Limit("units", 40, per=7)),
        Window(Limit("units", 60, per=11, burst=12)),
        Window(Limit("units", 700, per="day", resets="00:00 UTC")),
        pause,
    ]


@pytest.mark.parametrize("seed", range(30))
def test_asking_takes_nothing_and_what_is_promised_passes_then_and_not_before(seed: int) -> None:
    """So it is for all meters at once, whatever was refunded, owed, and reshaped before."""
    rng, now = random.Random(seed), 0
    route = Route((), tuple((meter, "units") for meter in meters(rng)))
    booked: list[tuple[int, int]] = []
    for _ in range(150):
        now += rng.choice([0, 1, SECOND // 9, SECOND, 9 * SECOND])
        amount = {"units": rng.randint(1, 9)}
        untouched = copy.deepcopy(route.meters)
        due, bound_by = admit(route, amount, now, now, book=False)
        assert [meter.available(now) for meter, _ in route.meters] == [
            meter.available(now) for meter, _ in untouched
        ]
        assert now <= due < NEVER
        assert (bound_by is None) == (due == now)
        if due > now:
            assert admit(route, amount, now, due - 1)[0] == due
            now = due
        assert admit(route, amount, now, now) == (now, None)
        booked.append((now, amount["units"]))
        for meter, _ in route.meters:
            assert meter.free <= meter.available(now)
        if rng.random() < 0.3:
            when, units = booked.pop(rng.randrange(len(booked)))
            for meter, _ in route.meters:
                if rng.random() < 0.5:
                    meter.owe(3, now)
                else:
                    meter.unbook(units, when)


async def test_one_timer_serves_several_calls_and_loses_nothing(virtual_time: VirtualTime) -> None:
    """At 5,000 a second a call comes due each 0.2 ms; none goes more than a millisecond late."""
    bucket = TokenBucket(5_000, burst=50, clock=virtual_time.clock)
    passed: list[float] = []

    async def call() -> None:
        await bucket.acquire()
        passed.append(virtual_time.now)

    await asyncio.gather(*(call() for _ in range(1_050)))
    late = [when - max(0, number - 49) / 5_000 for number, when in enumerate(passed)]
    assert min(late) >= -1e-9
    assert max(late) <= 0.001 + 20e-6
    assert len(set(passed[50:-64])) == pytest.approx((1_000 - 64) / 6, rel=0.1)
    assert passed[-1] == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize(
    ("meter", "leeway"),
    [
        (Bucket(rate=5_000, burst=50), 1_000_000),
        (Bucket(rate=5_000, burst=5), 400_000),
        (Bucket(rate=5_000, burst=1), 0),
        (Bucket(rate=900, burst=50), 0),
        (Window(Limit("units", 5_000, per=1, burst=5)), 400_000),
        (Window(Limit("units", 5_000, per=1, burst=5_000)), NEVER),
        (Pause(), 0),
    ],
)
def test_crowd_may_be_late_only_while_nothing_is_lost(meter: Meter, leeway: int) -> None:
    assert meter.leeway(1) == leeway


# --- a call that waits may come to cost less, or more ---


async def test_call_that_becomes_cheaper_passes_at_once_in_its_place(time: VirtualTime) -> None:
    limiter = Limiter(tpm=100, clock=time.clock)
    (await limiter.acquire(tokens=90)).release()
    served: list[str] = []

    async def call(name: str, lease: Lease) -> None:
        async with lease:
            served.append(name)

    leases = [limiter.acquire(tokens=80), limiter.acquire(tokens=5)]
    calls = [asyncio.create_task(call(name, each)) for name, each in zip("ab", leases, strict=True)]
    await all_blocked()
    reprice(leases[0], Cost(tokens=5))
    await asyncio.gather(*calls)
    assert (served, time.now, used(limiter)) == (["a", "b"], 0.0, [100])
    reprice(leases[0], Cost(tokens=70))
    assert used(limiter) == [100]  # what was admitted is settled
    nothing_is_left(limiter)


async def test_call_that_becomes_dearer_keeps_its_place(time: VirtualTime) -> None:
    limiter = Limiter(tpm=100, clock=time.clock).child("chat", itpm=50)
    (await limiter.acquire(tokens=50)).release()
    first, second = limiter.acquire(tokens=10), limiter.acquire(tokens=1)
    calls = [asyncio.ensure_future(each) for each in (first, second)]
    await all_blocked()
    reprice(first, Cost(tokens=50))
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert (first.cost["input_tokens"], first.bound_by) == (50, "input_tokens")
    assert not calls[1].done()
    first.settle(input_tokens=0)
    await calls[1]
    assert second.waited == first.waited
    for each in (first, second):
        each.release()
    nothing_is_left(limiter)


async def test_call_of_a_pool_is_repriced_wherever_it_waits(time: VirtualTime) -> None:
    members = [Limiter(tpm=100, clock=time.clock, name=name) for name in "ab"]
    for member in members:
        (await member.acquire(tokens=90)).release()
    lease: Any = Pool(*members).acquire(tokens=80)
    waiting = asyncio.ensure_future(lease)
    await all_blocked()
    reprice(lease, Cost(tokens=10))
    (await waiting).release()
    assert (time.now, sorted(used(members[0]) + used(members[1]))) == (0.0, [90, 100])
