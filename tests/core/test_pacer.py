"""When to look again: one task for each loop, alive only while a call waits."""

import asyncio
import collections
import contextlib
import contextvars
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import TypeVarTuple

import pytest

from asyncbucket import Cost, Limiter, TokenBucket
from asyncbucket.testing import VirtualTime, VirtualTimeLoop

Ts = TypeVarTuple("Ts")


def pacers() -> list[asyncio.Task[object]]:
    """Return the running loop's pacers."""
    return [task for task in asyncio.all_tasks() if task.get_name() == "asyncbucket pacer"]


async def test_pacer_lives_only_while_calls_wait(virtual_time: VirtualTime) -> None:
    """There is none while all calls pass at once, one while any number wait, none afterwards."""
    limiter = Limiter("10 RPS burst 1", concurrency=1, clock=virtual_time.clock)
    holder = await limiter.acquire()
    await asyncio.sleep(0)
    assert not pacers()
    calls = [asyncio.ensure_future(limiter.acquire()) for _ in range(3)]
    await virtual_time.all_blocked()
    limiter.pause(0)  # somebody rings
    await virtual_time.all_blocked()
    assert len(pacers()) == 1
    holder.release()
    for call in calls:
        (await call).release()
    await virtual_time.all_blocked()
    assert not pacers()


@pytest.mark.parametrize("rung", [False, True])
async def test_pacer_keeps_nothing_of_its_callers_alive(
    virtual_time: VirtualTime, *, rung: bool
) -> None:
    """Neither its task nor its timer runs in the context of the call that came first."""

    class Prompt:
        pass

    variable = contextvars.ContextVar[Prompt]("variable")
    bucket = TokenBucket(rate=1.0, clock=virtual_time.clock)
    bucket.acquire_nowait()

    async def first() -> "weakref.ref[Prompt]":
        prompt = Prompt()
        variable.set(prompt)
        await bucket.acquire()
        return weakref.ref(prompt)

    early = asyncio.create_task(first())
    await asyncio.sleep(0)
    if rung:
        bucket._pacer.ring_locked()
    late = [asyncio.create_task(bucket.acquire()) for _ in range(2)]
    prompt = await early
    del early
    await virtual_time.all_blocked()
    gc.collect()
    assert prompt() is None
    await asyncio.gather(*late)


async def test_pacer_cancelled_by_foreign_code_starts_again(virtual_time: VirtualTime) -> None:
    """Code that cancels every task it finds does not strand waiting calls."""
    limiter = Limiter("1/s burst 1", concurrency=1, clock=virtual_time.clock)
    holder = await limiter.acquire()
    waiting = [asyncio.create_task(limiter.acquire()) for _ in range(2)]
    await virtual_time.all_blocked()
    for _ in range(3):
        limiter.pause(0)
        await virtual_time.all_blocked()
        (pacer,) = pacers()
        pacer.cancel()
        await virtual_time.all_blocked()
    holder.release()
    (await waiting[0]).release()
    assert virtual_time.now == pytest.approx(1.0, rel=0.01)
    (await waiting[1]).release()
    await virtual_time.all_blocked()
    assert not pacers()


@pytest.mark.parametrize("children", [1, 2])
async def test_1000_calls_are_admitted_in_batches_of_256(
    virtual_time: VirtualTime, children: int
) -> None:
    """A thousand pass at one instant, and the loop's other tasks run in between."""
    limiter = Limiter("1000 TPM", clock=virtual_time.clock)
    below = [limiter.child(str(number)) for number in range(children)]
    holder = await limiter.acquire(tokens=1000)
    calls = [
        asyncio.ensure_future(below[number % children].acquire(tokens=1)) for number in range(1000)
    ]
    await virtual_time.all_blocked()
    holder.settle(tokens=0)
    turns: list[int] = []
    while not all(call.done() for call in calls):
        await asyncio.sleep(0)
        turns.append(sum(call.done() for call in calls))
    assert max(after - before for before, after in itertools.pairwise(turns)) == 256
    assert virtual_time.now == 0


@pytest.mark.parametrize("path", [(), ("child",)])
async def test_last_of_many_calls_is_not_late(
    path: tuple[str, ...], virtual_time: VirtualTime
) -> None:
    """It does not wait for others, since those before it have just gone."""
    times: list[float] = []

    async def call(limiter: Limiter) -> None:
        (await limiter.acquire()).release()
        times.append(virtual_time.now)

    limiter = Limiter("1000/s burst 100", clock=virtual_time.clock)
    for name in path:
        limiter = limiter.child(name)
    await asyncio.gather(*(call(limiter) for _ in range(103)))
    assert times[:100] == [0] * 100
    assert all(due <= now <= 0.003 for now, due in zip(times[100:], (0.001, 0.002), strict=False))
    assert times[-1] == 0.003


async def call_in_turn(
    trace: list[tuple[str, float]], time: VirtualTime, *children: Limiter
) -> None:
    """Call each of ``children`` at once; note which call passed when."""

    async def call(child: Limiter) -> None:
        (await child.acquire()).release()
        trace.append((child.name.rpartition("/")[2], time.now))

    await asyncio.gather(*(call(child) for child in children))


async def test_crowd_delays_no_call_of_slow_sibling(virtual_time: VirtualTime) -> None:
    """It is served at its exact instants."""
    trace: list[tuple[str, float]] = []
    key = Limiter("5k requests/s burst 100", clock=virtual_time.clock)
    crowd, slow = key.child("crowd"), key.child("slow", "50/s burst 1")
    await call_in_turn(trace, virtual_time, *[slow] * 5, *[crowd] * 500)
    assert [when for name, when in trace if name == "slow"] == [0, 0.02, 0.04, 0.06, 0.08]


@pytest.mark.parametrize("first", ["crowd", "slow"])
async def test_grandchild_keeps_its_rate_beside_crowds(
    virtual_time: VirtualTime, first: str
) -> None:
    """Whichever stands first in line, and even if its parent is not the next to be served."""
    trace: list[tuple[str, float]] = []
    key = Limiter("5k requests/s burst 100", clock=virtual_time.clock)
    team, others = key.child("team"), key.child("others")
    lines = [[team.child("crowd")] * 1_500, [team.child("slow", "400/s burst 1")] * 250]
    children = itertools.chain(*(lines if first == "crowd" else lines[::-1]), [others] * 1_500)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            await call_in_turn(trace, virtual_time, *children)
    assert len([name for name, _ in trace if name == "slow"]) >= 170  # one by one, it would be 176


async def test_children_with_own_limits_get_them_beside_crowds(virtual_time: VirtualTime) -> None:
    """What flows into a child's full bucket while others are served would be lost to it."""
    served: collections.Counter[str] = collections.Counter()

    async def call(child: Limiter) -> None:
        while virtual_time.now < 1:
            (await child.acquire()).release()
            served[child.name] += 1

    key = Limiter("120k RPM burst 200", name="key", clock=virtual_time.clock)
    children = [key.child(name) for name in ("a", "b", "c")]
    children += [key.child("d", "24k RPM burst 1"), key.child("e", "27k RPM burst 1")]
    await asyncio.gather(*(call(child) for child in children for _ in range(40)))
    for name in ("key/d", "key/e"):
        assert served[name] >= 390  # of 400: a fifth of the key's limit


async def test_batching_wastes_no_refill_of_bucket_with_burst_of_one(
    virtual_time: VirtualTime,
) -> None:
    """With a burst of one there is no time to wait, though another bucket lacks much."""
    limiter = Limiter("1000/s burst 1", "6M TPM burst 1M", clock=virtual_time.clock)
    await limiter.acquire(tokens=900_000)
    await asyncio.gather(*(limiter.acquire(tokens=1) for _ in range(100)))
    assert virtual_time.now == 0.1


def test_timer_that_fires_early_admits_no_call_early() -> None:
    """Timers of uvloop may be up to 1 ms early: the pacer looks again, and sleeps for the rest."""
    naps: list[float] = []

    class EarlyLoop(VirtualTimeLoop):
        def call_at(
            self,
            when: float,
            callback: Callable[[*Ts], object],
            *args: *Ts,
            context: contextvars.Context | None = None,
        ) -> asyncio.TimerHandle:
            naps.append(when - self.time())
            early = max(self.time() + 1e-5, when - 0.001)
            return super().call_at(early, callback, *args, context=context)

    async def main(loop: EarlyLoop) -> None:
        bucket = TokenBucket(rate=1.0, clock=loop.clock)
        for _ in range(4):
            await bucket.acquire()

    with asyncio.Runner(loop_factory=EarlyLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, EarlyLoop)
        runner.run(main(loop))
        assert 3.0 <= loop.time() < 3.0001
    assert len(naps) < 400


async def test_wait_of_ten_days_ends_on_time(virtual_time: VirtualTime) -> None:
    """No timer of the event loop is set for more than a day."""
    bucket = TokenBucket(rate=1 / (10 * 86_400), clock=virtual_time.clock)
    await bucket.acquire()
    await bucket.acquire()
    assert virtual_time.now == pytest.approx(10 * 86_400)


@pytest.mark.parametrize("where", ["root", "child"])
async def test_no_more_than_a_full_bucket_passes_after_a_long_stop(
    where: str, virtual_time: VirtualTime
) -> None:
    """A process that was stopped for an hour (`SIGSTOP`) finds a full bucket, not an hour's units."""
    looks, passed = 0, list[float]()

    def clock() -> int:
        nonlocal looks
        looks += 1
        return virtual_time.clock()

    async def call(limiter: Limiter) -> None:
        await limiter.acquire()
        passed.append(virtual_time.now)

    root = Limiter("600 RPM burst 3", clock=clock)
    limiter = root if where == "root" else root.child("child")
    calls = [asyncio.create_task(call(limiter)) for _ in range(10)]
    await asyncio.sleep(0.25)
    before = looks
    virtual_time.advance(3600)
    await asyncio.gather(*calls)
    assert looks - before < 20
    assert passed[:5] == [0, 0, 0, 0.1, 0.2]
    assert passed[5:] == [3600.25, 3600.25, 3600.25, 3600.35, 3600.45]


async def test_one_pass_admits_calls_in_order_and_skips_cancelled_ones(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter("10 units/s", clock=virtual_time.clock)
    went: list[tuple[float, int]] = []

    async def call(number: int, units: int) -> None:
        await limiter.acquire(Cost(requests=0, units=units))
        went.append((virtual_time.now, number))

    await limiter.acquire(Cost(requests=0, units=10))
    costs = [2, 2, 1, 1, 1, 1, 4, 4, 2, 2]
    calls = [asyncio.create_task(call(*each)) for each in enumerate(costs)]
    await virtual_time.all_blocked()
    calls[3].cancel()
    calls[8].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert [number for _, number in went] == [0, 1, 2, 4, 5, 6, 7, 9]
    first, second = (1 + 3 / 512) * 1, (1 + 3 / 512) * 2
    assert [when for when, _ in went] == pytest.approx([first] * 5 + [second] * 3, abs=1 / 512)


@pytest.mark.real_clock
@pytest.mark.parametrize("waiting", [1, 2])
async def test_slots_that_do_not_come_back_are_named_once(
    waiting: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the machine's clock says so: on virtual time, a minute is nothing."""
    monkeypatch.setattr("asyncbucket.core.pacer._STALL", 30_000_000)
    limiter = Limiter(concurrency=2, name="openai")
    below = limiter.child("chat", concurrency=5)
    forgotten = [await below.acquire() for _ in range(2)]
    calls = [asyncio.ensure_future(below.acquire()) for _ in range(waiting)]
    await asyncio.sleep(0.5)
    (said,) = caplog.messages
    assert said.startswith("no call has passed for 0 s: open leases hold 2 of 2 slots of 'openai';")
    for lease in forgotten:
        lease.release()
    for call in calls:
        (await call).release()
