"""Limits counted in slices: no more than a share passes in each, and what others take is left to them."""

import itertools

import pytest

from asyncbucket import Limit
from asyncbucket.feedback.headroom import Headroom, share_of
from asyncbucket.feedback.slices import Slices
from asyncbucket.testing import assert_never_over

SECOND = 1_000_000_000
MINUTE = 60 * SECOND


def meter(*, remaining: int | None = 10, amount: int = 600) -> Headroom:
    """Return the headroom of a limit; by a first reply, that much is left, as of a slice of ten."""
    headroom = Headroom(Limit("units", amount))
    if remaining is not None:
        headroom.update(remaining, 0, amount=amount)
    return headroom


def passed(meter: Headroom | Slices, amount: int, *, until: int, start: int = 0) -> list[int]:
    """Return when calls of ``amount`` pass that wait in line from ``start`` on."""
    times: list[int] = []
    now = start
    while (now := meter.earliest(amount, now)) < until:
        meter.book(amount, now)
        times.append(now)
    return times


def test_slices_never_admit_more_than_their_share_and_waste_little() -> None:
    """At most ten pass in a second, five of them at once; this uses 97 % of 600 a minute."""
    times = passed(meter(), 1, until=MINUTE)

    assert_never_over([(when, 1) for when in times], Limit("units", 10, per=1))
    assert times[:5] == [0] * 5
    assert times[5] > 0
    assert 0.97 < len(times) / 600 <= 1


def test_report_above_slice_share_ends_slicing() -> None:
    """After that, a tenth of the limit may pass at once."""
    headroom = meter()
    headroom.update(600, 0, amount=600)

    assert all(headroom.take(1, 0) for _ in range(60))


def test_longer_slices_are_tried_after_shorter_ones() -> None:
    """If more is left than fits into a second, the limit may be counted in ten-second slices."""
    assert (share_of(600), share_of(601)) == (10, 11)
    headroom = meter(remaining=90)
    assert 90 <= len(passed(headroom, 1, until=10 * SECOND)) <= 100
    headroom.update(600, MINUTE, amount=600)

    assert sum(headroom.take(1, MINUTE + 10 * SECOND) for _ in range(600)) == 600


def test_call_larger_than_slice_uses_up_following_slices() -> None:
    """A call of 25 takes a slice of ten and the two after it: a provider closes them, too."""
    times = passed(meter(), 25, until=10 * SECOND)

    assert len(times) > 3
    assert all(
        3 * SECOND <= later - earlier < 3.5 * SECOND for earlier, later in itertools.pairwise(times)
    )


def test_refund_of_large_call_reopens_slices() -> None:
    headroom = meter()
    headroom.book(45, 0)
    assert headroom.earliest(5, 0) > 4 * SECOND
    headroom.unbook(40, 0, left=5)
    headroom.update(10, 2 * SECOND, amount=600)

    assert headroom.take(5, 2 * SECOND)


def test_unbooked_call_returns_its_units_to_the_slice() -> None:
    headroom = meter()
    headroom.book(10, 0)
    assert not headroom.take(10, 0)
    headroom.unbook(10, 0)

    assert headroom.take(10, 0)


def test_lowered_limit_shrinks_slices() -> None:
    headroom = meter()
    headroom.update(5, 2 * SECOND, amount=300, limit=300)

    assert sum(headroom.take(1, 2 * SECOND) for _ in range(100)) <= 5


def test_slice_size_follows_providers_limit_not_ours() -> None:
    """Our limit is 300 of 600, but ten left are a full slice of the provider's, not twice ours."""
    headroom = meter(remaining=None, amount=300)
    headroom.update(10, SECOND, amount=300, limit=600)
    headroom.update(10, 2 * SECOND, amount=300)

    assert sum(headroom.take(1, 2 * SECOND) for _ in range(100)) <= 10
    assert headroom.others.estimate == 0


def shared(taken: int, *, at_most: int = 10, ours: int = 0) -> Slices:
    """Return slices of ten of which others took a part for 20 s, and we as well."""
    slices = Slices(10, SECOND)
    for second in range(1, 21):
        for _ in range(ours):
            slices.book(1, second * SECOND)
        end = second * SECOND + 900_000_000
        slices.update(10 - taken - ours, end, at_most=at_most)
    return slices


@pytest.mark.parametrize(("taken", "ours"), [(4, 5), (6, 2), (9, 1)])
def test_what_others_take_and_a_margin_is_left_to_them_evenly(taken: int, ours: int) -> None:
    """At least one call passes in each slice, and at most two at once."""
    times = passed(shared(taken), 1, start=30 * SECOND, until=40 * SECOND)

    assert_never_over([(when, 1) for when in times], Limit("units", ours, per=1))
    assert len(times) >= 9 * ours
    assert all(third > first for first, third in zip(times, times[2:], strict=False))


@pytest.mark.parametrize(
    "slices",
    [
        pytest.param(shared(0, ours=8), id="what we booked ourselves"),
        pytest.param(shared(6, at_most=0), id="what is never there, as in a small bucket"),
    ],
)
def test_nothing_is_left_to_others_who_take_nothing(slices: Slices) -> None:
    assert len(passed(slices, 1, start=30 * SECOND, until=40 * SECOND)) >= 97


def test_calls_of_ours_that_come_back_late_are_not_taken_for_missing() -> None:
    """In a sliding second, what was booked at once comes back at once, a second later."""
    headroom = meter()
    for _ in range(5):
        headroom.book(1, SECOND)
    for tenth in range(9):
        headroom.update(5, SECOND + tenth * SECOND // 10, amount=600)

    assert headroom.available(SECOND + 900_000_000) == 6


def test_others_share_is_left_to_them_by_headroom_too() -> None:
    """Others take four of ten by the end of each slice, so less than six are ours."""
    headroom = meter()
    for tenth in range(400):
        headroom.update(10 - min(4, tenth % 10), tenth * SECOND // 10, amount=600)
    headroom.book(3, 41 * SECOND)

    assert headroom.earliest(1, 41 * SECOND) > 41 * SECOND
