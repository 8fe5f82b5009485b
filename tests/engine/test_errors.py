"""Calls that are refused, and what the message says: the cause, the numbers, the remedy."""

import asyncio
import math
import re

import pytest

from asyncbucket import (
    AcquireTimeout,
    AsyncBucketError,
    Cost,
    CostExceedsLimit,
    Limiter,
    LimitSyntaxError,
    QueueFull,
    WouldBlock,
    errors,
)
from asyncbucket.engine.wording import one_line, rounded
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import HELD, all_blocked, refused, start, start_all


def test_errors_module_docstring_draws_every_error_once() -> None:
    drawn = re.findall(r"^ {4}[├└]── (\w+) (?:\((\w+)\))?", errors.__doc__ or "", re.MULTILINE)
    kinds = AsyncBucketError.__subclasses__()
    kinds += [heir for kind in kinds for heir in kind.__subclasses__()]
    assert sorted(drawn) == sorted(
        (kind.__name__, "".join(base.__name__ for base in kind.__bases__[1:]))
        for kind in kinds
        if kind.__module__ == errors.__name__ and not kind.__name__.startswith("_")
    )
    assert issubclass(CostExceedsLimit, ValueError)
    assert issubclass(LimitSyntaxError, ValueError)
    assert issubclass(AcquireTimeout, TimeoutError)


async def test_cost_above_limit_fails_at_once(time: VirtualTime) -> None:
    limiter = Limiter("500 RPM", "30k TPM", "1M tokens/d", "3 images/10s", clock=time.clock)
    never = (
        "^cost of 36,055 tokens exceeds the limit of 30,000 tokens per 60 s and can never pass; "
        "raise tpm or split the request$"
    )
    with pytest.raises(CostExceedsLimit, match=never):
        await limiter.acquire(tokens=36_055)
    for acquire in (limiter.acquire_nowait, limiter.acquire_sync):
        with pytest.raises(CostExceedsLimit, match=never):
            acquire(tokens=36_055)
    never = "^cost of 4 images exceeds the limit of 3 images per 10 s .*; raise the limit or split"
    with pytest.raises(CostExceedsLimit, match=never):
        async with limiter.acquire(Cost(images=4)):
            pass
    with pytest.raises(CostExceedsLimit, match=r"cost of over 1(,000){6} tokens exceeds"):
        await limiter.acquire(tokens=10**5_000)  # Python itself would not print its digits
    assert limiter.statistics().refused == 5
    assert time.now == 0


async def test_would_block_says_what_binds_and_for_how_long(time: VirtualTime) -> None:
    limiter = Limiter("2 RPS burst 1", "100 TPD", concurrency=2, clock=time.clock)
    held = limiter.acquire_nowait(tokens=60)
    says = "a call of 1 request cannot pass without waiting: requests bind for 0.5 s more; wait with acquire()"
    with refused(WouldBlock, says, retry_after=0.5, bound_by="requests"):
        limiter.acquire_nowait()
    says = "a call of 1 request, 60 tokens cannot pass without waiting: tokens bind for 86,906 s "
    with refused(WouldBlock, says, retry_after=pytest.approx(86_400 * HELD), bound_by="tokens"):
        limiter.acquire_nowait(tokens=60)
    limiter.pause(3, reason="429")
    with refused(WouldBlock, "is paused for 3 s more", retry_after=3.0, bound_by="paused"):
        limiter.acquire_nowait()
    await asyncio.sleep(3)
    with limiter.acquire_nowait():
        await asyncio.sleep(1)
        with refused(WouldBlock, "all 2 slots are taken", retry_after=None, bound_by="concurrency"):
            limiter.acquire_nowait()
        waiting = await start(limiter.acquire())
        held.release()
        with refused(WouldBlock, "cannot pass without waiting: those ahead need about 0.5 s"):
            limiter.acquire_nowait()
        (await waiting).release()


async def test_messages_are_written_as_people_speak(time: VirtualTime) -> None:
    """One is singular, names have no underscores, long times no exponent, foreign text no controls."""
    limiter = Limiter("10 ITPM", "1 request/1000s", max_queue=0, concurrency=1, clock=time.clock)
    with limiter.acquire_nowait(input_tokens=10):
        with refused(WouldBlock, "without waiting: the one slot is taken; wait with"):
            limiter.acquire_nowait()
        with refused(QueueFull, "a call of 1 request cannot pass without waiting: the one slot is"):
            limiter.acquire_sync()
    with refused(WouldBlock, "requests bind for 1,006 s more"):
        limiter.acquire_nowait()
    with refused(WouldBlock, "input tokens bind for 60.4 s more"):
        limiter.acquire_nowait(requests=0, input_tokens=1)
    shown = [rounded(each) for each in (0, 0.01234, 12.34, 99.6, 3_600, 1e6)]
    assert shown == ["0", "0.0123", "12.3", "99.6", "3,600", "1,000,000"]
    text = " a\x1b[2J\x07 name\r\n\tof\u200bsomebody\u2028 é "
    assert one_line(text) == "a [2J  name of somebody é"


async def test_would_block_tells_call_above_burst_to_wait_in_line(time: VirtualTime) -> None:
    """It earns the rest only there, so trying again without waiting would never succeed."""
    child = Limiter("20 requests/20s burst 5", clock=time.clock).child("chat", "100 RPM")
    says = (
        "a call of 10 requests cannot pass without waiting: above a burst of 5 requests it "
        "earns the rest while it is first in line; wait with acquire()"
    )
    for _ in range(2):
        with refused(WouldBlock, says, retry_after=None, bound_by="requests"):
            child.acquire_nowait(requests=10)
        await asyncio.sleep(10)
    assert (await child.acquire(requests=10)).waited == 5.0


# --- load shedding ---


async def test_call_beyond_max_queue_of_any_level_is_refused(time: VirtualTime) -> None:
    key = Limiter("60 RPM burst 1", max_queue=3, name="key", clock=time.clock)
    a, b = key.child("a", max_queue=2), key.child("b")
    below = a.child("below")
    await key.acquire()
    calls = await start_all(each.acquire() for each in (a, below))
    says = (
        "a call of 1 request cannot pass behind 2 calls waiting already: requests bind for "
        "3 s more; try again later or raise max_queue=2"
    )
    for limiter in (a, below):
        with refused(QueueFull, says, retry_after=3.0, bound_by="requests", limiter="key/a"):
            await limiter.acquire()
    calls.append(await start(b.acquire()))
    with refused(QueueFull, "behind 3 calls waiting already: "):
        await b.acquire()
    calls[0].cancel()
    await all_blocked()
    await asyncio.gather(a.acquire(), *calls[1:])
    assert (key.statistics().refused, key.max_queue) == (3, 3)


async def test_error_counts_those_who_are_ahead(time: VirtualTime) -> None:
    limiter = Limiter("60k TPM burst 1k", clock=time.clock)
    limiter.acquire_nowait(tokens=1_000)
    calls = await start_all(
        limiter.acquire(tokens=tokens, priority=priority)
        for tokens, priority in ((500, 0), (2_000, 0), (9_000, -1))
    )
    for priority, seconds in ((1, 1.0), (0, 6.875), (-1, 12.5)):
        says = f"tokens bind for {seconds:.3g} s more"
        with refused(AcquireTimeout, says, retry_after=seconds, bound_by="tokens"):
            await limiter.acquire(tokens=1_000, timeout=0.5, priority=priority)
    calls += await start_all(limiter.acquire(tokens=100) for _ in range(300))
    mean = (500 + 2_000 + 18 * 100) / 20  # the first twenty stand for all
    with refused(WouldBlock, retry_after=pytest.approx(1 + (302 * mean + 9_000) / 1_000)):
        limiter.acquire_nowait(tokens=1_000)
    for call in calls:
        call.cancel()


async def test_error_counts_what_others_get_meanwhile(time: VirtualTime) -> None:
    key = Limiter("60 RPM burst 1", "5000 RPD", clock=time.clock)
    a, b, slow = key.child("a"), key.child("b", weight=2), key.child("slow", rpm=6)
    key.acquire_nowait()
    calls = await start_all(each.acquire() for each in (a, b, slow) for _ in range(3))
    for limiter, seconds in ((key, 1.0), (a, 1.0 + 3 + 3 + 3), (slow, 1.0 + 3 * 10)):
        wait = pytest.approx(seconds)
        with refused(WouldBlock, retry_after=wait, bound_by="requests", limiter="default"):
            limiter.acquire_nowait()
    own = Limiter("60 RPM", name="shared", clock=time.clock).child("own", rpm=6)
    own.acquire_nowait()
    with refused(AcquireTimeout, retry_after=10.0, limiter="shared/own"):
        await own.acquire(timeout=5)
    for call in calls:
        call.cancel()


async def test_timeout_of_limiter_is_default_for_calls_and_children(time: VirtualTime) -> None:
    key = Limiter("1 RPM", timeout=10, clock=time.clock)
    await key.acquire()
    for limiter, timeout, said in (
        (key, 5, "5 s"),
        (key.child("like its parent"), None, "10 s"),
        (key.child("patient", timeout=20).child("below"), None, "20 s"),
        (key, 30, "30 s"),
    ):
        with refused(AcquireTimeout, f"cannot pass within {said}"):
            await limiter.acquire(timeout=timeout)
    assert time.now == 0
    await key.acquire(timeout=math.inf)
    assert time.now > 60


def raised(error: BaseException, *, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


def test_refusal_is_found_among_causes_contexts_and_groups() -> None:
    refusal = QueueFull("full")
    implicit, hidden, circular = ValueError("a"), ValueError("b"), ValueError("c")
    implicit.__context__ = hidden.__context__ = refusal
    hidden.__suppress_context__ = True
    circular.__context__ = raised(KeyError("d"), cause=circular)
    group = BaseExceptionGroup("e", [ValueError("f"), ExceptionGroup("g", [implicit])])
    for error in (refusal, implicit, group, raised(OSError("h"), cause=group)):
        assert errors.refusal_in(error) is refusal
    for other in (None, hidden, circular, asyncio.CancelledError()):
        assert errors.refusal_in(other) is None
