"""When to look again: one task for each loop, alive only while a call waits."""

import asyncio
import collections
import contextvars
import functools
import itertools
from collections.abc import Callable
from typing import TypeVarTuple

import pytest

from asyncbucket import Limiter, TokenBucket, tree
from asyncbucket.testing import VirtualTime, VirtualTimeLoop, assert_within_bucket

Ts = TypeVarTuple("Ts")


def pacers() -> list[asyncio.Task[object]]:
    """Return the running loop's pacers."""
    return [task for task in asyncio.all_tasks() if task.get_name() == "asyncbucket pacer"]


def test_pacer_lives_only_while_calls_wait(virtual_time: VirtualTime) -> None:
    """There is none while all calls pass at once, one while any number wait, none afterwards."""

    async def main() -> None:
        limiter = Limiter("10 RPS burst 1", clock=virtual_time.clock)
        await limiter.acquire()
        await asyncio.sleep(0)
        assert not pacers()
        calls = [asyncio.ensure_future(limiter.acquire()) for _ in range(3)]
        await virtual_time.all_blocked()
        assert len(pacers()) == 1
        await asyncio.gather(*calls)
        await virtual_time.all_blocked()
        assert not pacers()

    virtual_time.run(main())


def test_pacer_runs_in_empty_context(virtual_time: VirtualTime) -> None:
    """It runs in an empty context, so it keeps no caller's context variables alive."""
    variable = contextvars.ContextVar("variable", default="nobody's")
    seen: list[str] = []

    def clock() -> int:
        if pacers_step():
            seen.append(variable.get())
        return virtual_time.clock()

    def pacers_step() -> bool:
        task = asyncio.current_task()
        return task is not None and task.get_name() == "asyncbucket pacer"

    async def main() -> None:
        bucket = TokenBucket(rate=1.0, clock=clock)
        variable.set("mine")
        await bucket.acquire()
        await bucket.acquire()

    virtual_time.run(main())
    assert set(seen) == {"nobody's"}


def test_pacer_cancelled_by_foreign_code_starts_again(virtual_time: VirtualTime) -> None:
    """Code that cancels every task it finds does not strand waiting calls."""

    async def main() -> None:
        bucket = TokenBucket(rate=1.0, clock=virtual_time.clock)
        await bucket.acquire()
        waiting = asyncio.create_task(bucket.acquire())
        await virtual_time.all_blocked()
        for _ in range(3):
            (pacer,) = pacers()
            pacer.cancel()
            await virtual_time.all_blocked()
        await waiting
        assert virtual_time.now == 1.0
        await virtual_time.all_blocked()
        assert not pacers()

    virtual_time.run(main())


def test_loop_that_ends_with_waiting_calls_leaves_nothing_behind(virtual_time: VirtualTime) -> None:
    """asyncio.run cancels all calls and the pacer; the next run finds an empty line."""
    limiter = Limiter("1 RPS", concurrency=1, clock=virtual_time.clock)

    async def left_behind() -> None:
        held = await limiter.acquire()
        for _ in range(20):
            asyncio.create_task(call())  # noqa: RUF006 - to be cancelled by asyncio.run
        await asyncio.sleep(0)
        assert limiter.statistics().waiting == 20
        held.release()

    async def call() -> None:
        async with limiter.acquire():
            await asyncio.sleep(3)

    asyncio.run(left_behind())
    now = limiter.statistics()
    assert (now.waiting, now.in_flight, now.cancelled) == (0, 0, 20)
    virtual_time.advance(2)
    asyncio.run(call_once(limiter))


async def call_once(limiter: Limiter) -> None:
    """Pass at once."""
    async with limiter.acquire() as lease:
        assert lease.waited == 0


def test_1000_calls_are_admitted_in_batches_of_256(virtual_time: VirtualTime) -> None:
    """A thousand pass at one instant, and the loop's other tasks run in between."""

    async def main() -> None:
        limiter = Limiter("1000 TPM", clock=virtual_time.clock)
        holder = await limiter.acquire(tokens=1000)
        calls = [asyncio.ensure_future(limiter.acquire(tokens=1)) for _ in range(1000)]
        await virtual_time.all_blocked()
        holder.settle(tokens=0)
        turns: list[int] = []
        while not all(call.done() for call in calls):
            await asyncio.sleep(0)
            turns.append(sum(call.done() for call in calls))
        assert max(after - before for before, after in itertools.pairwise(turns)) == 256
        assert virtual_time.now == 0

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("waiting", "burst", "wake_ups"), [(1_000, 100, 100), (1_000, 1, 1_000), (1, 100, 1)]
)
def test_one_wake_up_admits_several_calls_in_quick_succession(
    waiting: int, burst: int, wake_ups: int, virtual_time: VirtualTime
) -> None:
    """One wake-up serves several calls if the bucket can hold the refill; one alone is not late."""
    trace: list[tuple[int, int]] = []

    async def call(bucket: TokenBucket) -> None:
        await bucket.acquire()
        trace.append((virtual_time.clock(), 1))

    async def main() -> None:
        bucket = TokenBucket(rate=5_000.0, burst=burst, clock=virtual_time.clock)
        await asyncio.gather(*(call(bucket) for _ in range(burst + waiting)))

    virtual_time.run(main())
    assert_within_bucket(trace, rate=5_000.0, burst=burst)
    assert len({when for when, _ in trace[burst:]}) <= wake_ups
    late = [when - (number + 1) * 200_000 for number, (when, _) in enumerate(trace[burst:])]
    assert max(late) <= (2_000_000 if waiting > wake_ups else 0)


@pytest.mark.parametrize("where", ["at the root", "below"])
def test_last_of_many_calls_is_not_late(where: str, virtual_time: VirtualTime) -> None:
    """It does not wait for others, since those before it have just gone."""
    times: list[float] = []

    async def call(limiter: Limiter) -> None:
        (await limiter.acquire()).release()
        times.append(virtual_time.now)

    async def main() -> None:
        key = Limiter("1000/s burst 100", clock=virtual_time.clock)
        limiter = key.child("child") if where == "below" else key
        await asyncio.gather(*(call(limiter) for _ in range(103)))

    virtual_time.run(main())
    assert times == [0] * 100 + [0.002] * 2 + [0.003]


async def note_passage(
    trace: list[tuple[str, int]], clock: Callable[[], int], child: Limiter
) -> None:
    """Acquire from ``child``, and note its name and when the call passed."""
    (await child.acquire()).release()
    trace.append((child.name, clock()))


def test_children_share_wake_ups(virtual_time: VirtualTime) -> None:
    """They share wake-ups in turns, as long as their own limits hold up none of them."""
    trace: list[tuple[str, int]] = []
    call = functools.partial(note_passage, trace, virtual_time.clock)

    async def main() -> None:
        limiter = Limiter("5k requests/s burst 100", clock=virtual_time.clock)
        children = [limiter.child(name, rpm=1_000_000_000) for name in ("one", "other")]
        await asyncio.gather(*(call(child) for child in children for _ in range(500)))

    virtual_time.run(main())
    assert_within_bucket([(when, 1) for _, when in trace], rate=5_000.0, burst=100)
    times = {name: [when for name_, when in trace if name_ == name] for name, _ in trace}
    assert len({when for _, when in trace}) <= 102
    # When the burst is over, what is left of one child is served together with the other's calls.
    assert times["default/one"][-1] <= 162_000_000 < times["default/other"][-1] == 180_000_000


def test_batched_wake_ups_cost_child_with_its_own_limit_no_admissions(
    virtual_time: VirtualTime,
) -> None:
    """What flows into that child's full bucket meanwhile would be lost to it."""
    served: collections.Counter[str] = collections.Counter()

    async def call(child: Limiter) -> None:
        while virtual_time.now < 1:
            (await child.acquire()).release()
            served[child.name] += 1

    async def main() -> None:
        key = Limiter("120k RPM burst 200", name="key", clock=virtual_time.clock)
        children = [key.child(name) for name in ("a", "b", "c")]
        children += [key.child("d", "24k RPM burst 1"), key.child("e", "27k RPM burst 1")]
        await asyncio.gather(*(call(child) for child in children for _ in range(40)))

    virtual_time.run(main())
    for name in ("key/d", "key/e"):
        assert served[name] >= 390  # of 400: a fifth of the key's limit


def test_calls_are_batched_without_delaying_slow_sibling(virtual_time: VirtualTime) -> None:
    """It is served at its exact instants; just before each of them, the others go one by one."""
    trace: list[tuple[str, int]] = []
    call = functools.partial(note_passage, trace, virtual_time.clock)

    async def main() -> None:
        key = Limiter("5k requests/s burst 100", name="key", clock=virtual_time.clock)
        crowd, slow = key.child("crowd"), key.child("slow", "50/s burst 1")
        await asyncio.gather(*(call(slow) for _ in range(5)), *(call(crowd) for _ in range(500)))

    virtual_time.run(main())
    assert [when for name, when in trace if name == "key/slow"] == [
        0,
        *range(20_000_000, 80_000_001, 20_000_000),
    ]
    assert len({when for _, when in trace}) <= 80  # 50 groups, and 4 times 2 ms


@pytest.mark.parametrize("first", ["crowd", "slow"])
def test_grandchild_keeps_its_rate_while_other_calls_are_batched(
    virtual_time: VirtualTime, first: str
) -> None:
    """Whichever stands first in line, and even if its parent is not the next to be served."""
    trace: list[tuple[str, int]] = []
    call = functools.partial(note_passage, trace, virtual_time.clock)

    async def main() -> None:
        key = Limiter("5k requests/s burst 100", name="key", clock=virtual_time.clock)
        team, others = key.child("team"), key.child("others")
        crowd, slow = team.child("crowd"), team.child("slow", "400/s burst 1")
        lines = [[crowd] * 1_500, [slow] * 250]
        children = [
            *itertools.chain(*(lines if first == "crowd" else lines[::-1])),
            *[others] * 1_500,
        ]
        calls = [asyncio.ensure_future(call(child)) for child in children]
        await asyncio.sleep(0.5)
        for each in calls:
            each.cancel()

    virtual_time.run(main())
    assert (
        len([name for name, _ in trace if name == "key/team/slow"]) >= 170
    )  # one by one, it would be 176
    assert len({when for _, when in trace}) <= 1_000  # of 2,500


def test_calls_are_not_batched_when_very_many_children_are_held_up(
    virtual_time: VirtualTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking at all of them before each wait would take longer."""
    monkeypatch.setattr(tree, "_MANY", 2)
    instants: set[int] = set()

    async def call(child: Limiter) -> None:
        await child.acquire()
        instants.add(virtual_time.clock())

    async def main() -> None:
        key = Limiter("5k requests/s burst 100", name="key", clock=virtual_time.clock)
        slow = [key.child(f"slow {number}", "1 RPM") for number in range(3)]
        waiting = [asyncio.ensure_future(child.acquire()) for child in slow for _ in range(2)]
        await asyncio.gather(*(call(key.child("crowd")) for _ in range(500)))
        for each in waiting:
            each.cancel()

    virtual_time.run(main())
    assert len(instants) > 400


def test_batching_wastes_no_refill_of_bucket_with_burst_of_one(virtual_time: VirtualTime) -> None:
    """With a burst of one there is no time to wait, though another bucket lacks much."""

    async def main() -> None:
        limiter = Limiter("1000/s burst 1", "6M TPM burst 1M", clock=virtual_time.clock)
        await limiter.acquire(tokens=900_000)
        await asyncio.gather(*(limiter.acquire(tokens=1) for _ in range(100)))

    virtual_time.run(main())
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


def test_wait_of_ten_days_ends_on_time(virtual_time: VirtualTime) -> None:
    """No timer of the event loop is set for more than a day."""

    async def main() -> None:
        bucket = TokenBucket(rate=1 / (10 * 86_400), clock=virtual_time.clock)
        await bucket.acquire()
        await bucket.acquire()
        assert virtual_time.now == pytest.approx(10 * 86_400)

    virtual_time.run(main())


@pytest.mark.parametrize("where", ["root", "child"])
def test_no_more_than_a_full_bucket_passes_after_a_long_stop(
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

    async def main() -> None:
        root = Limiter("600 RPM burst 3", clock=clock)
        limiter = root if where == "root" else root.child("child")
        calls = [asyncio.create_task(call(limiter)) for _ in range(10)]
        await asyncio.sleep(0.25)
        before = looks
        virtual_time.advance(3600)
        await asyncio.gather(*calls)
        assert looks - before < 20

    virtual_time.run(main())
    assert passed[:5] == [0, 0, 0, 0.1, 0.2]
    assert passed[5:] == [3600.25, 3600.25, 3600.25, 3600.35, 3600.45]


def test_one_pass_admits_calls_in_order_and_skips_cancelled_ones(virtual_time: VirtualTime) -> None:
    """A pass admits, in order, the calls that would pass one by one, and skips cancelled ones."""

    async def main() -> None:
        limiter = Limiter("10 units/s", clock=virtual_time.clock)
        went: list[tuple[float, int]] = []

        async def call(number: int, units: int) -> None:
            await limiter.acquire(requests=0, units=units)
            went.append((virtual_time.now, number))

        await limiter.acquire(requests=0, units=10)
        costs = [2, 2, 1, 1, 1, 1, 4, 4, 2, 2]
        calls = [asyncio.create_task(call(*each)) for each in enumerate(costs)]
        await virtual_time.all_blocked()
        calls[3].cancel()
        calls[8].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert [number for _, number in went] == [0, 1, 2, 4, 5, 6, 7, 9]
        first, second = (1 + 3 / 512) * 1, (1 + 3 / 512) * 2
        assert [when for when, _ in went] == pytest.approx([first] * 5 + [second] * 3, abs=1 / 512)

    virtual_time.run(main())


def test_call_above_burst_inherits_units_earned_by_cancelled_head(
    virtual_time: VirtualTime,
) -> None:
    """If nobody passed meanwhile, a call above the burst counts from when the first was head."""

    async def main() -> None:
        bucket = Limiter("20 units/20s burst 5", clock=virtual_time.clock)
        gone = asyncio.create_task(take(bucket, 15))
        await virtual_time.all_blocked()
        await asyncio.sleep(4)
        next_one = asyncio.create_task(take(bucket, 15))
        await virtual_time.all_blocked()
        await asyncio.sleep(4)
        gone.cancel()
        await next_one
        assert virtual_time.now == 10.0

    async def take(limiter: Limiter, units: int) -> None:
        await limiter.acquire(requests=0, units=units)

    virtual_time.run(main())
