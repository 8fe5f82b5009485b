"""A saturated key over the real transport: nearly all of it is used, and hardly a call is refused.

The provider is scripted: it counts by a bucket, a log of the last minute, minutes of the clock, or
seconds, and says in each reply what is left. Other programs may use the same key.
"""

import asyncio
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import httpx
import pytest

from asyncbucket import Limiter
from asyncbucket.testing import VirtualClock, virtual_time

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
REQUEST: Final[dict[str, Any]] = {
    "method": "POST",
    "url": httpx.URL("https://api.openai.com/v1/chat/completions"),
    "content": b'{"model": "m", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 400}',
    "headers": {"host": "api.openai.com", "authorization": "Bearer k"},
}
#: What `REQUEST` costs if tokens are limited.
TOKENS = 400

Counts = Literal["bucket", "log", "minute", "second"]
WHOLE: tuple[Counts, ...] = ("bucket", "log", "minute")
CLOCKED: tuple[Counts, ...] = (*WHOLE, "second")


@dataclass
class Provider(httpx.AsyncBaseTransport):
    """Admit `rpm` calls a minute; `depth` is the size of its bucket, if that is smaller."""

    counts: Counts
    rpm: int
    clock: VirtualClock
    cost: int
    depth: int | None
    #: When calls were admitted, and how many were refused.
    admitted: list[int] = field(default_factory=list)
    refused: int = 0

    #: What a bucket lacks, in units times a minute.
    _missing: int = 0
    _missing_at: int = 0
    _last_minute: deque[int] = field(default_factory=deque)
    _by_minute: Counter[int] = field(default_factory=Counter)
    _by_second: Counter[int] = field(default_factory=Counter)
    _chance: random.Random = field(default_factory=lambda: random.Random(1))

    def left(self) -> int:
        now = self.clock()
        if self.counts == "bucket":
            grown = (now - self._missing_at) * self.rpm
            self._missing, self._missing_at = max(0, self._missing - grown), now
            return (self.depth or self.rpm) - -(-self._missing // MINUTE)
        if self.counts == "minute":
            return self.rpm - self._by_minute[now // MINUTE]
        while self._last_minute and self._last_minute[0] <= now - MINUTE:
            self._last_minute.popleft()
        left = self.rpm - len(self._last_minute)
        if self.counts == "log":
            return left
        return min(left, self.rpm // 60 - self._by_second[now // SECOND])

    def admit(self) -> bool:
        if self.left() < 1:
            self.refused += 1
            return False
        now = self.clock()
        self._missing += MINUTE
        self._by_minute[now // MINUTE] += 1
        self._by_second[now // SECOND] += 1
        self._last_minute.append(now)
        self.admitted.append(now)
        return True

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        del request
        admitted = self.admit()
        if admitted:
            await asyncio.sleep(self._chance.uniform(0.2, 1.5))
        resource = "requests" if self.cost == 1 else "tokens"
        headers = {
            f"x-ratelimit-limit-{resource}": str(self.rpm * self.cost),
            f"x-ratelimit-remaining-{resource}": str(self.left() * self.cost),
        }
        if admitted:
            usage = {"prompt_tokens": 0, "completion_tokens": TOKENS, "total_tokens": TOKENS}
            return httpx.Response(200, headers=headers, json={"usage": usage})
        return httpx.Response(429, headers={"retry-after-ms": "500", **headers})


def share(
    counts: Counts,
    *,
    others: float = 0,
    seconds: int = 120,
    rpm: int = 600,
    depth: int | None = None,
    tokens: bool = False,
    deaf: int = 0,
    evenly: bool = False,
    ours_at_most: int | None = None,
) -> tuple[float, float]:
    """Saturate a limit while others take a part of it.

    Others come at random, or `evenly`; our limit may be lower than the provider's. For the first
    `deaf` seconds, replies are not read. Return which part of all calls, ours and others', was
    refused, and which part of the limit was used after the first minute.
    """
    cost = TOKENS if tokens else 1
    chance = random.Random(1)
    with virtual_time() as time:
        provider = Provider(counts, rpm, time.clock, cost, depth)
        limit = (ours_at_most or rpm) * cost
        limiter = Limiter(f"{limit} {'TPM' if tokens else 'RPM'}", clock=time.clock)

        async def ours(transport: httpx.AsyncBaseTransport) -> None:
            while True:
                await (await transport.handle_async_request(httpx.Request(**REQUEST))).aread()

        async def theirs() -> None:
            rate = others * rpm / 60
            while True:
                await asyncio.sleep(1 / rate if evenly else chance.expovariate(rate))
                provider.admit()

        async def run_for(seconds: float, *calls: Any) -> None:
            tasks = [asyncio.create_task(each) for each in calls]
            await asyncio.sleep(seconds)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        async def main() -> None:
            if deaf:
                unheard = limiter.transport(provider, learn=False)
                await run_for(deaf, *(ours(unheard) for _ in range(rpm // 6)))
            paced = limiter.transport(provider)
            crowd = [ours(paced) for _ in range(rpm // 6)]
            await run_for(seconds - deaf, *crowd, *([theirs()] if others else []))

        time.run(main())
    later = sum(when >= MINUTE for when in provider.admitted)
    refused = provider.refused / (len(provider.admitted) + provider.refused)
    return refused, later / (rpm * (seconds - 60) / 60)


def case(counts: Counts, refused: float, used: float, **options: Any) -> Any:
    traced = counts == "second" and len(options) < 2  # a few suffice to cover all lines
    marks = [] if traced else [pytest.mark.heavy]
    return pytest.param(counts, options, refused, used, id=f"{counts} {options or ''}", marks=marks)


def alone(counts: Counts, used: float = 0.95, **options: Any) -> Any:
    # That a bucket's worth does not fit into a second is learned from a refusal or two.
    return case(counts, 0.002 if counts == "second" else 0, used, **options)


def shared(counts: Counts, refused: float, used: float, **options: Any) -> Any:
    return case(counts, refused, used, **{"others": 0.4} | options)


@pytest.mark.parametrize(
    ("counts", "options", "refused", "used"),
    [
        *(alone(counts) for counts in CLOCKED),
        *(alone(counts, tokens=True) for counts in ("log", "second")),
        # Calls before the first reply that is read are not taken for others'.
        *(alone(counts, deaf=40) for counts in ("log", "minute")),
        *(alone(counts, 0.95 / 2, ours_at_most=300) for counts in ("log", "second")),
        # What never comes back, because a bucket is full, is not taken for others'.
        *(alone("bucket", depth=depth) for depth in (10, 20, 101, 300)),
        *(alone("bucket", depth=depth, tokens=True) for depth in (10, 600)),
        *(shared(counts, 0.005, 0.9, seconds=180) for counts in WHOLE),
        shared("log", 0.005, 0.9, seconds=180, tokens=True),
        *(shared(counts, 0.005, 0.9, seconds=180, others=0.6) for counts in ("log", "minute")),
        # In slices of ten, four calls of others that come by chance don't always fit: if we took all
        # that they leave, 18 % would be refused.
        shared("second", 0.06, 0.7, seconds=180),
        shared("second", 0.03, 0.85, evenly=True),
        shared("second", 0.03, 0.85, rpm=6_000, seconds=75),
    ],
)
def test_key_is_well_used_and_hardly_a_call_is_refused(
    counts: Counts, options: dict[str, Any], refused: float, used: float
) -> None:
    seen = share(counts, **options)
    assert seen[0] <= refused
    assert seen[1] > used
