"""Fixtures for pytest, found automatically once asyncbucket is installed.

`virtual_time` is a stretch of virtual time, on which it runs the test itself if that is ``async``,
whatever plugin runs the others; `rate_limited_provider` makes providers on loopback
that are stopped at the end of the test; `no_unpaced_calls` fails a test in which a call to a model
provider passes no limiter::

    async def test_an_hour_of_pacing(virtual_time):
        limiter = Limiter("500 RPM", clock=virtual_time.clock)
        await asyncio.sleep(3600)
        assert virtual_time.now == 3600


    async def test_no_429(rate_limited_provider):
        provider = rate_limited_provider(rpm=600, tpm=100_000)
        client = AsyncOpenAI(base_url=provider.base_url, api_key="any")

pytest loads this module in every session, so until a fixture is used it imports the core alone.
"""

import contextlib
import inspect
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
    """Virtual time that starts at 0: `clock`, `now`, `advance`, and `run(main())` in a plain test."""
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


class _OnVirtualTime(pytest.Function):
    """An async test that its own `virtual_time` runs; its async fixtures stay on another loop."""

    def runtest(self) -> None:
        given: dict[str, Any] = self.funcargs
        arguments = {name: given[name] for name in self._fixtureinfo.argnames}
        given["virtual_time"].run(self.obj(**arguments))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    """Take over the async tests that ask for `virtual_time`, after plugins that run async tests."""
    made = yield
    return list(map(_taken_over, made)) if isinstance(made, list) else _taken_over(made)


def _taken_over(item: Any) -> Any:
    info = getattr(item, "_fixtureinfo", None)
    if info is None or "virtual_time" not in info.argnames:
        return item
    if not inspect.iscoroutinefunction(item.obj):
        return item
    taken = _OnVirtualTime.from_parent(
        item.parent,
        name=item.name,
        callspec=getattr(item, "callspec", None),
        callobj=item.obj,
        fixtureinfo=info,
        keywords=item.keywords,
        originalname=item.originalname,
    )
    taken.own_markers = item.own_markers
    return taken
