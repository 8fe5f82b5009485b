"""The load of the demo: LlamaIndex agents with a tool, and batches of embeddings, all at once.

The same code runs in both halves; only the models differ, plain or wrapped.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib import import_module
from typing import Any, Final

import httpx
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.utils import get_tokenizer
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from asyncbucket import Cost, agent
from asyncbucket.cli import interrupts_blocked
from asyncbucket.cli.demo import CALLS_PER_AGENT, Run
from asyncbucket.cli.ui import Screen
from asyncbucket.testing import ProviderProcess

#: Seconds between two plain lines of progress.
_LINE_INTERVAL: Final = 2.0
#: The range of seconds that the provider takes for a reply.
_LATENCY: Final = (0.2, 0.6)
_REPLY_TOKENS: Final = 40
_MODEL: Final = "gpt-4o-mini"
_EMBED_MODEL: Final = "text-embedding-3-small"
_BATCH_SIZE: Final = 10
#: How many agents start before the loop gets a break; each costs some milliseconds of CPU.
_STARTS_BEFORE_BREAK: Final = 4
_CITIES: Final = ("Lima", "Oslo", "Accra", "Perth", "Quito", "Turin", "Kyoto", "Dakar")
_RATE_LIMITED: Final = 429

Job = Callable[[], Awaitable[object]]


def run_once(run: Run, screen: Screen) -> bool:
    """Run the agents once, from the provider's start to its end; return False if Ctrl-C ended it."""
    provider = ProviderProcess(
        rpm=run.scenario.requests.units,
        tpm=run.scenario.tokens.units,
        minute=run.scenario.requests.per,
        charge="usage",
        latency=_LATENCY,
        reply_tokens=_REPLY_TOKENS,
    )
    try:
        with interrupts_blocked():
            provider.start()
        asyncio.run(_drive(run, screen, provider.base_url))
    except KeyboardInterrupt:
        return False
    finally:
        if provider.pid is not None:
            run.arrivals = provider.arrivals
        provider.stop()
    return True


async def _drive(run: Run, screen: Screen, api_base: str) -> None:
    # What LlamaIndex's workflows leave behind when they are cancelled stays off the screen.
    asyncio.get_running_loop().set_exception_handler(_ignore)
    ticker = asyncio.create_task(_tick(run, screen))
    # What the first call would load: half a second of CPU that belongs to neither run.
    import_module("openai.resources")
    get_tokenizer()
    try:
        async with _counting_client(run) as client:
            jobs = list(_jobs(run, *_models(run, api_base, client)))
            run.started_ns = time.monotonic_ns()
            async with asyncio.TaskGroup() as group:
                for number, job in enumerate(jobs, 1):
                    group.create_task(_run_job(job, run))
                    if number % _STARTS_BEFORE_BREAK == 0:
                        await asyncio.sleep(0.001)
    finally:
        run.ended_ns = time.monotonic_ns()
        ticker.cancel()


def _ignore(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    del loop, context


async def _tick(run: Run, screen: Screen) -> None:
    while True:
        screen.show([run.panel()])
        await asyncio.sleep(screen.interval(_LINE_INTERVAL))


def _models(run: Run, api_base: str, client: httpx.AsyncClient) -> tuple[Any, Any]:
    """Return chat and embedding model as usual; paced if the run has a limiter."""
    common: Any = {"api_base": api_base, "api_key": "none", "async_http_client": client}
    llm = OpenAI(model=_MODEL, **common)
    embed_model = OpenAIEmbedding(model_name=_EMBED_MODEL, embed_batch_size=_BATCH_SIZE, **common)
    if run.limiter is None:
        return llm, embed_model
    return run.limiter.wrap(llm), run.limiter.wrap(embed_model)


def _counting_client(run: Run) -> httpx.AsyncClient:
    """Return a client that counts every attempt."""

    async def sent(_: httpx.Request) -> None:
        run.requests += 1

    async def replied(response: httpx.Response) -> None:
        run.refused += response.status_code == _RATE_LIMITED
        run.answered += response.is_success

    # As the OpenAI client has it: an httpx client without limits of its own has 100.
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
    hooks: Any = {"request": [sent], "response": [replied]}
    return httpx.AsyncClient(limits=limits, timeout=60, event_hooks=hooks)


async def _run_job(job: Job, run: Run) -> None:
    try:
        await job()
    except Exception as error:  # noqa: BLE001 - whatever ends an agent is counted and shown
        name, code = type(error).__name__, getattr(error, "code", None)
        # Equal errors are counted together; providers' messages all differ.
        whole = name if hasattr(error, "status_code") else f"{name}: {error}"
        run.failures[f"{name} ({code})" if code else whole] += 1


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
    worker: Any = FunctionAgent(tools=[look_up_weather], llm=llm, timeout=None)
    question = f"I am traveler {number}. What should I wear in {_CITIES[number % len(_CITIES)]}?"

    async def job() -> None:
        with agent(kind="traveler", expects=Cost(requests=CALLS_PER_AGENT)):
            await worker.run(user_msg=question)
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
