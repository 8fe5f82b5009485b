"""The meter of what others use of a key: it holds calls back, never lets more pass, and forgets."""

import asyncio
import contextlib
import itertools
import random
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Limit, Limiter, WouldBlock
from asyncbucket.feedback.headroom import Headroom
from asyncbucket.testing import (
    RateLimitedProvider,
    VirtualClock,
    assert_never_over,
    virtual_time,
)

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
URL = httpx.URL("https://api.openai.com/v1/chat/completions")
HEADERS = {"host": "api.openai.com", "authorization": "Bearer k"}
BODY = (
    b'{"model": "m", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 400}'
)


def meter(*, remaining: int | None = None, window: int = MINUTE) -> Headroom:
    """Return the headroom of 600 in a window; a reply at 0 said that `remaining` are left."""
    headroom = Headroom(amount=600, window=window)
    if remaining is not None:
        headroom.update(remaining, 0, amount=600)
    return headroom


def test_bookings_before_first_report_use_no_headroom() -> None:
    """Everything passes until the provider has said what is left."""
    headroom = meter()
    headroom.book(599, 0)
    headroom.unbook(1, 0)

    assert headroom.available(0) == 600
    assert headroom.earliest(10_000, 0) == 0


def test_headroom_admits_remaining_then_refills_at_limit_rate() -> None:
    """If sixty are left, sixty pass at once, and the next one when a unit has come back."""
    headroom = meter(remaining=60, window=HOUR)

    assert headroom.take(60, 0)
    assert not headroom.take(1, 0)
    assert headroom.earliest(1, 0) == 6 * SECOND
    assert not headroom.take(1, 6 * SECOND - 1)
    assert headroom.take(1, 6 * SECOND)


def test_report_applies_to_calls_already_waiting() -> None:
    """What is heard while a call waits in line counts for that call, too."""
    headroom = meter(remaining=60)
    headroom.update(0, SECOND, amount=600)

    assert headroom.earliest(1, 0) > SECOND


def test_unbooked_units_return_and_debt_is_subtracted() -> None:
    """What was not sent is available again; a debt is subtracted."""
    headroom = meter(remaining=60)
    headroom.book(30, 1)
    headroom.unbook(30, 1)
    assert headroom.available(1) == 60
    headroom.owe(70, 1)
    assert headroom.available(1) == -10


def test_unbooking_a_call_older_than_last_report_returns_nothing() -> None:
    """The provider's last report has counted it already."""
    headroom = meter(remaining=60)
    headroom.book(30, 1)
    headroom.update(30, 2, amount=600)
    headroom.unbook(30, 1)

    assert headroom.available(2) == 30


def test_headroom_forgets_reports_and_debt_after_two_windows() -> None:
    """What others used long ago holds back no calls."""
    headroom = meter(remaining=0)
    headroom.owe(10_000, 0)

    assert headroom.earliest(600, 0) == 2 * MINUTE
    assert headroom.available(2 * MINUTE) == 600
    assert headroom.take(600, 2 * MINUTE)


def test_headroom_rules_out_no_deadline_while_calls_are_in_flight() -> None:
    """While calls are in flight, a deadline is not refused because of the headroom alone."""
    headroom = meter(remaining=0)

    assert headroom.earliest(1, 0, back=1) == 0
    assert headroom.earliest(1, 0) > 0


def test_headroom_adopts_lower_announced_limit() -> None:
    """If the provider's limit was lowered, a call larger than it is not impossible."""
    headroom = meter(remaining=600)
    headroom.update(300, SECOND, amount=300)

    assert headroom.amount == 300
    assert headroom.earliest(400, SECOND) < 2 * MINUTE


def listen(headroom: Headroom, *, rate: int, seconds: int, start: int = 0, ours: int = 0) -> int:
    """Hear for `seconds` while others take `rate` and we take `ours` a second; return the end."""
    for second in range(start + 1, start + seconds + 1):
        headroom.book(ours, second * SECOND)
        headroom.update(600 - (rate + ours) * second, second * SECOND, amount=600)
    return (start + seconds) * SECOND


def test_headroom_measures_what_others_use_and_reserves_it() -> None:
    """Others take four a second: they are left 240 a minute, and a reserve for random variation."""
    headroom = meter(remaining=600)
    now = listen(headroom, rate=4, seconds=30, ours=5)

    assert 230 <= headroom.others <= 270
    assert not headroom.take(600 - 240 - 150, now)


def test_share_left_by_others_is_paced_after_a_small_burst() -> None:
    """At most a tenth of our share passes at once, and then one about every 60 / 336 s."""
    headroom = meter(remaining=600)
    now = listen(headroom, rate=4, seconds=30)
    burst = sum(headroom.take(1, now) for _ in range(100))
    first = headroom.earliest(1, now)
    assert headroom.take(1, first)

    assert 28 <= burst <= 36
    assert 0.15 * SECOND < headroom.earliest(1, first) - first < 0.21 * SECOND


def test_one_call_passes_per_twentieth_of_window_despite_others() -> None:
    """One call passes in each 20th of the window, so that its reply can tell what is left."""
    headroom = meter(remaining=600)
    now = listen(headroom, rate=9, seconds=60)
    headroom.update(60, now, amount=600)
    while headroom.take(1, now):
        pass

    assert headroom.earliest(1, now) <= now + 3 * SECOND


def test_provider_limit_far_above_ours_delays_no_call() -> None:
    """If the limit is far above ours, there is no need to share, however much others take."""
    headroom = Headroom(amount=600, window=MINUTE)
    for second in range(60):
        headroom.update(60_000 - 100 * second, second * SECOND, amount=600)

    assert headroom.others > 1_000
    assert headroom.take(600, MINUTE)


@given(
    st.sampled_from(["log", "clock", "bucket"]),
    st.lists(st.tuples(st.integers(0, 2 * SECOND), st.integers(0, 3 * SECOND)), max_size=120),
    st.sampled_from(["at admission", "at the end"]),
)
def test_unshared_key_reserves_nothing_for_others(
    counts: str, calls: list[tuple[int, int]], says: str
) -> None:
    """Whatever the provider counts by, and however late and out of order its replies come."""
    headroom = Headroom(amount=100, window=MINUTE)
    now = 0
    sent: list[int] = []
    events: list[tuple[int, int, int]] = []
    for number, (pause, took) in enumerate(calls):
        now += pause
        events += [(now, 0, number), (now + took, 1, number)]
        sent.append(now)
    said: dict[int, int] = {}
    booked: list[int] = []
    for instant, replies, number in sorted(events):
        if not replies:
            headroom.book(1, instant)
            booked.append(instant)
        left = 100 - used(counts, booked, instant)
        if not replies:
            said[number] = left
            continue
        booked_since = sum(when >= sent[number] for when in booked)
        remaining = said[number] if says == "at admission" else left
        headroom.update(max(0, remaining), instant, amount=100, booked_since=booked_since)
        assert headroom.others == 0


def used(counts: str, booked: list[int], now: int) -> int:
    """Return how much of the calls at these instants a provider of this kind has counted."""
    if counts == "log":
        return sum(when > now - MINUTE for when in booked)
    if counts == "clock":
        return sum(when // MINUTE == now // MINUTE for when in booked)
    level, last = 0, 0
    for when in booked:
        level, last = max(0, level - (when - last) * 100) + MINUTE, when
    return -(-max(0, level - (now - last) * 100) // MINUTE)


def passed(headroom: Headroom, amount: int, *, until: int) -> list[int]:
    """Return when calls of ``amount`` pass that wait in line from 0 on."""
    times: list[int] = []
    now = 0
    while (now := headroom.earliest(amount, now)) < until:
        headroom.book(amount, now)
        times.append(now)
    return times


def test_slices_never_admit_more_than_their_share_and_waste_little() -> None:
    """At most ten pass in a second, five of them at once; this uses 97 % of 600 a minute."""
    headroom = meter(remaining=10)
    times = passed(headroom, 1, until=MINUTE)

    assert_never_over([(when, 1) for when in times], Limit("units", 10, per=1))
    assert times[:5] == [0] * 5
    assert times[5] > 0
    assert 0.97 < len(times) / 600 <= 1


def test_report_above_slice_share_ends_slicing() -> None:
    """After that, a tenth of the limit may pass at once."""
    headroom = meter(remaining=10)
    headroom.update(600, 0, amount=600)

    assert all(headroom.take(1, 0) for _ in range(60))


def test_call_larger_than_slice_uses_up_following_slices() -> None:
    """A call of 25 takes a slice of ten, the next one, and half of the third."""
    times = passed(meter(remaining=10), 25, until=10 * SECOND)

    assert all(
        2.5 * SECOND <= later - earlier < 3.5 * SECOND
        for earlier, later in itertools.pairwise(times)
    )


def test_refund_of_large_call_reopens_slices() -> None:
    """What a call reserved and did not use no longer holds up others."""
    headroom = meter(remaining=10)
    headroom.book(45, 0)
    assert headroom.earliest(5, 0) > 4 * SECOND
    headroom.unbook(40, 0, left=5)
    headroom.update(10, 2 * SECOND, amount=600)

    assert headroom.take(5, 2 * SECOND)


def test_unbooked_call_returns_its_units_to_the_slice() -> None:
    """A call that was never sent counts in no slice."""
    headroom = meter(remaining=10)
    headroom.book(10, 0)
    assert not headroom.take(10, 0)
    headroom.unbook(10, 0)

    assert headroom.take(10, 0)


def test_slice_reserves_what_others_use() -> None:
    """Others take four of ten by the end of each slice, so less than six are ours."""
    headroom = meter(remaining=10)
    for tenth in range(400):
        headroom.update(10 - min(4, tenth % 10), tenth * SECOND // 10, amount=600)
    headroom.book(3, 41 * SECOND)

    assert headroom.earliest(1, 41 * SECOND) > 41 * SECOND


def test_deadline_is_not_refused_while_a_reply_may_raise_headroom() -> None:
    """A call whose deadline only the headroom rules out waits while a reply is awaited."""
    with virtual_time() as time:
        limiter = Limiter("600 tokens/minute", clock=time.clock)

        async def main() -> float:
            async with limiter.acquire(tokens=1) as lease:
                limiter.observe_remaining(0, resource="tokens", per=60)
                waiting = asyncio.create_task(limiter.acquire(tokens=500, timeout=30).__aenter__())
                await asyncio.sleep(1)
                limiter.observe_remaining(600, resource="tokens", per=60, limit=600)
                lease.settle(tokens=1)
                return (await waiting).waited

        assert time.run(main()) == pytest.approx(1)


def test_report_on_window_without_limit_is_ignored() -> None:
    """A window that the user did not limit is ignored."""
    limiter = Limiter("600 RPM burst 600")
    limiter.observe_remaining(0, resource="tokens", per=60)
    limiter.observe_remaining(0, resource="requests", per=1)

    assert limiter.acquire_nowait(tokens=5).waited == 0


events = st.lists(
    st.tuples(
        st.integers(0, 3 * SECOND),
        st.sampled_from(["take", "hear"]),
        st.integers(0, 130),
    ),
    max_size=60,
)


@given(events)
def test_user_limit_is_never_exceeded_whatever_provider_reports(
    history: list[tuple[int, str, int]],
) -> None:
    """Whatever the provider says, and whenever, every window keeps the user's limit."""
    clock = VirtualClock()
    limiter = Limiter(Limit("units", 100, per=10), clock=clock)
    passed: list[tuple[int, int]] = []
    for pause, what, amount in history:
        clock.advance(pause * 1e-9)
        if what == "hear":
            limiter.observe_remaining(amount, resource="units", per=10, since=clock.seconds - 1)
        else:
            with contextlib.suppress(WouldBlock):
                limiter.acquire_nowait(units=amount % 40 + 1)
                passed.append((clock(), amount % 40 + 1))
        (use,) = limiter.statistics().limits
        assert use.available <= 100 - use.used

    assert_never_over(passed, Limit("units", 100, per=10))


@dataclass(frozen=True)
class Shared:
    """The result of saturating a key that others use, too."""

    calls: int
    refused: int
    #: The part of the limit that was used after the first minute.
    use: float


async def call(transport: httpx.AsyncBaseTransport) -> None:
    """Make a call without a client, which would take twice as long."""
    request = httpx.Request("POST", URL, content=BODY, headers=HEADERS)
    await (await transport.handle_async_request(request)).aread()


def share(
    policy: Any,
    *,
    others: float,
    minutes: int = 4,
    rpm: int = 600,
    tpm: int | None = None,
    deaf: float = 0,
    evenly: bool = False,
    ours_at_most: int | None = None,
) -> Shared:
    """Saturate `rpm`, or a `tpm` of as many calls, while others take a part of it.

    Others come at random, or `evenly`; our limit may be lower than the provider's. For the first
    `deaf` seconds, replies are not read.
    """
    with virtual_time() as time:
        provider = RateLimitedProvider(
            rpm=None if tpm else rpm,
            tpm=tpm,
            policy=policy,
            latency=(0.2, 1.5),
            clock=time.clock,
            seed=1,
        )
        limiter = Limiter(rpm=None if tpm else ours_at_most or rpm, tpm=tpm, clock=time.clock)
        direct = httpx.ASGITransport(provider.app)
        chance = random.Random(1)
        crowd = rpm // 6
        rate = others * rpm / 60

        async def ours(transport: httpx.AsyncBaseTransport) -> None:
            while True:
                await call(transport)

        async def theirs() -> None:
            async with asyncio.TaskGroup() as calls:
                while True:
                    await asyncio.sleep(1 / rate if evenly else chance.expovariate(rate))
                    calls.create_task(call(direct))

        async def main() -> int:
            if deaf:
                unheard = limiter.transport(direct, learn=False)
                early = [asyncio.create_task(ours(unheard)) for _ in range(crowd)]
                await asyncio.sleep(deaf)
                for task in early:
                    task.cancel()
                await asyncio.gather(*early, return_exceptions=True)
            paced = limiter.transport(direct)
            tasks = [asyncio.create_task(ours(paced)) for _ in range(crowd)]
            if others:
                tasks.append(asyncio.create_task(theirs()))
            await asyncio.sleep(60 - deaf)
            first = provider.statistics().admitted
            await asyncio.sleep(60 * (minutes - 1))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return first

        first = time.run(main())
        seen = provider.statistics()
        use = (seen.admitted - first) / (rpm * (minutes - 1))
        return Shared(seen.requests, seen.refused, use)


@pytest.mark.heavy
@pytest.mark.parametrize("tpm", [None, 240_000])
@pytest.mark.parametrize("policy", ["token_bucket", "sliding_window", "fixed_window"])
def test_shared_key_is_well_used_with_almost_no_refusals(policy: str, tpm: int | None) -> None:
    """If others take 40 % of the key, under 0.5 % of all calls are refused, and 90 % is used."""
    seen = share(policy, others=0.4, tpm=tpm)

    assert seen.refused / seen.calls < 0.005
    assert seen.use > 0.9


@pytest.mark.heavy
def test_shared_large_slices_are_well_used_with_almost_no_refusals() -> None:
    """Others take 40 of a hundred in each slice, with little random variation in comparison."""
    seen = share("one_second_slices", others=0.4, rpm=6_000, minutes=2)

    assert seen.refused / seen.calls < 0.005
    assert seen.use > 0.9


@pytest.mark.heavy
def test_small_slices_shared_with_even_traffic_see_almost_no_refusals() -> None:
    """Others take four of ten in each slice, and never more."""
    seen = share("one_second_slices", others=0.4, evenly=True)

    assert seen.refused / seen.calls < 0.005
    assert seen.use > 0.85


@pytest.mark.heavy
@pytest.mark.parametrize("tpm", [None, 240_000])
def test_small_slices_shared_with_random_traffic_see_few_refusals(tpm: int | None) -> None:
    """Others take a random four of ten: without making room for them, 18 % would be refused."""
    seen = share("one_second_slices", others=0.4, tpm=tpm)

    assert seen.refused / seen.calls < 0.07
    assert seen.use > 0.88


@pytest.mark.heavy
@pytest.mark.parametrize("tpm", [None, 240_000])
@pytest.mark.parametrize(
    "policy", ["token_bucket", "sliding_window", "fixed_window", "one_second_slices"]
)
def test_unshared_key_is_well_used_and_never_refused(policy: str, tpm: int | None) -> None:
    """However the provider counts, no call is refused while we are alone, and 95 % is used."""
    seen = share(policy, others=0, minutes=3, tpm=tpm)

    assert seen.refused == 0
    assert seen.use > 0.95


@pytest.mark.heavy
@pytest.mark.parametrize("policy", ["token_bucket", "sliding_window", "fixed_window"])
def test_calls_sent_before_first_read_reply_are_not_taken_for_others(policy: str) -> None:
    """If replies are read only after 40 s, the limiter does not take its own calls for others'."""
    seen = share(policy, others=0, minutes=3, deaf=40)

    assert seen.refused == 0
    assert seen.use > 0.95


def test_headroom_admits_everything_before_first_report() -> None:
    """What the meter does not know holds up nobody."""
    headroom = Headroom(amount=10, window=60 * 1_000_000_000)
    assert headroom.take(10, 0)
    assert headroom.earliest(10, 0) == 0


def test_take_without_earliest_never_spends_units_twice() -> None:
    """`take` without asking first gives the same answer as `earliest`."""
    headroom = Headroom(amount=10, window=SECOND)
    for now in (0, SECOND, 2 * SECOND):
        headroom.update(10, now, amount=10)
    assert headroom.take(10, 2 * SECOND)
    assert not headroom.take(1, 2 * SECOND)
    assert headroom.take(1, 2 * SECOND + SECOND // 10)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "policy", ["token_bucket", "sliding_window", "fixed_window", "one_second_slices"]
)
def test_limit_below_the_providers_is_well_used_and_never_refused(policy: str) -> None:
    """With half of the provider's limit, nothing is refused, and 95 % of our limit is used."""
    seen = share(policy, others=0, minutes=3, ours_at_most=300)

    assert seen.refused == 0
    assert seen.use > 0.95 / 2
