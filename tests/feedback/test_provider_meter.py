"""How the provider counts is learned from what it accepts, what it refuses, and what it says."""

from typing import Any

import pytest

from asyncbucket import Limit, Limiter, WouldBlock
from asyncbucket.feedback.provider_meter import ProviderMeter
from asyncbucket.levels import meet_provider
from asyncbucket.testing import VirtualTime

SECOND = 1_000_000_000
MILLISECOND = 1_000_000
MINUTE = 60 * SECOND


def meter(limit: str = "600 RPM") -> ProviderMeter:
    return ProviderMeter(Limit.parse(limit))


def take(meter: ProviderMeter, amount: int, now: int) -> bool:
    passes = meter.earliest(amount, now) <= now
    if passes:
        meter.book(amount, now)
    return passes


def passing(meter: ProviderMeter, now: int, amount: int = 1) -> int:
    passed = 0
    while take(meter, amount, now):
        passed += 1
    return passed


@pytest.mark.parametrize(
    ("limit", "at_once"),
    [("600 RPM", 10), ("30 RPM", 1), ("5/s", 5), ("600 RPM burst 25", 25), ("60 RPM burst 60", 60)],
)
def test_a_seconds_worth_or_the_given_burst_passes_at_once(limit: str, at_once: int) -> None:
    assert passing(meter(limit), 0) == at_once


def test_call_above_the_size_passes_once_the_backlog_is_gone() -> None:
    tokens = meter("60k TPM")
    assert take(tokens, 5_000, 0)
    assert not take(tokens, 5_000, 0)
    assert tokens.earliest(5_000, 0) == 5 * SECOND
    assert tokens.earliest(5_000, 0, back=1) == 0  # a reply may bring good news


def test_size_grows_by_a_third_while_calls_are_accepted_up_to_a_tenth_of_the_limit() -> None:
    requests, sizes = meter(), list[int]()
    for now in range(7):
        passing(requests, now)
        requests.accepted(now, now)
        sizes.append(requests.size)
    assert sizes == [14, 19, 26, 35, 47, 60, 60]
    assert not requests.is_moved_by(6)


def test_refusal_cuts_the_size_to_a_third_and_begins_slowly() -> None:
    requests = meter()
    passing(requests, 0)
    assert requests.refused(1, 0, 1)  # ten were too many
    assert not requests.refused(1, 0, 1)  # of the same wave
    assert requests.size == 3
    # What passed is taken to be all there is.
    assert requests.earliest(1, 1) == 800 * MILLISECOND
    requests.accepted(0, 2)  # sent before the refusal: tells nothing of it
    requests.accepted(5, 2)  # not booked here
    assert not requests.refused(1, 5, 2)
    assert requests.size == 3


def test_larger_sizes_are_tried_again_after_four_quiet_windows() -> None:
    requests, now, tried = meter(), 0, list[int]()
    for _ in range(3):
        passing(requests, now)
        requests.refused(1, now, now + 1)
        began, size = now, requests.size
        while requests.size == size:
            now += 10 * SECOND
            passing(requests, now)
            requests.accepted(now, now)
        tried.append((now - began) // MINUTE)
    assert tried == [4, 4, 4]


def test_rate_that_is_refused_one_by_one_is_lowered_and_tried_again_in_steps() -> None:
    """The provider allows 400 a minute of the 600 told."""
    requests, refused, now, level, at = meter(), 0, 0, 10.0, 0
    for _ in range(2_000):
        now = max(now + MILLISECOND, requests.earliest(1, now))
        requests.book(1, now)
        level, at = min(10.0, level + (now - at) * 400 / MINUTE), now
        if level >= 1:
            level -= 1
            requests.accepted(now, now)
        else:
            refused += 1
            requests.refused(1, now, now)
            now += 150 * MILLISECOND
    assert 330 <= requests.rate <= 480
    assert refused < 40
    belief = requests.belief
    assert belief is not None
    assert belief.kind is None
    assert belief.words(requests.limit).startswith("the provider accepts 1 request at once and ")


def test_lowered_rate_comes_back_by_an_eighth_of_what_it_lacks_every_five_seconds() -> None:
    requests, rates = meter(), list[int]()
    take(requests, 1, 0)
    requests.refused(1, 0, 1)
    for second in range(150):
        if requests.rate not in rates:
            rates.append(requests.rate)
        take(requests, 1, second * SECOND)
        requests.accepted(second * SECOND, second * SECOND)
    assert (rates[:4], rates[-1]) == ([570, 574, 578, 581], 600)


def replies(
    meter: ProviderMeter, *told: tuple[int, float], now: int = 0, apart: int = 0, own: int = 0
) -> list[bool]:
    """Hear what remains, and in how many seconds all is back."""
    changed = []
    for left, seconds in told:
        now += apart
        span = round(seconds * SECOND), 10 * MILLISECOND
        changed.append(meter.heard(left, now, limit=600, since=now, own=own, full_in=span))
    return changed


@pytest.mark.parametrize(
    ("told", "apart", "kind", "size"),
    [
        ([(60 - n, n / 10) for n in range(1, 9)], 0, "bucket", 60),
        ([(0, 0.05 + n / 100) for n in range(4)], SECOND, "bucket", 1),
        ([(59, 0.1)] * 4, 0, None, 600),  # it says too little
        ([(60 - n // 4, n // 4 / 10) for n in range(16)], 0, "bucket", 60),  # they come in bunches
        ([(599 - n, 60) for n in range(8)], SECOND // 10, "window", 600),
        ([(0, 60)] * 8, SECOND, None, 600),  # a log or a bucket, which is empty
        ([(599 - 20 * n, 40 - n) for n in range(8)], SECOND, "window", 600),
        ([(500 - 40 * n, n) for n in range(8)], SECOND, None, 600),
        # A minute that ends soon, while nobody calls: replies hold a second's fraction by chance.
        ([(80, 4 - n / 20) for n in range(8)], 60 * MILLISECOND, None, 600),
    ],
)
def test_replies_prove_how_it_counts(told: Any, apart: int, kind: str | None, size: int) -> None:
    requests = meter()
    changed = replies(requests, *told, apart=apart)
    assert requests.kind == kind
    assert changed.count(True) == (kind is not None)
    assert requests.is_law == (kind == "bucket")
    belief = requests.belief
    assert belief is None if kind is None else (belief and belief.size == size)


def test_proven_bucket_is_used_whole_and_no_more() -> None:
    requests, passed, now = meter(), 0, 0
    while passed < 600:
        passed += passing(requests, now)
        replies(requests, (600 - passed, passed / 10), now=now, own=passed)
        requests.accepted(now, now)
        assert now < 12
        now += 1
    assert (requests.proven, passing(requests, now)) == (600, 0)
    later = now + 10 * SECOND
    assert passing(requests, later) == 100
    requests.refused(1, later, later + 1)  # others have taken it
    belief = requests.belief
    assert (belief and belief.kind, belief and belief.size) == ("bucket", 600)


def test_calls_come_a_little_later_once_one_that_came_too_soon_was_refused() -> None:
    """One a second: the network may bring two of them closer together than they left."""
    requests = meter("1/s")
    assert take(requests, 1, 0)
    assert requests.earliest(1, 0) == SECOND
    requests.refused(1, 0, 1)
    assert requests.earliest(1, 1) == SECOND + 100 * MILLISECOND


def test_what_left_before_the_limit_was_known_is_taken_for_ours_not_for_others() -> None:
    """Of forty calls that leave at once, the first reply tells the limit; the others come out of order."""
    requests = ProviderMeter(Limit.parse("600 RPM"), SECOND)
    for left in (585, 598, 560, 571, 589):
        requests.heard(left, SECOND, limit=600, since=0)
    assert requests._remaining.others.estimate == 0
    assert requests.available(SECOND) == 1  # as many as have passed at once, and one more
    assert passing(requests, 3 * SECOND) == 21


def test_one_refusal_of_a_proven_bucket_that_was_empty_is_explained_by_the_network() -> None:
    requests, sizes = meter(), list[int]()
    replies(requests, *((60 - n, n / 10) for n in range(1, 9)))
    for minute in range(1, 4):
        now = minute * MINUTE
        passing(requests, now)
        requests.heard(0, now, limit=600, since=now, own=60)
        assert requests.refused(1, now, now + 1) == (minute > 1)
        sizes.append(requests.size)
    assert sizes == [60, 50, 43]


def test_who_uses_a_key_alone_may_send_all_that_is_left() -> None:
    requests = meter()
    requests.book(1, 0)
    alone = []
    for second in range(7):
        requests.heard(599, second * SECOND, limit=600, since=second * SECOND)
        alone.append(requests.is_alone)
    assert alone == [False] * 5 + [True] * 2
    assert not requests.keeps_pace
    for second in range(7, 14):
        passing(requests, second * SECOND)
        requests.accepted(second * SECOND, second * SECOND)
    assert requests.size > 500
    requests.heard(0, 14 * SECOND, limit=600, since=14 * SECOND)  # others have taken hundreds
    assert requests.keeps_pace


def test_contradicted_proof_is_given_up_and_another_limit_is_followed() -> None:
    requests = meter()
    replies(requests, *((60 - n, n / 10) for n in range(1, 9)))
    assert replies(requests, *[(300, 0)] * 4) == [False, False, False, True]
    assert (requests.proven, requests.is_law) == (0, False)
    requests.heard(300, 0, limit=300)
    assert requests.rate == 300


@pytest.mark.parametrize(
    ("size", "rate", "kind"),
    [
        (600, 10, "bucket"),
        (540, 10, None),  # no more than a log of 600 may have left
        (600, 0, None),  # a log
        (650, 0, None),  # a minute of the clock that began with a debt of ours
    ],
)
def test_replies_without_a_time_prove_a_bucket_later(
    size: int, rate: int, kind: str | None
) -> None:
    requests, sent = meter(), 0
    for seconds in range(9):
        now = seconds * SECOND
        sent += 10 + (seconds < 5) * 5
        requests.book(10 + (seconds < 5) * 5, now)
        requests.heard(size - sent + rate * seconds, now, limit=600, since=now)
    assert requests.kind == kind


def test_lower_own_limits_stay() -> None:
    requests = meter("300 RPM")
    assert not requests.heard(599, 0, limit=600)
    replies(requests, *((60 - n, n / 10) for n in range(1, 9)))
    assert (requests.proven, requests.is_law, requests.rate) == (60, False, 300)


def test_long_window_is_not_paced_and_learns_nothing_from_refusals() -> None:
    day = meter("10k RPD")
    assert take(day, 10_000, 0)
    day.accepted(0, 1)
    assert not day.refused(1, 0, 1)
    assert (day.available(0), day.is_moved_by(0), day.pressure(5)) == (10_000, False, 0)


def test_memory_is_bounded() -> None:
    requests = meter()
    for now in range(5_000):
        requests.book(1, now)
    assert len(requests._backlog.sent) == 4_096


def test_what_comes_back_of_a_forgotten_booking_lowers_the_backlog() -> None:
    requests = meter("600 RPM burst 600")
    requests.book(500, 0)
    requests.unbook(300, 1)
    assert take(requests, 400, 0)


def test_other_limit_is_met_afresh_with_what_was_booked(virtual_time: VirtualTime) -> None:
    """Nothing is known of it; else a raised limit would wait for the old rate."""
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    meet_provider(limiter)
    limiter.acquire_nowait()
    limiter.reconfigure("60 RPM burst 1")  # the same
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait()
    limiter.reconfigure("6000 RPM")
    for _ in range(99):
        limiter.acquire_nowait()
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait()
