"""How much of each limit is in use at this moment."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from asyncbucket.cli.demo.scenario import Scenario
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.testing import ProviderProcess


@dataclass(frozen=True, slots=True)
class Use:
    """How much of a limit was used in its window up to now."""

    limit: Limit
    used: int


class Gauge(Protocol):
    """Read what is in use."""

    async def read(self) -> list[Use]:
        """Return it for each limit that is known."""
        ...


class ProviderGauge:
    """Ask the bundled provider, the same for both runs."""

    def __init__(self, provider: ProviderProcess, scenario: Scenario) -> None:
        self._provider = provider
        self._limits = scenario.limits
        self._window = scenario.window
        self._samples = deque([(time.monotonic(), 0, 0)])

    async def read(self) -> list[Use]:
        statistics = await asyncio.to_thread(self._provider.statistics)
        now = time.monotonic()
        self._samples.append((now, statistics.admitted, statistics.tokens))
        while self._samples[0][0] < now - self._window:
            self._samples.popleft()
        _, admitted, tokens = self._samples[0]
        used = {"requests": statistics.admitted - admitted, "tokens": statistics.tokens - tokens}
        return [Use(limit, used[limit.resource]) for limit in self._limits]


class LimiterGauge:
    """Ask the limiter, if there is one, because a real provider does not tell."""

    def __init__(self, limiter: Limiter | None) -> None:
        self._limiter = limiter

    async def read(self) -> list[Use]:
        if self._limiter is None:
            return []
        return [Use(use.limit, use.used) for use in self._limiter.statistics().limits]
