"""A call that gives up, at whatever await, leaves everything as if it had never asked."""

import asyncio
import gc
import random
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, Lease, Limiter, TokenBucket
from asyncbucket.core.meters import NEVER, Meter
from asyncbucket.core.queue import Waiter
from asyncbucket.testing import VirtualTime, virtual_time
from tests.core.conftest import steps


def nothing_is_left(limiter: Limiter) -> None:
    """Assert that nobody waits and nothing is held."""
    now = limiter.statistics()
    assert (now.waiting, now.in_flight) == (0, 0)
    with limiter.acquire_nowait() as lease:
        assert lease.waited == 0


@pytest.mark.parametrize("cancel_first", [True, False])
@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("before", range(6))
async def test_waiter_cancelled_at_any_step_leaks_nothing(
    virtual_time: VirtualTime, before: int, after: int, *, cancel_first: bool
) -> None:
    """Whether it waits, is being admitted or was just admitted: its slot comes back."""
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)
    holder = await limiter.acquire()
    served: list[str] = []

    async def call(name: str) -> None:
        async with limiter.acquire():
            served.append(name)
            await asyncio.sleep(1)

    first = asyncio.create_task(call("first"))
    second = asyncio.create_task(call("second"))
    await steps(before)
    if cancel_first:
        first.cancel()
        await steps(after)
        holder.release()
    else:
        holder.release()
        await steps(after)
        first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert first.cancelled()
    assert served[-1] == "second"
    assert virtual_time.now == 1.0
    nothing_is_left(limiter)


@pytest.mark.parametrize("reach", range(10))
async def test_all_waiters_cancelled_at_any_step_leak_nothing(
    virtual_time: VirtualTime, reach: int
) -> None:
    """A slot is released, and at some step soon after that all waiting calls are cancelled."""
    limiter = Limiter("1000 TPM", concurrency=1, clock=virtual_time.clock)
    holder = await limiter.acquire(tokens=10)
    calls = [asyncio.create_task(acquire_and_release(limiter)) for _ in range(3)]
    await virtual_time.all_blocked()
    holder.release()
    await steps(reach)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    nothing_is_left(limiter)
    if reach < 2:
        assert limiter.statistics().limits[0].used == 10
        assert limiter.statistics().cancelled == 3


async def acquire_and_release(limiter: Limiter) -> None:
    """Acquire and release."""
    async with limiter.acquire(tokens=10):
        pass


@pytest.mark.parametrize("limits", [("100 TPM",), ("100 TPM", "5 images/min")])
async def test_units_handed_to_cancelled_waiter_go_to_next_call(
    virtual_time: VirtualTime, limits: tuple[str, ...]
) -> None:
    """If 90 of 100 tokens are handed over and given back, the next call passes at that instant."""
    limiter = Limiter(*limits, concurrency=1, clock=virtual_time.clock)
    holder = await limiter.acquire()
    big = asyncio.ensure_future(limiter.acquire(tokens=90))
    next_one = asyncio.ensure_future(limiter.acquire(tokens=90))
    await virtual_time.all_blocked()
    holder.release()
    await asyncio.sleep(0)  # the pacer has handed it over; its task has not run yet
    assert limiter.statistics().limits[0].used == 90
    big.cancel()
    lease = await next_one
    assert lease.waited == virtual_time.now == 0.0
    assert limiter.statistics().limits[0].used == 90
    lease.release()


async def test_next_call_passes_at_once_when_head_is_cancelled(virtual_time: VirtualTime) -> None:
    """If a costly call leaves the line, the cheap one behind it passes at that instant."""
    bucket = TokenBucket(rate=1.0, burst=10, clock=virtual_time.clock)
    await bucket.acquire(9)
    costly = asyncio.create_task(bucket.acquire(10))
    cheap = asyncio.create_task(bucket.acquire(1))
    await virtual_time.all_blocked()
    assert bucket.statistics().waiting == 2
    costly.cancel()
    await cheap
    assert virtual_time.now == 0.0
    assert bucket.statistics().waiting == 0


async def test_next_call_passes_at_once_when_head_is_cancelled_after_another_timed_out(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter("50 tokens/10s burst 7", clock=virtual_time.clock)
    limiter.acquire_nowait(tokens=7)
    late = asyncio.create_task(limiter.acquire(tokens=7, timeout=1.5))
    await asyncio.sleep(1)
    limiter.pause(1)
    with pytest.raises(AcquireTimeout):
        await late
    await asyncio.sleep(5)
    costly = asyncio.create_task(limiter.acquire(tokens=20))
    await asyncio.sleep(0)
    cheap = asyncio.create_task(limiter.acquire(tokens=5))
    await asyncio.sleep(1)
    costly.cancel()
    assert (await cheap).waited == 1


@pytest.mark.parametrize("depth", range(5))
async def test_bucket_takes_back_unit_handed_to_cancelled_waiter(
    virtual_time: VirtualTime, depth: int
) -> None:
    """Cancelled at any step around its own instant, it leaves its unit to the next call."""
    bucket = TokenBucket(rate=1.0, burst=1, clock=virtual_time.clock)
    await bucket.acquire()
    first = asyncio.create_task(bucket.acquire())
    second = asyncio.create_task(bucket.acquire())
    loop = asyncio.get_running_loop()
    await virtual_time.all_blocked()
    loop.call_at(1.0, call_after, depth, first.cancel)
    await second
    assert virtual_time.now == (1.0 if first.cancelled() else 2.0)


def call_after(steps_left: int, function: Callable[[], object]) -> None:
    """Call `function` after the loop has run `steps_left` more times."""
    if steps_left:
        asyncio.get_running_loop().call_soon(call_after, steps_left - 1, function)
    else:
        function()


@pytest.mark.parametrize("depth", range(4))
async def test_waiter_cancelled_at_its_deadline_takes_nothing(
    virtual_time: VirtualTime, depth: int
) -> None:
    """If the deadline and the cancellation come at about the same step, the call is gone."""
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)
    holder = await limiter.acquire()
    late = asyncio.ensure_future(limiter.acquire(timeout=1))
    loop = asyncio.get_running_loop()
    await virtual_time.all_blocked()
    loop.call_at(1.0, call_after, depth, late.cancel)
    with pytest.raises((asyncio.CancelledError, AcquireTimeout)):
        await late
    holder.release()
    nothing_is_left(limiter)


async def test_coroutine_closed_while_waiting_leaves_line(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)
    holder = await limiter.acquire()
    acquisition = limiter.acquire()
    acquisition.send(None)
    assert limiter.statistics().waiting == 1
    acquisition.close()
    assert limiter.statistics().waiting == 0
    holder.release()
    nothing_is_left(limiter)


async def test_asyncio_wait_for_and_timeout_leave_nothing_behind(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)
    holder = await limiter.acquire()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(limiter.acquire(), 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1), limiter.acquire():
            pass
    with pytest.raises(AcquireTimeout):
        await limiter.acquire(timeout=1)
    assert virtual_time.now == 3.0
    assert limiter.statistics().cancelled == 2
    assert limiter.statistics().refused == 1
    holder.release()
    nothing_is_left(limiter)


@pytest.mark.heavy
async def test_100_000_waiters_leave_line_when_cancelled_last_to_first(
    virtual_time: VirtualTime,
) -> None:
    """A hundred thousand waiters leave from the back in about a second: each costs the same."""
    limiter = Limiter("1 RPM", clock=virtual_time.clock)
    await limiter.acquire()
    waiters = [Hand(limiter.acquire().__await__()) for _ in range(100_000)]
    assert limiter.statistics().waiting == 100_000
    for waiter in reversed(waiters):
        waiter.cancel()
    assert limiter.statistics().waiting == 0
    assert limiter.statistics().cancelled == 100_000


CANCELLED = asyncio.CancelledError


class Hand:
    """Drive one acquisition by hand, as a task would, at a tenth of a task's cost."""

    def __init__(self, steps: Generator[Any, Any, Lease | None]) -> None:
        self._steps = steps
        self.lease: Lease | None = None
        self.future: asyncio.Future[int] | None = None
        try:
            self.future = steps.send(None)
        except StopIteration as done:
            self.lease = done.value

    def cancel(self) -> None:
        """Cancel the future and then the coroutine; if it was admitted, only the coroutine."""
        assert self.future is not None
        self.future.cancel()
        try:
            self._steps.throw(CANCELLED)
        except asyncio.CancelledError:
            return
        raise AssertionError("a cancellation was swallowed")

    def taken(self) -> bool:
        """Take the lease if the call was admitted; return whether it has finished."""
        if self.future is not None:
            if not self.future.done():
                return False
            self.future = None
            try:
                self._steps.send(None)
            except StopIteration as done:
                self.lease = done.value
        return True


class Crowd:
    """Ask and give up at random; check that calls are admitted in order of arrival."""

    def __init__(self, ask: Callable[[int], Generator[Any, Any, Lease | None]], seed: int) -> None:
        self._ask = ask
        self._chance = random.Random(seed)
        self.cancelled = 0
        self.line: list[Hand] = []
        self.held: list[Lease] = []

    async def mill(self, cancellations: int) -> None:
        """Let 5,000 calls come at a time; cancel 99 % before their turn, at it or after it."""
        while self.cancelled < cancellations:
            self.line += [Hand(self._ask(self._chance.randrange(1, 60))) for _ in range(5000)]
            await asyncio.sleep(self._chance.random() * 0.05)
            self.release()
            waits = [hand.future is not None and not hand.future.done() for hand in self.line]
            assert waits == sorted(waits)  # nobody was overtaken
            self.line = [hand for hand in self.line if self._stays(hand)]

    def _stays(self, hand: Hand) -> bool:
        """Return whether `hand` stays in line."""
        if hand.future is None or self._chance.random() < 0.01:
            if not hand.taken():
                return True
            if hand.lease is not None:
                self.held.append(hand.lease)
        else:
            hand.cancel()
            self.cancelled += 1
        return False

    async def finish(self) -> None:
        """Let the remaining calls pass, one after the other."""
        for hand in self.line:
            while not hand.taken():
                self.release()
                await asyncio.sleep(0.01)
            if hand.lease is not None:
                self.held.append(hand.lease)
        self.release()

    def release(self) -> None:
        """Release all slots."""
        for lease in self.held:
            lease.release()
        self.held.clear()


@pytest.mark.heavy
def test_400_000_cancellations_of_limiter_leak_nothing_and_keep_order() -> None:
    """Before, at and after the handover: no unit or slot is lost, and nobody is overtaken."""

    async def main(limiter: Limiter, crowd: Crowd) -> None:
        await crowd.mill(400_000)
        now = limiter.statistics()
        assert (now.waiting, now.in_flight) == (len(crowd.line), len(crowd.held))
        assert now.cancelled == crowd.cancelled
        await crowd.finish()

    with virtual_time() as time:
        limiter = Limiter("1000 RPS burst 1000", "20k tokens/s", concurrency=32, clock=time.clock)
        crowd = Crowd(lambda tokens: limiter.acquire(tokens=tokens).__await__(), seed=20)
        time.run(main(limiter, crowd))
        nothing_is_left(limiter)
        time.advance(2)
        assert [use.available for use in limiter.statistics().limits] == [1000, 20_000]


@pytest.mark.heavy
def test_600_000_cancellations_of_bucket_leak_nothing_and_keep_order() -> None:
    """The same holds for a bucket, which has only one meter."""

    async def main(bucket: TokenBucket, crowd: Crowd) -> None:
        await crowd.mill(600_000)
        assert bucket.statistics().waiting == len(crowd.line)
        await crowd.finish()
        assert bucket.statistics().waiting == 0

    with virtual_time() as time:
        bucket = TokenBucket(rate=20_000.0, burst=100, clock=time.clock)
        crowd = Crowd(lambda units: bucket.acquire(units).__await__(), seed=26)
        time.run(main(bucket, crowd))
        time.advance(2)
        assert bucket.statistics().available == 100


def test_tasks_dropped_on_closed_loop_are_counted_out_once() -> None:
    held: list[object] = []

    async def forever(coroutine: Coroutine[Any, Any, object]) -> None:
        held.append(await coroutine)

    limiter = Limiter(concurrency=2)
    holder, other = limiter.acquire_nowait(), limiter.acquire_nowait()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, __: None)  # "Task was destroyed": this is intended
    tasks = [loop.create_task(forever(limiter.acquire())) for _ in range(5)]
    loop.run_until_complete(steps(3))
    other.release()
    loop.run_until_complete(steps(5))  # the first one passes
    assert (limiter.statistics().waiting, len(held)) == (4, 1)
    tasks[2].cancel()
    loop.close()
    del tasks
    gc.collect()
    holder.release()
    held.clear()
    gc.collect()
    nothing_is_left(limiter)


async def test_dropped_lease_that_waited_with_deadline_releases_itself(
    virtual_time: VirtualTime,
) -> None:
    """Nothing that looks after deadlines keeps it alive."""
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)
    held = await limiter.acquire()
    waiting = asyncio.create_task(limiter.acquire(timeout=1_000))
    await virtual_time.all_blocked()
    held.release()
    await waiting
    del waiting, held
    await asyncio.sleep(0)  # until then the task is an argument of the callback that runs
    limiter.acquire_nowait().release()
    assert virtual_time.now == 0


class Interrupting(Meter):
    """Stand for Ctrl-C: call back when it is asked something for the n-th time within a look."""

    def __init__(self, interrupt: Callable[[], object]) -> None:
        self.interrupt = interrupt
        self.left = 0

    def _note(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.interrupt()

    def earliest(self, amount: int, now: int, *, back: int = 0) -> int:  # noqa: ARG002
        self._note()
        return now

    def take(self, amount: int, now: int) -> bool:  # noqa: ARG002
        self._note()
        return True

    def book(self, amount: int, when: int) -> None:  # noqa: ARG002
        self._note()

    def owe(self, amount: int, when: int) -> None: ...

    def unbook(self, amount: int, when: int, *, left: int = 0) -> None: ...

    def available(self, now: int) -> int:  # noqa: ARG002
        self._note()
        return NEVER


@pytest.mark.parametrize("question", range(9))
@pytest.mark.parametrize("path", [(), ("chat", "agent")])
@pytest.mark.parametrize("others", ["none", "alike", "elsewhere"])
async def test_call_cancelled_within_a_look_leaks_nothing(
    virtual_time: VirtualTime,
    monkeypatch: pytest.MonkeyPatch,
    question: int,
    path: tuple[str, ...],
    others: str,
) -> None:
    """Ctrl-C under ``asyncio.run`` cancels the main task between any two lines of Python.

    The look is interrupted at its n-th question to a meter, or (0) just before it resolves the
    call.
    """
    limiter = key = Limiter("100 TPM", concurrency=1, clock=virtual_time.clock)
    for name in path:
        limiter = limiter.child(name)
    holder = await limiter.acquire(tokens=10)
    other = key.child("other") if others == "elsewhere" else limiter
    limiters = [limiter] + [other] * (2 if others != "none" else 0)
    calls = [asyncio.create_task(acquire_and_release(each)) for each in limiters]
    meter = Interrupting(calls[0].cancel)
    key._node.extra = ((meter, "tokens"),)
    key._node.pacer.limits_changed_locked(key._node)
    await virtual_time.all_blocked()
    assert key.statistics().waiting == len(calls)

    def set_result(waiter: Waiter, result: bool) -> None:  # noqa: FBT001 - as `Future.set_result`
        calls[0].cancel()
        asyncio.Future.set_result(waiter, result)

    if question == 0:
        monkeypatch.setattr(Waiter, "set_result", set_result)
    meter.left = question
    holder.release()
    await asyncio.gather(*calls, return_exceptions=True)
    assert not any(call.cancelled() for call in calls[1:])
    assert calls[0].cancelled() or question > 1
    passed = sum(not call.cancelled() for call in calls)
    assert key.statistics().limits[0].used == 10 * (1 + passed)
    assert virtual_time.now == 0
    nothing_is_left(key)


@pytest.mark.parametrize("turns", range(6))
def test_call_handed_over_on_loop_that_is_closed_then_leaks_nothing(turns: int) -> None:
    """It had passed, but its task never ran again."""
    limiter = Limiter("100 TPM", concurrency=1)
    holder = limiter.acquire_nowait()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, __: None)  # "Task was destroyed": this is intended
    task = loop.create_task(acquire_and_release(limiter))
    loop.run_until_complete(steps(3))
    assert limiter.statistics().waiting == 1

    async def release() -> None:
        holder.release()
        await steps(turns)

    loop.run_until_complete(release())
    loop.close()
    del task
    gc.collect()
    nothing_is_left(limiter)
    assert limiter.statistics().limits[0].used in {0, 10}
