from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Limit
from asyncbucket.testing.assertions import BusiestWindow, assert_never_over, assert_within_bucket

SECOND = 1_000_000_000


instants = st.one_of(
    st.integers(min_value=0, max_value=20).map(lambda half: half * SECOND // 2),
    st.integers(min_value=0, max_value=10 * SECOND),
)
traces = st.lists(st.tuples(instants, st.integers(min_value=0, max_value=9)), max_size=30)


def test_trace_may_be_unordered_and_in_seconds_or_nanoseconds() -> None:
    in_seconds = assert_never_over([(1.5, 2), (0.5, 3), (9.0, 4)], "5/2s")
    assert in_seconds == BusiestWindow(5, 2, SECOND // 2, 3 * SECOND // 2)
    in_nanoseconds = [(9 * SECOND, 4), (SECOND // 2, 3), (3 * SECOND // 2, 2)]
    assert in_seconds == assert_never_over(in_nanoseconds, "5/2s")
    assert assert_never_over([], "5/2s") == BusiestWindow(0, 0, 0, 0)


def test_what_is_over_a_limit_or_its_burst_fails_with_numbers() -> None:
    trace = [(0, 5), (30 * SECOND, 3), (60 * SECOND - 1, 3), (60 * SECOND, 5)]
    with pytest.raises(AssertionError) as over:
        assert_never_over(trace, "10 TPM")
    with pytest.raises(AssertionError) as over_burst:
        assert_within_bucket([(0, 1), (0, 1), (SECOND // 4, 1)], rate=2.0, burst=2)
    assert str(over.value) == (
        "over the limit: 11 units in 3 admissions from 0 s to 59.999999999 s, "
        "where any 60 s may hold 10"
    )
    assert str(over_burst.value) == (
        "over the burst by 0.5: 3 units in 3 admissions from 0 s to 0.25 s, "
        "where a bucket of 2 refilled at 2/s admits 2.5"
    )
    assert_never_over([(float(second), 1) for second in range(10)], "10/10s burst 2")
    with pytest.raises(AssertionError, match="over the burst by 1: 3 units in 3 admissions"):
        assert_never_over([(0, 1)] * 3, "10/s burst 2")


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([(0, 1), (0.5, 1)], "mixes int times"),
        ([("0", 1)], r"int \(ns\) or float \(s\), not '0'"),
        ([(True, 1)], "not True"),
        ([(float("nan"), 1)], "must be finite, not nan"),
        ([(0, -1)], "integer >= 0, not -1"),
        ([(0, 1.5)], "integer >= 0, not 1.5"),
        ([(0, True)], "integer >= 0, not True"),
    ],
)
def test_trace_without_a_clear_meaning_is_refused(trace: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        assert_never_over(trace, "10 TPM")


def test_limit_or_bucket_without_a_clear_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="holds by the calendar, and in no other"):
        assert_never_over([(0, 1)], "5 RPD resets 00:00 UTC")
    for rate, burst in ((-1.0, 2.0), (float("inf"), 2.0), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match=f"burst above 0, not {rate} and {burst}"):
            assert_within_bucket([(0, 5)], rate=rate, burst=burst)


@given(traces, st.integers(min_value=1, max_value=8))
def test_window_check_agrees_with_brute_force(trace: list[tuple[int, int]], halves: int) -> None:
    window, per = halves * SECOND // 2, halves / 2
    ends = {end for end, _ in trace}
    sums = [sum(n for when, n in trace if end - window < when <= end) for end in ends]
    worst = max(sums, default=0)
    assert assert_never_over(trace, Limit("units", worst or 1, per=per)).amount == worst
    if worst > 1:
        with pytest.raises(AssertionError, match=f"over the limit: {worst} units"):
            assert_never_over(trace, Limit("units", worst - 1, per=per))


@given(traces, st.sampled_from([0.5, 1.0, 1 / 3, 2.0, 7.25]), st.sampled_from([1, 2, 2.5, 5, 9]))
def test_bucket_check_agrees_with_brute_force(trace: Any, rate: float, burst: float) -> None:
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
