"""What counts as a number wherever one is given."""

import json
import math
from fractions import Fraction
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, Limit, Limiter, TokenBucket, plan
from asyncbucket.core.levels import observe_remaining
from asyncbucket.core.wording import is_integer, is_number
from asyncbucket.testing import VirtualTime


@pytest.mark.parametrize("value", [3, 0.5, math.nan, math.inf, 10**400, Fraction(1, 3)])
def test_nan_infinity_and_fractions_count_as_numbers(value: object) -> None:
    """Whether a number makes sense is checked elsewhere."""
    assert is_number(value)
    assert is_integer(value) == isinstance(value, int)


@pytest.mark.parametrize("value", [True, "3", None, 1j, [3]])
def test_bools_strings_and_complex_do_not_count_as_numbers(value: object) -> None:
    assert not is_number(value)
    assert not is_integer(value)


async def test_numpy_numbers_are_accepted_everywhere() -> None:
    """Lengths counted in arrays come as numpy's types; they are kept as Python's own."""
    numpy: Any = pytest.importorskip("numpy")
    whole, real = numpy.int64, numpy.float32
    limiter = Limiter(
        rpm=whole(100), tpm=real(2000), concurrency=whole(3), max_queue=whole(5), timeout=whole(4)
    )
    child = limiter.child("child", weight=whole(2), concurrency=(whole(1), whole(4)))
    async with child.acquire(tokens=whole(5), timeout=real(1.5), priority=whole(2)) as lease:
        lease.settle(tokens=real(3))
    limiter.pause(real(0))

    assert "concurrency 0/3" in repr(limiter)
    limit = Limit("tokens", whole(10), per=real(60), burst=whole(3))
    told = json.dumps([limit.amount, limit.per, limit.burst, limiter.concurrency])
    assert told == "[10, 60.0, 3, 3]"


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "int32", "int64", "float32"])
async def test_seconds_in_small_numpy_integers_do_not_overflow(
    virtual_time: VirtualTime, kind: str
) -> None:
    numpy: Any = pytest.importorskip("numpy")
    thirty = getattr(numpy, kind)(30)
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock, slot_ttl=thirty)
    limiter.pause(thirty)
    await limiter.acquire(timeout=thirty, deadline=thirty)
    assert virtual_time.now == 30
    told = plan(rpm=100, latency=[thirty, thirty], what_if=False)
    assert told.duration == 30


def test_counts_in_small_numpy_integers_do_not_overflow() -> None:
    """Neither in a plan, which multiplies slots by time, nor where threads are counted."""
    numpy: Any = pytest.importorskip("numpy")
    three = numpy.int8(3)
    told = plan(rpm=100, calls=three, concurrency=three, latency=three, what_if=True)
    assert told.duration == 3
    limiter = Limiter("100 requests/s")
    assert sorted(item.result for item in limiter.map(str, [1, 2], workers=three)) == ["1", "2"]
    limiter = Limiter("1k TPM")
    observe_remaining(limiter, three, resource="tokens", per=60, limit=three, rounding=three)
    assert limiter.statistics().limits[0].available == three


def test_fraction_as_seconds_is_shown_as_decimal_number(virtual_time: VirtualTime) -> None:
    """Before Python 3.12 fractions cannot be formatted, and they are never valid JSON."""
    third: Any = Fraction(1, 3)
    bucket = TokenBucket(rate=third, burst=1, clock=virtual_time.clock)
    bucket.acquire_nowait()
    limiter = Limiter("60 RPM", clock=virtual_time.clock)
    paused: list[Any] = []
    limiter.observe(paused.append)
    limiter.pause(third)

    with pytest.raises(AcquireTimeout, match=r"cannot pass within 0\.333 s at 0\.333333 a"):
        virtual_time.run(bucket.acquire(timeout=third))
    assert json.dumps([event.seconds for event in paused]) == "[0.3333333333333333]"


def test_plan_accepts_numpy_numbers() -> None:
    """They give the same plan as Python's own."""
    numpy: Any = pytest.importorskip("numpy")
    whole, real = numpy.int64, numpy.float32

    planned = plan(calls=whole(100), tokens=whole(30), rpm=whole(60), latency=real(1.5))

    assert planned == plan(calls=100, tokens=30, rpm=60, latency=1.5)


def test_bucket_with_numpy_rate_is_exact(virtual_time: VirtualTime) -> None:
    numpy: Any = pytest.importorskip("numpy")

    async def take() -> None:
        bucket = TokenBucket(numpy.int64(1), numpy.int32(1), clock=virtual_time.clock)
        for _ in range(3):
            await bucket.acquire(numpy.int8(1))

    virtual_time.run(take())

    assert virtual_time.now == 2.0
