"""The load: LlamaIndex agents with a tool, and batches of embeddings beside them, all at once.

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
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import PrivateAttr

from asyncbucket.cli.demo.scenario import Scenario
from asyncbucket.cli.demo.tally import Tally
from asyncbucket.cli.demo.traffic import CountingTransport
from asyncbucket.cli.provider import without_key
from asyncbucket.llama_index import RateLimitWaitEvent

#: How many agents start before the loop gets a break; each costs some milliseconds of CPU.
_STARTS_BEFORE_BREAK: Final = 4
_BATCH_SIZE: Final = 10
_CITIES: Final = ("Lima", "Oslo", "Accra", "Perth", "Quito", "Turin", "Kyoto", "Dakar")
#: Errors that any other call would get, too: the demo ends at the first one.
_FATAL: Final = frozenset({401, 403, 404})

Job = Callable[[], Awaitable[object]]


class Fatal(Exception):  # noqa: N818 - its name says it
    """Say that no call can succeed, and why."""


def look_up_weather(city: str) -> str:
    """Look up the weather in a city."""
    return f"{city}: 21 degrees, a light wind from the west, no rain until the evening."


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
async def models(
    scenario: Scenario, tally: Tally, *, api_base: str
) -> AsyncGenerator[tuple[Any, Any]]:
    """Open LLM and embedding model as usual; paced if the tally has a limiter."""
    async with httpx.AsyncClient(
        transport=CountingTransport(tally.traffic), timeout=60, trust_env=True
    ) as client:
        common: dict[str, Any] = {
            "api_base": api_base,
            "api_key": scenario.api_key,
            "async_http_client": client,
        }
        llm: Any = OpenAI(model=scenario.model, **common)
        try:
            _ = llm.metadata
        except ValueError:
            llm = _AnyOpenAI(model=scenario.model, **common)
        embed_model: Any = None
        if scenario.embed_model is not None:
            embed_model = OpenAIEmbedding(
                model_name=scenario.embed_model, embed_batch_size=_BATCH_SIZE, **common
            )
        if tally.limiter is not None:
            llm = tally.limiter.wrap(llm)
            embed_model = embed_model and tally.limiter.wrap(embed_model)
        yield llm, embed_model


async def run(scenario: Scenario, tally: Tally, *, api_base: str) -> None:
    """Run all jobs at once and return when the last one is done.

    Cancelling ends them all; what they did stays in the tally.

    Raises:
        Fatal: the first call failed in a way that all others would, too.
    """
    _preload()
    async with models(scenario, tally, api_base=api_base) as (llm, embed_model):
        jobs = list(_jobs(scenario, tally, llm, embed_model))
        tally.started_ns = time.monotonic_ns()
        try:
            with _recording_waits(tally):
                await _run_all(jobs, tally, scenario.api_key)
        finally:
            tally.ended_ns = time.monotonic_ns()


def _preload() -> None:
    """Load what the first call would load: half a second of CPU that belongs to neither run."""
    import_module("openai.resources")
    get_tokenizer()


async def _run_all(jobs: list[Job], tally: Tally, api_key: str) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for number, job in enumerate(jobs, 1):
                group.create_task(_run_job(job, tally, api_key))
                if number % _STARTS_BEFORE_BREAK == 0:
                    await asyncio.sleep(0.001)
    except* Fatal as errors:
        raise errors.exceptions[0] from None


async def _run_job(job: Job, tally: Tally, api_key: str) -> None:
    tally.begun += 1
    try:
        await job()
    except Exception as error:  # noqa: BLE001 - whatever ends an agent is counted and shown
        if getattr(error, "status_code", None) in _FATAL:
            raise Fatal(without_key(f"{type(error).__name__}: {error}", api_key)) from None
        tally.failures[_error_key(error, api_key)] += 1


def _error_key(error: Exception, api_key: str) -> str:
    """Return a name by which equal errors are counted together; providers' messages all differ."""
    name = type(error).__name__
    if hasattr(error, "status_code"):
        code = getattr(error, "code", None)
        return f"{name} ({code})" if code else name
    return without_key(f"{name}: {error}", api_key)


def _jobs(scenario: Scenario, tally: Tally, llm: Any, embed_model: Any) -> Iterator[Job]:
    """Yield agents, with the batches spread evenly among them."""
    batches = 0
    for number in range(scenario.agents):
        yield _agent(number, tally, llm)
        while batches < (number + 1) * scenario.batches // scenario.agents:
            yield _batch(batches, tally, embed_model)
            batches += 1


def _agent(number: int, tally: Tally, llm: Any) -> Job:
    # As `Any`, because type checkers pick a deprecated overload of `run`.
    agent: Any = FunctionAgent(tools=[look_up_weather], llm=llm, timeout=None)
    question = f"I am traveller {number}. What should I wear in {_CITIES[number % len(_CITIES)]}?"

    async def job() -> None:
        await agent.run(user_msg=question)
        tally.agents_finished += 1

    return job


def _batch(number: int, tally: Tally, embed_model: Any) -> Job:
    texts = [
        f"Report {number}.{line}: the harbour of {_CITIES[line % len(_CITIES)]} in fine weather."
        for line in range(_BATCH_SIZE)
    ]

    async def job() -> None:
        await embed_model.aget_text_embedding_batch(texts)
        tally.batches_finished += 1

    return job


class _WaitHandler(BaseEventHandler):
    """Record each wait that the wrap reports."""

    _waits: list[tuple[float, str]] = PrivateAttr()

    def __init__(self, waits: list[tuple[float, str]]) -> None:
        super().__init__()
        self._waits = waits

    @classmethod
    def class_name(cls) -> str:
        return "asyncbucket_demo_waits"

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if isinstance(event, RateLimitWaitEvent):
            self._waits.append((event.waited, event.bound_by or "their turn"))


@contextmanager
def _recording_waits(tally: Tally) -> Generator[None]:
    dispatcher = get_dispatcher()
    handler = _WaitHandler(tally.waits)
    dispatcher.add_event_handler(handler)
    try:
        yield
    finally:
        dispatcher.event_handlers.remove(handler)
