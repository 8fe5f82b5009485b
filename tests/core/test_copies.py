"""Objects that hold slots or count calls exist once, however they are copied."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from asyncbucket import Limiter, TokenBucket

COPIES = pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])


@COPIES
def test_copied_lease_gives_its_slot_back_once(copied: Callable[[Any], Any]) -> None:
    limiter = Limiter(concurrency=1)
    lease = limiter.acquire_nowait()
    twin = copied({"lease": lease})["lease"]
    del twin
    assert limiter.statistics().in_flight == 1
    lease.release()
    copied(lease).release()
    assert limiter.statistics().in_flight == 0
    assert repr(limiter) == "<Limiter 'default', concurrency 0/1, 0 waiting>"


@COPIES
def test_copy_of_limiter_or_bucket_is_same_object(copied: Callable[[Any], Any]) -> None:
    limiter = Limiter("60 RPM")
    child = limiter.child("chat")
    bucket = TokenBucket(1.0)
    assert copied([limiter, child, bucket]) == [limiter, child, bucket]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Limiter("60 RPM"),
        lambda: Limiter("60 RPM").child("chat"),
        lambda: Limiter("60 RPM").acquire_nowait(),
        lambda: TokenBucket(1.0),
    ],
)
def test_pickling_limiter_lease_or_bucket_fails_with_remedy(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"belongs to its process .* with store=\.\.\. if they"):
        pickle.dumps(make())
