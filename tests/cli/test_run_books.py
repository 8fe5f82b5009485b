"""A restarted process stays under the limit: what was admitted before still counts."""

import json
import time

import pytest

from asyncbucket import Limiter, WouldBlock
from asyncbucket.cli.run.books import Admission, restore, snapshot

SECOND = 1_000_000_000


def ago(seconds: float) -> int:
    """Return the instant of the wall clock some seconds ago."""
    return time.time_ns() - round(seconds * SECOND)


def through_json(limiter: Limiter) -> dict[str, object]:
    """Return the bookings as they come back from a file."""
    found: dict[str, object] = json.loads(json.dumps(snapshot(limiter)))
    return found


def test_what_was_booked_is_booked_again() -> None:
    """This covers requests and tokens, in their windows and in the bucket that paces them."""
    before = Limiter("100 RPM burst 10", tpm=1_000)
    for _ in range(7):
        before.acquire_nowait(tokens=50).release()
    after = Limiter("100 RPM burst 10", tpm=1_000)

    restore(after, [], saved=through_json(before))

    assert [use.used for use in after.statistics().limits] == [7, 350]
    assert after.statistics().limits[0].available == 3


def test_window_lets_them_go_when_they_are_a_window_old() -> None:
    """The wait in the refusal is 60 s from the admission, not from the restart."""
    limiter = Limiter("10 RPM burst 10")
    restore(limiter, [Admission(ago(45), {"requests": 1})] * 10)

    with pytest.raises(WouldBlock) as caught:
        limiter.acquire_nowait()
    assert caught.value.retry_after == pytest.approx(15.35, abs=0.5)


def test_admissions_come_on_top_of_what_was_saved() -> None:
    """These are the ones between the last note and the kill."""
    before = Limiter("100 RPM")
    before.acquire_nowait().release()
    after = Limiter("100 RPM")

    restore(after, [Admission(ago(0), {"requests": 2})], saved=through_json(before))

    assert after.statistics().limits[0].used == 3


def test_what_is_older_than_the_window_is_forgotten() -> None:
    """A restart on the next day begins with the whole limit."""
    limiter = Limiter("10 RPM burst 10")
    restore(limiter, [Admission(ago(86_400), {"requests": 10})])

    assert limiter.statistics().limits[0].available == 10


def test_clock_that_was_set_back_errs_on_the_safe_side() -> None:
    """An admission in the future counts as one of now."""
    limiter = Limiter("10 RPM burst 10")
    restore(limiter, [Admission(ago(-3_600), {"requests": 10})])

    with pytest.raises(WouldBlock) as caught:
        limiter.acquire_nowait()
    assert caught.value.retry_after == pytest.approx(60, abs=1)


def test_other_limits_than_before_take_what_concerns_them() -> None:
    """A new limit has nothing booked, and one that is gone is no error."""
    before = Limiter(rpm=100, tpm=1_000)
    before.acquire_nowait(tokens=10).release()
    after = Limiter(rpm=50, rpd=1_000)

    restore(after, [], saved=through_json(before))

    assert [use.used for use in after.statistics().limits] == [1, 0]


def test_deadline_is_judged_without_what_nobody_gives_back() -> None:
    """Leases of the last process cannot come back, so a hopeless wait is refused at once."""
    limiter = Limiter("10 RPM burst 10")
    restore(limiter, [Admission(ago(0), {"requests": 10})])

    assert limiter._account.limits["requests", 60][1].lent == 0
