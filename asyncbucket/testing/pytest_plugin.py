"""Fixtures for pytest, found automatically once asyncbucket is installed.

`virtual_time` is a stretch of virtual time; `rate_limited_provider` makes providers on loopback
that are stopped at the end of the test::

    def test_an_hour_of_pacing(virtual_time):
        limiter = Limiter("500 RPM", clock=virtual_time.clock)
        virtual_time.run(main(limiter))


    async def test_no_429(rate_limited_provider):
        provider = rate_limited_provider(rpm=600, tpm=100_000)
        client = AsyncOpenAI(base_url=provider.base_url, api_key="any")

pytest loads this module in every session, so it imports nothing until a fixture is used.
"""

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Protocol, Unpack

import pytest

if TYPE_CHECKING:
    from asyncbucket.testing.provider import Options, RateLimitedProvider
    from asyncbucket.testing.virtual_time import VirtualTime


class ProviderFactory(Protocol):
    """What `rate_limited_provider` returns: call it with the options of `RateLimitedProvider`."""

    def __call__(self, **options: "Unpack[Options]") -> "RateLimitedProvider":
        """Return a provider that runs until the end of the test."""
        ...


@pytest.fixture
def virtual_time() -> "Generator[VirtualTime]":
    """Virtual time that starts at 0: `run(main())`, `clock`, `now`."""
    from asyncbucket.testing.virtual_time import VirtualTime

    with VirtualTime() as time:
        yield time


@pytest.fixture
def rate_limited_provider() -> Generator[ProviderFactory]:
    """Make running `RateLimitedProvider`s, in synchronous and asynchronous tests alike."""
    from asyncbucket.testing.provider import RateLimitedProvider

    with contextlib.ExitStack() as running:

        def start(**options: "Unpack[Options]") -> RateLimitedProvider:
            return running.enter_context(RateLimitedProvider(**options))

        yield start
