"""`TokenBucket.acquire` contains a copy of `Bucket.take`; both must give the same results."""

import random

import pytest

from asyncbucket import TokenBucket, WouldBlock
from asyncbucket.core.meters import Bucket


def passes_at_once(bucket: TokenBucket) -> None:
    """Await an acquire that need not wait, without a loop."""
    coroutine = bucket.acquire()
    with pytest.raises(StopIteration):
        coroutine.send(None)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("rate", [1.0, 3.0, 0.7, 1e6])
@pytest.mark.parametrize("burst", [1, 2, 50])
def test_inlined_bookings_leave_same_state_as_bucket(rate: float, burst: int, seed: int) -> None:
    """Mixed with locked bookings and their refunds, all later answers are the same."""
    now = 10**12
    bucket = TokenBucket(rate, burst, clock=lambda: now)
    written, plain = bucket._bucket, Bucket(rate=rate, burst=burst)
    booked: list[tuple[int, int]] = []
    random_ = random.Random(seed)
    for _ in range(60):
        now += random_.choice([0, 0, 1, int(random_.random() * 2e9 / rate)])
        choice = random_.random()
        if choice < 0.5 and plain.take(1, now):
            passes_at_once(bucket)
        elif choice < 0.75:
            amount = random_.randint(1, burst)
            if plain.take(amount, now):
                bucket.acquire_nowait(amount)
                booked.append((amount, now))
            else:
                with pytest.raises(WouldBlock):
                    bucket.acquire_nowait(amount)
        elif booked:
            refund = booked.pop(random_.randrange(len(booked)))
            plain.unbook(*refund)
            written.unbook(*refund)
        assert written.available(now) == plain.available(now)
        assert written.earliest(burst, now) == plain.earliest(burst, now)
