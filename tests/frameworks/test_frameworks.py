"""What docs/frameworks.md promises holds for each framework, by the page's own code and real packages.

`make frameworks` has environments with all of them; elsewhere what is not installed is skipped.
The frameworks, and the provider, run on the machine's clock.
"""

import asyncio
import gc
import itertools
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

# The frameworks warn of what they will change, in themselves and in each other.
pytestmark = [pytest.mark.real_clock, pytest.mark.filterwarnings("default")]

PAGE = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text("utf-8")
SECTIONS: Mapping[str, str] = {
    title: "".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    if "async def ask" in text
}
#: Their agents call models in threads, which nobody can cancel.
IN_THREADS = {"CrewAI"}

CALLS = 200
#: Calls a second: slow enough for the slowest of them on a busy machine.
RATE = 30
CONCURRENCY = 5
#: A single call and four retries.
ATTEMPTS = 5
#: What knows only of the call before it, and not of its end.
REQUESTS_ONLY = {"Other models of LangChain"}
#: No prompt is asked twice: DSPy remembers replies, in files too.
PROMPTS = (f"Is {n} prime?" for n in itertools.count(time.time_ns()))


@pytest.fixture(params=SECTIONS)
async def framework(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """Run a section with a limiter of the test's own; yield what it defines, and the provider."""
    with RateLimitedProvider(rpm=RATE, minute=1.0, latency=0.02) as provider:
        settings = {
            **{f"{name}_API_KEY": "test-key" for name in ("OPENAI", "ANTHROPIC", "GEMINI")},
            "OPENAI_BASE_URL": provider.base_url,
            "ANTHROPIC_BASE_URL": provider.url,
            "ANTHROPIC_API_BASE": provider.url,
            "GOOGLE_GEMINI_BASE_URL": provider.url,
            # What they would send to others, or ask of them.
            "CREWAI_DISABLE_TELEMETRY": "true",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "OPENAI_AGENTS_DISABLE_TRACING": "1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        limiter = Limiter(f"{RATE}/s", "100M TPM", concurrency=CONCURRENCY)
        defined: dict[str, Any] = {"__name__": "page", "limiter": limiter}
        try:
            source = SECTIONS[request.param].replace("http://127.0.0.1:11434/v1", provider.base_url)
            exec(source, defined)  # noqa: S102 - our own documentation
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed")
        ours = {"title": request.param, "provider": provider, "limiter": limiter}
        yield SimpleNamespace(**{"first_part": None, **defined, **ours})
    # Clients that nobody closes must not warn in another test.
    _ = gc.collect()


async def until(condition: Callable[[], bool], *, within: float) -> None:
    """Wait until something holds, which nothing announces."""
    async with asyncio.timeout(within):
        while not condition():
            _ = gc.collect()  # streams that were dropped end then
            await asyncio.sleep(0.2)


async def test_many_calls_at_once_are_never_refused_and_use_the_limit(framework: Any) -> None:
    provider, limiter = framework.provider, framework.limiter
    await framework.ask(next(PROMPTS))  # some load parts of themselves late

    await asyncio.gather(*(framework.ask(next(PROMPTS)) for _ in range(CALLS)))

    arrived = [each.time_ns for each in provider.arrivals[-CALLS:]]
    used = CALLS / RATE / ((arrived[-1] - arrived[0]) / 1e9)
    tokens = limiter.statistics().limits[1].used / (CALLS + 1)
    figures = f"{framework.title}: {used:.1%} used, {tokens:.1f} tokens a call"
    assert provider.statistics().refused == 0, figures
    assert provider.statistics().requests == limiter.statistics().admitted == CALLS + 1, figures
    assert used >= 0.95, figures
    assert tokens < 100, figures  # the reply's usage stands, not the estimate of 256
    print(figures)  # noqa: T201 - for those who ask for it by `-s`


async def test_one_layer_retries(framework: Any) -> None:
    framework.provider.fail_next(100, status=503, retry_after=0.001)

    with pytest.raises(Exception, match=r"."):  # each has its own
        await framework.ask(next(PROMPTS))

    attempts = 1 if framework.title in REQUESTS_ONLY else ATTEMPTS
    assert framework.provider.statistics().requests == attempts
    assert framework.limiter.statistics().in_flight == 0


async def test_cancelled_calls_give_their_slots_back(framework: Any) -> None:
    limiter, waits = framework.limiter, framework.title in IN_THREADS
    framework.provider.latency = 1.0 if waits else 30.0
    tasks = [asyncio.ensure_future(framework.ask(next(PROMPTS))) for _ in range(4 * CONCURRENCY)]
    await until(lambda: framework.provider.statistics().in_flight >= CONCURRENCY, within=10)

    for task in tasks:
        task.cancel()
    _ = await asyncio.gather(*tasks, return_exceptions=True)

    await until(lambda: not limiter.statistics().in_flight, within=20 if waits else 2)
    framework.provider.latency = 0.0
    await framework.ask(next(PROMPTS))


async def test_dropped_stream_gives_its_slot_back(framework: Any) -> None:
    if framework.first_part is None:
        pytest.skip("the page shows no stream")
    framework.provider.latency = 1.0

    await framework.first_part(next(PROMPTS))

    await until(lambda: not framework.limiter.statistics().in_flight, within=10)
    assert framework.limiter.statistics().admitted == 1


async def test_hook_gives_calls_of_litellm_their_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """So are those paced that another framework makes."""
    litellm = pytest.importorskip("litellm")
    loggers = pytest.importorskip("litellm.integrations.custom_logger")
    handlers = pytest.importorskip("litellm.llms.custom_httpx.http_handler")
    limiter = Limiter("60 RPM")
    client = handlers.AsyncHTTPHandler(transport=limiter.transport())

    class PassClient(loggers.CustomLogger):  # type: ignore[misc, name-defined]
        async def async_pre_call_deployment_hook(self, kwargs: Any, _: object) -> dict[str, Any]:
            return {**kwargs, "client": client}

    monkeypatch.setattr(litellm, "callbacks", [PassClient()])
    messages, model = [{"role": "user", "content": next(PROMPTS)}], "anthropic/claude-sonnet-5"
    with RateLimitedProvider() as provider:
        await litellm.acompletion(model, messages, api_base=provider.url, api_key="test-key")

    assert limiter.statistics().admitted == 1
