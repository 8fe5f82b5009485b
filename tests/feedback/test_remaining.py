"""What a provider says is left holds calls back, never lets more pass, and is forgotten."""

import asyncio

import pytest

from asyncbucket import Limit, Limiter
from asyncbucket.feedback.proof import Proof
from asyncbucket.feedback.remaining import Remaining
from asyncbucket.levels import observe_remaining
from asyncbucket.testing import virtual_time

SECOND = 1_000_000_000
MINUTE = 60 * SECOND


def told(left: int | None = None, *, amount: int = 600, per: float = 60) -> Remaining:
    limit = Limit("units", amount, per=per)
    remaining = Remaining(limit, Proof(limit.window), with_reserve=per <= 120)
    if left is not None:
        remaining.hear(left, 0, amount, 0)
    return remaining


def hear(remaining: Remaining, left: int, now: int, *, amount: int = 600, own: int = 0) -> None:
    remaining.hear(left, now, amount, now, own=own)


def take(remaining: Remaining, amount: int, now: int) -> bool:
    passes = remaining.earliest(amount, now) <= now
    if passes:
        remaining.book(amount, now)
    return passes


#: What is done to sixty that are left of 600 an hour: verb, units, at which second; what is left then.
DONE: dict[str, tuple[list[tuple[str, int, int]], int]] = {
    "a call and its refund": ([("book", 30, 1), ("unbook", 30, 1)], 60),
    "a debt": ([("book", 70, 1)], -10),
    "a refund of what a report told": ([("book", 30, 1), ("hear", 30, 2), ("unbook", 30, 1)], 30),
    "a call that left after a report": (
        [("book", 30, 1), ("hear", 60, 2), ("unbook", 30, 1), ("book", 30, 3)],
        30,
    ),
}


@pytest.mark.parametrize("done", DONE)
def test_what_is_left_after(done: str) -> None:
    remaining = told(60, per=3_600)
    moves, available = DONE[done]
    for verb, units, second in moves:
        if verb == "hear":
            hear(remaining, units, second * SECOND)
        else:
            getattr(remaining, verb)(units, second * SECOND)
    assert remaining.available(3 * SECOND) == available


def test_all_passes_until_the_provider_says_what_is_left_then_that_and_what_flows_in() -> None:
    remaining = told(per=3_600)
    remaining.book(599, 0)
    assert (remaining.available(0), remaining.earliest(10_000, 0)) == (600, 0)
    remaining = told(60, per=3_600)
    assert take(remaining, 60, 0)
    assert remaining.earliest(1, 0) == 6 * SECOND
    hear(remaining, 300, 7 * SECOND, amount=300)
    assert remaining.earliest(400, 7 * SECOND) < 7_200 * SECOND  # though it is above the limit


def test_reports_and_debts_are_forgotten_after_two_windows() -> None:
    remaining = told(0)
    remaining.book(10_000, 0)
    assert remaining.earliest(600, 0) == 2 * MINUTE
    assert remaining.available(2 * MINUTE) == 600
    assert take(remaining, 600, 2 * MINUTE)


def test_calls_are_spread_over_a_window_at_most() -> None:
    remaining = told(600)
    for now in (1, 2, 3):
        remaining.book(600, now)
    hear(remaining, 10, 2 * MINUTE)
    assert remaining.earliest(1, 2 * MINUTE) == 2 * MINUTE


def test_what_others_use_is_measured_and_reserved() -> None:
    """Others take four a second: they are left 240 a minute, and a reserve for random variation."""
    remaining, now = told(600), 0
    for second in range(1, 31):
        now = second * SECOND
        remaining.book(5, now)
        hear(remaining, 600 - 9 * second, now, own=5)
    assert 230 <= remaining.others.estimate <= 270
    assert not take(remaining, 600 - 240 - 150, now)
    hear(remaining, 600 - 9 * 30 - 4 * 10, 40 * SECOND)
    assert remaining.others.at_once == 4  # that was no burst: in ten seconds they take forty
    unheard = told()
    unheard.book(400, 0)
    hear(unheard, 200, SECOND)  # calls before the first reply that is read are not others'
    assert unheard.others.estimate == 0
    far_above_ours = told()
    for second in range(60):
        hear(far_above_ours, 60_000 - 100 * second, second * SECOND)
    assert all(take(far_above_ours, 1, MINUTE) for _ in range(600))  # there is enough for all


def test_two_bursts_of_others_stay_untouched_in_what_is_proven_to_be_a_bucket() -> None:
    remaining = told(600)
    remaining._proof.size = 600
    for second in range(10):
        hear(remaining, 580 - 10 * second, second * SECOND)
    burst, passed = remaining.others.at_once, 0
    assert 10 <= burst <= 20
    while take(remaining, 1, 9 * SECOND):
        passed += 1
    assert 490 - passed == 2 * (burst + 1)


def test_one_call_asks_an_empty_bucket_that_others_have_emptied_at_once() -> None:
    """What several clients sent at once is missing; without a reply nobody learns that it came back."""
    remaining = told(600)
    remaining._proof.size = 600
    remaining.book(225, 0)
    hear(remaining, 0, SECOND)
    asks_at = remaining.earliest(1, SECOND)
    assert asks_at == 4 * SECOND + SECOND // 10  # a twentieth later, and the time of a unit
    assert take(remaining, 1, asks_at)
    assert not take(remaining, 1, 5 * SECOND)


def test_replies_of_several_meters_in_turn_say_nothing_of_others() -> None:
    """What is left rises by more than can have come back: two models share this limit."""
    remaining, delays = told(600), list[float]()
    for second in range(1, 8):
        now = second * SECOND
        remaining.book(1, now)
        hear(remaining, 20 if second % 2 else 590, now)
        delays.append((remaining.earliest(1, now) - now) / SECOND)
    assert (delays[0], delays[4], delays[5:]) == (3, 3, [0, 0])


def test_what_never_comes_back_to_a_small_bucket_is_not_taken_for_others() -> None:
    remaining = told(60)
    for second in range(1, 31):
        remaining.book(10, second * SECOND)
        hear(remaining, 60 - second, second * SECOND)
    assert remaining.earliest(20, 30 * SECOND) == 30 * SECOND


def test_deadline_of_call_without_tokens_does_not_wait_for_tokens() -> None:
    with virtual_time() as time:
        limiter = Limiter("600 tokens/minute", "60 RPM burst 1", clock=time.clock)

        async def main() -> float:
            await limiter.acquire()
            observe_remaining(limiter, 0, resource="tokens", per=60)
            return (await limiter.acquire(timeout=1)).waited

        assert time.run(main()) == 1


def test_deadline_is_not_refused_while_a_reply_may_bring_good_news() -> None:
    """A call whose deadline only what is left rules out waits while a reply is awaited."""
    with virtual_time() as time:
        limiter = Limiter("600 tokens/minute burst 600", clock=time.clock)

        async def main() -> float:
            async with limiter.acquire(tokens=1) as lease:
                observe_remaining(limiter, 0, resource="tokens", per=60)
                call = limiter.acquire(tokens=500, timeout=30)
                waiting = asyncio.ensure_future(call.__aenter__())
                await asyncio.sleep(1)
                observe_remaining(limiter, 600, resource="tokens", per=60, limit=600)
                lease.settle(tokens=1)
                return (await waiting).waited

        assert time.run(main()) == pytest.approx(1)


def test_calls_sent_after_the_answered_one_may_not_be_counted_in_what_is_left() -> None:
    with virtual_time() as time:
        limiter = Limiter("600 tokens/minute burst 600", clock=time.clock)
        for _ in range(3):
            limiter.acquire_nowait(tokens=40)
            time.advance(1)
        observe_remaining(limiter, 300, resource="tokens", per=60, since=0.5)
        assert limiter.statistics().limits[0].available == 300 - 2 * 40
