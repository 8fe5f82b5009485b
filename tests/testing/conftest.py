"""What the tests of the kit share."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Wait until something that happens in another thread has happened."""

    async def wait(happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not happened():  # noqa: ASYNC110 - no event crosses over from the server's loop
                await asyncio.sleep(0.005)

    return wait
