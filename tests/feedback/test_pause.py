"""The meter of a pause: nobody passes before its end, and after it few at first."""

import math

from asyncbucket.core.meters import NEVER
from asyncbucket.feedback.pause import Pause

MS = 1_000_000


def paused(until: int = 160 * MS, *, gradually: bool = False) -> Pause:
    """Return a pause that began at 0."""
    pause = Pause()
    pause.begin(until, 0, gradually=gradually)
    return pause


def test_everything_or_nothing_is_available_and_debt_does_not_count() -> None:
    assert Pause().available(0) == NEVER
    pause = paused(10)
    pause.owe(5, 0)
    pause.redate(5, 0, 1)

    assert (pause.available(9), pause.available(10)) == (0, NEVER)
    assert not pause.take(1, 9)
    assert pause.take(1, 10)


def test_longer_pause_stays_in_force() -> None:
    pause = paused(10)
    pause.begin(5, 1, gradually=True)
    assert pause.earliest(1, 2) == 10
    pause.begin(20, 2, gradually=False)
    assert pause.earliest(1, 3, back=1) == 20
    assert pause.earliest(1, 21) == 21


def test_slow_start_admits_twice_as_many_calls_at_each_step() -> None:
    """Its steps are a 16th of the pause; after 256 calls, all pass."""
    pause = paused(gradually=True)
    times: list[int] = []
    for _ in range(300):
        times.append(pause.earliest(1, times[-1] if times else 0))
        assert pause.take(1, times[-1])

    assert [sum(at <= (160 + 10 * step) * MS for at in times) for step in range(9)] == [
        *(2**step for step in range(8)),
        300,
    ]


def test_step_of_slow_start_takes_at_most_a_quarter_of_a_second() -> None:
    second = 1_000_000_000
    pause = paused(60 * second, gradually=True)
    pause.book(1, 60 * second)

    assert pause.earliest(1, 60 * second) == 60 * second + second // 4


def test_unbooked_call_of_slow_start_leaves_its_step_to_the_next() -> None:
    pause = paused(gradually=True)
    for _ in range(3):
        pause.book(1, pause.until)
    pause.unbook(1, 170 * MS)

    assert pause.until == 160 * MS + int(10 * MS * math.log2(3))


def test_restored_pause_goes_on_as_the_one_before() -> None:
    pause, other = paused(gradually=True), Pause()
    pause.book(1, 160 * MS)
    other.restore(pause.state())
    for each in (pause, other):
        each.book(1, each.until)

    assert pause.until == other.until == 160 * MS + int(10 * MS * math.log2(3))


def test_only_longer_pause_restarts_slow_start() -> None:
    pause = paused(gradually=True)
    pause.book(1, 160 * MS)
    pause.begin(165 * MS, 160 * MS, gradually=True)
    assert pause.until == 170 * MS
    pause.begin(320 * MS, 160 * MS, gradually=True)
    assert pause.until == 320 * MS
