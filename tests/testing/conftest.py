"""What the tests of `asyncbucket.testing` share."""

import asyncio
from collections.abc import Awaitable, Callable
from importlib.util import find_spec

import pytest

#: Tests that need an SDK are left out if it is missing, as on a Python with the core alone.
collect_ignore: list[str] = (
    []
    if find_spec("openai") and find_spec("anthropic")
    else [
        "test_provider_anthropic.py",
        "test_provider_lifecycle.py",
        "test_provider_openai.py",
        "test_replies.py",
    ]
)


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Wait until something that happens in another thread has happened."""

    async def wait(happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not happened():  # noqa: ASYNC110 - the server's loop sends no event to this one
                await asyncio.sleep(0.005)

    return wait
