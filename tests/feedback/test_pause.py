"""The meter of a pause: nobody passes before its end, and after it few at first."""

import math

from asyncbucket.core.meters import NEVER
from asyncbucket.feedback.pause import Pause

MS = 1_000_000


def paused(until: int = 160 * MS, *, gradually: bool = False) -> Pause:
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


def test_step_of_slow_start_takes_at_most_a_quarter_of_a_second() -> None:
    second = 1_000_000_000
    pause = paused(60 * second, gradually=True)
    pause.book(1, 60 * second)
    assert pause.earliest(1, 60 * second) == 60 * second + second // 4


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
