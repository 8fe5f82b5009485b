"""The load of the demo: LlamaIndex agents with a tool, and batches of embeddings, all at once.

The same code runs in both halves; only the models differ, plain or wrapped.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib import import_module
from typing import Any, Final

import httpx
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import LLMMetadata
from llama_index.core.utils import get_tokenizer
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from asyncbucket.cli import interrupts_blocked
from asyncbucket.cli.demo import Run, Scenario
from asyncbucket.cli.options import without_key
from asyncbucket.cli.ui import Screen
from asyncbucket.core.events import Admitted, Event
from asyncbucket.testing import Arrival, ProviderProcess

#: Seconds between two plain lines of progress.
_LINE_INTERVAL: Final = 2.0
#: The range of seconds that the bundled provider takes for a reply.
_LATENCY: Final = (0.2, 0.6)
_REPLY_TOKENS: Final = 40
_EMBED_MODEL: Final = "text-embedding-3-small"
_BATCH_SIZE: Final = 10
#: How many agents start before the loop gets a break; each costs some milliseconds of CPU.
_STARTS_BEFORE_BREAK: Final = 4
_CITIES: Final = ("Lima", "Oslo", "Accra", "Perth", "Quito", "Turin", "Kyoto", "Dakar")
_RATE_LIMITED: Final = 429
#: Errors that any other call would get, too: the demo ends at the first one.
_FATAL: Final = frozenset({401, 403, 404})

Job = Callable[[], Awaitable[object]]


class Fatal(Exception):  # noqa: N818 - its name says it
    """Say that no call can succeed, and why."""


def run_once(run: Run, screen: Screen) -> None:
    """Run the agents once, from the provider's start to its end, even if Ctrl-C ends it.

    Raises:
        Fatal: the provider refuses in a way that any call would meet.
    """
    if run.scenario.api_base is not None:
        _run(run, screen, run.scenario.api_base)
        return
    with bundled_provider(run.scenario) as provider:
        _run(run, screen, provider.base_url)
        run.arrivals = provider.arrivals


def _run(run: Run, screen: Screen, api_base: str) -> None:
    try:
        asyncio.run(_drive(run, screen, api_base))
    except KeyboardInterrupt:  # the second one, or one before or after the loop
        run.interrupted = True


async def _drive(run: Run, screen: Screen, api_base: str) -> None:
    asyncio.get_running_loop().set_exception_handler(_ignore)
    ticker = asyncio.create_task(_tick(run, screen))
    try:
        await load(run, api_base)
    except asyncio.CancelledError:  # how asyncio passes on a Ctrl-C
        run.interrupted = True
    finally:
        ticker.cancel()


def _ignore(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Keep off the screen what LlamaIndex's workflows leave behind when they are cancelled."""
    del loop, context


async def _tick(run: Run, screen: Screen) -> None:
    while True:
        screen.show([run.panel()])
        await asyncio.sleep(screen.interval(_LINE_INTERVAL))


@contextmanager
def bundled_provider(scenario: Scenario) -> Generator[ProviderProcess]:
    """Provide the bundled provider in a process of its own."""
    provider = ProviderProcess(
        rpm=scenario.amount("requests"),
        tpm=scenario.amount("tokens"),
        minute=scenario.window,
        charge="usage",
        latency=_LATENCY,
        reply_tokens=_REPLY_TOKENS,
    )
    try:
        with interrupts_blocked():
            provider.start()
        yield provider
    finally:
        provider.stop()


async def load(run: Run, api_base: str) -> None:
    """Run all jobs at once and return when the last one is done.

    Cancelling ends them all; what they did stays in ``run``.

    Raises:
        Fatal: the first call failed in a way that all others would, too.
    """
    # What the first call would load: half a second of CPU that belongs to neither run.
    import_module("openai.resources")
    get_tokenizer()

    def note(event: Event) -> None:
        if isinstance(event, Admitted):
            run.waits.append((event.waited, event.bound_by if event.waited else None))

    if run.limiter is not None:
        run.limiter.observe(note)
    async with _models(run, api_base) as (llm, embed_model):
        jobs = list(_jobs(run, llm, embed_model))
        run.started_ns = time.monotonic_ns()
        try:
            await _run_all(jobs, run)
        finally:
            run.ended_ns = time.monotonic_ns()


class _AnyOpenAI(OpenAI):
    """Accept models whose context size LlamaIndex does not know, such as other providers'."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=32_000,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=self.model,
        )


@asynccontextmanager
async def _models(run: Run, api_base: str) -> AsyncGenerator[tuple[Any, Any]]:
    """Open chat and embedding model as usual; paced if the run has a limiter."""
    async with _counting_client(run) as client:
        common: dict[str, Any] = {
            "api_base": api_base,
            "api_key": run.scenario.api_key,
            "async_http_client": client,
        }
        llm: Any = OpenAI(model=run.scenario.model, **common)
        try:
            _ = llm.metadata
        except ValueError:
            llm = _AnyOpenAI(model=run.scenario.model, **common)
        embed_model: Any = OpenAIEmbedding(
            model_name=_EMBED_MODEL, embed_batch_size=_BATCH_SIZE, **common
        )
        if run.limiter is not None:
            llm, embed_model = run.limiter.wrap(llm), run.limiter.wrap(embed_model)
        yield llm, embed_model


def _counting_client(run: Run) -> httpx.AsyncClient:
    """Return a client that counts every attempt; one is under way until its headers are there."""

    async def sent(request: httpx.Request) -> None:
        run.requests += 1
        run.in_flight += 1
        request.extensions["asyncbucket_demo"] = time.monotonic_ns()

    async def replied(response: httpx.Response) -> None:
        is_refusal = response.status_code == _RATE_LIMITED
        run.in_flight -= 1
        run.refused += is_refusal
        run.answered += response.is_success
        sent_ns: int = response.request.extensions["asyncbucket_demo"]
        run.arrivals.append(Arrival(sent_ns, "", 0, not is_refusal))

    # As the OpenAI client has it: an httpx client without limits of its own has 100.
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
    hooks: Any = {"request": [sent], "response": [replied]}
    return httpx.AsyncClient(limits=limits, timeout=60, event_hooks=hooks)


async def _run_all(jobs: list[Job], run: Run) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for number, job in enumerate(jobs, 1):
                group.create_task(_run_job(job, run))
                if number % _STARTS_BEFORE_BREAK == 0:
                    await asyncio.sleep(0.001)
    except* Fatal as errors:
        raise errors.exceptions[0] from None


async def _run_job(job: Job, run: Run) -> None:
    try:
        await job()
    except Exception as error:  # noqa: BLE001 - whatever ends an agent is counted and shown
        name = type(error).__name__
        whole = without_key(f"{name}: {error}", run.scenario.api_key)
        status, code = (getattr(error, field, None) for field in ("status_code", "code"))
        if status in _FATAL:
            raise Fatal(whole) from None
        # Equal errors are counted together; providers' messages all differ.
        short = f"{name} ({code})" if code else name
        run.failures[whole if status is None else short] += 1


def _jobs(run: Run, llm: Any, embed_model: Any) -> Iterator[Job]:
    """Yield agents, with the batches spread evenly among them."""
    agents, batches = run.scenario.agents, 0
    for number in range(agents):
        yield _agent(number, run, llm)
        while batches < (number + 1) * run.scenario.batches // agents:
            yield _batch(batches, embed_model)
            batches += 1


def look_up_weather(city: str) -> str:
    """Look up the weather in a city."""
    return f"{city}: 21 degrees, a light wind from the west, no rain until the evening."


def _agent(number: int, run: Run, llm: Any) -> Job:
    # As `Any`, because type checkers pick a deprecated overload of `run`.
    agent: Any = FunctionAgent(tools=[look_up_weather], llm=llm, timeout=None)
    question = f"I am traveler {number}. What should I wear in {_CITIES[number % len(_CITIES)]}?"

    async def job() -> None:
        await agent.run(user_msg=question)
        run.agents_finished += 1

    return job


def _batch(number: int, embed_model: Any) -> Job:
    texts = [
        f"Report {number}.{line}: the harbor of {_CITIES[line % len(_CITIES)]} in fine weather."
        for line in range(_BATCH_SIZE)
    ]

    def job() -> Awaitable[object]:
        batch: Awaitable[object] = embed_model.aget_text_embedding_batch(texts)
        return batch

    return job
