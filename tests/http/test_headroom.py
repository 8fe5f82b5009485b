"""The one meter that hears of others: it holds back, never lets more pass, and forgets."""

import asyncio
import contextlib
import random
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Limit, Limiter, WouldBlock
from asyncbucket.headroom import Headroom
from asyncbucket.testing import (
    RateLimitedProvider,
    VirtualClock,
    assert_never_over,
    virtual_time,
)

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 400}


def meter(*, remaining: int | None = None) -> Headroom:
    """Return the headroom of 600 a minute, of which a reply at 0 left so much."""
    headroom = Headroom(amount=600, window=MINUTE)
    if remaining is not None:
        headroom.hear(remaining, 0, amount=600)
    return headroom


def test_knows_nothing_before_it_is_told() -> None:
    """Without a word from the provider everything passes."""
    headroom = meter()
    headroom.book(599, 0)
    headroom.unbook(1, 0)

    assert headroom.available(0) == 600
    assert headroom.earliest(10_000, 0) == 0


def test_what_is_left_passes_and_the_rest_flows_in() -> None:
    """Sixty are left: sixty pass at once, the next one when a unit has come back."""
    headroom = meter(remaining=60)

    assert headroom.take(60, 0)
    assert not headroom.take(1, 0)
    assert headroom.earliest(1, 0) == SECOND // 10
    assert not headroom.take(1, SECOND // 10 - 1)
    assert headroom.take(1, SECOND // 10)


def test_answer_holds_for_those_who_stood_in_line_before() -> None:
    """A waiter asks with the instant since which it waits; a word that came later counts too."""
    headroom = meter(remaining=60)
    headroom.hear(0, SECOND, amount=600)

    assert headroom.earliest(1, 0) > SECOND


def test_undone_booking_comes_back() -> None:
    """What was not sent after all is there again; what is owed is gone."""
    headroom = meter(remaining=60)
    headroom.book(30, 1)
    headroom.unbook(30, 1)
    assert headroom.available(1) == 60
    headroom.owe(70, 1)
    assert headroom.available(1) == -10


def test_booking_from_before_the_last_word_does_not_come_back() -> None:
    """The provider counted it when it spoke."""
    headroom = meter(remaining=60)
    headroom.book(30, 1)
    headroom.hear(30, 2, amount=600)
    headroom.unbook(30, 1)

    assert headroom.available(2) == 30


def test_all_is_forgotten_after_two_windows() -> None:
    """What others did long ago holds nobody back."""
    headroom = meter(remaining=0)
    headroom.owe(10_000, 0)

    assert headroom.earliest(600, 0) == 2 * MINUTE
    assert headroom.available(2 * MINUTE) == 600
    assert headroom.take(600, 2 * MINUTE)


def test_what_comes_back_may_bring_better_news() -> None:
    """As long as calls are in flight, a deadline is not hopeless for the headroom's sake."""
    headroom = meter(remaining=0)

    assert headroom.earliest(1, 0, back=1) == 0
    assert headroom.earliest(1, 0) > 0


def test_others_are_noticed_and_left_a_margin() -> None:
    """Others who take half of the limit slow us down to the other half, and a margin stays."""
    headroom = meter(remaining=600)
    for second in range(1, 60):
        headroom.hear(600 - 5 * second, second * SECOND, amount=600)

    assert 250 < headroom.others < 700
    assert headroom.available(59 * SECOND) < 305


def test_deadline_is_not_refused_for_what_a_reply_may_mend() -> None:
    """A call whose deadline only the headroom forbids waits as long as a reply is awaited."""
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


def test_window_that_is_not_limited_here_is_not_heard() -> None:
    """Nothing is kept of a limit that the user did not set."""
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
def test_user_limit_is_never_exceeded_whatever_is_heard(
    history: list[tuple[int, str, int]],
) -> None:
    """Any words of the provider, at any time: in every window at most the user's limit passes."""
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


# -- against the provider --------------------------------------------------------------------------


def share(policy: Any, *, others: float, seconds: int, **limit: Any) -> tuple[int, int, float]:
    """Saturate 600 RPM beside others who take a part of it; return calls, refusals, use."""
    with virtual_time() as time:
        provider = RateLimitedProvider(
            rpm=600, policy=policy, latency=(0.2, 1.5), clock=time.clock, seed=1
        )
        limiter = Limiter(Limit("requests", 600, **limit), clock=time.clock)
        headers = {"authorization": "Bearer k"}
        direct = httpx.ASGITransport(provider.app)
        chance = random.Random(1)

        async def ours(client: httpx.AsyncClient) -> None:
            while True:
                await client.post("/chat/completions", json=BODY)

        async def theirs(client: httpx.AsyncClient) -> None:
            async with asyncio.TaskGroup() as calls:
                while True:
                    await asyncio.sleep(chance.expovariate(others * 10))
                    calls.create_task(client.post("/chat/completions", json=BODY))

        async def main() -> None:
            where: dict[str, Any] = {"base_url": "https://api.openai.com/v1", "headers": headers}
            async with (
                httpx.AsyncClient(transport=limiter.transport(direct), **where) as paced,
                httpx.AsyncClient(transport=direct, **where) as plain,
            ):
                tasks = [asyncio.create_task(ours(paced)) for _ in range(100)]
                if others:
                    tasks.append(asyncio.create_task(theirs(plain)))
                await asyncio.sleep(seconds)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        time.run(main())
        seen = provider.statistics()
        return seen.requests, seen.refused, seen.admitted / (10 * seconds)


def test_key_is_shared_with_others_without_refusals() -> None:
    """Others take 40 % of the key: under 0.5 % of all calls are refused, and 90 % are used."""
    calls, refused, use = share("token_bucket", others=0.4, seconds=150)

    assert refused / calls < 0.005
    assert use > 0.9


@pytest.mark.parametrize(
    "policy", ["token_bucket", "sliding_window", "fixed_window", "one_second_slices"]
)
def test_alone_nothing_is_refused_and_little_is_lost(policy: str) -> None:
    """However the provider counts: while we are alone its headers cost no call and under 5 %."""
    _, refused, use = share(policy, others=0, seconds=90, burst=1)

    assert refused == 0
    assert use > 0.95
