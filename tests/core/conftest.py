"""What the tests of the core share, and what holds in all of them."""

import asyncio
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.testing import VirtualTime


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> list[pytest.Function] | None:
    """Run an async test that takes ``virtual_time`` on it."""
    if not (
        name.startswith("test_")
        and inspect.iscoroutinefunction(obj)
        and "virtual_time" in inspect.signature(obj).parameters
    ):
        return None
    test = _run_on_virtual_time(obj)
    setattr(collector.obj, name, test)
    return list(collector._genfunctions(name, test))


def _run_on_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*, virtual_time: VirtualTime, **others: Any) -> None:
        virtual_time.run(test(virtual_time=virtual_time, **others))

    return run


class _Kept(logging.Handler):
    """Keep log records of exceptions."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.messages.append(self.format(record))


@pytest.fixture(autouse=True)
def no_callback_fails() -> Iterator[None]:
    """Fail a test in which a timer or a callback raised: a loop only logs such errors."""
    kept = _Kept()
    log = logging.getLogger("asyncio")
    log.addHandler(kept)
    yield
    log.removeHandler(kept)
    assert kept.messages == []


class FakeLock:
    """Stand in for a pacer's lock; subclasses change how it is acquired."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True) -> bool:  # noqa: FBT001, FBT002 - as `Lock.acquire`
        return self._lock.acquire(blocking)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def used(limiter: Limiter) -> list[int]:
    """Return how much of each of its limits is used."""
    return [use.used for use in limiter.statistics().limits]


def available(limiter: Limiter) -> int:
    """Return how much of its only limit could pass now."""
    (use,) = limiter.statistics().limits
    return use.available


def nothing_is_left(*limiters: Limiter) -> None:
    """Assert that nobody waits and nothing is held."""
    for limiter in limiters:
        now = limiter.statistics()
        assert (now.waiting, now.in_flight) == (0, 0)


async def steps(count: int) -> None:
    """Let the loop run ``count`` times."""
    for _ in range(count):
        await asyncio.sleep(0)
