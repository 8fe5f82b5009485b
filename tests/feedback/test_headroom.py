"""The meter of what a provider says is left: it holds calls back, never lets more pass, and forgets."""

import asyncio
import itertools

import pytest

from asyncbucket import Limit, Limiter
from asyncbucket.feedback.headroom import Headroom
from asyncbucket.levels import observe_remaining
from asyncbucket.testing import assert_never_over, virtual_time
from tests.engine.conftest import take

SECOND = 1_000_000_000
MINUTE = 60 * SECOND


def meter(*, remaining: int | None = None, amount: int = 600, per: float = 60) -> Headroom:
    headroom = Headroom(Limit("units", amount, per=per))
    if remaining is not None:
        headroom.update(remaining, 0, amount=amount)
    return headroom


#: What is done to sixty that are left of 600 a minute, in which second; what is left then.
DONE: dict[str, tuple[list[tuple[str, int, int]], int]] = {
    "a call and its refund": ([("book", 30, 1), ("unbook", 30, 1)], 60),
    "a debt": ([("owe", 70, 1)], -10),
    "refund of what a report counted": ([("book", 30, 1), ("hear", 30, 2), ("unbook", 30, 1)], 30),
    "a call that left after a report": ([("book", 30, 1), ("hear", 60, 2), ("redate", 30, 3)], 30),
}


@pytest.mark.parametrize("done", DONE)
def test_headroom_has_what_is_left_after(done: str) -> None:
    headroom, now = meter(remaining=60), 0
    moves, available = DONE[done]
    for verb, units, now in moves:
        if verb == "hear":
            headroom.update(units, now, amount=600)
        elif verb == "redate":
            headroom.redate(units, 1, now)
        else:
            getattr(headroom, verb)(units, now)
    assert headroom.available(now) == available


def test_all_passes_until_the_provider_says_what_is_left_then_that_and_what_flows_in() -> None:
    headroom = meter(per=3_600)
    headroom.book(599, 0)
    assert (headroom.available(0), headroom.earliest(10_000, 0)) == (600, 0)
    headroom = meter(remaining=60, per=3_600)
    assert take(headroom, 60, 0)
    assert headroom.earliest(1, 0) == 6 * SECOND
    assert not take(headroom, 1, 6 * SECOND - 1)
    assert take(headroom, 1, 6 * SECOND)
    headroom.update(300, 7 * SECOND, amount=300, limit=300)
    assert headroom.earliest(400, 7 * SECOND) < 7_200 * SECOND  # though it is above the limit


def test_headroom_forgets_reports_and_debt_after_two_windows() -> None:
    headroom = meter(remaining=0)
    headroom.owe(10_000, 0)
    assert headroom.earliest(600, 0) == 2 * MINUTE
    assert headroom.available(2 * MINUTE) == 600
    assert take(headroom, 600, 2 * MINUTE)


def listen(headroom: Headroom, *, rate: int, seconds: int, ours: int = 0) -> int:
    """Hear for `seconds` while others take `rate` and we take `ours` a second; return the end."""
    for second in range(1, seconds + 1):
        headroom.book(ours, second * SECOND)
        headroom.update(600 - (rate + ours) * second, second * SECOND, amount=600)
    return seconds * SECOND


def test_headroom_measures_what_others_use_and_reserves_it() -> None:
    """Others take four a second: they are left 240 a minute, and a reserve for random variation."""
    headroom = meter(remaining=600)
    now = listen(headroom, rate=4, seconds=30, ours=5)
    assert 230 <= headroom.others.estimate <= 270
    assert not take(headroom, 600 - 240 - 150, now)
    far_above_ours = meter()
    for second in range(60):
        far_above_ours.update(60_000 - 100 * second, second * SECOND, amount=600)
    assert all(take(far_above_ours, 1, MINUTE) for _ in range(600))  # there is enough for all


def passed(headroom: Headroom, amount: int, *, since: int = 0, until: int) -> list[int]:
    """Return when calls of ``amount`` pass that wait in line from ``since`` on."""
    times: list[int] = []
    now = since
    while (now := headroom.earliest(amount, now)) < until:
        headroom.book(amount, now)
        times.append(now)
    return times


def test_slices_never_admit_more_than_their_share() -> None:
    """Of ten a second, half is left to others until reports say what they take."""
    headroom = meter(remaining=10)
    assert len(passed(headroom, 1, until=SECOND)) == 3
    times: list[int] = []
    for second in range(1, 60):
        headroom.update(10, second * SECOND, amount=600)
        times += passed(headroom, 1, since=second * SECOND, until=(second + 1) * SECOND)
    assert_never_over([(when, 1) for when in times], Limit("units", 10, per=1))
    assert len(times) / 590 > 0.75


@pytest.mark.parametrize(("every", "passing"), [(1, 60), (10, 15)])
def test_units_that_come_back_all_the_time_rule_slices_out(every: int, passing: int) -> None:
    """In a slice of ten seconds, what was booked stays missing until it ends."""
    headroom = meter(remaining=90)
    for second in range(1, 15):
        headroom.book(5, second * SECOND - SECOND // 2)
        headroom.update(90 - 5 * (second % every), second * SECOND, amount=600)
    assert sum(take(headroom, 1, 14 * SECOND) for _ in range(200)) == passing


def test_report_above_slice_share_ends_slicing() -> None:
    headroom = meter(remaining=10)
    headroom.update(600, 0, amount=600)
    assert all(take(headroom, 1, 0) for _ in range(60))


def test_longer_slices_are_tried_after_shorter_ones() -> None:
    """If more is left than fits into a second, the limit may be counted in ten-second slices."""
    headroom = meter(remaining=90)
    assert sum(take(headroom, 1, SECOND) for _ in range(600)) < 100
    headroom.update(600, MINUTE + 2 * SECOND, amount=600)
    assert sum(take(headroom, 1, MINUTE + 2 * SECOND) for _ in range(600)) == 600


def test_call_larger_than_slice_uses_up_following_slices() -> None:
    """A call of 25 takes a slice of ten and the two after it: a provider closes them, too."""
    headroom = meter(remaining=10)
    times = passed(headroom, 25, until=10 * SECOND)
    assert len(times) > 3
    assert all(
        3 * SECOND <= later - earlier < 3.5 * SECOND for earlier, later in itertools.pairwise(times)
    )


def test_refund_of_large_call_reopens_slices() -> None:
    headroom = meter(remaining=10)
    headroom.book(45, 0)
    assert headroom.earliest(5, 0) > 4 * SECOND
    headroom.unbook(40, 0, left=5)
    headroom.update(10, 2 * SECOND, amount=600)
    assert take(headroom, 5, 2 * SECOND)
    for second in (50, 60):
        headroom.book(45, second * SECOND)
    headroom.unbook(1, 50 * SECOND, left=44)  # those of the later call stay closed
    assert headroom.earliest(5, 60 * SECOND) > 64 * SECOND


def test_deadline_of_call_without_tokens_knows_no_headroom_of_tokens() -> None:
    with virtual_time() as time:
        limiter = Limiter("600 tokens/minute", "60 RPM burst 1", clock=time.clock)

        async def main() -> float:
            await limiter.acquire()
            observe_remaining(limiter, 0, resource="tokens", per=60)
            return (await limiter.acquire(timeout=1)).waited

        assert time.run(main()) == 1


def test_deadline_is_not_refused_while_a_reply_may_raise_headroom() -> None:
    """A call whose deadline only the headroom rules out waits while a reply is awaited."""
    with virtual_time() as time:
        limiter = Limiter("600 tokens/minute", clock=time.clock)

        async def main() -> float:
            async with limiter.acquire(tokens=1) as lease:
                observe_remaining(limiter, 0, resource="tokens", per=60)
                waiting = asyncio.ensure_future(
                    limiter.acquire(tokens=500, timeout=30).__aenter__()
                )
                await asyncio.sleep(1)
                observe_remaining(limiter, 600, resource="tokens", per=60, limit=600)
                lease.settle(tokens=1)
                return (await waiting).waited

        assert time.run(main()) == pytest.approx(1)


def test_calls_sent_after_the_answered_one_may_not_be_counted_in_what_is_left() -> None:
    with virtual_time() as time:
        limiter = Limiter("600 tokens/minute", clock=time.clock)
        for _ in range(3):
            limiter.acquire_nowait(tokens=40)
            time.advance(1)
        observe_remaining(limiter, 300, resource="tokens", per=60, since=0.5)
        ((headroom, _),) = limiter._node.extra
        assert headroom.available(time.clock()) == 300 - 2 * 40
