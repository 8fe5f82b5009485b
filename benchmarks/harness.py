"""Measure contenders side by side, so that what disturbs one disturbs all.

Every contender is sampled once a round, in turn, all in one process; a figure is the median over
the rounds, with the lowest and the highest sample beside it. Ratios are formed within a round and
then their median is taken: a machine that slows down for a while slows both sides. The garbage
collector is on, as it is for users; it starts each sample with nothing to do, and what the imports
brought is frozen, so that no contender pays for another's libraries. Waiting costs are
CPU time (time asleep is the limiter's job); the rest is wall time of a loop that never sleeps.
"""

import asyncio
import collections
import contextlib
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from asyncbucket.testing import ProviderStatistics

#: One sample: set up, measure, return the figure.
Sample: TypeAlias = Callable[[], Coroutine[Any, Any, float]]
Acquire: TypeAlias = Callable[[], Coroutine[Any, Any, object]]


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one contender."""

    name: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The least of all rounds."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """The most of all rounds."""
        return max(self.samples)


@dataclass(frozen=True, slots=True)
class Claim:
    """A bound that asyncbucket sets itself: ``ours`` at most ``bound`` times ``theirs``."""

    ours: str
    theirs: str
    bound: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement of all contenders; rows in the order in which they were given."""

    key: str
    title: str
    unit: str
    note: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    #: Contenders left out, and why.
    absent: Mapping[str, str] = field(default_factory=dict[str, str])

    def row(self, name: str) -> Row:
        """Return the row of contender ``name``."""
        return next(row for row in self.rows if row.name == name)

    def ratio(self, ours: str, theirs: str) -> float:
        """Return the median over the rounds of ``ours`` / ``theirs``."""
        pairs = zip(self.row(ours).samples, self.row(theirs).samples, strict=True)
        return statistics.median(mine / other for mine, other in pairs)


@dataclass(slots=True)
class ServedProvider:
    """The bundled provider, while it runs in a process of its own."""

    base_url: str
    #: What it saw, once it has ended.
    seen: ProviderStatistics = field(default_factory=ProviderStatistics)


@contextlib.contextmanager
def served_provider(**options: Any) -> Generator[ServedProvider]:
    """Run the bundled provider in a process of its own, so that it takes no time of the caller's."""
    given = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "asyncbucket.testing.provider", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        provider = ServedProvider(process.stdout.readline().strip())
        try:
            yield provider
        finally:
            process.terminate()
            provider.seen = ProviderStatistics(**json.loads(process.stdout.readline()))


def progress(now: str = "") -> None:
    """Say in the terminal, if there is one, what is measured now; without a word say nothing more."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K  {now}" if now else "\r\x1b[K")


def measure(samples: Mapping[str, Sample], *, rounds: int) -> tuple[Row, ...]:
    """Sample all contenders in turn, ``rounds`` times, each on a fresh event loop.

    Each round begins with another contender: what a sample leaves in the heap and the caches slows
    down the next one, which must not always be the same.
    """
    found: dict[str, list[float]] = {name: [] for name in samples}
    for number in range(rounds):
        order = collections.deque(samples.items())
        order.rotate(-number)
        for name, sample in order:
            progress(f"round {number + 1} of {rounds}: {name}")
            gc.collect()
            found[name].append(asyncio.run(sample()))
    progress()
    return tuple(Row(name, tuple(values)) for name, values in found.items())
