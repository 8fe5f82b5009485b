"""What is refused, and what the message says: the cause, the numbers, the remedy."""

import asyncio
import re
from typing import Any

import pytest

import asyncbucket
from asyncbucket import (
    AcquireTimeout,
    AsyncBucketError,
    Cost,
    CostExceedsLimit,
    Limit,
    Limiter,
    LimitSyntaxError,
    QueueFull,
    StoreError,
    TokenBucket,
    WouldBlock,
    errors,
    pace,
)
from asyncbucket.core.wording import one_line, shown
from asyncbucket.testing import VirtualTime

NO_TIMES = [float("nan"), True, "5", [], b""]


def test_errors_share_one_base_and_derive_from_builtin_errors() -> None:
    """ValueError for what can never pass, TimeoutError for what is too late."""
    for kind in (
        AcquireTimeout,
        CostExceedsLimit,
        LimitSyntaxError,
        QueueFull,
        StoreError,
        WouldBlock,
    ):
        assert issubclass(kind, AsyncBucketError)
    assert issubclass(CostExceedsLimit, ValueError)
    assert issubclass(LimitSyntaxError, ValueError)
    assert issubclass(AcquireTimeout, TimeoutError)


def test_errors_module_docstring_draws_every_error_once() -> None:
    """Each is drawn beneath the common base, with the built-in error that it also is."""
    drawn = re.findall(r"^ {4}[├└]── (\w+) (?:\((\w+)\))?", errors.__doc__ or "", re.MULTILINE)

    kinds = AsyncBucketError.__subclasses__()
    kinds += [heir for kind in kinds for heir in kind.__subclasses__()]
    assert sorted(drawn) == sorted(
        (kind.__name__, "".join(base.__name__ for base in kind.__bases__[1:]))
        for kind in kinds
        if kind.__module__ == errors.__name__ and not kind.__name__.startswith("_")
    )


async def test_cost_above_limit_fails_at_once(virtual_time: VirtualTime) -> None:
    """The message has the cost, the limit and the keyword to raise, in every kind of acquire."""
    limiter = Limiter("500 RPM", "30k TPM", "3 images/10s", clock=virtual_time.clock)
    message = (
        "cost of 36,055 tokens exceeds the limit of 30,000 tokens per 60 s and can never pass; "
        "raise tpm or split the request"
    )
    with pytest.raises(CostExceedsLimit) as error:
        await limiter.acquire(tokens=36_055)
    assert str(error.value) == message
    with pytest.raises(CostExceedsLimit) as error:
        limiter.acquire_nowait(tokens=36_055)
    assert str(error.value) == message
    with pytest.raises(CostExceedsLimit) as error:
        async with limiter.acquire(Cost(images=4)):
            pass
    assert str(error.value) == (
        "cost of 4 images exceeds the limit of 3 images per 10 s and can never pass; "
        "raise the limit or split the request"
    )
    with pytest.raises(CostExceedsLimit, match=r"cost of over 1(,000){6} tokens exceeds"):
        await limiter.acquire(tokens=10**5_000)  # Python itself would not print its digits
    assert limiter.statistics().refused == 4
    assert virtual_time.now == 0


async def test_would_block_says_what_binds_and_for_how_long(virtual_time: VirtualTime) -> None:
    """It may be requests, tokens for most of a day, slots, a pause, or calls that came first."""
    clock = virtual_time.clock
    limiter = Limiter("2 RPS burst 1", "100 TPD", concurrency=2, name="x", clock=clock)
    held = limiter.acquire_nowait(tokens=60)
    with pytest.raises(WouldBlock) as error:
        limiter.acquire_nowait()
    assert str(error.value) == (
        "a call of 1 request cannot pass without waiting: requests bind for 0.5 s more; "
        "wait with acquire()"
    )
    assert (error.value.retry_after, error.value.bound_by) == (0.5, "requests")
    with pytest.raises(WouldBlock) as error:
        limiter.acquire_nowait(tokens=60)
    assert str(error.value) == (
        "a call of 1 request, 60 tokens cannot pass without waiting: tokens bind for 86,906 s "
        "more; wait with acquire()"
    )
    assert error.value.retry_after == pytest.approx(86_400 * 515 / 512)
    limiter.pause(3, reason="429")
    with pytest.raises(WouldBlock) as error:
        limiter.acquire_nowait()
    assert "the limiter is paused for 3 s more" in str(error.value)
    assert (error.value.retry_after, error.value.bound_by) == (3.0, "paused")
    await asyncio.sleep(3)
    with limiter.acquire_nowait():
        await asyncio.sleep(1)
        with pytest.raises(WouldBlock) as error:
            limiter.acquire_nowait()
        assert "all 2 slots are taken" in str(error.value)
        assert (error.value.retry_after, error.value.bound_by) == (None, "concurrency")
        waiting = asyncio.ensure_future(limiter.acquire())
        await virtual_time.all_blocked()
        held.release()
        with pytest.raises(WouldBlock, match="cannot pass without waiting: others came first"):
            limiter.acquire_nowait()
        (await waiting).release()


async def test_would_block_tells_call_above_burst_to_wait_in_line(
    virtual_time: VirtualTime,
) -> None:
    """It earns the rest only there, so trying again without waiting would never succeed."""
    key = Limiter("20 requests/20s burst 5", clock=virtual_time.clock)
    child = key.child("chat", "100 RPM")
    for _ in range(2):
        with pytest.raises(WouldBlock) as error:
            child.acquire_nowait(requests=10)
        assert str(error.value) == (
            "a call of 10 requests cannot pass without waiting: above a burst of 5 requests it "
            "earns the rest while it is first in line; wait with acquire()"
        )
        assert (error.value.retry_after, error.value.bound_by) == (None, "requests")
        await asyncio.sleep(10)
    assert (await child.acquire(requests=10)).waited == 5.0


async def test_hopeless_timeout_of_bucket_is_refused_at_once(virtual_time: VirtualTime) -> None:
    """The error shows the time that was given and the time that is needed."""
    limiter = Limiter("1 RPM", clock=virtual_time.clock)
    await limiter.acquire()
    bucket = TokenBucket(rate=0.5, burst=3, clock=virtual_time.clock)
    await bucket.acquire(3)
    with pytest.raises(AcquireTimeout) as error:
        await bucket.acquire(2, timeout=3.5)
    assert str(error.value) == (
        "2 units cannot pass within 3.5 s at 0.5 a second; raise the timeout or the rate"
    )
    assert (error.value.retry_after, error.value.bound_by) == (4.0, "units")
    assert virtual_time.now == 0
    assert bucket.statistics().waiting == 0


@pytest.mark.parametrize("seconds", NO_TIMES)
def test_invalid_time_is_refused(seconds: float) -> None:
    """NaN, bools and strings are refused at once, by name, for every argument that is a time."""
    limiter = Limiter("5 RPM")
    for name in ("timeout", "deadline"):
        times: dict[str, Any] = {name: seconds}
        for acquire in (limiter.acquire, limiter.acquire_sync):
            with pytest.raises(ValueError) as error:
                acquire(**times)
            assert str(error.value) == f"{name} must be a number of seconds, not {seconds!r}"
    with pytest.raises(ValueError):
        limiter.pause(seconds)
    with pytest.raises(ValueError):
        asyncio.run(TokenBucket(rate=1).acquire(timeout=seconds))


def test_negative_times_are_refused_and_only_pause_must_be_finite() -> None:
    limiter = Limiter("5 RPM burst 5")
    with pytest.raises(ValueError, match="timeout must be at least 0 s, not -1; None waits for"):
        limiter.acquire(timeout=-1)
    limiter.acquire_sync(timeout=float("inf"), deadline=float("inf")).release()
    with pytest.raises(ValueError, match="a pause must end: give a finite number of seconds"):
        limiter.pause(float("inf"))
    with pytest.raises(
        ValueError, match=r"^a pause must be at least 0 s, not -1; it counts from now$"
    ):
        limiter.pause(-1)
    with pytest.raises(ValueError, match="a pause must be a number of seconds, not nan"):
        limiter.pause(float("nan"))
    message = r"^a deadline must be at least 0 s, not -1; math.inf sets none$"
    with pytest.raises(ValueError, match=message), asyncbucket.deadline(-1):
        pass
    with pytest.raises(AcquireTimeout):
        Limiter("5 RPM").acquire_sync(requests=2, deadline=-5)


@pytest.mark.parametrize("amount", [0, -1, 1.0, 1.5, float("nan"), True, "1", None])
def test_bucket_refuses_amount_that_is_not_whole_number_of_units(amount: int) -> None:
    """Anything else is refused, waiting or not, and the error shows the value."""
    bucket = TokenBucket(rate=1.0, burst=5)
    message = f"amount must be a whole number of units from 1 on, not {shown(amount)}"
    with pytest.raises(ValueError) as error:
        asyncio.run(bucket.acquire(amount))
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        bucket.acquire_nowait(amount)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "x", None, 1e-300])
def test_bucket_refuses_invalid_rate_and_burst(value: float) -> None:
    with pytest.raises(ValueError) as error:
        TokenBucket(value)
    assert str(error.value) == f"rate must be from 1e-9 to 1e9 units a second, not {value!r}"
    with pytest.raises(ValueError) as error:
        TokenBucket(1.0, value)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert (
        str(error.value)
        == f"burst must be a whole number from 1 to 1,000,000,000,000 units, not {value!r}"
    )


def test_bucket_refuses_call_above_its_burst() -> None:
    with pytest.raises(CostExceedsLimit) as error:
        TokenBucket(rate=1.0, burst=1000).acquire_nowait(2000)
    assert str(error.value) == (
        "cost of 2,000 units exceeds the burst of 1,000 units and can never pass; "
        "raise burst or split the call"
    )
    with pytest.raises(CostExceedsLimit, match="cost of 5 units exceeds the burst of 1 unit and"):
        TokenBucket(rate=1.0).acquire_nowait(5)


def test_unknown_resource_is_refused_with_list_of_known_ones() -> None:
    """The error lists the known names; the four common ones are always accepted."""
    limiter = Limiter("5 RPM", "3 images/s")
    mistyped: Any = {"imges": 3, "token": 5}
    with pytest.raises(TypeError) as error:
        limiter.acquire(**mistyped)
    assert str(error.value) == (
        "no limit counts imges, token: this limiter counts images, input_tokens, output_tokens, "
        "requests, tokens"
    )
    slots: Any = {"concurrency": 2}
    with pytest.raises(TypeError, match="a call takes one slot: concurrency is no part"):
        limiter.acquire(**slots)
    amounts: Any = {"tokens": 5, "input_tokens": 5, "images": 1}
    limiter.acquire_nowait(**amounts).release()


def test_number_in_place_of_cost_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a Cost or keywords such as tokens=500, not 5"):
        Limiter("5 RPM").acquire(5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


def test_pace_without_limit_is_refused() -> None:
    nothing: tuple[dict[str, Any], ...] = ({}, {"rpm": None}, {"on_outage": "open"})
    for keywords in nothing:
        with pytest.raises(LimitSyntaxError, match="pace\\(\\) without a limit would pace nothing"):
            pace(object(), **keywords)
    with pytest.raises(LimitSyntaxError, match="rpm must be a whole number of at least 1, not 0"):
        pace(object(), rpm=0)


async def test_messages_use_singular_for_one_and_no_underscores(virtual_time: VirtualTime) -> None:
    """This shows in messages about one call in line, one slot, and input tokens."""
    clock = virtual_time.clock
    limiter = Limiter("10 ITPM", max_queue=1, concurrency=1, clock=clock)
    held = await limiter.acquire(input_tokens=10)
    with pytest.raises(WouldBlock, match="without waiting: the one slot is taken; wait with"):
        limiter.acquire_nowait()
    held.release()
    with pytest.raises(WouldBlock, match=r"input tokens bind for 60\.4 s more"):
        limiter.acquire_nowait(input_tokens=1)
    waiting = asyncio.ensure_future(limiter.acquire(input_tokens=1))
    await virtual_time.all_blocked()
    with pytest.raises(QueueFull, match="cannot pass behind 1 call waiting already: "):
        await limiter.acquire()
    waiting.cancel()


async def test_messages_show_long_times_without_exponent(virtual_time: VirtualTime) -> None:
    """Messages do not write 1,000 s, or the seconds of a month, as powers of ten."""
    bucket = TokenBucket(rate=0.001, clock=virtual_time.clock)
    await bucket.acquire()
    with pytest.raises(WouldBlock, match=r"cannot pass before 1,000 s from now at 0\.001 a"):
        bucket.acquire_nowait()
    with pytest.raises(AcquireTimeout, match=r"cannot pass within 900 s at 0\.001 a second"):
        await bucket.acquire(timeout=900)
    assert str(Limit("requests", 5, per=30 * 86_400)) == "5 requests per 2,592,000 s"


def test_unknown_name_in_package_raises_attribute_error() -> None:
    """Some names are loaded when first used; unknown ones are an AttributeError."""
    with pytest.raises(AttributeError, match=r"^module 'asyncbucket' has no attribute 'Limitr'$"):
        _ = asyncbucket.Limitr
    assert asyncbucket.Plan.__name__ == "Plan"


def test_foreign_text_is_shown_on_one_line_without_control_characters() -> None:
    assert (
        one_line(" a\x1b[2J\x07 name\r\n\tof\u200bsomebody\u2028 é ") == "a [2J  name of somebody é"
    )
