"""When calls come: all at once, at random, at given instants, or from agents that call other agents."""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Final, TypeAlias

from asyncbucket.core.wording import is_number, plain, read_count, shown

#: The most calls of a plan: they take a minute or two and some gigabytes.
MOST: Final = 10_000_000
_NANOSECONDS: Final = 1_000_000_000
#: More generations of two or more agents each would be too many calls to count.
_DEEP: Final = 64


@dataclass(frozen=True, slots=True)
class Poisson:
    """Let calls come at random, independently: ``rate`` a second on average."""

    rate: float

    def __post_init__(self) -> None:
        """Refuse an invalid rate."""
        if not is_number(self.rate) or not 0 < self.rate < math.inf:
            raise ValueError(
                f"a rate must be a finite number of calls a second above 0, not {self.rate!r}"
            )

    def instants(self, calls: int, seed: str) -> Iterator[int]:
        """Yield when each call comes, in nanoseconds."""
        rng = random.Random(f"{seed} arrivals")  # noqa: S311 - repeatable, not secret
        now = 0.0
        for _ in range(calls):
            now += rng.expovariate(self.rate)
            yield round(now * _NANOSECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTree:
    """Let ``agents`` start at once, each make ``steps`` calls in a row, and then call others.

    An agent that has finished calls ``fan_out`` further agents, which do the same, until there are
    ``depth`` generations. So a call comes when the one before it has ended, however long that took.

    Args:
        agents: how many start.
        depth: generations, the first included.
        fan_out: how many agents each of them calls; irrelevant if ``depth`` is 1.
        steps: how many calls each agent makes, one after the other.
    """

    agents: int = 1
    depth: int = 1
    fan_out: int = 1
    steps: int = 1

    def __post_init__(self) -> None:
        """Refuse an invalid tree."""
        for name in ("agents", "depth", "fan_out", "steps"):
            object.__setattr__(self, name, read_count(getattr(self, name), name, least=1))
        if (self.fan_out > 1 and self.depth > _DEEP) or self.calls > MOST:
            raise ValueError(
                f"agents={self.agents:,}, depth={self.depth:,}, fan_out={self.fan_out:,} and "
                f"steps={self.steps:,} make more than {MOST:,} calls, the most of a plan: give a "
                f"smaller tree"
            )

    @property
    def calls(self) -> int:
        """The total number of calls."""
        if self.fan_out == 1:
            return self.agents * self.depth * self.steps
        family: int = (self.fan_out**self.depth - 1) // (self.fan_out - 1)
        return self.agents * family * self.steps

    @property
    def generations(self) -> int:
        """How many calls there are in a row."""
        return self.depth * self.steps

    def followers(self, generations: int) -> int:
        """Return how many calls follow one that has ``generations`` more after it."""
        if not generations:
            return 0
        return 1 if generations % self.steps else self.fan_out


Arrivals: TypeAlias = Poisson | AgentTree | Iterable[float] | None
"""`Poisson`, an `AgentTree`, the instants at which calls come (seconds), or None: all at once."""


def instants_of(
    arrivals: "Poisson | Iterable[float] | None", calls: int, seed: str
) -> Iterator[int]:
    """Yield when each call comes, in nanoseconds, ascending."""
    if arrivals is None:
        return repeat(0, calls)
    if isinstance(arrivals, Poisson):
        return arrivals.instants(calls, seed)
    return iter(sorted(round(second * _NANOSECONDS) for second in arrivals))


def read_instants(arrivals: Iterable[float]) -> list[float]:
    """Return the given instants.

    Raises:
        TypeError: they are not iterable.
        ValueError: one of them is not a finite number of seconds from 0 on.
    """
    if not isinstance(arrivals, Iterable):
        raise TypeError(
            f"arrivals must be instants in seconds, Poisson(8.0) for so many calls a second, or an "
            f"AgentTree, not {shown(arrivals)}"
        )
    instants = list(arrivals)
    for second in instants:
        if not is_number(second) or not 0 <= second < math.inf:
            raise ValueError(
                f"an arrival must be a finite number of seconds from 0 on, not {second!r}"
            )
    return [plain(second) for second in instants]
