"""Loads on virtual time, through a real transport, against providers that count in their own ways.

`play` sends a load through ``limiter.transport()`` to a bundled provider, and `ideal` sends it as a
client that sees the provider's own meter: first come, first served, each call at the first instant
at which the provider takes it. How much longer the first takes is what not knowing the meter costs.
"""

import asyncio
import itertools
import random
import time as real_time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self
from unittest import mock

import httpx

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider, virtual_time
from asyncbucket.testing.endpoints import charges
from asyncbucket.testing.enforcer import NANOSECONDS as SECOND
from asyncbucket.testing.enforcer import RULES, CallError
from asyncbucket.testing.replies import Answer

KEY: Final = {"authorization": "Bearer k"}
#: Seconds that a request and a reply take on the way, from and to.
NETWORK: Final = (0.02, 0.06)
#: Rules of providers whose replies lack something.
NO_HEADERS: Final = replace(RULES["openai"], headers={})
NO_RESET: Final = replace(RULES["openai"], parts=("limit", "remaining"))


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A provider, and what its user tells the limiter.

    Attributes:
        provider: Options of `RateLimitedProvider`.
        told: The arguments of `Limiter`.
        host: By which the transport knows the provider's profile.
        changes: Options that the provider gets at a second.
    """

    provider: Mapping[str, Any]
    told: tuple[Any, ...] = ()
    host: str = "api.openai.com"
    changes: Mapping[float, Mapping[str, Any]] = field(default_factory=dict[float, Any])

    @property
    def path(self) -> str:
        return "/v1/messages" if "anthropic" in self.host else "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """So many agents, each of which makes calls one after the other.

    Attributes:
        agents: How many begin.
        calls: How many calls each makes.
        every: Seconds from the beginning of one agent to that of the next; 0 is at once.
        tokens: The least and the most that a prompt has; sizes are spread evenly on a log scale.
        output: The most that a reply may have.
        reply: What it has.
        shared: The tokens of a prefix that all calls share, marked for the provider's cache.
        remembers: Whether a call repeats its agent's earlier questions, all marked for the cache.
        stream: Whether replies are streams.
        slots: How many calls may be in flight; no limit by default.
        seconds: When the load ends, whether or not it is done.
    """

    agents: int
    calls: int = 1
    every: float = 0.0
    tokens: tuple[int, int] = (20, 20)
    output: int = 100
    reply: int = 60
    shared: int = 0
    remembers: bool = False
    stream: bool = False
    slots: int | None = None
    seconds: float = 3_600.0

    def prompts(self, seed: int) -> list[list[int]]:
        """Return the tokens of each call's prompt, by agent."""
        chance, (low, high) = random.Random(seed), self.tokens
        return [
            [round(low * (high / low) ** chance.random()) for _ in range(self.calls)]
            for _ in range(self.agents)
        ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a load.

    Attributes:
        done: Calls that were answered.
        lost: Calls that raised, or ended with an error.
        refused: 429s that the provider sent to us.
        refused_at: When, in seconds.
        seconds: When the last call ended.
        others: Which part of the calls of others was refused.
        cpu: Processor seconds.
        provider: The provider, as it was at the end.
    """

    done: int
    lost: int
    refused: int
    refused_at: tuple[float, ...]
    seconds: float
    others: float
    cpu: float
    provider: RateLimitedProvider


#: Sends a call of an agent with so many tokens of its own, and returns the status of its reply.
Send = Callable[[int, int], Awaitable[int]]


def play(
    world: World, load: Load, *, seed: int = 0, latency: float = 0.8, **transport: Any
) -> Outcome:
    """Send a load through a limiter's transport, and return what came of it."""

    def paced(provider: RateLimitedProvider) -> Send:
        limiter = Limiter(*world.told, concurrency=load.slots, clock=provider.clock)
        wire = Wire(provider.mock_transport(), seed)
        client = httpx.AsyncClient(transport=limiter.transport(wire, **transport), headers=KEY)
        url, body = f"https://{world.host}{world.path}", body_of(load)
        first = []
        if "system" in body and "messages" not in world.path:
            first = [{"role": "system", "content": body.pop("system")}]
        talks: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)

        async def send(agent: int, tokens: int) -> int:
            past = talks[agent]
            asked = question(tokens, marked=load.remembers)
            reply = await client.post(url, json={**body, "messages": [*first, *past, asked]})
            past.extend([asked] if load.remembers else ())
            return reply.status_code

        return send

    return _run(world, load, seed, latency, paced)


def ideal(world: World, load: Load, *, seed: int = 0, latency: float = 0.8) -> Outcome:
    """Let each call of a load in at the first instant at which the provider's meter takes it."""

    def oracle(provider: RateLimitedProvider) -> Send:
        enforcer, turn = provider.enforcer, asyncio.Lock()
        slots, provider.accidents = asyncio.Semaphore(load.slots or 1_000_000), 0.0
        rules = enforcer.rules or RULES["anthropic" if "messages" in world.path else "openai"]

        async def enter(costs: Mapping[str, int]) -> None:
            while True:
                try:
                    enforcer.enter("chat/completions", "m", costs)
                except CallError as refusal:
                    await asyncio.sleep(0.01 if refusal.wait is None else refusal.wait / SECOND)
                else:
                    return

        async def send(_agent: int, tokens: int) -> int:
            answer = Answer("m", "", None, False, load.output, tokens, load.reply)
            costs, corrections = charges(rules, answer)
            async with slots:
                async with turn:
                    await enter(costs)
                await asyncio.sleep(enforcer.draw_latency() + sum(NETWORK) / 2)
                enforcer.leave(corrections)
            return 200

        return send

    return _run(world, load, seed, latency, oracle)


_numbers = itertools.count()


def body_of(load: Load) -> dict[str, Any]:
    """Return what all calls of a load have in common."""
    body: dict[str, Any] = {"model": "m", "max_tokens": load.output}
    if load.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if load.shared:
        mark = {"cache_control": {"type": "ephemeral"}}
        body["system"] = [{"type": "text", "text": "word" * load.shared, **mark}]
    return body


def question(tokens: int, *, marked: bool = False) -> dict[str, Any]:
    """Return a message of so many tokens; no two are the same."""
    text = f"{next(_numbers):012}" + "word" * (tokens - 3)
    if not marked:
        return {"role": "user", "content": text}
    part = {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}
    return {"role": "user", "content": [part]}


class Wire:
    """Take some time on the way to a provider, and back."""

    def __init__(self, inner: Any, seed: int) -> None:
        self._inner, self._chance = inner, random.Random(seed)

    async def handle_async_request(self, request: Any) -> Any:
        await asyncio.sleep(self._chance.uniform(*NETWORK) / 2)
        reply = await self._inner.handle_async_request(request)
        await asyncio.sleep(self._chance.uniform(*NETWORK) / 2)
        return reply

    async def aclose(self) -> None:
        """Close nothing."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close nothing."""


#: Makes what sends calls to a provider.
Sender = Callable[[RateLimitedProvider], Send]
#: What the wall clock shows when virtual time begins.
_WALL: Final = 1_700_000_000


def _run(world: World, load: Load, seed: int, latency: float, sender: Sender) -> Outcome:
    cpu = real_time.process_time()
    with (
        virtual_time(start=1_000 + 17.37 * seed) as time,
        # Dates in headers have whole seconds: let a run always begin at the same part of one.
        mock.patch("time.time", lambda: _WALL + time.now),  # noqa: PT008 - it goes on
    ):
        spread = (0.8 * latency, 1.2 * latency)
        options: dict[str, Any] = {"latency": spread, "reply_tokens": load.reply, **world.provider}
        provider = RateLimitedProvider(clock=time.clock, **options)
        began = time.now
        ends = time.run(_drive(world, load, seed, provider, sender))
    seen = provider.statistics()
    return Outcome(
        done=ends.count(200),
        lost=len(ends) - ends.count(200),
        refused=seen.refused,
        refused_at=tuple(e.time_ns / SECOND - began for e in provider.arrivals if not e.admitted),
        seconds=time.now - began,
        others=seen.others_refused / max(1, seen.others_sent),
        cpu=real_time.process_time() - cpu,
        provider=provider,
    )


async def _drive(
    world: World, load: Load, seed: int, provider: RateLimitedProvider, sender: Sender
) -> list[int]:
    """Return the status of each call that ended in time; 0 of one that raised."""
    send, ends = sender(provider), list[int]()

    async def agent(number: int, sizes: list[int]) -> None:
        await asyncio.sleep(number * load.every)
        for tokens in sizes:
            try:
                ends.append(await send(number, tokens))
            except Exception:  # noqa: BLE001 - whatever a client raises, the call is lost
                ends.append(0)

    async def change(second: float, options: Mapping[str, Any]) -> None:
        await asyncio.sleep(second)
        for name, value in options.items():
            setattr(provider, name, value)

    changes = [asyncio.create_task(change(*each)) for each in world.changes.items()]
    agents = [asyncio.create_task(agent(n, sizes)) for n, sizes in enumerate(load.prompts(seed))]
    await asyncio.wait(agents, timeout=load.seconds)
    for task in (*changes, *agents):
        task.cancel()
    await asyncio.gather(*changes, *agents, return_exceptions=True)
    return ends
