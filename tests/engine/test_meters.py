"""The meters' arithmetic, checked against simple models that keep every booking."""

import copy
import json
from dataclasses import dataclass, field
from fractions import Fraction
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbucket import Limit
from asyncbucket.engine.meters import Bucket, Window
from tests.engine.conftest import take

SECOND = 1_000_000_000
moderate = settings(deadline=None, max_examples=150)

rates = st.sampled_from([0.1, 0.5, 1, 2.0, 3, 7, 1 / 3, 200_000 / 60, 1e9, Fraction(500, 60)])
bursts = st.integers(1, 20)


@dataclass
class Booking:
    """What was booked when, and how much of it is still booked."""

    when: int
    amount: int
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.amount

    def give_back(self, meter: Bucket | Window, amount: int) -> None:
        self.left -= amount
        meter.unbook(amount, self.when, left=self.left)


def nanoseconds_of(rate: float | Fraction) -> Fraction:
    exact = Fraction(rate)
    simple = exact.limit_denominator(1_000_000)
    return SECOND / (simple if float(simple) == float(rate) else exact)


def missing(history: list[Booking], rate: float | Fraction, burst: int, now: int) -> Fraction:
    """Return the units that a bucket lacks if it had seen only what is left of ``history``.

    A call above the burst takes all of a bucket that has stood full, and leaves it empty.
    """
    each = nanoseconds_of(rate)
    full_at = Fraction(0)
    for booking in history:
        full_at = max(full_at, Fraction(booking.when)) + min(booking.left, burst) * each
    return max(Fraction(0), full_at - now) / each


def window_of(amount: int, per: float = 1.0, *, burst: int | None = None) -> Window:
    return Window(Limit("units", amount, per=per, burst=burst))


# --- a bucket ---


@moderate
@given(
    rates,
    bursts,
    st.lists(st.tuples(st.integers(0, 3 * SECOND), st.integers(1, 20)), max_size=20),
    st.integers(1, 60),
    st.lists(st.floats(0, 1, exclude_max=True), max_size=8),
)
def test_bucket_refuses_before_promised_instant_and_passes_at_it(
    rate: float | Fraction,
    burst: int,
    calls: list[tuple[int, int]],
    amount: int,
    before: list[float],
) -> None:
    bucket = Bucket(rate=rate, burst=burst)
    now = answer = 0
    for delay, units in calls:
        now += delay
        assert bucket.earliest(amount, now) >= max(answer, now)
        take(bucket, min(units, burst), now)
        answer = bucket.earliest(amount, now)
    amount = min(amount, burst)
    promised = bucket.earliest(amount, now)
    for instant in {now + int((promised - now) * share) for share in before} | {promised - 1}:
        if now <= instant < promised:
            assert not take(copy.deepcopy(bucket), amount, instant)
    assert take(copy.deepcopy(bucket), amount, promised)
    assert bucket.earliest(amount, (now + promised) // 2) == promised


@moderate
@given(
    rates,
    bursts,
    st.lists(
        st.tuples(
            st.sampled_from(["book", "book", "undo", "part", "owe"]),
            st.integers(0, 3 * SECOND),
            st.integers(1, 30),
            st.integers(0, 1000),
        ),
        max_size=60,
    ),
    st.integers(0, 5 * SECOND),
)
def test_unbook_leaves_bucket_as_if_units_had_never_been_booked(
    rate: float | Fraction, burst: int, moves: list[tuple[str, int, int, int]], pause: int
) -> None:
    bucket = Bucket(rate=rate, burst=burst)
    history: list[Booking] = []
    now = 0
    for verb, delay, amount, pick in moves:
        now += delay
        if verb == "book":
            now = bucket.earliest(amount, now)
            bucket.book(amount, now)
            history.append(Booking(now, amount))
        elif verb == "owe":
            history.append(Booking(now, min(amount, burst)))
            bucket.owe(history[-1].amount, now)
        elif history:
            booking = history[pick % len(history)]
            booking.give_back(bucket, booking.left if verb == "undo" else booking.left // 2)
    now += pause
    lacking = missing(history, rate, burst, now)
    assert bucket.available(now) == (burst - lacking) // 1
    for amount in range(1, burst + 1):
        wait = max(Fraction(0), (lacking + amount - burst) * nanoseconds_of(rate))
        assert bucket.earliest(amount, now) == now + -(-wait // 1)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**9), st.sampled_from([(100, 200), (1_000, 1_500)]))
def test_refunds_to_busy_bucket_err_on_safe_side(seed: int, size: tuple[int, int]) -> None:
    random = Random(seed)
    burst, calls = size
    bucket = Bucket(rate=1, burst=burst)
    history: list[Booking] = []
    now = 0
    for _ in range(calls):
        now += random.randrange(SECOND)
        amount = random.choice([1, 1, 1, 2])
        if take(bucket, amount, now):
            history.append(Booking(now, amount))
        if random.random() < 0.2:
            booking = random.choice(history)
            booking.give_back(bucket, random.randint(0, booking.left))
    exact = (burst - missing(history, 1, burst, now)) // 1
    assert bucket.available(now) <= exact
    assert calls > 500 or bucket.available(now) == exact


def test_memory_of_meters_is_bounded() -> None:
    bucket, window = Bucket(rate=1, burst=100_000), window_of(1_000_000)
    for step in range(50_000):
        assert take(bucket, 1, step * 1_000)
        assert take(window, 1, step * 40_000)
    for meter in (bucket, window):
        assert len(json.dumps(meter.state()).split()) < 1_100


#: What is done to a bucket of ten, refilled by one a second, in which second; what is there then.
DONE: dict[str, tuple[list[tuple[str, Any, float]], int]] = {
    "a call above the burst": ([("book", 30, 20)], 0),
    "settled": ([("book", 30, 20), ("unbook 5", 25, 20)], 5),
    "undone": ([("book", 30, 20), ("unbook", 30, 20)], 10),
    "redated, and charged once": ([("book", 30, 20), ("unbook", 30, 20), ("owe", 30, 21)], 0),
    "a debt": ([("book", 10, 0), ("owe", 15, 0)], -15),
    "debt above burst, corrected": ([("book", 5, 20), ("owe", 15, 20.5), ("unbook", 15, 20.5)], 5),
    "a debt above the burst, earned": ([("owe", 30, 20)], 0),
    "a debt above the burst, not yet earned": ([("owe", 30, 20 - 1e-9)], -20),
    "forgotten refund": ([("book", 4, 1), ("shape", (4, 5), 1), ("unbook", 4, 0.9)], 1),
    "refund after a change": (
        [("book", 6, 1), ("book", 4, 6), ("shape", (2, 10), 6), ("unbook", 6, 1)],
        6,
    ),
    "refund of what was refilled before another rate": (
        [
            ("book", 4, 15),
            ("book", 2, 20),
            ("shape", (7, 10), 20),
            ("book", 3, 20),
            ("unbook", 4, 15),
        ],
        5,
    ),
    "refund before another's low, after another rate": (
        [("book", 4, 1), ("book", 3, 1.5), ("shape", (7, 10), 2), ("unbook", 4, 1)],
        7,
    ),
    "refund after another rate, between two others": (
        [
            *[("shape", (3, 9), 0), ("book", 2, 1), ("book", 6, 1.1), ("book", 1, 1.2)],
            *[("shape", (7, 9), 1.2), ("unbook", 6, 1.1)],
        ],
        6,
    ),
    "refund of a call above the burst of its day": (
        [
            *[("shape", (1, 20), 0), ("book", 30, 40), ("owe", 6, 40), ("shape", (1, 10), 41)],
            ("unbook 12", 18, 40),
        ],
        -15,
    ),
    "refund of what was refilled before": (
        [
            *[("shape", (7, 10), 0), ("book", 5, 1), ("shape", (7, 20), 2), ("book", 3, 2)],
            *[("shape", (7, 20), 2), ("unbook", 3, 1)],
        ],
        17,
    ),
}


@pytest.mark.parametrize("done", DONE)
def test_bucket_has_what_is_left_after(done: str) -> None:
    bucket = Bucket(rate=1, burst=10)
    moves, available = DONE[done]
    latest = 0
    for verb, what, second in moves:
        now = round(second * SECOND)
        latest = max(latest, now)
        if verb == "shape":
            bucket = bucket.reshaped(rate=what[0], burst=what[1], now=now)
        elif verb == "book":
            bucket.book(what, now)
        elif verb == "owe":
            bucket.owe(what, now)
        else:
            bucket.unbook(what, now, left=int(verb.removeprefix("unbook") or 0))
    assert bucket.available(latest) == available


@pytest.mark.parametrize("bursts", [[12], [12, 7], [3, 12], [20, *range(11, 30), 12]])
def test_call_above_burst_gives_back_no_more_than_it_took(bursts: list[int]) -> None:
    """It had taken the seven of its day's burst: settled to seven, it gives nothing back."""
    bucket = Bucket(rate=5, burst=7)
    when = bucket.earliest(20, 0)
    bucket.book(20, when)
    for burst in bursts:
        bucket = bucket.reshaped(rate=5, burst=burst, now=when)
    before = bucket.available(when)
    assert before == bursts[-1] - 7
    bucket.unbook(13, when, left=7)
    assert bucket.available(when) == before
    bucket.unbook(7, when)
    assert before <= bucket.available(when) <= bursts[-1]


# --- a window ---

spans = st.sampled_from([0.001, 0.1, 1, 60])


def within(history: list[Booking], now: int, span: int) -> int:
    """Return the units of ``history`` that were booked less than ``span`` before ``now``."""
    return sum(booking.left for booking in history if booking.when > now - span)


@moderate
@given(
    spans,
    st.integers(1, 50),
    st.lists(
        st.tuples(
            st.sampled_from(["take", "take", "undo", "part", "owe"]),
            st.floats(0, 1.2),
            st.integers(1, 50),
            st.integers(0, 1000),
        ),
        max_size=80,
    ),
)
def test_window_keeps_its_limit_and_counts_exactly_what_it_holds(
    per: float, limit: int, moves: list[tuple[str, float, int, int]]
) -> None:
    """After refunds at any time, in whole or in part, and debts.

    It may count more only for what left the window less than W/128 ago, so calls are late by as
    much at most; but a debt above the limit is paid in full, by a pace. What it says is lent to open calls is never less than they can still give back.
    """
    window = window_of(limit, per)
    span = window.limit.window
    history: list[Booking] = []
    now = 0
    for verb, delay, amount, pick in moves:
        now += int(delay * span / 3)
        if verb == "take":
            amount = min(amount, limit)  # noqa: PLW2901 - what can pass
            before, now = now, window.earliest(amount, now)
            assert within(history, now, span) + amount <= limit
            if now > before:
                assert not take(copy.deepcopy(window), amount, now - 1)
                early = max(before, now - span // 128 - 1)
                as_full = within(history, early, span) + amount > limit
                assert early == before or window.pace or as_full
            assert take(window, amount, now)
            history.append(Booking(now, amount))
        elif verb == "owe":
            window.owe(amount, now)
            history.append(Booking(now, amount))
        elif verb in {"undo", "part"} and history:
            booking = history[pick % len(history)]
            booking.give_back(window, booking.left if verb == "undo" else booking.left // 2)
        available = window.available(now)
        assert window.pace or limit - within(history, now, span + span // 128) <= available
        assert available <= limit - within(history, now, span)
        latest = history[-3:]
        assert window.lent(len(latest)) >= within(latest, now, span)


def test_reshaped_window_keeps_what_was_booked_and_its_pace_starts_anew() -> None:
    window = window_of(10)
    window.book(6, 0)
    shapes = [(4, None, -2), (20, None, 14), (10, 3, 3), (10, 10, 4), (10, 2, 2)]
    for amount, burst, available in shapes:
        window.reshape(Limit("units", amount, per=1, burst=burst), 1)
        assert window.available(1) == available
    window.book(1, SECOND // 2)
    window.reshape(Limit("units", 10, per=1), SECOND // 2)
    assert window.available(SECOND * 515 // 512) == 9


@moderate
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["take", "take", "owe", "part", "redate"]),
            st.integers(0, SECOND),
            st.integers(1, 15),
        ),
        max_size=30,
    )
)
def test_paced_window_does_as_bucket_and_bare_window(moves: list[tuple[str, int, int]]) -> None:
    paced, bare = window_of(20, per=3, burst=5), window_of(20, per=3)
    bucket = Bucket(rate=Fraction(20, 3), burst=5)
    last: list[tuple[int, int]] = []
    now = 0
    for verb, delay, amount in moves:
        now += delay
        due = max(bare.earliest(amount, now), bucket.earliest(amount, now))
        assert paced.earliest(amount, now) == due
        if verb == "take":
            may = all(take(copy.deepcopy(each), amount, now) for each in (bare, bucket))
            assert take(paced, amount, now) == may
            if not may:
                continue
            take(bare, amount, now)
            take(bucket, amount, now)
            last.append((amount, now))
        elif verb == "owe":
            for meter in (paced, bare, bucket):
                meter.owe(amount, now)
            last.append((amount, now))
        elif last:
            units, when = last.pop()
            for meter in (paced, bare, bucket):
                if verb == "redate":
                    meter.redate(units, when, now)
                else:
                    meter.unbook(units - units // 2, when, left=units // 2)
            last.append((units, now) if verb == "redate" else (units // 2, when))
        assert paced.available(now) == min(bare.available(now), bucket.available(now))


def test_window_is_filled_no_further_than_it_holds() -> None:
    """By what was taken elsewhere, at its own date."""
    window = Window(Limit("requests", 10, per=60, burst=10))
    window.book(4, 20 * SECOND)
    window.fill(3, 10 * SECOND, 20 * SECOND)
    window.fill(2, 30 * SECOND, 30 * SECOND)
    assert window.used == 9
    window.fill(50, 30 * SECOND, 30 * SECOND)
    assert window.used == 10
    window.fill(50, 30 * SECOND, 30 * SECOND)
    assert (window.used, window.available(30 * SECOND)) == (10, 0)
    assert window.earliest(3, 30 * SECOND) == 10 * SECOND + window.log.hold
