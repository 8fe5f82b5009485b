"""What holds in every test of the core."""

import logging
from collections.abc import Iterator

import pytest


class _Kept(logging.Handler):
    """Keep what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.messages.append(self.format(record))


@pytest.fixture(autouse=True)
def no_callback_fails() -> Iterator[None]:
    """An exception in a timer or a callback ends no test by itself: a loop only logs it."""
    kept = _Kept()
    log = logging.getLogger("asyncio")
    log.addHandler(kept)
    yield
    log.removeHandler(kept)
    assert kept.messages == []
