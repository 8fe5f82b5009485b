"""What a limiter has booked, and how a later limiter books it again."""

from asyncbucket import Limiter
from asyncbucket.core.bookings import Booked, bookings, rebook, rebook_call
from asyncbucket.testing import VirtualClock

SECOND = 1_000_000_000


def test_bookings_report_each_entry_with_its_age() -> None:
    """Windows are told entry by entry, and the bucket that paces them by what it lacks."""
    clock = VirtualClock()
    limiter = Limiter("60 RPM burst 10", "600 TPM", clock=clock)
    limiter.acquire_nowait(tokens=100).release()
    clock.advance(2.0)
    limiter.acquire_nowait(requests=5, tokens=50).release()
    clock.advance(1.0)

    assert bookings(limiter) == (
        Booked("requests", 60, ((3 * SECOND, 1), (SECOND, 5)), missing=4),
        Booked("tokens", 60, ((3 * SECOND, 100), (SECOND, 50)), missing=0),
    )


def test_rebooking_restores_use_as_if_same_limiter_had_gone_on() -> None:
    """The time in between counts, too; what the new limiter does not limit is left out."""
    clock = VirtualClock()
    clock.advance(100.0)
    before = Limiter("60 RPM burst 10", "600 TPM", clock=clock)
    before.acquire_nowait(requests=8, tokens=500).release()
    booked = bookings(before)
    clock.advance(2.0)
    after = Limiter("60 RPM burst 10", clock=clock)
    rebook(after, booked, ago=2 * SECOND)

    assert bookings(after) == bookings(before)[:1]
    assert after.statistics().limits[0].available == 4


def test_refilled_bucket_lacks_nothing_after_rebooking() -> None:
    """Its window may remember older calls than those that the bucket still lacks."""
    clock = VirtualClock()
    clock.advance(100.0)
    before = Limiter("60 RPM burst 10", clock=clock)
    before.acquire_nowait(requests=5).release()
    clock.advance(5.0)
    after = Limiter("60 RPM burst 10", clock=clock)
    rebook(after, bookings(before), ago=0)

    assert after.statistics().limits[0].used == 5
    assert after.statistics().limits[0].available == 10


def test_call_is_rebooked_in_each_limit_that_counts_it() -> None:
    """It is booked in paced and other limits; resources that it does not cost do not change."""
    clock = VirtualClock()
    clock.advance(100.0)
    limiter = Limiter("60 RPM burst 10", "600 TPM", "3 images/10s", clock=clock)
    rebook_call(limiter, {"requests": 1, "tokens": 100}, ago=5 * SECOND)

    assert [use.used for use in limiter.statistics().limits] == [1, 100, 0]
    clock.advance(56.0)
    assert [use.used for use in limiter.statistics().limits] == [0, 0, 0]
