"""Limits counted in slices: where they begin, what is left to others, and that the rest is used."""

import pytest

from asyncbucket import Limit
from asyncbucket.feedback.slices import Beat, Slices
from asyncbucket.testing import assert_never_over

SECOND = 1_000_000_000
MS = 1_000_000


def beat(*words: tuple[float, int]) -> Beat:
    found = Beat(10, SECOND)
    for when, left in words:
        found.update(left, round(when * SECOND))
    return found


JUMPS = [(0.2, 1), (0.4, 9), (1.2, 2), (1.35, 8), (2.25, 0), (2.45, 9)]
#: A sliding window jumps, too, but irregularly: the search starts anew again and again.
IRREGULAR = [
    word
    for second in range(8)
    for word in ((second + 0.3 * (second % 3), 0), (second + 0.3 * (second % 3) + 0.05, 9))
]


@pytest.mark.parametrize(
    ("words", "is_found", "is_sure"),
    [
        pytest.param(JUMPS[:2], True, False, id="one jump"),
        pytest.param(JUMPS, True, True, id="three jumps a second apart"),
        pytest.param(IRREGULAR, True, False, id="a sliding second"),
        pytest.param([(0, 1), (0.4, 5)], False, False, id="a bucket's refill in 0.4 s"),
        pytest.param([(0, 5), (0.1, 4)], False, False, id="no more"),
        pytest.param([(0, 0), (0.5, 10)], False, False, id="half a slice of silence"),
    ],
)
def test_slices_begin_where_what_is_left_jumps_regularly(
    words: list[tuple[float, int]], *, is_found: bool, is_sure: bool
) -> None:
    heard = beat(*words)
    assert (heard.fits > 0, heard.is_sure) == (is_found, is_sure)
    if is_sure:
        assert 7.3 * SECOND <= heard.nearest(7 * SECOND) <= 7.4 * SECOND
        assert heard.uncertainty <= 0.2 * SECOND


def test_stray_jump_does_not_move_sure_slice_start() -> None:
    """Once, something else made room in the middle of a slice."""
    words = [(second + part, left) for second in range(6) for part, left in ((0.2, 1), (0.4, 9))]
    heard = beat(*words)
    before = heard.nearest(20 * SECOND)
    heard.update(0, round(6.7 * SECOND))
    heard.update(9, round(6.75 * SECOND))
    assert heard.is_sure
    assert heard.nearest(20 * SECOND) == before


def test_slice_start_keeps_a_margin_for_reply_delay() -> None:
    """However many jumps fit, replies may be late or early, so a margin stays on either side."""
    words = [(second + 0.3 * part, 9 * part) for second in range(1, 40) for part in (0, 1)]
    assert beat(*words, (40.29, 0), (40.31, 9)).uncertainty >= SECOND // 16


def hear(slices: Slices, left: int, now: int) -> None:
    """Report what is left; all that was booked is counted in it."""
    slices.update(left, left, left, now)


def known(*, taken: int = 0) -> Slices:
    """Return slices of ten a second whose beginning is known, and of which others take `taken`.

    For some of the half minute before we took the rest. The last report came at 29.99 s.
    """
    slices = Slices(10, SECOND, SECOND)
    for second in range(1, 30):
        ours = 10 - taken if 9 < second < 25 else 0
        end = 10 - taken - ours
        for part, left in ((10, 10), (450, 10 - taken), (900, end), (990, end)):
            hear(slices, left, second * SECOND + part * MS)
            for _ in range(ours if part == 450 else 0):
                slices.book(1, second * SECOND + 500 * MS)
    assert slices.are_known
    return slices


def test_slice_reserves_others_share_until_its_end() -> None:
    """Others take six of ten: early at most two pass, and more once they have taken less."""
    slices = known(taken=6)
    start = 30 * SECOND + 100 * MS
    early = 0
    while early < 9 and slices.earliest(1, start) <= start:
        slices.book(1, start)
        early += 1
    late = 30 * SECOND + 950 * MS
    hear(slices, 9 - early, late)
    assert early <= 2
    assert slices.earliest(1, late) == late


def test_full_slice_delays_calls_until_next_slice() -> None:
    slices = known(taken=6)
    hear(slices, 0, 30 * SECOND + 500 * MS)
    slices.book(1, 30 * SECOND + 500 * MS)
    when = slices.earliest(1, 30 * SECOND + 600 * MS)
    assert 31 * SECOND <= when <= 31 * SECOND + 100 * MS
    assert slices.earliest(1, when) == when


def test_one_call_passes_per_slice_however_much_others_take() -> None:
    """If anything is left, one call passes, so that its reply can tell whether that has changed."""
    slices = known(taken=9)
    now = 30 * SECOND + 200 * MS
    assert slices.earliest(1, now) == now
    slices.book(1, now)
    assert slices.earliest(1, now) >= 31 * SECOND


def test_call_at_slice_end_counts_in_next_slice_too() -> None:
    """It may arrive in either of the two."""
    slices = known()
    late = 30 * SECOND + 990 * MS
    for _ in range(10):
        slices.book(1, late)
    begun = slices.earliest(1, late)
    slices.book(1, begun)
    assert begun >= 31 * SECOND
    assert slices.earliest(1, begun + 500 * MS) >= 32 * SECOND


def test_unbooked_call_returns_units_only_to_its_own_slice() -> None:
    slices = known()
    now = 30 * SECOND + 200 * MS
    for _ in range(10):
        slices.book(1, now)
    assert slices.earliest(1, now + 600 * MS) > 31 * SECOND
    slices.unbook(1, 29 * SECOND)
    assert slices.earliest(1, now + 600 * MS) > 31 * SECOND
    slices.unbook(5, now)
    assert slices.earliest(1, now + 600 * MS) == now + 600 * MS


def test_slices_continue_while_no_calls_are_made() -> None:
    slices = known()
    now = 90 * SECOND + 500 * MS
    for _ in range(5):
        assert slices.earliest(1, now) == now
        slices.book(1, now)
    assert 90 * SECOND < slices.earliest(10, now) <= 91 * SECOND + 100 * MS


def test_half_of_a_share_passes_until_slices_are_found_or_ruled_out() -> None:
    slices = Slices(10, SECOND, SECOND // 2)
    hear(slices, 10, SECOND)
    times: list[int] = []
    while (when := slices.earliest(1, SECOND)) < 5 * SECOND:
        slices.book(1, when)
        times.append(when)
    assert_never_over([(when, 1) for when in times], Limit("units", 5, per=1))
    assert len(times) >= 19
    assert times[2] - times[1] > 200 * MS
    assert slices.are_searched
    for second in range(2, 11):
        hear(slices, 9, second * SECOND)
    assert not slices.are_searched


def refill(*, every: int) -> Slices:
    """Return slices of ten seconds after 14 s in which we took 5 a second, and all was back `every` s."""
    slices = Slices(100, 10 * SECOND, SECOND)
    hear(slices, 90, SECOND)
    for second in range(2, 15):
        slices.book(5, second * SECOND - SECOND // 2)
        hear(slices, 90 - 5 * (second % every), second * SECOND)
    return slices


def test_units_that_come_back_all_the_time_rule_slices_out() -> None:
    """In a slice, what was booked stays missing until it ends."""
    assert refill(every=1).are_refuted
    assert not refill(every=10).are_refuted
