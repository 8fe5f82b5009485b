"""Providers with their ways of counting, loads, and what pacing may cost there: refusals, and time."""

from dataclasses import dataclass, replace
from typing import Any, Final

from asyncbucket.testing.provider import Counting
from tests.feedback.worlds import NO_HEADERS, NO_RESET, Load, World, ideal, play


@dataclass(frozen=True, slots=True)
class Row:
    """A provider under a load, and what it may come to. No call may be lost.

    Attributes:
        refused: The most refusals.
        over: The most time, in times the ideal.
        others: The largest part of the calls of others that may be refused.
        later: From which second on refusals count as late ones, and how many of those there may be.
    """

    world: World
    load: Load
    refused: int = 0
    over: float = 1.1
    others: float = 1.0
    later: tuple[float, int] | None = None


AT_ONCE: Final = Load(agents=500)
AGENTS: Final = Load(agents=40, calls=12)
MIXED: Final = Load(agents=120, tokens=(100, 20_000))
#: More than others leave.
STEADY: Final = Load(agents=1_500, every=0.1, slots=100, seconds=150.0)
RPM: Final = ("600 RPM",)


def requests(
    counting: Counting | None = None, told: tuple[str, ...] = RPM, **options: Any
) -> World:
    """Return a provider of 600 requests a minute."""
    return World(provider={"rpm": 600, "policy": counting or Counting(), **options}, told=told)


def tokens(amount: int, counting: Counting | None = None, **options: Any) -> World:
    """Return a provider of so many tokens a minute."""
    provider = {"tpm": amount, "policy": counting or Counting(), **options}
    return World(provider=provider, told=(f"{amount} TPM",))


def log(**counting: Any) -> Counting:
    """Return how a log of any minute counts."""
    return Counting(by="log", **counting)


def shared(by: Any, **counting: Any) -> World:
    """Return a provider of which others take 40 % in bursts of 20."""
    return requests(Counting(by=by, others=0.4, others_at_once=20, **counting))


def anthropic(*told: str, **limits: int) -> World:
    """Return a provider that speaks as Anthropic does."""
    provider = {"profile": "anthropic", **limits}
    return World(provider=provider, told=told, host="api.anthropic.com")


GROQ = World(provider={"profile": "groq", "tpm": 60_000}, told=("60k TPM",), host="api.groq.com")
OPENROUTER = World(provider={"profile": "openrouter", "accidents": 0.05}, host="openrouter.ai")
SECOND_SLICES: Final = Counting(by="log", slices=60, hidden=True)
SIXTY: Final = Counting(size=60)
HALVED: Final = {20.0: {"rpm": 300}}
CROWD: Final = Load(agents=400)
IN_TIME: Final = Load(agents=800, every=0.05)

ROWS: Final[dict[str, Row]] = {
    "full bucket of 600, 500 at once": Row(requests(), AT_ONCE, over=2.7),
    "full bucket of 600, 40 agents of 12": Row(requests(), AGENTS, over=1.25),
    "full bucket of 200k tokens, mixed": Row(tokens(200_000), MIXED),
    "told nothing, full bucket, at once": Row(requests(told=()), AT_ONCE, over=2.7),
    "told nothing, full bucket, agents": Row(requests(told=()), AGENTS, over=1.25),
    "bucket of 1": Row(requests(Counting(size=1)), AT_ONCE, refused=30, over=1.25),
    **{
        f"bucket of {size}": Row(requests(Counting(size=size)), AT_ONCE, refused=10, over=1.1)
        for size in (3, 10, 20, 60, 120, 200)
    },
    "bucket of 20k of 200k tokens, mixed": Row(tokens(200_000, Counting(size=20_000)), MIXED),
    "bucket of 40, replies out of order": Row(
        requests(Counting(size=40), latency=(0.2, 20.0)), Load(agents=60, calls=8)
    ),
    "bucket of 60, no reset": Row(requests(SIXTY, profile=NO_RESET), AT_ONCE, refused=20),
    "full bucket of 600, no reset": Row(requests(profile=NO_RESET), AGENTS, over=1.6),
    "calendar, no reset": Row(
        requests(Counting(by="calendar"), profile=NO_RESET), AGENTS, over=2.7
    ),
    "bucket of 60, no headers": Row(
        requests(SIXTY, profile=NO_HEADERS), AT_ONCE, refused=20, over=1.2
    ),
    "log, at once": Row(requests(log()), AT_ONCE, over=25),
    "log, 1,300 at once": Row(requests(log()), Load(agents=1_300)),
    "calendar, 1,300 at once": Row(requests(Counting(by="calendar")), Load(agents=1_300), over=2.0),
    "log of tokens, mixed": Row(tokens(200_000, log()), MIXED, over=1.25),
    "Anthropic, mixed": Row(
        anthropic("600 RPM", "200k ITPM", "40k OTPM", rpm=600, itpm=200_000, otpm=40_000), MIXED
    ),
    "Groq, mixed": Row(GROQ, replace(MIXED, agents=60, tokens=(100, 5_000))),
    "shown slices of 10 in a second": Row(requests(log(slices=60)), CROWD, refused=20, over=1.3),
    "shown slices of 100 in ten seconds": Row(requests(log(slices=6)), CROWD, refused=20, over=1.4),
    "shown slices of tokens": Row(tokens(200_000, log(slices=6)), MIXED, refused=20, over=1.3),
    "hidden slices of 10 in a second": Row(requests(SECOND_SLICES), CROWD, refused=20, over=1.3),
    "hidden slices of 10 in a second, 2,000": Row(
        requests(SECOND_SLICES), Load(agents=2_000), refused=30, over=1.3, later=(60.0, 10)
    ),
    "told ten times too much, no headers": Row(
        requests(told=("6000 RPM",), profile=NO_HEADERS), Load(agents=800), refused=150, over=1.3
    ),
    "halved, no headers": Row(
        replace(requests(profile=NO_HEADERS), changes=HALVED), IN_TIME, refused=40, over=1.3
    ),
    "halved, headers": Row(replace(requests(), changes=HALVED), IN_TIME, refused=40, over=1.3),
    "accidents at OpenRouter": Row(OPENROUTER, replace(AT_ONCE, slots=20), refused=60, over=1.5),
    "accidents, headers show room": Row(requests(accidents=0.05), CROWD, refused=40, over=11.0),
    # What is sent before the first refusal is refused, too: 300 and 190.
    "told nothing, no headers": Row(
        World(provider={"rpm": 300, "profile": NO_HEADERS}), Load(agents=600), refused=320, over=1.2
    ),
    "told nothing, 10 slots": Row(
        World(provider={"concurrency": 10}), Load(agents=200), refused=210, over=1.4
    ),
    "others, bucket": Row(shared("bucket"), STEADY, refused=20, others=0.1),
    "others, log": Row(shared("log"), STEADY, refused=40, over=1.6, others=0.1),
    "others, shown slices": Row(shared("log", slices=6), STEADY, refused=40, over=1.55),
}


def failures(row: Row, latency: float) -> list[str]:
    """Play a row; return what its outcome misses."""
    seen, best = (way(row.world, row.load, latency=latency) for way in (play, ideal))
    said: list[str] = []
    if seen.lost:
        said.append(f"{seen.lost} calls lost")
    if seen.refused > row.refused:
        said.append(f"{seen.refused} refused, not {row.refused}")
    # How much longer it took than it needed, or how much less was done in its time.
    if (over := max(seen.seconds / best.seconds, best.done / max(1, seen.done))) > row.over:
        said.append(f"{over:.2f} times the ideal, not {row.over}")
    if seen.others > row.others:
        said.append(f"{seen.others:.0%} of others refused, not {row.others:.0%}")
    if row.later and (late := sum(at > row.later[0] for at in seen.refused_at)) > row.later[1]:
        said.append(f"{late} refused late, not {row.later[1]}")
    return said
