"""What the tests of the core share, and what holds in all of them."""

import logging
import threading
from collections.abc import Iterator

import pytest


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
    """Stand in for a budget's lock; subclasses change how it is acquired."""

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
