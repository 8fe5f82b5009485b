"""Loads that share a long prompt, at providers with a prompt cache, and what pacing may cost there.

``python -m tests.feedback.warm agents`` says how long the rows with "agents" in their names take.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from asyncbucket.testing.provider import Cache, Counting
from tests.feedback.worlds import Load, Outcome, World, play


@dataclass(frozen=True, slots=True)
class Row:
    """A provider with a cache, and what a load may come to there. No call may be lost.

    Attributes:
        latency: Seconds of a reply.
        most: The most seconds until the last call ends.
        used: The least part of what the provider allows that is used.
        writes: How many calls may write to the cache.
        refused: The largest part of the calls that may be refused.
        options: Of the transport.
    """

    world: World
    load: Load
    latency: float
    most: float = 1_000.0
    used: float = 0.0
    writes: int = 1_000_000
    refused: float = 0.01
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


LEAD: Final = {"cache": "lead"}


def cached(itpm: int, cache: Cache | None = None, **counting: Any) -> World:
    """Return a provider of so many input tokens a minute that caches prompts."""
    return World(
        provider={"itpm": itpm, "cache": cache or Cache(), "policy": Counting(**counting)},
        told=(f"{itpm} ITPM",),
        host="api.anthropic.com",
    )


def steady(tokens: int, *, allowed: int = 50_000, seconds: float = 300.0) -> Load:
    """Return prompts of so many tokens, a twentieth of them new, at 1.2 times what is allowed."""
    every = 60 / (allowed / (tokens / 20)) / 1.2
    own = tokens // 20, tokens // 20
    return Load(
        agents=round(seconds / every),
        every=every,
        tokens=own,
        shared=tokens - tokens // 20,
        stream=True,
        seconds=seconds,
    )


AGENTS: Final = Load(agents=50, calls=5, tokens=(1_000, 1_000), shared=36_000, stream=True)
WHOLE: Final = replace(AGENTS, stream=False)
FIFTY: Final = cached(50_000)
#: Caches that do otherwise, and the least part of the limit that must be used with prompts of 3,000 and
#: of 10,000 tokens: hardly less than if all input is reserved in full until the reply comes.
ODD: Final[dict[str, tuple[Cache, float, float]]] = {
    "never caches": (Cache(least=1_000_000), 1.15, 1.12),
    "evicts after 20 s": (Cache(lives=20.0, renews=False), 1.05, 1.05),
    "caches from 4,096 tokens on": (Cache(least=4_096), 1.15, 1.1),
    "has three machines": (Cache(machines=3), 1.1, 1.1),
}

ROWS: Final[dict[str, Row]] = {
    "agents, lead, streams": Row(
        cached(450_000), AGENTS, latency=10, most=75, writes=3, refused=0, options=LEAD
    ),
    "agents, lead, whole replies": Row(
        cached(450_000), WHOLE, latency=10, most=90, writes=3, refused=0, options=LEAD
    ),
    "agents, streams": Row(cached(450_000), AGENTS, latency=10, most=130),
    "agents, whole replies": Row(cached(450_000), WHOLE, latency=10, most=130),
    "steady, replies after 2 s": Row(FIFTY, steady(10_000), latency=2, used=0.9),
    "steady, replies after 15 s": Row(FIFTY, steady(10_000), latency=15, used=0.9),
    "prompts of 60k": Row(cached(50_000, oversize=True), steady(60_000), latency=5, used=0.8),
    "conversations that grow to 75k": Row(
        FIFTY,
        Load(agents=4, calls=30, tokens=(2_500, 2_500), remembers=True, stream=True),
        latency=5,
        most=400,
        used=0.8,
    ),
    **{
        f"{what}, {size:,} tokens": Row(cached(50_000, cache), steady(size), latency=2, used=least)
        for what, (cache, *most) in ODD.items()
        for size, least in zip((3_000, 10_000), most, strict=True)
    },
}


def used(row: Row, seen: Outcome) -> float:
    """Return how much of what the provider allows was charged, as far as a bucket's refill goes."""
    load, provider = row.load, seen.provider
    statistics = provider.statistics()
    new = load.tokens[0] * statistics.admitted
    whole = load.shared * (statistics.admitted - statistics.cache_reads)
    assert provider.itpm is not None
    return (new + whole) / (provider.itpm * seen.seconds / 60)


def failures(row: Row) -> list[str]:
    """Play a row; return what its outcome misses."""
    seen = play(row.world, row.load, latency=row.latency, **row.options)
    said: list[str] = []
    statistics = seen.provider.statistics()
    if seen.lost:
        said.append(f"{seen.lost} calls lost")
    if seen.refused > row.refused * statistics.requests:
        said.append(f"{seen.refused} of {statistics.requests} refused, not {row.refused:.0%}")
    if seen.seconds > row.most:
        said.append(f"{seen.seconds:.0f} s, not {row.most:.0f}")
    if (part := used(row, seen)) < row.used:
        said.append(f"{part:.0%} used, not {row.used:.0%}")
    if statistics.cache_writes > row.writes:
        said.append(f"{statistics.cache_writes} writes, not {row.writes}")
    return said


def main() -> None:
    """Play the rows that have an argument in their names, and say how long they took."""
    for name, row in ROWS.items():
        if sys.argv[-1] in name:
            seen = play(row.world, row.load, latency=row.latency, **row.options)
            sys.stdout.write(f"{name}: {seen.seconds:.0f} s, {used(row, seen):.0%} used\n")


if __name__ == "__main__":
    main()
