"""Limits counted in slices: where they begin, what is left to others, and that the rest is used."""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from asyncbucket.feedback.headroom import Headroom
from asyncbucket.feedback.slices import (
    SLICE_COUNTS,
    Beat,
    Slices,
    possible_slices,
    with_small_margin,
)

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
MS = 1_000_000


def beat(*words: tuple[float, int]) -> Beat:
    """Return a detector of one-second slices of ten units that heard these reports."""
    found = Beat(share=10, length=SECOND)
    for when, left in words:
        found.update(left, round(when * SECOND))
    return found


def test_jumps_in_remaining_show_where_slices_begin() -> None:
    """Two jumps show where each slice begins, and so where later ones will."""
    heard = beat((0.2, 1), (0.4, 9))
    assert heard.is_found
    assert not heard.is_sure
    heard = beat((0.2, 1), (0.4, 9), (1.2, 2), (1.35, 8), (2.25, 0), (2.45, 9))

    assert heard.is_sure
    assert 7.3 * SECOND <= heard.nearest(7 * SECOND) <= 7.4 * SECOND
    assert heard.uncertainty <= 0.2 * SECOND


def test_steady_refill_is_not_taken_for_a_slice() -> None:
    """A bucket refills steadily: four more after 0.4 s do not indicate a slice."""
    assert not beat((0, 1), (0.4, 5)).is_found
    assert not beat((0, 5), (0.1, 4)).is_found


def test_jump_after_half_a_slice_of_silence_is_ignored() -> None:
    """The slice may have begun at any moment in between."""
    assert not beat((0, 0), (0.5, 10)).is_found


def test_irregular_jumps_do_not_make_slices_sure() -> None:
    """A sliding window jumps, too, but irregularly: nothing is sure, and the search starts anew."""
    words = [(second + 0.3 * (second % 3), 0) for second in range(8)]
    jumps = [(when + 0.05, 9) for when, _ in words]
    heard = beat(*(word for pair in zip(words, jumps, strict=True) for word in pair))

    assert heard.is_found
    assert not heard.is_sure


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


@dataclass
class Provider:
    """Count in slices of a second that begin at `phase`, and refuse what is above the share."""

    phase: int
    share: int = 10
    used: Counter[int] = field(default_factory=Counter)
    refused: int = 0

    def left(self, now: int) -> int:
        return self.share - self.used[(now + self.phase) // SECOND]

    def admit(self, amount: int, now: int) -> None:
        if self.left(now) >= amount:
            self.used[(now + self.phase) // SECOND] += amount
        else:
            self.refused += amount


def saturate(
    provider: Provider, *, others: float = 0, seconds: int = 60, way: int = 0, seed: int = 1
) -> float:
    """Send all that passes while others come at random; return the part that was used.

    A reply is written after about half a second with what is left then; its way takes up to
    ``way`` ns. The first 16 seconds, in which slices are detected, do not count as use.
    """
    chance = random.Random(seed)
    slices = Slices(amount=60 * provider.share, window=MINUTE, number=60)
    slices.update(provider.share, SECOND)
    events: list[tuple[int, int, str, int]] = [(SECOND, 0, "ask", 0)]
    number = 0

    def later(delay: float, what: str, left: int = 0) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (now + round(delay), number, what, left))

    now = SECOND
    if others:
        later(0, "others")
    end = (seconds + 1) * SECOND
    asked = 0
    while now < end:
        now, _, what, left = heapq.heappop(events)
        if what == "others":
            provider.admit(1, now)
            later(chance.expovariate(others) * SECOND, "others")
        elif what == "arrive":
            provider.admit(1, now)
            later(chance.uniform(0.1, 0.9) * SECOND, "reply")
        elif what == "reply":
            later(chance.randint(0, way), "hear", provider.left(now))
        elif what == "hear":
            slices.update(left, now)
            later(0, "ask")
        else:
            while (when := slices.earliest(1, now)) <= now:
                slices.book(1, now)
                later(chance.randint(0, way), "arrive")
            if when != asked:
                asked = when
                later(when - now, "ask")
    late = [used for index, used in provider.used.items() if 16 < index <= seconds]
    return sum(late) / (provider.share * (seconds - 16))


@pytest.mark.parametrize("phase", [0, 370 * MS, 990 * MS])
@pytest.mark.parametrize("way", [0, 50 * MS])
def test_unshared_slices_are_well_used_and_never_refused(phase: int, way: int) -> None:
    """Whenever slices begin, and with delays of up to 50 ms either way."""
    provider = Provider(phase)

    assert saturate(provider, way=way) > 0.95
    assert provider.refused == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shared_large_slices_are_well_used_with_few_refusals(seed: int) -> None:
    """Others take a random 40 of a hundred: under 0.5 % is refused, and 90 % is used."""
    provider = Provider(370 * MS, share=100)
    used = saturate(provider, others=40, way=10 * MS, seed=seed)

    assert used > 0.9
    assert provider.refused < 0.005 * 6_000


def test_shared_small_slices_are_well_used_with_few_refusals() -> None:
    """Others take a random four of ten; without making room for them, 18 % would be refused."""
    provider = Provider(370 * MS)
    used = saturate(provider, others=4, seconds=200)

    assert used > 0.88
    assert provider.refused < 0.05 * 2_000


def listen(
    hear: Callable[[int, int], None], book: Callable[[int, int], None], share: int, taken: int
) -> None:
    """Hear for half a minute of slices that begin with each second, of which others take a part.

    For some of that time we take the rest of each. The last report comes at 29.99 s.
    """
    for second in range(1, 30):
        ours = share - taken if 9 < second < 25 else 0
        for part, left in ((10, share), (450, share - taken), (900, 0), (990, 0)):
            hear(left or share - taken - ours, second * SECOND + part * MS)
            if part == 450:
                for _ in range(ours):
                    book(1, second * SECOND + 500 * MS)


def known(*, taken: int = 0, share: int = 10) -> Slices:
    """Return slices of a second whose beginning is known, and of which others take `taken`."""
    slices = Slices(amount=60 * share, window=MINUTE, number=60)
    listen(slices.update, slices.book, share, taken)
    return slices


def test_slice_reserves_others_share_until_its_end() -> None:
    """Others take six of ten: early at most two pass, and more once they have taken less."""
    slices = known(taken=6)
    assert slices.is_known
    start = 30 * SECOND + 100 * MS
    early = 0
    while early < 9 and slices.earliest(1, start) <= start:
        slices.book(1, start)
        early += 1
    late = 30 * SECOND + 950 * MS
    slices.update(9 - early, late)

    assert early <= 2
    assert slices.earliest(1, late) == late


def test_full_slice_delays_calls_until_next_slice() -> None:
    """The next call passes once the next slice has begun."""
    slices = known(taken=6)
    slices.update(0, 30 * SECOND + 500 * MS)
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
    """Undoing a call of a slice that is over brings nothing back."""
    slices = known()
    now = 30 * SECOND + 200 * MS
    for _ in range(10):
        slices.book(1, now)
    assert slices.earliest(1, now + 600 * MS) > 31 * SECOND
    slices.unbook(1, 29 * SECOND, 0)
    assert slices.earliest(1, now + 600 * MS) > 31 * SECOND
    slices.unbook(5, now, 0)

    assert slices.earliest(1, now + 600 * MS) == now + 600 * MS


def test_slices_continue_while_no_calls_are_made() -> None:
    """After a time without calls, bookings count in the slice of that time."""
    slices = known()
    now = 90 * SECOND + 500 * MS
    for _ in range(5):
        assert slices.earliest(1, now) == now
        slices.book(1, now)

    assert 90 * SECOND < slices.earliest(10, now) <= 91 * SECOND + 100 * MS


def test_slices_of_two_units_are_known_only_on_unshared_key() -> None:
    """Of two in a slice no part can be left to others, so only when alone are slices known."""
    assert known(share=2).is_known
    assert not known(share=2, taken=1).is_known


def test_new_slices_delay_calls_after_half_a_share() -> None:
    """This holds from the first reply until slices are detected or ruled out."""
    slices = Slices(amount=600, window=MINUTE, number=60)
    slices.update(10, SECOND)
    assert slices.earliest(10, SECOND) == SECOND
    slices.update(9, SECOND + 500 * MS)
    for _ in range(5):
        slices.book(1, SECOND + 500 * MS)

    assert slices.is_searching
    assert slices.earliest(1, 2 * SECOND + 400 * MS) > 2 * SECOND + 400 * MS
    for second in range(2, 11):
        slices.update(9, second * SECOND)
    assert not slices.is_searching


def test_reserve_for_random_variation_shrinks_with_expected_use() -> None:
    """The reserve is counted in whole calls, however large they are."""
    assert with_small_margin(40, 1) == 40 + 18
    assert with_small_margin(4, 1) == 4 + 4
    assert with_small_margin(0.8, 1) == 1
    assert with_small_margin(0.2, 1) == 0
    assert with_small_margin(400, 100) == 800
    assert with_small_margin(400, 100, minimal=True) == 600


def test_slices_are_tried_from_shortest_to_longest() -> None:
    """If more is left than fits into a second, the limit may be counted in ten-second slices."""
    assert [each.share for each in possible_slices(amount=600, window=MINUTE)] == [10, 100]
    assert SLICE_COUNTS == (60, 6)
    headroom = Headroom(amount=600, window=MINUTE)
    headroom.update(90, SECOND, amount=600)
    assert sum(headroom.take(1, SECOND) for _ in range(600)) < 100
    headroom.update(600, MINUTE + 2 * SECOND, amount=600)

    assert sum(headroom.take(1, MINUTE + 2 * SECOND) for _ in range(600)) == 600


def test_lowered_limit_shrinks_slices() -> None:
    """If the limit is lowered while it is counted in slices, the slices get smaller, too."""
    headroom = Headroom(amount=600, window=MINUTE)
    headroom.update(10, SECOND, amount=600)
    headroom.update(5, 2 * SECOND, amount=300)

    assert sum(headroom.take(1, 2 * SECOND) for _ in range(100)) <= 5


def test_slice_size_follows_providers_limit_not_ours() -> None:
    """Our limit is 300 of 600, but ten left are a full slice of the provider's, not twice ours."""
    headroom = Headroom(amount=300, window=MINUTE)
    headroom.update(10, SECOND, amount=300, limit=600)
    headroom.update(10, 2 * SECOND, amount=300)

    assert sum(headroom.take(1, 2 * SECOND) for _ in range(100)) <= 10
    assert headroom.others == 0


def test_known_slices_let_headroom_admit_at_next_slice_start() -> None:
    """What is left at the end of a slice tells nothing of the next one."""
    headroom = Headroom(amount=600, window=MINUTE)
    listen(lambda left, now: headroom.update(left, now, amount=600), headroom.book, 10, 0)
    for _ in range(10):
        headroom.book(1, 29 * SECOND + 500 * MS)
    begun = headroom.earliest(1, 29 * SECOND + 995 * MS)

    assert 30 * SECOND <= begun <= 30 * SECOND + 200 * MS
    assert headroom.take(1, begun)
