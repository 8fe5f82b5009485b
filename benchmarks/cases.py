"""The cases: an idle call, waiting in a crowd, a whole admission, and cancelling."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from benchmarks import contenders
from benchmarks.harness import Acquire, Claim, Figure, Sample, measure

Make: TypeAlias = Callable[[float, int], Acquire]

OURS = "asyncbucket"
LEAKY = "asynciolimiter"
AIO = "aiolimiter"
PEERS: Mapping[str, Make] = {
    OURS: contenders.asyncbucket,
    LEAKY: contenders.asyncio_leaky,
    AIO: contenders.aio,
    "llama_index": contenders.llama_index,
    "langchain": contenders.langchain,
    "pyrate-limiter": contenders.pyrate,
    "throttled-py": contenders.throttled_py,
}
#: From this many waiters on, a limiter that searches its line for one that leaves takes minutes.
QUADRATIC = 20_000
#: From this many waiters on it is a crowd, and too much for some contenders.
CROWD = 10_000
ABSENT: Mapping[str, str] = {
    "llama_index": "148 µs CPU an admission with 10,000",
    "langchain": "polls: 1,000 calls worth 1.5 s took 12 s",
    "pyrate-limiter": "one lock around each sleep: 1,000 calls worth 1.5 s took 9 s",
    "throttled-py": "polls: 1,000 calls worth 1.5 s took more than 15 s",
}
#: Nobody waits with these: units flow in faster than any loop takes them.
FAST, HUGE = 1e9, 10**9


async def nothing() -> None:
    """The cost of any coroutine."""


async def waiting() -> None:
    """The cost of any task that waits for a future until it is cancelled."""
    await asyncio.get_running_loop().create_future()


def idle(*, rounds: int, calls: int) -> Figure:
    """Time an acquire that need not wait, in a loop that does nothing else."""

    def sample(make: Make, rate: float, *, drained: int = 0) -> Sample:
        async def run() -> float:
            acquire = make(rate, HUGE)
            for _ in range(1 + drained):  # some begin empty
                await acquire()
            start = time.perf_counter()
            for _ in range(calls):
                await acquire()
            return (time.perf_counter() - start) / calls * 1e9

        return run

    samples = {"a bare coroutine": sample(lambda _rate, _burst: nothing, FAST)}
    samples |= {name: sample(make, FAST) for name, make in PEERS.items()}
    samples[f"{OURS}, not full"] = sample(contenders.asyncbucket, 1.0, drained=100)
    return Figure(
        key="idle",
        title="An idle acquire",
        unit="ns",
        note="One unit of a bucket that has plenty; the event loop gets no turn, so the timers that "
        "asynciolimiter sets instead of reading a clock never run here (see the next).",
        rows=measure(samples, rounds=rounds),
        claims=(Claim(OURS, LEAKY, 1.0), Claim(OURS, AIO, 0.5), Claim(f"{OURS}, not full", AIO, 1)),
    )


def idle_turning(*, rounds: int, calls: int) -> Figure:
    """Measure the CPU time of an acquire that need not wait, timers included, in a running loop."""

    def sample(make: Make) -> Sample:
        async def run() -> float:
            acquire = make(FAST, HUGE)
            await acquire()
            start = time.process_time()
            for _ in range(calls):
                await acquire()
                await asyncio.sleep(0)
            return (time.process_time() - start) / calls * 1e9

        return run

    names = (OURS, LEAKY, AIO)
    samples = {"a bare coroutine": sample(lambda _rate, _burst: nothing)}
    samples |= {name: sample(PEERS[name]) for name in names}
    return Figure(
        key="idle_turning",
        title="An idle acquire, and a turn of the loop",
        unit="ns CPU",
        note="The whole cost of a call now and then: asynciolimiter sets a timer for each, which the "
        "loop runs. The turn itself is in all figures: what a line costs more than a bare coroutine is "
        "the limiter's.",
        rows=measure(samples, rounds=rounds),
        claims=(Claim(OURS, LEAKY, 1.0), Claim(OURS, AIO, 1.0)),
    )


def contended(waiters: int, *, rounds: int, names: tuple[str, ...]) -> Figure:
    """Measure the CPU time of an admission while ``waiters`` calls queue at once for 1.5 s."""
    rate = waiters / 1.5
    burst = round(rate / 100)

    def sample(make: Make) -> Sample:
        async def run() -> float:
            acquire = make(rate, burst)
            start = time.process_time()
            async with asyncio.TaskGroup() as group:
                for _ in range(waiters):
                    group.create_task(acquire())
            return (time.process_time() - start) / waiters * 1e6

        return run

    return Figure(
        key=f"contended_{waiters}",
        title=f"{waiters:,} calls at once",
        unit="µs CPU an admission",
        note=f"At {rate:,.0f} a second with a burst of {burst:,}, until all have passed; the tasks "
        "themselves included.",
        rows=measure({name: sample(PEERS[name]) for name in names}, rounds=rounds),
        claims=(Claim(OURS, LEAKY, 1.15), Claim(OURS, AIO, 0.75)) if waiters >= CROWD else (),
        absent={name: why for name, why in ABSENT.items() if name not in names},
    )


def giving_up(waiters: int, *, rounds: int) -> Figure:
    """Time the cancelling of ``waiters`` calls, from the last to the first."""
    names = (OURS, LEAKY) if waiters > QUADRATIC else (OURS, LEAKY, AIO)

    def sample(make: Make) -> Sample:
        async def run() -> float:
            acquire = make(0.001, 1)  # one passes, the others wait
            tasks = [asyncio.create_task(acquire()) for _ in range(waiters)]
            await asyncio.sleep(0)
            start = time.process_time()
            for task in reversed(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return time.process_time() - start

        return run

    samples = {name: sample(PEERS[name]) for name in names}
    samples["bare futures"] = sample(lambda _rate, _burst: waiting)
    return Figure(
        key=f"giving_up_{waiters}",
        title=f"{waiters:,} waiting calls cancelled, last first",
        unit="s CPU",
        note="Until the last task has ended. asyncbucket promises less than a second for 100,000. Most of "
        "it is asyncio's: the last line is what tasks take that wait for a future of their own.",
        rows=measure(samples, rounds=rounds),
    )
