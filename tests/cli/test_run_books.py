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


def test_restore_books_saved_usage_in_windows_and_bucket() -> None:
    """This covers requests and tokens, in their windows and in the bucket that paces them."""
    before = Limiter("100 RPM burst 10", tpm=1_000)
    for _ in range(7):
        before.acquire_nowait(tokens=50).release()
    after = Limiter("100 RPM burst 10", tpm=1_000)

    restore(after, [], saved=through_json(before))

    assert [use.used for use in after.statistics().limits] == [7, 350]
    assert after.statistics().limits[0].available == 3


def test_restored_admissions_expire_a_window_after_they_were_made() -> None:
    """The wait in the refusal is 60 s from the admission, not from the restart."""
    limiter = Limiter("10 RPM burst 10")
    restore(limiter, [Admission(ago(45), {"requests": 1})] * 10)

    with pytest.raises(WouldBlock) as caught:
        limiter.acquire_nowait()
    assert caught.value.retry_after == pytest.approx(15.35, abs=0.5)


def test_restore_adds_later_admissions_to_saved_bookings() -> None:
    """These are the ones between the last note and the kill."""
    before = Limiter("100 RPM")
    before.acquire_nowait().release()
    after = Limiter("100 RPM")

    restore(after, [Admission(ago(0), {"requests": 2})], saved=through_json(before))

    assert after.statistics().limits[0].used == 3


def test_restore_ignores_admissions_older_than_the_window() -> None:
    """A restart on the next day begins with the whole limit."""
    limiter = Limiter("10 RPM burst 10")
    restore(limiter, [Admission(ago(86_400), {"requests": 10})])

    assert limiter.statistics().limits[0].available == 10


def test_admission_dated_in_the_future_counts_from_now() -> None:
    """An admission in the future counts as one of now."""
    limiter = Limiter("10 RPM burst 10")
    restore(limiter, [Admission(ago(-3_600), {"requests": 10})])

    with pytest.raises(WouldBlock) as caught:
        limiter.acquire_nowait()
    assert caught.value.retry_after == pytest.approx(60, abs=1)


def test_restore_under_changed_limits_books_only_matching_usage() -> None:
    """A new limit has nothing booked, and one that is gone is no error."""
    before = Limiter(rpm=100, tpm=1_000)
    before.acquire_nowait(tokens=10).release()
    after = Limiter(rpm=50, rpd=1_000)

    restore(after, [], saved=through_json(before))

    assert [use.used for use in after.statistics().limits] == [1, 0]


def test_restored_bookings_are_not_expected_as_refunds() -> None:
    """Leases of the last process cannot come back, so a hopeless wait is refused at once."""
    limiter = Limiter("10 RPM burst 10")
    restore(limiter, [Admission(ago(0), {"requests": 10})])

    assert limiter._account.limits["requests", 60][1].lent == 0
