"""What the tests of the core share, and what holds in all of them."""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Generator, Iterable, Iterator
from typing import Any, TypeVar
from unittest.mock import ANY

import pytest

from asyncbucket import AcquireTimeout, Limiter, QueueFull, WouldBlock
from asyncbucket.engine.dispatchers import ThreadDispatcher
from asyncbucket.engine.meters import Meter, Route, admit
from asyncbucket.testing import VirtualTime, VirtualTimeLoop

T = TypeVar("T")
Refusal = WouldBlock | AcquireTimeout | QueueFull

#: How much longer than its span a window remembers a call.
HELD = 515 / 512


@pytest.fixture(name="time")
def time_of_test(virtual_time: VirtualTime) -> VirtualTime:
    """Give the virtual time on which the test runs."""
    return virtual_time


@pytest.fixture(autouse=True)
def no_callback_fails(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which a timer or a callback raised: a loop only logs such errors."""
    yield
    told = [each for each in caplog.get_records("call") if each.name == "asyncio" and each.exc_info]
    assert [each.getMessage() for each in told] == []


def take(meter: Meter, amount: int, now: int) -> bool:
    """Have a newcomer pass one meter if it may; return whether it did."""
    due, _ = admit(Route((), ((meter, "units"),)), {"units": amount}, now, now)
    return due <= now


def used(limiter: Limiter) -> list[int]:
    """Return how much of each of its limits is used."""
    return [use.used for use in limiter.statistics().limits]


def available(limiter: Limiter) -> int:
    """Return how much of its only limit could pass now."""
    (use,) = limiter.statistics().limits
    return use.available


def nothing_is_left(*limiters: Limiter) -> None:
    """Assert that nobody waits and nothing is held, anywhere."""
    for limiter in limiters:
        now = limiter.statistics()
        assert (now.waiting, now.in_flight) == (0, 0)
        dispatchers = limiter._node.pacer.dispatchers
        for dispatcher in (dispatchers.threads, *dispatchers.values()):
            assert (dispatcher.waiting, dispatcher.leases) == (0, 0)
            assert not isinstance(dispatcher, ThreadDispatcher)


@contextlib.contextmanager
def refused(
    kind: type[Refusal],
    says: str = " ",
    *,
    retry_after: object = ANY,
    bound_by: object = ANY,
    limiter: object = ANY,
) -> Generator[None]:
    """Expect an error with this in its message, and with these attributes."""
    with pytest.raises(kind, match=re.escape(says)) as error:
        yield
    assert error.value.retry_after == retry_after
    assert error.value.bound_by == bound_by
    assert error.value.limiter == limiter


async def steps(count: int) -> None:
    """Let the loop run ``count`` times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def all_blocked() -> None:
    """Let the other tasks of a loop on virtual time run until all of them wait."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    await loop.all_blocked()


async def start(call: Awaitable[T]) -> "asyncio.Future[T]":
    """Start a call, and let it run until it waits."""
    return (await start_all([call]))[0]


async def start_all(calls: Iterable[Awaitable[T]]) -> "list[asyncio.Future[T]]":
    """Start calls in this order, and let them run until they wait."""
    tasks: list[asyncio.Future[T]] = [asyncio.ensure_future(call) for call in calls]
    await all_blocked()
    return tasks


def cancel(*calls: "asyncio.Future[Any]") -> None:
    """Cancel calls."""
    for call in calls:
        call.cancel()
