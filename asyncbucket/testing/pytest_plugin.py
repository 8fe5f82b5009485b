"""Fixtures for pytest, found automatically once asyncbucket is installed.

`virtual_time` is a stretch of virtual time; `rate_limited_provider` makes providers on loopback
that are stopped at the end of the test; `no_unpaced_calls` fails a test in which a call to a model
provider passes no limiter::

    def test_an_hour_of_pacing(virtual_time):
        limiter = Limiter("500 RPM", clock=virtual_time.clock)
        virtual_time.run(main(limiter))


    async def test_no_429(rate_limited_provider):
        provider = rate_limited_provider(rpm=600, tpm=100_000)
        client = AsyncOpenAI(base_url=provider.base_url, api_key="any")

pytest loads this module in every session, so until a fixture is used it imports the core alone.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

if TYPE_CHECKING:
    from asyncbucket.auditing import Audit
    from asyncbucket.testing.provider import RateLimitedProvider
    from asyncbucket.testing.virtual_time import VirtualTime

ProviderFactory: TypeAlias = "Callable[..., RateLimitedProvider]"
"""What `rate_limited_provider` is: call it with the options of `RateLimitedProvider`."""


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

        def start(**options: Any) -> "RateLimitedProvider":
            return running.enter_context(RateLimitedProvider(**options))

        yield start


@pytest.fixture
def no_unpaced_calls() -> "Generator[Audit]":
    """Fail the test if it calls a model provider past all limiters; see `asyncbucket.audit`."""
    from asyncbucket.auditing import audit

    with audit() as seen:
        yield seen
    if seen.unpaced:
        pytest.fail(str(seen), pytrace=False)
