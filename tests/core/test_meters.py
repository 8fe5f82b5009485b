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

from asyncbucket import Limit, Limiter
from asyncbucket.core.meters import NEVER, Bucket, Meter, Window
from asyncbucket.core.node import Node
from asyncbucket.feedback.pause import Pause
from asyncbucket.testing import assert_within_bucket, busiest_window

SECOND = 1_000_000_000
HELD = Fraction(515, 512)
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


def nanoseconds_of(rate: float | Fraction) -> Fraction:
    """Return the exact time in which one unit is refilled."""
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


def empty_bucket(*, burst: int = 10, at: int = 0) -> Bucket:
    """Return a bucket of one unit a second, emptied at ``at``."""
    bucket = Bucket(rate=1, burst=burst)
    bucket.book(burst, at)
    return bucket


def window_of(amount: int, per: float = 1.0, *, burst: int | None = None) -> Window:
    """Return the meter of a limit of some units."""
    return Window(Limit("units", amount, per=per, burst=burst))


# --- a bucket ---


@moderate
@given(
    rates, bursts, st.lists(st.tuples(st.integers(0, 5 * SECOND), st.integers(1, 40)), max_size=40)
)
def test_bucket_never_exceeds_its_rate_and_burst(
    rate: float | Fraction, burst: int, calls: list[tuple[int, int]]
) -> None:
    """Calls that pass as early as allowed keep rate and burst in every interval."""
    bucket = Bucket(rate=rate, burst=burst)
    trace: list[tuple[int, int]] = []
    now = 0
    for delay, amount in calls:
        now = bucket.earliest(amount, now + delay)
        bucket.book(amount, now)
        trace.append((now, amount))
    exact = float(SECOND / nanoseconds_of(rate))
    if Fraction(exact) == SECOND / nanoseconds_of(rate):
        assert_within_bucket(trace, rate=exact, burst=burst)
    for first, (start, one) in enumerate(trace):
        total = 0
        for when, amount in trace[first:]:
            total += amount
            assert total <= max(burst, one) + (when - start) / nanoseconds_of(rate)


@moderate
@given(
    rates,
    bursts,
    st.lists(st.tuples(st.integers(0, 3 * SECOND), st.integers(1, 20)), max_size=20),
    st.integers(0, SECOND),
    st.integers(1, 20),
    st.lists(st.floats(0, 1, exclude_max=True), max_size=8),
)
def test_bucket_refuses_before_promised_instant_and_passes_at_it(
    rate: float | Fraction,
    burst: int,
    calls: list[tuple[int, int]],
    pause: int,
    amount: int,
    before: list[float],
) -> None:
    bucket = Bucket(rate=rate, burst=burst)
    now = 0
    for delay, units in calls:
        now += delay
        bucket.take(min(units, burst), now)
    now += pause
    amount = min(amount, burst)
    promised = bucket.earliest(amount, now)
    too_early = {now + int((promised - now) * share) for share in before} | {promised - 1}
    for instant in too_early:
        if now <= instant < promised:
            assert not copy.deepcopy(bucket).take(amount, instant)
    assert copy.deepcopy(bucket).take(amount, promised)
    assert bucket.earliest(amount, (now + promised) // 2) == promised


@moderate
@given(
    rates, bursts, st.lists(st.integers(0, 4 * SECOND), min_size=1, max_size=10), st.integers(1, 60)
)
def test_earliest_of_bucket_never_decreases_as_time_goes_by(
    rate: float | Fraction, burst: int, delays: list[int], amount: int
) -> None:
    """Asking later never gives an earlier instant, not even for calls above the burst."""
    bucket = Bucket(rate=rate, burst=burst)
    bucket.book(burst, 0)
    now = answer = 0
    for delay in delays:
        now += delay
        assert bucket.earliest(amount, now) >= max(answer, now)
        answer = bucket.earliest(amount, now)


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
    """After any refunds, in whole or in part and however late, exactly what is left counts."""
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
            bucket.owe(min(amount, burst), now)
            history.append(Booking(now, min(amount, burst)))
        elif history:
            booking = history[pick % len(history)]
            back = booking.left if verb == "undo" else booking.left // 2
            booking.left -= back
            bucket.unbook(back, booking.when, left=booking.left)
    now += pause
    lacking = missing(history, rate, burst, now)
    assert bucket.available(now) == (burst - lacking) // 1
    for amount in range(1, burst + 1):
        wait = max(Fraction(0), (lacking + amount - burst) * nanoseconds_of(rate))
        assert bucket.earliest(amount, now) == now + -(-wait // 1)


@pytest.mark.heavy
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**9))
def test_hundreds_of_refunds_to_busy_bucket_are_exact(seed: int) -> None:
    random = Random(seed)
    bucket = Bucket(rate=1, burst=100)
    history: list[Booking] = []
    now = 0
    for _ in range(200):
        now += random.randrange(SECOND)
        amount = random.choice([1, 1, 2, 7])
        if bucket.take(amount, now):
            history.append(Booking(now, amount))
        if history and random.random() < 0.4:
            booking = random.choice(history)
            back = random.randint(0, booking.left)
            booking.left -= back
            bucket.unbook(back, booking.when, left=booking.left)
        assert bucket.available(now) == (100 - missing(history, 1, 100, now)) // 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**9))
def test_refunds_beyond_memory_of_bucket_err_on_safe_side(seed: int) -> None:
    """After more bookings than a bucket remembers, refunds bring back at most what is due."""
    random = Random(seed)
    bucket = Bucket(rate=1, burst=1000)
    history: list[Booking] = []
    now = 0
    for _ in range(1500):
        now += random.randrange(SECOND)
        amount = random.choice([1, 1, 1, 2])
        if bucket.take(amount, now):
            history.append(Booking(now, amount))
        if random.random() < 0.1:
            booking = random.choice(history)
            bucket.unbook(booking.left, booking.when)
            booking.left = 0
    assert bucket.available(now) <= 1000 - missing(history, 1, 1000, now)


def test_memory_of_meters_is_bounded() -> None:
    """However many bookings there are, a meter keeps only a few hundred numbers."""
    bucket = Bucket(rate=1, burst=100_000)
    for step in range(50_000):
        assert bucket.take(1, step * 1000)
    assert len(bucket._dates) == len(bucket._lows) <= 512
    window = window_of(1_000_000)
    for step in range(100_000):
        assert window.take(1, step * 20_000)
    assert len(window._units) == len(window._dates) <= 520


def test_call_above_burst_that_is_settled_keeps_what_it_used() -> None:
    """Thirty units from a bucket of ten are settled to five: five more may pass, not ten."""
    bucket = Bucket(rate=1, burst=10)
    when = bucket.earliest(30, 0)
    assert when == 20 * SECOND
    bucket.book(30, when)
    assert bucket.available(when) == 0
    bucket.unbook(25, when, left=5)
    assert bucket.available(when) == 5


def test_call_above_burst_that_is_redated_is_charged_once() -> None:
    """If it is refunded in full and owed a second later, the bucket is empty, but not in debt."""
    bucket = Bucket(rate=1, burst=10)
    bucket.book(30, 20 * SECOND)
    bucket.unbook(30, 20 * SECOND)
    bucket.owe(30, 21 * SECOND)
    assert bucket.available(21 * SECOND) == 0


def test_refund_of_call_above_burst_keeps_what_others_booked_at_that_instant() -> None:
    """The ten units it waited for beyond the burst do not offset the five of another call."""
    bucket = Bucket(rate=1, burst=10)
    bucket.book(20, 10 * SECOND)
    bucket.owe(5, 10 * SECOND)
    bucket.unbook(20, 10 * SECOND)
    assert bucket.available(10 * SECOND) == 5


def test_debt_of_bucket_is_paid_off_before_anything_passes() -> None:
    bucket = empty_bucket()
    bucket.owe(15, 0)
    assert bucket.available(0) == -15
    assert bucket.earliest(1, 0) == 16 * SECOND


@pytest.mark.parametrize(
    ("rate", "now", "available"),
    [
        (1, 20 * SECOND, 0),
        (1, 20 * SECOND - 1, -20),
        (7, 2_857_142_858, 0),
        (7, 2_857_142_857, -20),
    ],
)
def test_debt_above_burst_is_earned_if_bucket_stood_full_long_enough(
    rate: int, now: int, available: int
) -> None:
    bucket = Bucket(rate=rate, burst=10)
    bucket.owe(30, now)
    assert bucket.available(now) == available


def test_earliest_of_bucket_is_sooner_if_units_come_back() -> None:
    bucket = empty_bucket(at=3 * SECOND)
    due = [bucket.earliest(5, 3 * SECOND, back=units) for units in (0, 3, 5, 9)]
    assert due == [8 * SECOND, 5 * SECOND, 3 * SECOND, 3 * SECOND]


def test_smallest_backlog_that_counts_is_one_nanosecond() -> None:
    bucket = Bucket(rate=1e9, burst=3)
    assert [bucket.take(1, 0) for _ in range(4)] == [True, True, True, False]


def test_reshaped_bucket_lacks_same_units_as_before() -> None:
    """Four of ten are missing before and after; only the refill follows the new rate."""
    bucket = Bucket(rate=1, burst=10)
    bucket.book(4, SECOND)
    bucket.reshape(rate=4, burst=5, now=SECOND)
    assert bucket.available(SECOND) == 1
    assert bucket.earliest(5, SECOND) == 2 * SECOND
    bucket.unbook(4, 0)
    assert bucket.available(SECOND) == 1


def test_reshaped_bucket_gives_back_no_more_than_it_still_lacked() -> None:
    """Five units had been refilled before the second call, at any rate: one of six comes back."""
    bucket = Bucket(rate=1, burst=10)
    bucket.book(6, SECOND)
    bucket.book(4, 6 * SECOND)
    bucket.reshape(rate=2, burst=10, now=6 * SECOND)
    bucket.unbook(6, SECOND)
    assert bucket.available(6 * SECOND) == 6
    bucket.reshape(rate=1, burst=20, now=7 * SECOND)
    assert bucket.available(7 * SECOND) == 18
    bucket.unbook(4, 6 * SECOND)
    assert bucket.available(7 * SECOND) == 20


def test_full_bucket_is_still_full_after_reshape() -> None:
    """It is full exactly, and refunds of what was booked before do not count."""
    bucket = Bucket(rate=7, burst=10)
    bucket.book(5, SECOND)
    bucket.reshape(rate=7, burst=20, now=2 * SECOND)
    assert bucket.available(2 * SECOND) == 20
    bucket.book(3, 2 * SECOND)
    bucket.reshape(rate=7, burst=20, now=2 * SECOND)
    assert bucket.available(2 * SECOND) == 17
    bucket.unbook(3, SECOND)
    assert bucket.available(2 * SECOND) == 17


def test_bucket_reshaped_to_another_rate_keeps_its_history_in_integers() -> None:
    """Of six units, three were refilled before the next call: only the other three come back."""
    bucket = Bucket(rate=3, burst=9)
    bucket.book(6, SECOND)
    bucket.book(3, 2 * SECOND)
    bucket.reshape(rate=7, burst=9, now=2 * SECOND)
    assert bucket.available(2 * SECOND) == 3
    bucket.unbook(6, SECOND)
    assert bucket.available(2 * SECOND) == 6
    numbers = (bucket.tat, bucket.full_at, *bucket._dates, *bucket._lows)
    assert {type(number) for number in numbers} == {int}


@pytest.mark.parametrize("bursts", [[12], [12, 7], [3, 12], [20, *range(11, 30), 12]])
def test_call_above_burst_gives_back_no_more_than_it_took_of_a_bucket_reshaped_since(
    bursts: list[int],
) -> None:
    """It had taken the seven of its day's burst: settled to seven, it gives nothing back."""
    bucket = Bucket(rate=5, burst=7)
    when = bucket.earliest(20, 0)
    bucket.book(20, when)
    for burst in bursts:
        bucket.reshape(rate=5, burst=burst, now=when)
    before = bucket.available(when)
    assert before == bursts[-1] - 7
    bucket.unbook(13, when, left=7)
    assert bucket.available(when) == before
    bucket.unbook(7, when)
    assert before <= bucket.available(when) <= bursts[-1]


@pytest.mark.parametrize("rate", [0.1, 2 / 3, 200_000 / 60, 1e-9, 123_456_789.123])
def test_bucket_meets_its_rate_exactly_over_thousands_of_units(rate: float) -> None:
    """Rounding errors do not add up: unit n beyond the burst passes at n / rate, rounded up."""
    bucket = Bucket(rate=rate, burst=2)
    when = 0
    for _ in range(5002):
        when = bucket.earliest(1, when)
        bucket.book(1, when)
    exact = 5000 * nanoseconds_of(rate)
    assert exact <= when < exact + 1


def test_booking_inlined_in_token_bucket_bounds_later_refunds() -> None:
    """Refunds of two earlier bookings give back no more than would be there without them."""
    bucket = Bucket(rate=1, burst=4)
    bucket.book(1, 0)
    bucket.book(1, 0)
    bucket.low = bucket.tat - SECOND // 2 * bucket.q  # as `TokenBucket.acquire` books one at 0.5 s
    bucket.tat += bucket.p
    bucket.unbook(1, 0)
    bucket.unbook(1, 0)
    assert bucket.earliest(4, SECOND // 2) == SECOND * 3 // 2


# --- a window ---

spans = st.sampled_from([0.001, 0.1, 1, 60])


def within(history: list[Booking], now: int, span: int) -> int:
    """Return the units of ``history`` that were booked less than ``span`` before ``now``."""
    return sum(booking.left for booking in history if booking.when > now - span)


@moderate
@given(
    spans,
    st.integers(1, 50),
    st.lists(st.tuples(st.floats(0, 1.2), st.integers(1, 50)), max_size=60),
)
def test_window_keeps_its_limit_and_delays_calls_by_a_128th_at_most(
    per: float, limit: int, calls: list[tuple[float, int]]
) -> None:
    window = window_of(limit, per)
    span = window.window
    history: list[Booking] = []
    now = 0
    for delay, units in calls:
        now += int(delay * span / 4)
        amount = min(units, limit)
        when = window.earliest(amount, now)
        assert within(history, when, span) + amount <= limit
        if when > now:
            assert not copy.deepcopy(window).take(amount, when - 1)
            too_early = max(now, when - span // 128 - 1)
            assert too_early == now or within(history, too_early, span) + amount > limit
        assert window.take(amount, when)
        history.append(Booking(when, amount))
        now = when
    trace = [(booking.when, booking.amount) for booking in history]
    assert busiest_window(trace, per=per).amount <= limit


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
def test_window_gives_back_exactly_what_was_booked(
    per: float, limit: int, moves: list[tuple[str, float, int, int]]
) -> None:
    """After refunds at any time, in whole or in part, it counts exactly what its window holds.

    It may count more only for what left the window less than W/128 ago. What it says is lent to
    open calls is never less than they can still give back.
    """
    window = window_of(limit, per)
    span = window.window
    history: list[Booking] = []
    now = 0
    for verb, delay, amount, pick in moves:
        now += int(delay * span / 3)
        if verb == "take" and window.take(amount, now):
            history.append(Booking(now, amount))
        elif verb == "owe":
            window.owe(amount, now)
            history.append(Booking(now, amount))
        elif verb in {"undo", "part"} and history:
            booking = history[pick % len(history)]
            back = booking.left if verb == "undo" else booking.left // 2
            booking.left -= back
            window.unbook(back, booking.when, left=booking.left)
        available = window.available(now)
        assert limit - within(history, now, span + span // 128) <= available
        assert available <= limit - within(history, now, span)
        latest = history[-3:]
        assert window.lent(len(latest)) >= within(latest, now, span)


def test_refund_of_booking_that_left_window_takes_nothing_from_newer_one() -> None:
    window = window_of(1)
    window.book(1, 0)
    assert window.take(1, 2 * SECOND)
    window.unbook(1, 0)
    assert window.available(2 * SECOND) == 0


def test_window_in_debt_passes_nothing_until_debt_leaves() -> None:
    window = window_of(10)
    window.owe(20, 0)
    assert window.available(0) == -10
    assert window.earliest(1, 0) == HELD * SECOND // 1
    assert window.earliest(11, 0) == NEVER


def test_window_lists_what_it_holds() -> None:
    """Refunds leave no entry; what has left the window is gone."""
    window = window_of(100, per=60)
    for when, units in ((1, 5), (10, 7), (20, 9)):
        window.book(units, when * SECOND)
    window.unbook(7, 10 * SECOND)
    assert window.entries(20 * SECOND) == [(SECOND, 5), (20 * SECOND, 9)]
    assert window.entries(62 * SECOND) == [(20 * SECOND, 9)]
    assert window.entries(200 * SECOND) == []


def test_reshaped_window_keeps_what_was_booked() -> None:
    window = window_of(10)
    window.book(6, 0)
    for amount, available in ((4, -2), (20, 14)):
        window.reshape(Limit("units", amount, per=1), 1)
        assert window.available(1) == available


def test_pace_of_window_comes_and_goes_with_its_burst() -> None:
    """Pacing that begins knows nothing of what was booked before; pacing that ends is forgotten."""
    window = window_of(10)
    window.book(6, 0)
    for burst, available in ((3, 3), (10, 4), (2, 2)):
        window.reshape(Limit("units", 10, per=1, burst=burst), 1)
        assert window.available(1) == available


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
def test_paced_window_does_what_its_bucket_and_its_bare_window_do(
    moves: list[tuple[str, int, int]],
) -> None:
    """A limit is kept together with its pace: each as if it were alone."""
    paced, bare = window_of(20, per=3, burst=5), window_of(20, per=3)
    bucket = Bucket(rate=Fraction(20, 3), burst=5)
    last: list[tuple[int, int]] = []
    now = 0
    for verb, delay, amount in moves:
        now += delay
        due = max(bare.earliest(amount, now), bucket.earliest(amount, now))
        assert paced.earliest(amount, now) == due
        if verb == "take":
            may = copy.deepcopy(bare).take(amount, now) and copy.deepcopy(bucket).take(amount, now)
            assert paced.take(amount, now) == may
            if not may:
                continue
            bare.take(amount, now)
            bucket.take(amount, now)
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


@moderate
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["take", "owe", "unbook", "burst"]),
            st.integers(0, SECOND),
            st.integers(1, 6),
        ),
        max_size=30,
    ),
    st.sampled_from([None, 5]),
)
def test_meter_restored_from_json_goes_on_as_before(
    moves: list[tuple[str, int, int]], burst: int | None
) -> None:
    """So a store can keep it."""

    def make(burst: int | None) -> Window:
        return window_of(20, per=3, burst=burst)

    meter, now, booked = make(burst), 0, [(1, 0)]
    for verb, delay, amount in moves:
        now += delay
        if verb == "burst":
            burst = None if burst is None else 5 + amount
            meter.reshape(Limit("units", 20, per=3, burst=burst), now)
        state = json.loads(json.dumps(meter.state()))
        other = make(burst)
        other.restore(state)
        for each in (meter, other):
            if verb == "take":
                each.take(amount, now)
            elif verb == "owe":
                each.owe(amount, now)
            elif verb == "unbook":
                each.unbook(*booked[-1])
        booked.append((amount, now))
        assert other.state() == meter.state()
        assert other.available(now) == meter.available(now)
        assert other.earliest(3, now) == meter.earliest(3, now)


# --- all meters of a limiter ---

amounts = st.fixed_dictionaries(
    {"a": st.integers(0, 12), "b": st.integers(0, 6), "concurrency": st.just(1)}
)
calls = st.lists(st.tuples(st.integers(0, SECOND), amounts), max_size=40)


def node_of_many_meters() -> Node:
    """Return the state of a limiter with slots, and limits of two resources, of a level above."""
    limits = (Limit("a", 20, per=3, burst=10), Limit("b", 100, per=50, burst=5))
    above = Limiter(Limit("a", 25, per=2), concurrency=5, clock=lambda: 0)
    return above.child("below", *limits, concurrency=3)._node


def state_of(node: Node, now: int) -> list[tuple[int, int]]:
    """Return what can be told apart by asking."""
    return [(meter.available(now), meter.earliest(3, now)) for meter, _ in node.meters]


@moderate
@given(calls)
def test_all_meters_are_taken_or_none(calls: list[tuple[int, dict[str, int]]]) -> None:
    """A call that one meter refuses changes nothing in the others."""
    tried, only_passed = node_of_many_meters(), node_of_many_meters()
    now = 0
    for delay, costs in calls:
        now += delay
        when, bound_by = only_passed.earliest_of_all(costs, now)
        oversize = costs["a"] > 10 or costs["b"] > 5
        passed = tried.take(costs, now)
        assert passed == (bound_by is None and not oversize)
        if passed:
            assert when == now
            only_passed.book(costs, now)
        for (left, due), (exactly, once) in zip(
            state_of(tried, now), state_of(only_passed, now), strict=True
        ):
            assert left == exactly
            assert once <= due <= once + 50 * SECOND // 128  # an entry may be dated later
        assert tried.in_flight == only_passed.in_flight
        if tried.in_flight == 3:
            for each in (tried, only_passed):
                for level in each.path:
                    level.in_flight -= 1


@moderate
@given(
    calls,
    amounts.filter(lambda costs: costs["a"] <= 10 and costs["b"] <= 5),
    st.integers(0, 5),
    st.data(),
)
def test_many_calls_are_booked_as_if_one_by_one(
    before: list[tuple[int, dict[str, int]]], costs: dict[str, int], most: int, data: st.DataObject
) -> None:
    """As many are booked as there is room for, and a refund of one of them has the same effect."""
    together, apart = node_of_many_meters(), node_of_many_meters()
    now = 0
    for delay, earlier in before:
        now += delay
        assert together.take(earlier, now) == apart.take(earlier, now)
    room = together.room(costs, now, most)
    taken = 0
    while taken < most and apart.take(costs, now):
        taken += 1
    assert room == taken
    together.book(costs, now, calls=room)
    at = now
    if room and data.draw(st.booleans()):
        now += data.draw(st.integers(0, SECOND))
        later = data.draw(amounts)
        assert together.take(later, now) == apart.take(later, now)
        together.unbook(together.meters, costs, at)
        apart.unbook(apart.meters, costs, at)
    assert state_of(together, now) == state_of(apart, now)


def test_slow_start_has_room_for_one_call_at_a_time() -> None:
    node = Limiter(concurrency=9, clock=lambda: 0)._node
    pause = Pause()
    pause.begin(16 * SECOND, 0, gradually=True)
    node.extra = ((pause, "concurrency"),)
    cost = {"concurrency": 1}
    assert node.room(cost, 15 * SECOND, 9) == 0
    assert node.room(cost, 16 * SECOND, 9) == 1
    assert node.room(cost, 16 * SECOND, 0) == 0
    node.book(cost, 16 * SECOND)
    assert node.room(cost, 16 * SECOND, 9) == 0


def test_meter_that_is_free_last_binds() -> None:
    """Resources that a call does not use never bind."""
    limits = (Limit("a", 1, per=1, burst=1), Limit("b", 9, per=9))
    node = Limiter(*limits, clock=lambda: 0)._node
    node.book({"a": 1, "b": 9}, 0)
    held = HELD * SECOND // 1
    assert node.earliest_of_all({"a": 1, "b": 3}, 0) == (9 * HELD * SECOND // 1, "b")
    assert node.earliest_of_all({"a": 1}, 0) == (held, "a")
    assert node.earliest_of_all({}, 5) == (5, None)


def test_price_of_call_is_its_largest_part_of_any_short_term_limit() -> None:
    """Of one resource the fastest limit counts; limits of days do not."""
    limits = ("600 RPM", "100 RPD", "60k TPM", "500 tokens/s")
    node = Limiter(*limits)._node
    assert node.price({"requests": 1}) == 0.1
    assert node.price({"requests": 1, "tokens": 5_000}) == 5.0
    assert Limiter()._node.price({"requests": 7}) == 1.0


class Told:
    """Note what a meter is told."""

    def __init__(self) -> None:
        self.all: list[tuple[str, int, int]] = []

    def owe(self, amount: int, when: int) -> None:
        self.all.append(("owe", amount, when))

    def unbook(self, amount: int, when: int) -> None:
        self.all.append(("unbook", amount, when))


def test_meter_that_knows_no_better_redates_by_giving_back_and_owing() -> None:
    meter: Any = Told()
    Meter.redate(meter, 5, 1, 9)
    assert meter.all == [("unbook", 5, 1), ("owe", 5, 9)]
