"""Send everything at once through one limiter, to a provider in a process of its own that counts.

150 agents with a tool (two calls of the model each), chats, streams and batches of embeddings start
in the same moment, on one event loop. What is asked afterwards is the provider, not the limiter: how
many calls came, how many it refused, how many were in flight at once; and each reply is looked at.
Once the models are wrapped, and once they are LlamaIndex's own above a paced HTTP client. Retries are
off, so that whatever is refused or lost is seen.

`python -m benchmarks.storm` takes about seven minutes; the table goes to benchmarks/results. A minute
of this provider lasts 20 s.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import httpx
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from asyncbucket import Limit, Limiter
from asyncbucket.testing.counting import POLICY_NAMES, PolicyName
from benchmarks.harness import served_provider

MINUTE: Final = 20.0
RPM: Final = 300
TPM: Final = 120_000
CONCURRENCY: Final = 50
LATENCY: Final = (0.1, 0.6)
TEXTS: Final = 10
RESULTS: Final = Path(__file__).parent / "results"

Door: TypeAlias = Literal["wrap", "transport"]


@dataclass(frozen=True, slots=True)
class Load:
    """How many of each start at once."""

    agents: int = 150
    chats: int = 300
    streams: int = 150
    batches: int = 60

    @property
    def calls(self) -> int:
        """How many calls that makes: an agent asks for a tool, and then answers."""
        return 2 * self.agents + self.chats + self.streams + self.batches


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the provider saw of a sudden load, and what came back from it."""

    door: Door
    policy: PolicyName
    calls: int
    #: Replies that are what they should be, by calls.
    answered: int
    admitted: int
    refused: int
    peak: int
    #: The larger part of the two limits that was used in the wall time.
    used: float
    seconds: float

    @property
    def held(self) -> bool:
        """Whether it was as promised."""
        exact = self.calls == self.answered == self.admitted
        return exact and not self.refused and self.peak <= CONCURRENCY and self.used >= 0.93


def weather(city: str) -> str:
    """Look up the weather in a city."""
    return f"{city}: 21 degrees, a light wind from the west."


async def storm(door: Door, policy: PolicyName, load: Load) -> Outcome:
    """Let it break loose once."""
    limits = [Limit("requests", RPM, per=MINUTE), Limit("tokens", TPM, per=MINUTE)]
    limiter = Limiter(*limits, concurrency=CONCURRENCY, name="storm")
    async with AsyncExitStack() as stack:
        provider = stack.enter_context(
            served_provider(
                rpm=RPM,
                tpm=TPM,
                minute=MINUTE,
                policy=policy,
                latency=LATENCY,
                concurrency=CONCURRENCY,
            )
        )
        llm, embed_model = await _models(stack, door, limiter, provider.base_url)
        start = time.monotonic()
        counts = await asyncio.gather(*_jobs(llm, embed_model, load), return_exceptions=True)
        seconds = time.monotonic() - start
    seen = provider.seen
    minutes = seconds / MINUTE
    return Outcome(
        door=door,
        policy=policy,
        calls=load.calls,
        answered=sum(count for count in counts if isinstance(count, int)),
        admitted=seen.admitted,
        refused=seen.refused,
        peak=seen.peak_in_flight,
        used=max(seen.admitted / RPM, seen.tokens / TPM) / minutes,
        seconds=seconds,
    )


async def _models(
    stack: AsyncExitStack, door: Door, limiter: Limiter, base_url: str
) -> tuple[Any, Any]:
    pool = httpx.Limits(max_connections=None)
    if door == "wrap":
        client = httpx.AsyncClient(limits=pool, timeout=300)
    else:
        client = limiter.http_client(limits=pool, timeout=300)
    await stack.enter_async_context(client)
    common: dict[str, Any] = {"api_base": base_url, "api_key": "none", "max_retries": 0}
    llm = OpenAI(model="gpt-4o-mini", max_tokens=150, async_http_client=client, **common)
    embed_model = OpenAIEmbedding(async_http_client=client, embed_batch_size=TEXTS, **common)
    if door == "transport":
        return llm, embed_model
    return limiter.wrap(llm, retry=False), limiter.wrap(embed_model, retry=False)


def _jobs(llm: Any, embed_model: Any, load: Load) -> Iterator[Coroutine[Any, Any, int]]:
    """Yield what starts at once; each returns how many calls were answered as they should be."""

    async def agent(number: int) -> int:
        asks: Any = FunctionAgent(tools=[weather], llm=llm, timeout=None)
        memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
        city = f"Lima {number}"
        reply = await asks.run(user_msg=f"the weather in {city}", memory=memory)
        return 2 if city in str(reply) else 0

    async def chat(number: int) -> int:
        reply = await llm.achat([ChatMessage(content=f"chat {number}")])
        return int(f"chat {number}" in str(reply))

    async def stream(number: int) -> int:
        chunks = await llm.astream_chat([ChatMessage(content=f"stream {number}")])
        text = "".join([chunk.delta or "" async for chunk in chunks])
        return int(f"stream {number}" in text)

    async def batch(number: int) -> int:
        texts = [f"text {number} {index}" for index in range(TEXTS)]
        vectors = await embed_model.aget_text_embedding_batch(texts)
        return int(len(vectors) == TEXTS)

    for job, count in (
        (agent, load.agents),
        (chat, load.chats),
        (stream, load.streams),
        (batch, load.batches),
    ):
        yield from (job(number) for number in range(count))


def lines(outcomes: list[Outcome], load: Load) -> Iterator[str]:
    """Yield the report in Markdown."""
    yield "# A sudden load"
    yield ""
    yield (
        f"{load.agents} agents, {load.chats} chats, {load.streams} streams and {load.batches} "
        f"batches of embeddings start at once on one event loop: {load.calls:,} calls. The bundled "
        f"provider, in a process of its own, allows {RPM} requests and {TPM:,} tokens a minute, "
        f"which lasts {MINUTE:g} s, and {CONCURRENCY} calls in flight. There are no retries. "
        "`python -m benchmarks.storm` makes this page."
    )
    yield ""
    yield "| paced by | provider | calls | answered | arrived | 429s | most at once | used | s |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    for each in outcomes:
        yield (
            f"| the {each.door} | {each.policy.replace('_', ' ')} | {each.calls:,} "
            f"| {each.answered:,} | {each.admitted + each.refused:,} | {each.refused} "
            f"| {each.peak} | {100 * each.used:.1f} % | {each.seconds:.1f} |"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run all of them, print the table, and write it; the status tells whether all held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storm", description=__doc__)
    parser.add_argument("--door", choices=get_args(Door), help="only this one")
    parser.add_argument("--policy", choices=POLICY_NAMES, help="only this one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args(arguments)
    load = Load()
    outcomes: list[Outcome] = []
    for door in get_args(Door):
        for policy in POLICY_NAMES:
            # A wrapped model doesn't know how a provider that it doesn't know counts.
            blind = door == "wrap" and policy == "one_second_slices"
            chosen = options.door in (None, door) and options.policy in (None, policy)
            if chosen and not blind:
                sys.stderr.write(f"{door}, {policy}\n")
                outcomes.append(asyncio.run(storm(door, policy, load)))
    report = "\n".join(lines(outcomes, load))
    print(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "storm.md").write_text(f"{report}\n", "utf-8")
    return 0 if all(outcome.held for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
