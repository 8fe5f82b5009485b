"""Exact checks that a trace of admissions kept a limit: every window, one pass, integers only.

A trace says what was admitted when: pairs of time and amount in any order. Times are integer
nanoseconds (from a clock) or float seconds, not a mix. Arithmetic is on integers and fractions
throughout, so there is no tolerance to choose: a nanosecond or a unit too much fails.

*Window.* A window of length W is half-open, [t, t + W): two admissions exactly W apart are never
in one window. The busiest window ends with an admission, so two pointers over the sorted trace see
it.

*Bucket.* With refill r and burst b, what is admitted from s to t (both included) is at most
b + r (t - s). With P the running sum, that is: the maximum of P_i - r t_i minus the running
minimum of P_before - r t is at most b (`rate.go` and every GCRA proof use the same line). A single
call that costs more than b earns the rest before it goes, so an interval that begins with a call
of n units may hold max(b, n) instead of b.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from asyncbucket.engine.limits import Limit
from asyncbucket.engine.wording import counted, written_out

NANOSECONDS = 1_000_000_000

TimedAmounts: TypeAlias = Iterable[tuple[float, int]]
"""Pairs of time (int: nanoseconds, float: seconds) and amount."""


@dataclass(frozen=True, slots=True)
class BusiestWindow:
    """The window that held most.

    Attributes:
        amount: Units admitted in it.
        admissions: How many admissions that were.
        first: Time of its first admission, in nanoseconds.
        last: Time of its last admission, in nanoseconds.
    """

    amount: int
    admissions: int
    first: int
    last: int


def assert_never_over(trace: TimedAmounts, limit: Limit | str) -> BusiestWindow:
    """Assert that every window of `limit.per` seconds holds at most `limit.amount`.

    `limit` may be a text, as for a limiter: `"60k TPM"`. If it has a burst (a request limit has one
    of a tenth, unless you say `"600 RPM burst 600"`), assert also that a bucket of that burst,
    refilled at `amount / per`, admits the trace.

    Returns:
        The busiest window, to assert that the limit was used: `.amount >= 0.99 * limit.amount`.

    Raises:
        AssertionError: Naming the worst window, by how much it is over and when.
        ValueError, TypeError: If the trace is not valid, or `limit` can't be read or is one of the
            calendar's.
    """
    limit = Limit.parse(limit) if isinstance(limit, str) else limit
    if limit.resets is not None:
        raise ValueError(f"{limit} holds by the calendar, and in no other window of that length")
    admissions = _admissions(trace)
    worst = _busiest(admissions, _nanoseconds(limit.per))
    if worst.amount > limit.units:
        raise AssertionError(
            f"over the limit: {counted(worst.amount, 'units')} in "
            f"{counted(worst.admissions, 'admissions')} from "
            f"{_seconds(worst.first)} to {_seconds(worst.last)}, where any {written_out(limit.per)} s may "
            f"hold {_number(limit.units)}"
        )
    if limit.burst_units is not None:
        rate = Fraction(limit.units) / Fraction(limit.per)
        _check_bucket(admissions, rate, limit.burst_units)
    return worst


def assert_within_bucket(trace: TimedAmounts, *, rate: float, burst: float) -> None:
    """Assert that a bucket refilled at `rate` units a second and holding `burst` admits the trace.

    Raises:
        AssertionError: Naming the worst interval, by how much it is over and when.
        ValueError, TypeError: If the trace is not valid, `rate` is not a finite number from 0 on,
            or `burst` is not above 0.
    """
    if not (0 <= rate < math.inf and 0 < burst < math.inf):
        raise ValueError(f"rate must be at least 0 and burst above 0, not {rate!r} and {burst!r}")
    _check_bucket(_admissions(trace), Fraction(rate), burst)


def _busiest(admissions: list[tuple[int, int]], window: int) -> BusiestWindow:
    worst = BusiestWindow(0, 0, 0, 0)
    oldest = held = 0
    for newest, (now, amount) in enumerate(admissions):
        held += amount
        while admissions[oldest][0] <= now - window:
            held -= admissions[oldest][1]
            oldest += 1
        if held > worst.amount:
            worst = BusiestWindow(held, newest - oldest + 1, admissions[oldest][0], now)
    return worst


def _check_bucket(admissions: list[tuple[int, int]], rate: Fraction, burst: float) -> None:
    """Count in units of 1 / scale, so that a nanosecond's refill and the burst are integers."""
    size = Fraction(burst)
    scale = NANOSECONDS * rate.denominator * size.denominator
    refill, full = rate.numerator * size.denominator, int(size * scale)
    total = excess = lowest = start = 0
    interval = (0, 0)
    for index, (now, amount) in enumerate(admissions):
        below = total - refill * now + max(0, amount * scale - full)
        if index == 0 or below < lowest:
            lowest, start = below, index
        total += amount * scale
        if total - refill * now - lowest - full > excess:
            excess, interval = total - refill * now - lowest - full, (start, index)
    worst = Fraction(excess, scale)
    if worst:
        over = admissions[interval[0] : interval[1] + 1]
        amount = sum(amount for _, amount in over)
        raise AssertionError(
            f"over the burst by {_number(float(worst))}: {counted(amount, 'units')} in "
            f"{counted(len(over), 'admissions')} from {_seconds(over[0][0])} to "
            f"{_seconds(over[-1][0])}, where a bucket of {_number(burst)} refilled at "
            f"{_number(float(rate))}/s admits {_number(float(amount - worst))}"
        )


def _admissions(trace: TimedAmounts) -> list[tuple[int, int]]:
    """Sort a trace and convert its times to nanoseconds; refuse what has no clear meaning."""
    pairs = list(trace)
    for when, amount in pairs:
        if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
            raise ValueError(f"an amount in a trace must be an integer >= 0, not {amount!r}")
        if type(when) not in (int, float):
            raise TypeError(f"a time in a trace must be int (ns) or float (s), not {when!r}")
    if len({type(when) for when, _ in pairs}) > 1:
        raise TypeError("a trace mixes int times (ns) and float times (s); use one kind")
    return sorted((when if type(when) is int else _nanoseconds(when), n) for when, n in pairs)


def _nanoseconds(seconds: float) -> int:
    try:
        return round(seconds * NANOSECONDS)
    except (ValueError, OverflowError) as exc:
        raise ValueError(f"a time must be finite, not {seconds}") from exc


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{float(value):,.6g}"


def _seconds(nanoseconds: int) -> str:
    whole, rest = divmod(nanoseconds, NANOSECONDS)
    return f"{whole}.{rest:09d}".rstrip("0").rstrip(".") + " s"
