from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Limit
from asyncbucket.testing.assertions import (
    BusiestWindow,
    assert_never_over,
    assert_within_bucket,
    busiest_window,
)

SECOND = 1_000_000_000


traces = st.lists(
    st.tuples(
        st.one_of(
            st.integers(min_value=0, max_value=20).map(lambda half: half * SECOND // 2),
            st.integers(min_value=0, max_value=10 * SECOND),
        ),
        st.integers(min_value=0, max_value=9),
    ),
    max_size=30,
)


def test_window_over_by_one_fails_with_numbers() -> None:
    trace = [(0, 5), (30 * SECOND, 3), (60 * SECOND - 1, 3), (60 * SECOND, 5)]
    with pytest.raises(AssertionError) as caught:
        assert_never_over(trace, Limit("units", 10, per=60))
    assert str(caught.value) == (
        "over the limit: 11 units in 3 admissions from 0 s to 59.999999999 s, "
        "where any 60 s may hold 10"
    )


def test_trace_may_be_unordered_and_in_seconds_or_nanoseconds() -> None:
    in_seconds = busiest_window([(1.5, 2), (0.5, 3), (9.0, 4)], per=2)
    assert in_seconds == BusiestWindow(5, 2, SECOND // 2, 3 * SECOND // 2)
    assert in_seconds == busiest_window(
        [(9 * SECOND, 4), (SECOND // 2, 3), (3 * SECOND // 2, 2)], per=2
    )
    assert busiest_window([], per=2) == BusiestWindow(0, 0, 0, 0)


def test_exceeded_burst_fails_with_numbers() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_within_bucket([(0, 1), (0, 1), (SECOND // 4, 1)], rate=2.0, burst=2)
    assert str(caught.value) == (
        "over the burst by 0.5: 3 units in 3 admissions from 0 s to 0.25 s, "
        "where a bucket of 2 refilled at 2/s admits 2.5"
    )


def test_limit_may_be_a_string_and_its_burst_is_checked_too() -> None:
    assert assert_never_over([(0, 60_000)], "60k TPM").amount == 60_000
    assert_never_over([(float(second), 1) for second in range(10)], "10/10s burst 2")
    with pytest.raises(AssertionError, match="over the burst by 1: 3 units in 3 admissions"):
        assert_never_over([(0, 1)] * 3, "10/s burst 2")
    with pytest.raises(AssertionError, match="over the limit: 11 units in 1 admission from 0 s"):
        assert_never_over([(0, 11)], "10/s")


def test_invalid_limit_or_window_is_refused() -> None:
    limit: Any = 100
    with pytest.raises(TypeError, match='a Limit or a string such as "100 TPM", not 100'):
        assert_never_over([(0, 1)], limit)
    with pytest.raises(
        ValueError, match="reset at 00:00 UTC holds by the calendar, and in no other"
    ):
        assert_never_over([(0, 1)], "5 RPD resets 00:00 UTC")
    for per in (0, -3):
        with pytest.raises(ValueError, match=f"a positive number of seconds, not {per}"):
            busiest_window([(0, 1)], per=per)


@pytest.mark.parametrize(
    ("rate", "burst", "message"),
    [
        (-1.0, 2, "rate must be a finite number from 0 on, not -1.0"),
        (float("inf"), 2, "rate must be a finite number from 0 on, not inf"),
        (1.0, 0, "burst must be a finite number above 0, not 0"),
        (1.0, -5, "burst must be a finite number above 0, not -5"),
        (1.0, float("nan"), "burst must be a finite number above 0, not nan"),
    ],
)
def test_bucket_of_invalid_rate_or_burst_is_refused(
    rate: float, burst: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assert_within_bucket([(0, 5)], rate=rate, burst=burst)


@pytest.mark.parametrize(
    ("trace", "error", "message"),
    [
        (
            [0.0, 0.5],
            TypeError,
            r"pairs of time and amount, such as \(0\.5, 1\), .*amounts.*, not 0\.0",
        ),
        ([(0, 1), (0.5, 1)], TypeError, "mixes int times"),
        ([("0", 1)], TypeError, r"int \(ns\) or float \(s\), not '0'"),
        ([(True, 1)], TypeError, "not True"),
        ([(float("nan"), 1)], ValueError, "must be finite, not nan"),
        ([(float("inf"), 1)], ValueError, "must be finite, not inf"),
        ([(0, -1)], ValueError, "integer >= 0, not -1"),
        ([(0, 1.5)], ValueError, "integer >= 0, not 1.5"),
        ([(0, True)], ValueError, "integer >= 0, not True"),
    ],
)
def test_odd_or_invalid_trace_is_refused(trace: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        assert_never_over(trace, Limit("units", 10, per=60))


@given(traces, st.integers(min_value=1, max_value=40), st.integers(min_value=1, max_value=8))
def test_window_check_agrees_with_brute_force(
    trace: list[tuple[int, int]], amount: int, halves: int
) -> None:
    window = halves * SECOND // 2
    worst = max(
        (sum(amount for when, amount in trace if end - window < when <= end) for end, _ in trace),
        default=0,
    )
    assert busiest_window(trace, per=halves / 2).amount == worst
    if worst <= amount:
        assert_never_over(trace, Limit("units", amount, per=halves / 2))
    else:
        with pytest.raises(AssertionError, match=f"over the limit: {worst} units"):
            assert_never_over(trace, Limit("units", amount, per=halves / 2))


@given(traces, st.sampled_from([0.5, 1.0, 1 / 3, 2.0, 7.25]), st.sampled_from([1, 2, 2.5, 5, 9]))
def test_bucket_check_agrees_with_brute_force(
    trace: list[tuple[int, int]], rate: float, burst: float
) -> None:
    ordered = sorted(trace)
    over = any(
        sum(amount for _, amount in ordered[first : last + 1])
        > max(Fraction(burst), Fraction(ordered[first][1]))
        + Fraction(rate) * (ordered[last][0] - ordered[first][0]) / SECOND
        for first in range(len(ordered))
        for last in range(first, len(ordered))
    )
    if over:
        with pytest.raises(AssertionError, match="over the burst by"):
            assert_within_bucket(trace, rate=rate, burst=burst)
    else:
        assert_within_bucket(trace, rate=rate, burst=burst)
