"""The meter of what others use of a key: it holds calls back, never lets more pass, and forgets."""

import asyncio
import contextlib
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


def test_headroom_admits_remaining_then_refills_at_limit_rate() -> None:
    headroom = meter(remaining=60, window=HOUR)

    assert headroom.take(60, 0)
    assert not headroom.take(1, 0)
    assert headroom.earliest(1, 0) == 6 * SECOND
    assert not headroom.take(1, 6 * SECOND - 1)
    assert headroom.take(1, 6 * SECOND)


def test_headroom_adopts_lower_announced_limit() -> None:
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
    headroom = meter(remaining=600)
    now = listen(headroom, rate=4, seconds=30, ours=5)

    assert 230 <= headroom.others <= 270
    assert not headroom.take(600 - 240 - 150, now)


@given(
    st.sampled_from(["log", "clock", "bucket"]),
    st.lists(st.tuples(st.integers(0, 2 * SECOND), st.integers(0, 3 * SECOND)), max_size=120),
    st.sampled_from(["at admission", "at the end"]),
)
def test_unshared_key_reserves_nothing_for_others(
    counts: str, calls: list[tuple[int, int]], says: str
) -> None:
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


def test_report_on_window_without_limit_is_ignored() -> None:
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
    seen = share(policy, others=0.4, tpm=tpm)

    assert seen.refused / seen.calls < 0.005
    assert seen.use > 0.9


@pytest.mark.heavy
def test_shared_large_slices_are_well_used_with_almost_no_refusals() -> None:
    seen = share("one_second_slices", others=0.4, rpm=6_000, minutes=2)

    assert seen.refused / seen.calls < 0.005
    assert seen.use > 0.9


@pytest.mark.heavy
def test_small_slices_shared_with_even_traffic_see_almost_no_refusals() -> None:
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
    seen = share(policy, others=0, minutes=3, tpm=tpm)

    assert seen.refused == 0
    assert seen.use > 0.95


@pytest.mark.heavy
@pytest.mark.parametrize(
    "policy", ["token_bucket", "sliding_window", "fixed_window", "one_second_slices"]
)
def test_limit_below_the_providers_is_well_used_and_never_refused(policy: str) -> None:
    seen = share(policy, others=0, minutes=3, ours_at_most=300)

    assert seen.refused == 0
    assert seen.use > 0.95 / 2
