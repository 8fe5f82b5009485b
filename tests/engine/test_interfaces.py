"""What is told of a call beside the limits may refuse it, before it waits and when it has passed."""

from typing import Any

import pytest

from asyncbucket import AsyncBucketError, Limiter
from asyncbucket.engine.interfaces import Account
from asyncbucket.engine.meters import Amounts


class Refusing(Account):
    """Refuse calls from the n-th question on."""

    def __init__(self, after: int) -> None:
        self.after = after

    def refuses(self, amounts: Amounts) -> AsyncBucketError | None:  # noqa: ARG002 - all alike
        self.after -= 1
        return AsyncBucketError("refused here") if self.after < 0 else None


@pytest.mark.parametrize("after", [0, 1])
async def test_account_that_refuses_is_asked_once_and_nothing_is_kept(after: int) -> None:
    limiter = Limiter("10 RPM", concurrency=1)
    lease: Any = limiter.acquire()
    lease.accounts = (Refusing(after),)
    with pytest.raises(AsyncBucketError, match="refused here"):
        await lease
    now = limiter.statistics()
    assert (now.in_flight, now.limits[0].used) == (0, 0)


async def test_nowait_gives_back_what_an_account_refuses_after_the_admission() -> None:
    limiter = Limiter("10 RPM", concurrency=1)
    lease: Any = limiter.acquire()
    lease.accounts = (Refusing(1),)
    with pytest.raises(AsyncBucketError, match="refused here"):
        lease._take_now()
    assert limiter.statistics().in_flight == 0
    limiter.acquire_nowait().release()
