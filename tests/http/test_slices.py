"""Limits counted in slices: where they begin, what is left to others, and that the rest is used."""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from asyncbucket.feedback.slices import (
    Beat,
    Slices,
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
    heard = beat((0.2, 1), (0.4, 9))
    assert heard.is_found
    assert not heard.is_sure
    heard = beat((0.2, 1), (0.4, 9), (1.2, 2), (1.35, 8), (2.25, 0), (2.45, 9))

    assert heard.is_sure
    assert 7.3 * SECOND <= heard.nearest(7 * SECOND) <= 7.4 * SECOND
    assert heard.uncertainty <= 0.2 * SECOND


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
    provider = Provider(phase)

    assert saturate(provider, way=way) > 0.95
    assert provider.refused == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shared_large_slices_are_well_used_with_few_refusals(seed: int) -> None:
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
    slices = known(taken=6)
    slices.update(0, 30 * SECOND + 500 * MS)
    slices.book(1, 30 * SECOND + 500 * MS)
    when = slices.earliest(1, 30 * SECOND + 600 * MS)

    assert 31 * SECOND <= when <= 31 * SECOND + 100 * MS
    assert slices.earliest(1, when) == when
