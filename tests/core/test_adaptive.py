"""A number of slots found by search: nearly as good as the best fixed one, and it adapts."""

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncbucket import Limiter
from asyncbucket.core.errors import AcquireTimeout
from asyncbucket.feedback.adaptive import AUTO, Adaptive, Concurrency, read_concurrency
from asyncbucket.testing import VirtualTime, virtual_time

SECOND = 1_000_000_000
#: How long a call takes (s) on an idle server.
LATENCY = 1.0
Capacity = Callable[[float], int]


class RefusedError(Exception):
    """A server's 429."""


class QueueingServer:
    """Serve `capacity` calls at once; let the others wait, first come, first served."""

    def __init__(self, time: VirtualTime, capacity: Capacity, spread: float) -> None:
        self._time = time
        self._capacity = capacity
        self._spread = spread
        self._chance = random.Random(3)
        self._line: list[asyncio.Future[None]] = []
        self.serving = 0

    async def call(self) -> None:
        """Return when the call is served."""
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        self._serve()
        await turn
        await self._work()

    async def _work(self) -> None:
        latency = LATENCY
        if self._spread:
            latency *= self._chance.lognormvariate(-(self._spread**2) / 2, self._spread)
        await asyncio.sleep(latency)
        self.serving -= 1
        self._serve()

    def _serve(self) -> None:
        while self._line and self.serving < self._capacity(self._time.now):
            self.serving += 1
            self._line.pop(0).set_result(None)


class RefusingServer(QueueingServer):
    """Serve `capacity` calls at once, and refuse the others after 20 ms."""

    async def call(self) -> None:
        """Return when the call is served."""
        if self.serving >= self._capacity(self._time.now):
            await asyncio.sleep(0.02)
            raise RefusedError
        self.serving += 1
        await self._work()


@dataclass
class Run:
    """The results of a run: when calls were served, and what sizes were found."""

    served: list[float] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)
    refused: int = 0

    def rate(self, start: float, end: float) -> float:
        """Return the calls served per second from `start` to `end`."""
        return sum(start <= when < end for when in self.served) / (end - start)

    def sizes_from(self, start: float) -> list[int]:
        """Return the sizes from `start` on."""
        return [size for when, size in self.sizes if when >= start]


def run(
    kind: type[QueueingServer],
    capacity: Capacity,
    *,
    concurrency: Concurrency = "auto",
    seconds: float = 300,
    callers: int = 150,
    spread: float = 0.05,
) -> Run:
    """Let `callers` call a server again and again through a limiter; return the results."""
    found = Run()

    async def caller(time: VirtualTime, limiter: Limiter, server: QueueingServer) -> None:
        while time.now < seconds:
            lease = await limiter.acquire()
            try:
                await server.call()
            except RefusedError:
                found.refused += 1
                lease.overloaded()
            else:
                lease.release()
                found.served.append(time.now)
            found.sizes.append((time.now, limiter.concurrency or 0))

    async def main(time: VirtualTime) -> None:
        limiter = Limiter(concurrency=concurrency, clock=time.clock)
        server = kind(time, capacity, spread)
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(caller(time, limiter, server))
        assert limiter.statistics().in_flight == server.serving == 0

    with virtual_time() as time:
        time.run(main(time))
    return found


def always(capacity: int) -> Capacity:
    """Return a capacity that never changes."""
    return lambda _: capacity


@pytest.mark.heavy
@pytest.mark.parametrize("spread", [0.05, 0.3])
@pytest.mark.parametrize("capacity", [3, 10, 40])
@pytest.mark.parametrize("kind", [QueueingServer, RefusingServer])
def test_adaptive_throughput_is_within_10_percent_of_best_fixed_concurrency(
    kind: type[QueueingServer], capacity: int, spread: float
) -> None:
    """Whether a server queues excess calls or refuses them, 90 % of its capacity is used."""
    fixed = run(kind, always(capacity), concurrency=capacity, spread=spread)
    found = run(kind, always(capacity), spread=spread)
    assert found.rate(60, 300) >= 0.9 * fixed.rate(60, 300)
    assert found.rate(0, 60) >= 0.75 * fixed.rate(0, 60)


@pytest.mark.heavy
@pytest.mark.parametrize("capacity", [10, 40])
def test_queue_in_server_stays_short(capacity: int) -> None:
    """On average at most half as many calls wait in a server as it serves; at worst, as many."""
    sizes = run(QueueingServer, always(capacity)).sizes_from(60)
    assert sum(sizes) / len(sizes) <= 1.5 * capacity
    assert max(sizes) <= 2 * capacity


@pytest.mark.heavy
def test_queue_in_server_does_not_grow_from_one_anchor_to_the_next() -> None:
    """Calls admitted before a cut count neither in the round after it nor for its latency."""
    sizes = run(QueueingServer, always(50), seconds=600, spread=0).sizes_from(60)
    assert sum(sizes) / len(sizes) <= 4 / 3 * 50


@pytest.mark.heavy
def test_at_most_1_percent_of_calls_are_refused() -> None:
    found = run(RefusingServer, always(40))
    assert found.refused <= 0.01 * len(found.served)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [QueueingServer, RefusingServer])
def test_size_follows_capacity_that_halves_and_doubles(kind: type[QueueingServer]) -> None:
    """After 40 s, the time of 40 calls in a row, it uses 90 % of the new capacity."""

    def capacity(now: float) -> int:
        return 20 if 200 <= now < 400 else 40

    found = run(kind, capacity, seconds=600)
    assert found.rate(150, 200) >= 0.9 * 40
    assert found.rate(240, 400) >= 0.9 * 20
    assert found.rate(440, 600) >= 0.9 * 40
    halved = [size for when, size in found.sizes if 240 <= when < 400]
    assert sum(halved) / len(halved) <= 1.5 * 20


def test_size_recovers_after_all_calls_become_three_times_slower() -> None:
    adaptive = Adaptive(least=1, most=1_000)
    feed(adaptive, 5_000, lambda size: SECOND * max(size, 40) // 40)
    before = adaptive.size
    feed(adaptive, 4_000, lambda size: 3 * SECOND * max(size, 40) // 40)
    assert adaptive.size >= 0.7 * before


def test_size_grows_even_if_batching_slows_each_call() -> None:
    """A batch of 64 takes twice as long as one call, but does 32 times the work."""
    adaptive = Adaptive(least=1, most=1_000)
    feed(adaptive, 6_000, lambda size: int(SECOND * (1 + size / 64)))
    assert adaptive.size >= 32


def test_same_history_gives_same_sizes() -> None:
    """The search uses no random numbers."""
    runs = [run(RefusingServer, always(10), seconds=60, spread=0.3) for _ in range(2)]
    assert runs[0] == runs[1]


def feed(
    adaptive: Adaptive, calls: int, latency: Callable[[int], int], *, waited: bool = True
) -> None:
    """Let calls succeed with the latency that `latency` gives for the present size."""
    for _ in range(calls):
        adaptive.succeeded(latency(adaptive.size), waited=waited)


def test_successful_calls_do_not_raise_size_while_slots_are_free() -> None:
    adaptive = Adaptive(least=1, most=1_000)
    feed(adaptive, 1_000, lambda _: SECOND, waited=False)
    assert adaptive.size == 4
    feed(adaptive, 100, lambda _: SECOND)
    assert adaptive.size > 16


def test_slow_calls_lower_size_even_while_slots_are_free() -> None:
    adaptive = Adaptive(least=1, most=1_000)
    feed(adaptive, 200, lambda _: SECOND)
    before = adaptive.size
    feed(adaptive, 3 * before, lambda _: 10 * SECOND, waited=False)
    assert adaptive.size < before


def test_refusals_of_one_wave_cut_size_once() -> None:
    adaptive = Adaptive(least=1, most=1_000, start=100)
    for _ in range(50):
        adaptive.overloaded(started=1, now=10)
    assert adaptive.size == 90
    adaptive.overloaded(started=11, now=20)
    assert adaptive.size == 45


def test_cut_takes_back_last_raise() -> None:
    """If a doubled size is refused, the size before it is known to be good."""
    adaptive = Adaptive(least=1, most=1_000, start=16)
    feed(adaptive, 32, lambda _: SECOND)
    assert adaptive.size == 32
    adaptive.overloaded(started=1, now=2)
    assert adaptive.size == 16
    feed(adaptive, 32, lambda _: SECOND)
    assert adaptive.size == 24  # halfway to the size that was refused


def test_refusal_while_measuring_at_lower_size_cuts_from_usual_size() -> None:
    adaptive = Adaptive(least=1, most=20, start=20)
    while adaptive.size == 20:
        feed(adaptive, 1, lambda _: SECOND)
    assert adaptive.size == 14
    adaptive.overloaded(started=1, now=2)
    assert adaptive.size == 18


@settings(deadline=None, max_examples=60)
@given(
    least=st.integers(1, 5),
    more=st.integers(0, 60),
    events=st.lists(
        st.tuples(st.integers(0, 5 * SECOND), st.booleans(), st.integers(0, 40)), max_size=60
    ),
)
def test_size_stays_within_its_bounds_for_any_history(
    least: int, more: int, events: list[tuple[int, bool, int]]
) -> None:
    adaptive = Adaptive(least=least, most=least + more)
    now = 0
    for latency, waited, calls in events:
        now += SECOND
        if calls:
            feed(adaptive, calls, lambda _, ns=latency: ns, waited=waited)  # type: ignore[misc]
        else:
            adaptive.overloaded(started=now - latency, now=now)
        assert least <= adaptive.size <= least + more


def test_size_falls_no_lower_than_one_slot() -> None:
    """A server that refuses everything is still called, by one call at a time."""
    found = run(RefusingServer, always(0), seconds=20, callers=10)
    assert found.sizes[-1][1] == 1
    assert not found.served


async def test_auto_concurrency_starts_with_four_slots_and_shows_them(
    virtual_time: VirtualTime,
) -> None:
    """Statistics and the repr show the present number; the repr shows its bounds, too."""
    limiter = Limiter(concurrency="auto", clock=virtual_time.clock)
    leases = [limiter.acquire_nowait() for _ in range(4)]
    with pytest.raises(AcquireTimeout, match="all 4 slots are taken"):
        await limiter.acquire(timeout=1)
    assert limiter.statistics().concurrency == limiter.concurrency == 4
    assert repr(limiter) == "<Limiter 'default', concurrency 4/4 of 1 to 1,000, 0 waiting>"
    for lease in leases:
        lease.release()


async def test_raised_concurrency_admits_waiting_calls(virtual_time: VirtualTime) -> None:
    """A raise when a call ends admits two: one by the slot given back, one by the new slot."""
    limiter = Limiter(concurrency=(1, 2), clock=virtual_time.clock)
    limiter.reconfigure(concurrency=1)
    limiter.reconfigure(concurrency=(1, 2))

    async def call() -> None:
        async with limiter.acquire():
            await asyncio.sleep(1)

    async with asyncio.TaskGroup() as group:
        for _ in range(60):
            group.create_task(call())
    assert virtual_time.now < 60


async def test_waiting_for_child_slots_does_not_raise_size_of_parent(
    virtual_time: VirtualTime,
) -> None:
    """The limiter above has free slots, so it learns nothing about how many are too many."""
    limiter = Limiter(concurrency="auto", clock=virtual_time.clock)
    child = limiter.child("child", concurrency=2)

    async def agent() -> None:
        for _ in range(40):
            async with child.acquire():
                await asyncio.sleep(1)

    await asyncio.gather(*(agent() for _ in range(10)))
    assert limiter.concurrency == 4
    assert limiter.statistics().waits["concurrency"].count > 380


async def test_only_timeout_raised_in_with_block_counts_as_overload(
    virtual_time: VirtualTime,
) -> None:
    async def leave_by(limiter: Limiter, error: BaseException) -> int | None:
        await asyncio.sleep(1)
        with pytest.raises(type(error)):
            async with limiter.acquire():
                raise error
        with pytest.raises(type(error)), limiter.acquire_sync():
            raise error
        return limiter.concurrency

    limiter = Limiter(concurrency=(1, 100), clock=virtual_time.clock)
    assert await leave_by(limiter, ValueError()) == 4
    assert await leave_by(limiter, asyncio.CancelledError()) == 4
    assert await leave_by(limiter, AcquireTimeout("another limiter's")) == 4
    assert await leave_by(limiter, TimeoutError()) == 3
    assert limiter.statistics().in_flight == 0


def test_only_first_reported_outcome_of_call_counts(virtual_time: VirtualTime) -> None:
    """`overloaded` and `failed` release the lease; later calls on it change nothing."""
    limiter = Limiter(concurrency=(1, 100), clock=virtual_time.clock)
    lease = limiter.acquire_nowait()
    lease.failed()
    assert lease.released
    lease.overloaded()
    lease.release()
    assert (limiter.concurrency, limiter.statistics().in_flight) == (4, 0)
    plain = Limiter(concurrency=3, clock=virtual_time.clock).acquire_nowait()
    plain.overloaded()
    assert plain.released


async def test_calls_of_wave_sent_after_first_refusal_do_not_cut_again(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter(concurrency=(1, 100), clock=virtual_time.clock)
    wave = [await limiter.acquire() for _ in range(4)]
    for lease in wave:
        await asyncio.sleep(0.01)
        lease.sent()
        lease.overloaded()
    assert limiter.concurrency == 3


def test_undone_failed_and_dropped_leases_do_not_change_size(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=(1, 100), clock=virtual_time.clock)
    for _ in range(200):
        limiter.acquire_nowait().undo()
        limiter.acquire_nowait().failed()
        limiter.acquire_nowait()
    assert limiter.concurrency == 4
    assert limiter.statistics().in_flight == 0


def test_reconfigure_switches_between_fixed_and_auto_concurrency(virtual_time: VirtualTime) -> None:
    """The search starts anew after a fixed number, and goes on if only its bounds change."""
    limiter = Limiter("60 RPM", clock=virtual_time.clock)
    lease = limiter.acquire_nowait()
    limiter.reconfigure(concurrency="auto")
    lease.release()
    assert limiter.concurrency == 4
    limiter.reconfigure(concurrency=(8, 20))
    assert limiter.concurrency == 8
    limiter.reconfigure(concurrency=(1, 20))
    assert limiter.concurrency == 8
    limiter.reconfigure(concurrency=7)
    assert repr(limiter).endswith("concurrency 0/7, 0 waiting>")
    limiter.reconfigure(concurrency=(1, 2))
    assert limiter.concurrency == 2
    assert limiter.statistics().in_flight == 0


def test_concurrency_must_be_number_auto_or_pair_of_bounds() -> None:
    """Anything else is refused, and the error shows the value that was given."""
    assert read_concurrency(None) is None
    assert read_concurrency(7) == (7, 7)
    assert read_concurrency("auto") == AUTO
    assert read_concurrency((2, 9)) == (2, 9)
    wrong: tuple[Any, ...] = ((1,), (0, 4), (1, 2, 3), (1, math.inf), "many", [1, 2], (True, 2))
    for bad in wrong:
        with pytest.raises(ValueError, match="or a pair of such numbers, not"):
            read_concurrency(bad)
    with pytest.raises(ValueError, match=r"concurrency=\(9, 2\) has its bounds in the wrong order"):
        read_concurrency((9, 2))


def test_adaptive_repr_shows_size_and_bounds() -> None:
    assert repr(Adaptive(least=1, most=1_000)) == "<Adaptive 4 of 1 to 1,000>"
