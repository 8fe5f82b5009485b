"""A number of slots found by search: nearly as good as the best fixed one, and it adapts."""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from asyncbucket.feedback.adaptive import Adaptive

SECOND = 1_000_000_000
#: How many callers call again and again.
CALLERS = 150
Capacity = Callable[[float], int]


@dataclass
class Run:
    """The results of a run: when calls were served, and what sizes were found."""

    served: list[float] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)
    refused: int = 0

    def rate(self, start: float, end: float) -> float:
        return sum(start <= when < end for when in self.served) / (end - start)

    def mean_size(self, start: float, end: float = 1_000) -> float:
        sizes = [size for when, size in self.sizes if start <= when < end]
        return sum(sizes) / len(sizes)


def run(
    capacity: Capacity, *, refuses: bool, seconds: float = 300, spread: float = 0.05, fixed: int = 0
) -> Run:
    """Call a server as often as `Adaptive`, or a `fixed` number of slots, allows; return the results.

    The server serves `capacity` calls at once, in a second each on average. It lets the others wait,
    or refuses them after 20 ms.
    """
    adaptive = Adaptive(least=1, most=1_000)
    chance = random.Random(3)
    found = Run()
    ends: list[tuple[float, int, float, str]] = []
    queued: deque[tuple[int, float]] = deque()
    now, number, serving, in_flight = 0.0, 0, 0, 0
    while now < seconds:
        size = fixed or adaptive.size
        while in_flight < min(size, CALLERS):
            in_flight += 1
            number += 1
            if refuses and serving >= capacity(now):
                heapq.heappush(ends, (now + 0.02, number, now, "overloaded"))
                continue
            serving += refuses
            queued.append((number, now))
        while queued and (refuses or serving < capacity(now)):
            serving += not refuses
            call, started = queued.popleft()
            took = chance.lognormvariate(-(spread**2) / 2, spread)
            heapq.heappush(ends, (now + took, call, started, "ok"))
        now, _, started, outcome = heapq.heappop(ends)
        full = in_flight >= size
        in_flight -= 1
        if outcome == "ok":
            serving -= 1
            found.served.append(now)
        else:
            found.refused += 1
        adaptive.ended(
            outcome,
            started=int(started * SECOND),
            now=int(now * SECOND),
            waited=size < CALLERS,
            full=full,
        )
        found.sizes.append((now, adaptive.size))
    return found


def always(capacity: int) -> Capacity:
    return lambda _: capacity


@pytest.mark.parametrize("spread", [0, 0.05, 0.3])
@pytest.mark.parametrize("capacity", [3, 10, 40])
@pytest.mark.parametrize("refuses", [False, True])
def test_adaptive_is_within_10_percent_of_best_fixed_concurrency_and_hardly_above(
    *, refuses: bool, capacity: int, spread: float
) -> None:
    fixed = run(always(capacity), refuses=refuses, spread=spread, fixed=capacity)
    found = run(always(capacity), refuses=refuses, spread=spread)
    assert found.rate(60, 300) >= 0.9 * fixed.rate(60, 300)
    assert found.rate(0, 60) >= 0.75 * fixed.rate(0, 60)
    if capacity == 40 and refuses:
        assert found.refused <= 0.01 * len(found.served)
    elif capacity > 3 and spread < 0.3:
        assert found.mean_size(60) <= 1.5 * capacity
        assert max(size for when, size in found.sizes if when >= 60) <= 2 * capacity


@pytest.mark.parametrize("refuses", [False, True])
def test_size_follows_capacity_that_halves_and_doubles(*, refuses: bool) -> None:
    """After 40 s, the time of 40 calls in a row, it uses 90 % of the new capacity."""
    found = run(lambda now: 20 if 200 <= now < 400 else 40, refuses=refuses, seconds=600)
    assert found.rate(150, 200) >= 0.9 * 40
    assert found.rate(240, 400) >= 0.9 * 20
    assert found.rate(440, 600) >= 0.9 * 40
    assert found.mean_size(240, 400) <= 1.5 * 20


def feed(
    adaptive: Adaptive, calls: int, latency: Callable[[int], int], *, waited: bool = True
) -> None:
    """Let calls succeed with the latency that `latency` gives for the present size."""
    for _ in range(calls):
        adaptive.ended("ok", started=0, now=latency(adaptive.size), waited=waited, full=True)


def refuse(adaptive: Adaptive, *, started: int, now: int) -> None:
    adaptive.ended("overloaded", started=started, now=now, waited=True, full=True)


def test_size_suits_calls_that_batching_slows_and_that_become_slower() -> None:
    adaptive = Adaptive(least=1, most=1_000)
    feed(adaptive, 6_000, lambda size: int(SECOND * (1 + size / 64)))
    assert adaptive.size >= 32  # a batch of 64 takes twice as long, but does 32 times the work
    feed(adaptive, 5_000, lambda size: SECOND * max(size, 40) // 40)
    before = adaptive.size
    feed(adaptive, 4_000, lambda size: 3 * SECOND * max(size, 40) // 40)
    assert adaptive.size >= 0.7 * before  # all take three times as long
    feed(adaptive, 3 * before, lambda _: 30 * SECOND, waited=False)
    assert adaptive.size < before  # they are slow, though slots are free


@pytest.mark.parametrize(
    ("outcome", "waited", "full"),
    [
        pytest.param("ok", False, True, id="slots are free"),
        pytest.param("ok", True, False, id="it waited for slots of another level"),
        pytest.param("failed", True, True, id="it failed"),
    ],
)
def test_call_that_tells_nothing_leaves_size(outcome: str, *, waited: bool, full: bool) -> None:
    adaptive = Adaptive(least=1, most=1_000)
    for _ in range(1_000):
        adaptive.ended(outcome, started=0, now=SECOND, waited=waited, full=full)
    assert adaptive.size == 4


def test_refusals_of_one_wave_cut_size_once() -> None:
    adaptive = Adaptive(least=1, most=1_000, start=100)
    for _ in range(50):
        refuse(adaptive, started=1, now=10)
    assert adaptive.size == 90
    refuse(adaptive, started=11, now=20)
    assert adaptive.size == 45


def test_cut_takes_back_last_raise() -> None:
    adaptive = Adaptive(least=1, most=1_000, start=16)
    feed(adaptive, 32, lambda _: SECOND)
    assert adaptive.size == 32
    refuse(adaptive, started=1, now=2)
    assert adaptive.size == 16
    feed(adaptive, 32, lambda _: SECOND)
    assert adaptive.size == 24  # halfway to the size that was refused


def test_refusal_while_measuring_at_lower_size_cuts_from_usual_size() -> None:
    """The smaller size used to measure a new anchor is not what a refusal cuts."""
    adaptive = Adaptive(least=1, most=20, start=20)
    while adaptive.size == 20:
        feed(adaptive, 1, lambda _: SECOND)
    assert adaptive.size == 14
    refuse(adaptive, started=1, now=2)
    assert adaptive.size == 18


def test_larger_size_is_being_tried_until_a_call_admitted_since_succeeds() -> None:
    adaptive = Adaptive(least=1, most=1_000)
    assert not adaptive.is_trying
    feed(adaptive, 14, lambda _: SECOND)
    assert (adaptive.size, adaptive.is_trying) == (8, True)
    feed(adaptive, 1, lambda _: SECOND)  # admitted before
    assert adaptive.is_trying
    adaptive.ended("ok", started=2 * SECOND, now=3 * SECOND, waited=True, full=True)
    assert not adaptive.is_trying


def test_refused_size_is_not_being_tried() -> None:
    adaptive = Adaptive(least=1, most=1_000)
    feed(adaptive, 14, lambda _: SECOND)
    refuse(adaptive, started=SECOND, now=SECOND)
    assert (adaptive.size, adaptive.is_trying) == (4, False)


def test_single_failures_say_nothing_of_a_size_once_calls_have_failed_at_another() -> None:
    adaptive = Adaptive(least=1, most=1_000)
    adaptive.ended("failed", started=0, now=SECOND, waited=True, full=True)
    feed(adaptive, 14, lambda _: SECOND)
    assert (adaptive.size, adaptive.is_trying) == (8, False)
