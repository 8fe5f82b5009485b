"""Real LlamaIndex agents over HTTP: calls in order of arrival, or in the order of their agents."""

import asyncio
import random
import time
from typing import Any, Final

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.llms.openai import OpenAI

from asyncbucket import Limiter, agent
from benchmarks.harness import served_provider

#: Agents of each kind; how many conversations one holds side by side, and questions in each.
KINDS: Final = {"chat": (28, 1, 1), "tools": (22, 1, 4), "research": (10, 5, 2)}
_RPM: Final = 60
#: Seconds that the provider's minute lasts.
_MINUTE: Final = 6.0


def look_up_weather(city: str) -> str:
    """Look up the weather in a city."""
    return f"{city}: 21 degrees, a light wind from the west, no rain until the evening."


async def _run(kind: str, number: int, llm: Any, *, scopes: bool) -> float:
    """Run one agent; return how long it took."""
    _, beside, questions = KINDS[kind]
    tools: list[Any] = [] if kind == "chat" else [look_up_weather]
    worker: Any = FunctionAgent(tools=tools, llm=llm, timeout=None)

    async def converse(part: int) -> None:
        for question in range(questions):
            await worker.run(user_msg=f"{kind} {number}.{part}.{question}: shall I take a coat?")

    async def work() -> None:
        await asyncio.gather(*map(converse, range(beside)))

    began = time.monotonic()
    if scopes:
        with agent(f"{kind} {number}", kind=kind):
            await work()
    else:
        await work()
    return time.monotonic() - began


async def _drive(base_url: str, *, scopes: bool) -> tuple[list[float], float]:
    limiter = Limiter(f"{_RPM} requests/{_MINUTE:g}s burst 6")
    llm = limiter.wrap(OpenAI(model="gpt-4o-mini", api_base=base_url, api_key="none"))
    for kind in KINDS:  # what agents of each kind use
        await _run(kind, -1, llm, scopes=scopes)
    await asyncio.sleep(_MINUTE)
    jobs = [(kind, number) for kind, (count, _, _) in KINDS.items() for number in range(count)]
    random.Random(1).shuffle(jobs)
    began = time.monotonic()
    seconds = await asyncio.gather(*(_run(*job, llm, scopes=scopes) for job in jobs))
    return list(seconds), time.monotonic() - began


def play(*, scopes: bool) -> tuple[list[float], float, int]:
    """Return the seconds that each agent took, those of the whole run, and refusals."""
    with served_provider(
        rpm=_RPM, minute=_MINUTE, latency=(0.1, 0.4), policy="sliding_window"
    ) as provider:
        seconds, whole = asyncio.run(_drive(provider.base_url, scopes=scopes))
    return seconds, whole, provider.seen.refused
