"""The meters' arithmetic, checked against simple models that keep every booking."""

import copy
from dataclasses import dataclass, field
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbucket.core.gates import Gates
from asyncbucket.core.meters import NEVER, Bucket, Meter, Slots, Window
from asyncbucket.feedback.pause import Pause
from asyncbucket.testing import assert_within_bucket, busiest_window

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


def nanoseconds_of(rate: float | Fraction) -> Fraction:
    """Return the exact time in which one unit is refilled."""
    exact = Fraction(rate)
    simple = exact.limit_denominator(1_000_000)
    return SECOND / (simple if float(simple) == float(rate) else exact)


def missing(history: list[Booking], rate: float | Fraction, burst: int, now: int) -> Fraction:
    """Return the units that a bucket lacks at `now` if it had seen only what is left of `history`.

    A call above the burst takes all of a bucket that has stood full, and leaves it empty.
    """
    each = nanoseconds_of(rate)
    full_at = Fraction(0)
    for booking in history:
        full_at = max(full_at, Fraction(booking.when)) + min(booking.left, burst) * each
    return max(Fraction(0), full_at - now) / each


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
            allowed = max(burst, one) + (when - start) / nanoseconds_of(rate)
            assert total <= allowed


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
    """`take` fails at every instant before `earliest`, and succeeds exactly at it."""
    bucket = Bucket(rate=rate, burst=burst)
    now = 0
    for delay, units in calls:
        now += delay
        bucket.take(min(units, burst), now)
    now += pause
    amount = min(amount, burst)
    promised = bucket.earliest(amount, now)
    for share in before:
        instant = now + int((promised - now) * share)
        if instant < promised:
            assert not copy.deepcopy(bucket).take(amount, instant)
    if promised > now:
        assert not copy.deepcopy(bucket).take(amount, promised - 1)
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


steps = st.lists(
    st.tuples(
        st.sampled_from(["book", "book", "undo", "part", "owe"]),
        st.integers(0, 3 * SECOND),
        st.integers(1, 30),
        st.integers(0, 1000),
    ),
    max_size=60,
)


def play(bucket: Bucket, moves: list[tuple[str, int, int, int]]) -> tuple[list[Booking], int]:
    """Book and give back as `moves` say; return what stays booked, and the last instant."""
    history: list[Booking] = []
    now = 0
    for verb, delay, amount, pick in moves:
        if verb == "book":
            now = bucket.earliest(amount, now + delay)
            bucket.book(amount, now)
            history.append(Booking(now, amount))
        elif verb == "owe":
            now += delay
            bucket.owe(min(amount, bucket.burst), now)
            history.append(Booking(now, min(amount, bucket.burst)))
        elif history:
            now += delay
            booking = history[pick % len(history)]
            back = booking.left if verb == "undo" else booking.left // 2
            booking.left -= back
            bucket.unbook(back, booking.when, left=booking.left)
    return history, now


@moderate
@given(rates, bursts, steps, st.integers(0, 5 * SECOND))
def test_unbook_leaves_bucket_as_if_units_had_never_been_booked(
    rate: float | Fraction,
    burst: int,
    moves: list[tuple[str, int, int, int]],
    pause: int,
) -> None:
    """After any refunds, in whole or in part and however late, exactly what is left counts."""
    bucket = Bucket(rate=rate, burst=burst)
    history, now = play(bucket, moves)
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
    """With a bucket that is seldom full and refunds in any order, each step is exact."""
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


def test_bucket_memory_is_bounded() -> None:
    """However long it is busy, it keeps only a few hundred numbers."""
    bucket = Bucket(rate=1, burst=100_000)
    for step in range(50_000):
        assert bucket.take(1, step * 1000)
    assert len(bucket._dates) == len(bucket._lows) <= 512


def test_bucket_keeps_what_partially_refunded_call_above_burst_used() -> None:
    """Thirty units from a bucket of ten are settled to five: five more may pass, not ten."""
    bucket = Bucket(rate=1, burst=10)
    when = bucket.earliest(30, 0)
    assert when == 20 * SECOND
    bucket.book(30, when)
    assert bucket.available(when) == 0
    bucket.unbook(25, when, left=5)
    assert bucket.available(when) == 5


def test_window_ignores_refunds_of_bookings_from_before_it_began() -> None:
    """A refund of that instant gives nothing back, either; one of a later booking does."""
    window = Window(amount=10, window=60 * SECOND, began=5 * SECOND)
    window.book(8, 6 * SECOND)
    for when in (4, 5):
        window.unbook(3, when * SECOND)
    assert window.available(6 * SECOND) == 2
    window.unbook(3, 6 * SECOND)
    assert window.available(6 * SECOND) == 5


def test_bucket_charges_redated_call_above_burst_once() -> None:
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


def test_debt_is_paid_off_before_anything_passes() -> None:
    """Twenty-five units from a bucket of ten leave -15 available, and 16 s until one may pass."""
    bucket = Bucket(rate=1, burst=10)
    bucket.book(10, 0)
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
    """Thirty from a bucket of ten empty it if it stood full for twenty units, else it owes."""
    bucket = Bucket(rate=rate, burst=10)
    bucket.owe(30, now)
    assert bucket.available(now) == available


def test_earliest_is_sooner_if_units_come_back() -> None:
    """An empty bucket of ten passes five after five seconds, or after two if three come back."""
    bucket = Bucket(rate=1, burst=10)
    bucket.book(10, 3 * SECOND)
    assert [bucket.earliest(5, 3 * SECOND, back=n) for n in (0, 3, 5, 9)] == [
        8 * SECOND,
        5 * SECOND,
        3 * SECOND,
        3 * SECOND,
    ]


def test_bucket_counts_units_one_nanosecond_apart() -> None:
    """The smallest backlog that counts is one nanosecond."""
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


windows = st.sampled_from([1_000_000, SECOND // 10, SECOND, 60 * SECOND])


def within(history: list[Booking], now: int, span: int) -> int:
    """Return the units of `history` that were booked less than `span` before `now`."""
    return sum(booking.left for booking in history if booking.when > now - span)


@moderate
@given(
    windows,
    st.integers(1, 50),
    st.lists(st.tuples(st.floats(0, 1.2), st.integers(1, 50)), max_size=60),
)
def test_window_keeps_its_limit_and_delays_calls_by_a_128th_at_most(
    span: int, limit: int, calls: list[tuple[float, int]]
) -> None:
    """Every window keeps the limit; no call waits longer than W/128 beyond the exact instant."""
    window = Window(amount=limit, window=span)
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
    assert busiest_window(trace, per=span / SECOND).amount <= limit


@moderate
@given(
    windows,
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
    span: int, limit: int, moves: list[tuple[str, float, int, int]]
) -> None:
    """After refunds at any time, in whole or in part, it counts exactly what its window holds.

    It may count more only for what left the window less than W/128 ago.
    """
    window = Window(amount=limit, window=span)
    history: list[Booking] = []
    now = 0
    for verb, delay, amount, pick in moves:
        now += int(delay * span / 3)
        if verb in {"take", "owe"}:
            if verb == "owe":
                window.owe(amount, now)
            elif not window.take(amount, now):
                continue
            history.append(Booking(now, amount))
        elif history:
            booking = history[pick % len(history)]
            back = booking.left if verb == "undo" else booking.left // 2
            booking.left -= back
            window.unbook(back, booking.when, left=booking.left)
        available = window.available(now)
        assert limit - within(history, now, span + span // 128) <= available
        assert available <= limit - within(history, now, span)


def test_refund_of_booking_that_left_window_takes_nothing_from_newer_one() -> None:
    """A call that ends after its booking was forgotten gives nothing back."""
    window = Window(amount=1, window=SECOND)
    window.book(1, 0)
    assert window.take(1, 2 * SECOND)
    window.unbook(1, 0)
    assert window.available(2 * SECOND) == 0


def test_window_memory_is_bounded() -> None:
    """A hundred thousand bookings within one window are kept as about 513 entries."""
    window = Window(amount=1_000_000, window=SECOND)
    for step in range(100_000):
        assert window.take(1, step * 20_000)
    assert len(window._dates) <= 520
    assert len(window._units) == len(window._dates)


def test_window_in_debt_passes_nothing_until_debt_leaves() -> None:
    """Twice the limit is owed: -10 is available, and nothing passes for the whole window."""
    window = Window(amount=10, window=SECOND)
    window.owe(20, 0)
    assert window.available(0) == -10
    assert window.earliest(1, 0) == SECOND + 3 * SECOND // 512
    assert window.earliest(11, 0) == NEVER


def test_window_tells_what_was_booked_since_given_instant() -> None:
    """It knows this up to its resolution: bookings in a later booking's entry count as later."""
    window = Window(amount=10, window=SECOND)
    for when, amount in ((0, 1), (1000, 2), (SECOND // 2, 4)):
        window.book(amount, when)
    assert [window.booked_since(when) for when in (0, 1000, SECOND // 2)] == [7, 4, 0]


def test_window_counts_units_that_may_come_back_as_lent() -> None:
    """`lent` is what was booked and not given back, until a closed call is subtracted."""
    window = Window(amount=10, window=60 * SECOND)
    assert (window.amount, window.window, window.lent, window.last) == (10, 60 * SECOND, 0, 0)
    window.take(3, 1)
    window.take(2, 1)
    window.book(4, 2)
    assert window.lent == 9
    window.unbook(2, 1)
    assert window.lent == 7


def test_closed_units_of_window_are_its_oldest() -> None:
    """Nine of ten are booked and four may come back, so the oldest five are closed."""
    window = Window(amount=10, window=60 * SECOND)
    for when in (1, 2, 3):
        window.book(3, when * SECOND)
    window.lent = 4
    closed = window.without_open_calls()
    assert (closed.used, closed.lent, closed.last) == (5, 0, 2 * SECOND)
    held = 60 * SECOND * 515 // 512
    assert [closed.earliest(n, 3 * SECOND) for n in (5, 8, 10)] == [
        3 * SECOND,
        SECOND + held,
        2 * SECOND + held,
    ]
    closed.book(5, 3 * SECOND)
    assert window.used == 9


@pytest.mark.parametrize(("window", "held"), [(100, 100), (513, 516)])
def test_window_of_nanoseconds_keeps_bookings_apart(window: int, held: int) -> None:
    """If a 512th of a window is about a nanosecond or less, bookings are kept to the nanosecond."""
    meter = Window(amount=10, window=window)
    meter.book(5, 0)
    meter.book(5, 1)
    assert [meter.available(held + now) for now in (-1, 0, 1)] == [0, 5, 10]


def test_reshaped_window_keeps_what_was_booked() -> None:
    """Six of ten are used: a limit of four leaves it two over, one of twenty leaves room for 14."""
    window = Window(amount=10, window=SECOND)
    window.book(6, 0)
    window.reshape(amount=4)
    assert window.available(1) == -2
    window.reshape(amount=20)
    assert window.available(1) == 14


def test_slots_admit_calls_until_all_are_taken() -> None:
    """Of two slots two calls may take one each; a third never passes until one comes back."""
    slots = Slots(size=2)
    assert slots.take(1, 0)
    assert slots.earliest(1, 5) == 5
    slots.book(1, 0)
    assert not slots.take(1, 0)
    assert slots.earliest(1, 7) == NEVER
    slots.unbook(1, 0)
    assert slots.available(0) == 1
    slots.reshape(size=1)
    slots.owe(1, 0)
    assert slots.available(0) == -1


amounts = st.fixed_dictionaries(
    {"a": st.integers(0, 12), "b": st.integers(0, 6), "c": st.integers(0, 1)}
)


def meters_of_every_kind() -> list[tuple[Meter, str]]:
    """Make meters of every kind; two of them count the same resource."""
    return [
        (Bucket(rate=5, burst=10), "a"),
        (Window(amount=20, window=3 * SECOND), "a"),
        (Bucket(rate=2, burst=5), "b"),
        (Slots(size=3), "c"),
    ]


@moderate
@given(st.lists(st.tuples(st.integers(0, SECOND), amounts), max_size=40))
def test_gates_take_all_or_nothing(calls: list[tuple[int, dict[str, int]]]) -> None:
    """A call that one meter refuses changes nothing in the others."""
    tried, only_passed = Gates(meters_of_every_kind()), Gates(meters_of_every_kind())
    now = 0
    for delay, costs in calls:
        now += delay
        when, bound_by = only_passed.earliest(costs, now)
        passed = tried.take(costs, now)
        oversize = costs["a"] > 10 or costs["b"] > 5
        assert passed == (bound_by is None) or oversize
        if passed:
            assert when == now
            only_passed.book(costs, now)
        for (one, _), (other, _) in zip(tried.meters, only_passed.meters, strict=True):
            assert one.available(now) == other.available(now)
            assert one.earliest(3, now) >= other.earliest(3, now) - SECOND // 128


@moderate
@given(
    st.lists(st.tuples(st.integers(0, SECOND), amounts), max_size=20),
    amounts.filter(any),
    st.integers(0, 5),
    st.data(),
)
def test_gates_book_many_calls_as_if_one_by_one(
    before: list[tuple[int, dict[str, int]]], costs: dict[str, int], most: int, data: st.DataObject
) -> None:
    """As many are booked as there is room for, and a refund of one of them has the same effect."""
    together, apart = Gates(meters_of_every_kind()), Gates(meters_of_every_kind())
    now = 0
    for delay, earlier in before:
        now += delay
        assert together.take(earlier, now) == apart.take(earlier, now)

    room = together.room(costs, now, most=most)
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
        together.unbook(costs, at)
        apart.unbook(costs, at)
    for (one, _), (other, _) in zip(together.meters, apart.meters, strict=True):
        assert one.available(now) == other.available(now)
        assert one.earliest(3, now) == other.earliest(3, now)


def test_gates_have_room_for_one_call_at_a_time_in_slow_start() -> None:
    """In a slow start each call has its own instant, so there is room for only one at a time."""
    pause = Pause()
    pause.begin(16 * SECOND, 0, gradually=True)
    gates = Gates([(pause, "c"), (Slots(size=9), "c")])
    assert gates.room({"c": 1}, 15 * SECOND, most=9) == 0
    assert gates.room({"c": 1}, 16 * SECOND, most=9) == 1
    assert gates.room({"c": 1}, 16 * SECOND, most=0) == 0
    gates.book({"c": 1}, 16 * SECOND)
    assert gates.room({"c": 1}, 16 * SECOND, most=9) == 0


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


def test_gates_name_resource_that_binds() -> None:
    """The meter that is free last binds; resources that a call does not use never bind."""
    gates = Gates([(Bucket(rate=1, burst=1), "a"), (Bucket(rate=1, burst=9), "b")])
    gates.book({"a": 1, "b": 9}, 0)
    assert gates.earliest({"a": 1, "b": 3}, 0) == (3 * SECOND, "b")
    assert gates.earliest({"a": 1}, 0) == (SECOND, "a")
    assert gates.earliest({}, 5) == (5, None)


def test_soonest_assumes_that_lent_units_and_slots_come_back() -> None:
    """`soonest` assumes that all that open calls booked, and every slot, may come back."""
    gates = Gates([(Slots(size=1), "c"), (Window(amount=10, window=SECOND), "a")])
    cost = {"a": 8, "c": 1}
    assert gates.take(cost, 0)
    assert gates.soonest(cost, 0, since=0) == 0
    gates.windows[0][0].lent = 0
    assert gates.soonest(cost, 0, since=0) == SECOND + 3 * SECOND // 512
    assert gates.soonest({"c": 1}, 0, since=0) == 0
    gates.windows[0][0].lent = 8
    gates.unbook(cost, 0)
    assert gates.take(cost, 0)


@pytest.mark.parametrize(("lent", "due"), [(0, NEVER), (1, 0)])
def test_soonest_counts_only_units_lent_by_windows_of_same_resource(lent: int, due: int) -> None:
    """What other resources' windows lent does not count, whatever the order of the meters."""
    a, b = (Window(amount=10, window=SECOND) for _ in range(2))
    other = Slots(size=1)
    gates = Gates([(a, "a"), (b, "b"), (other, "a")])
    assert gates.take({"a": 1, "b": 1}, 0)
    a.lent, b.lent = lent, 1 - lent
    assert gates.soonest({"a": 1}, 0, since=0) == due


def test_bucket_takes_over_units_that_another_bucket_lacked() -> None:
    """It is missing up to a burst, beyond that it is a debt; later bookings come on top."""
    bucket = Bucket(rate=2, burst=4)
    bucket.remember(3, 10 * SECOND)
    assert bucket.available(10 * SECOND) == 1
    bucket.remember(1, 10 * SECOND)
    assert bucket.earliest(1, 10 * SECOND) == 10 * SECOND + SECOND // 2

    indebted = Bucket(rate=2, burst=4)
    indebted.remember(7, 10 * SECOND)
    assert indebted.available(10 * SECOND) == -3
    assert indebted.earliest(1, 10 * SECOND) == 12 * SECOND


def test_window_lists_its_entries_and_takes_over_those_of_another() -> None:
    """Refunds leave no entry; what is remembered is an entry, but `lent` does not count it."""
    window = Window(amount=100, window=60 * SECOND)
    window.book(5, SECOND)
    window.book(7, 10 * SECOND)
    window.book(9, 20 * SECOND)
    window.unbook(7, 10 * SECOND)
    assert window.entries(20 * SECOND) == [(SECOND, 5), (20 * SECOND, 9)]
    assert window.entries(62 * SECOND) == [(20 * SECOND, 9)]
    assert window.entries(200 * SECOND) == []

    window.remember(30, 190 * SECOND)
    assert (window.available(200 * SECOND), window.lent) == (70, 14)
    assert window.entries(200 * SECOND) == [(190 * SECOND, 30)]


def test_closed_units_of_window_are_told_apart_to_the_last_unit() -> None:
    """The oldest units of a window are those whose calls are over, down to the last unit."""
    window = Window(amount=100, window=60 * SECOND)
    window.book(1, SECOND)
    window.lent -= 1
    window.book(4, 2 * SECOND)

    closed = window.without_open_calls()
    assert closed.entries(3 * SECOND) == [(SECOND, 1)]
    assert (closed.used, closed.lent, window.used) == (1, 0, 5)


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
