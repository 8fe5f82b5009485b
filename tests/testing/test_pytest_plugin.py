"""Async tests on virtual time, whichever plugin runs the others."""

import pytest

pytest_plugins = ("pytester",)

#: LangChain's plugin, which a peer in the benchmarks brings, takes seconds to load.
QUIET = ("-p", "no:cacheprovider", "-p", "no:langsmith_plugin")
ASYNC_TESTS = """
import asyncio
import pytest
from asyncbucket import Limiter

pytestmark = pytest.mark.{plugin}

@pytest.fixture
async def on_another_loop():
    yield asyncio.get_running_loop()

async def test_three_calls(virtual_time):
    limiter = Limiter("1 request/64s", clock=virtual_time.clock)
    for _ in range(3):
        async with limiter.acquire():
            pass
    assert virtual_time.now == 128.75

class TestHours:
    @pytest.mark.parametrize("hours", [1, 2])
    async def test_sleep(self, hours, virtual_time, on_another_loop):
        await asyncio.sleep(3600 * hours)
        assert virtual_time.now == 3600 * hours

async def test_that_fails(virtual_time):
    assert virtual_time.now == 1, "shown"

async def test_on_the_machines_clock():
    assert "Virtual" not in repr(asyncio.get_running_loop())
"""


@pytest.mark.parametrize(
    "options",
    [["-o", "asyncio_mode=auto"], ["-o", "asyncio_mode=strict"], ["-p", "no:asyncio"]],
    ids=["auto", "strict", "anyio"],
)
def test_async_test_runs_on_virtual_time(pytester: pytest.Pytester, options: list[str]) -> None:
    is_anyio = "no:asyncio" in options
    source = ASYNC_TESTS.format(plugin="anyio" if is_anyio else "asyncio")
    if "asyncio_mode=strict" in options:
        source = source.replace("@pytest.fixture", "@__import__('pytest_asyncio').fixture")
    pytester.makepyfile(source)
    scope = [] if is_anyio else ["-o", "asyncio_default_fixture_loop_scope=function"]
    done = pytester.runpytest_inprocess(*QUIET, "-W", "error", *scope, *options)
    done.assert_outcomes(passed=4, failed=1)
    done.stdout.fnmatch_lines(["*AssertionError: shown*"])
