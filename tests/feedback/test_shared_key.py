"""A saturated key over the real transport: nearly all of it is used, and hardly a call is refused.

The provider is scripted: it counts by a bucket, a log of the last minute, minutes of the clock, or
seconds, of the clock or sliding, and says in each reply what is left. Other programs may use the same key.
"""

import asyncio
import random
from collections import Counter, deque
from dataclasses import dataclass
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

Counts = Literal["bucket", "log", "minute", "second", "sliding second"]
WHOLE: tuple[Counts, ...] = ("bucket", "log", "minute")
CLOCKED: tuple[Counts, ...] = (*WHOLE, "second")


class Provider(httpx.AsyncBaseTransport):
    """Admit `rpm` calls a minute; `depth` is the size of its bucket, if that is smaller."""

    def __init__(
        self,
        counts: Counts,
        rpm: int,
        clock: VirtualClock,
        *,
        depth: int | None,
        cost: int,
        phase: float,
    ) -> None:
        self._counts, self._rpm, self._clock, self._cost = counts, rpm, clock, cost
        #: How long before each second of the clock a slice begins (ns).
        self._phase = round(phase * SECOND)
        self._depth = (depth or rpm) * MINUTE
        self._level, self._level_at = self._depth, 0
        self._last_minute: deque[int] = deque()
        self._by_minute, self._by_second = Counter[int](), Counter[int]()
        self._chance = random.Random(1)
        #: When calls were admitted, and how many were refused.
        self.admitted: list[int] = []
        self.refused = 0

    def left(self) -> int:
        now = self._clock()
        if self._counts == "bucket":
            grown = self._level + (now - self._level_at) * self._rpm
            self._level, self._level_at = min(self._depth, grown), now
            return self._level // MINUTE
        if self._counts == "minute":
            return self._rpm - self._by_minute[now // MINUTE]
        while self._last_minute and self._last_minute[0] <= now - MINUTE:
            self._last_minute.popleft()
        left = self._rpm - len(self._last_minute)
        if self._counts == "log":
            return left
        used = self._by_second[(now + self._phase) // SECOND]
        if self._counts == "sliding second":
            used = sum(when > now - SECOND for when in self.admitted[-self._rpm // 60 :])
        return min(left, self._rpm // 60 - used)

    def admit(self) -> bool:
        if self.left() < 1:
            self.refused += 1
            return False
        now = self._clock()
        self._level -= MINUTE
        self._by_minute[now // MINUTE] += 1
        self._by_second[(now + self._phase) // SECOND] += 1
        self._last_minute.append(now)
        self.admitted.append(now)
        return True

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        del request
        admitted = self.admit()
        if admitted:
            await asyncio.sleep(self._chance.uniform(0.2, 1.5))
        resource = "requests" if self._cost == 1 else "tokens"
        headers = {
            f"x-ratelimit-limit-{resource}": str(self._rpm * self._cost),
            f"x-ratelimit-remaining-{resource}": str(self.left() * self._cost),
        }
        if admitted:
            usage = {"prompt_tokens": 0, "completion_tokens": TOKENS, "total_tokens": TOKENS}
            return httpx.Response(200, headers=headers, json={"usage": usage})
        return httpx.Response(429, headers={"retry-after-ms": "500", **headers})


@dataclass(frozen=True)
class Shared:
    """The result of saturating a key."""

    #: The parts of all calls, ours and others', that were refused.
    refused: float
    #: The part of the limit that was used after the first minute.
    later_use: float


def share(
    counts: Counts,
    *,
    others: float = 0,
    seconds: int = 180,
    rpm: int = 600,
    depth: int | None = None,
    tokens: bool = False,
    deaf: int = 0,
    evenly: bool = False,
    ours_at_most: int | None = None,
    phase: float = 0,
) -> Shared:
    """Saturate a limit while others take a part of it.

    Others come at random, or `evenly`; our limit may be lower than the provider's. For the first
    `deaf` seconds, replies are not read.
    """
    cost = TOKENS if tokens else 1
    chance = random.Random(1)
    with virtual_time() as time:
        provider = Provider(counts, rpm, time.clock, depth=depth, cost=cost, phase=phase)
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
    return Shared(
        refused=provider.refused / (len(provider.admitted) + provider.refused),
        later_use=later / (rpm * (seconds - 60) / 60),
    )


def alone(counts: Counts, used: float = 0.95, **options: Any) -> Any:
    return pytest.param(counts, options, 0, used, id=f"{counts}, alone {options or ''}")


def shared(counts: Counts, refused: float, used: float, **options: Any) -> Any:
    return pytest.param(
        counts, {"others": 0.4} | options, refused, used, id=f"{counts}, shared {options or ''}"
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("counts", "options", "refused", "used"),
    [
        *(alone(counts, tokens=tokens) for counts in CLOCKED for tokens in (False, True)),
        *(alone("second", phase=phase) for phase in (0.37, 0.99)),
        *(alone("sliding second", 0.93, tokens=tokens) for tokens in (False, True)),
        # Calls before the first reply that is read are not taken for others'.
        *(alone(counts, deaf=40) for counts in WHOLE),
        *(alone(counts, 0.95 / 2, ours_at_most=300) for counts in CLOCKED),
        # What never comes back, because a bucket is full, is not taken for others'.
        *(alone("bucket", depth=depth) for depth in (10, 12, 20, 60, 100, 101, 300)),
        *(alone("bucket", depth=depth, tokens=True) for depth in (10, 20, 100, 600)),
        *(
            shared(counts, 0.005, 0.9, tokens=tokens)
            for counts in WHOLE
            for tokens in (False, True)
        ),
        *(shared(counts, 0.005, 0.9, others=0.6) for counts in WHOLE),
        # In slices of ten, four calls of others that come by chance don't always fit: without room
        # for them, 18 % would be refused.
        shared("second", 0.07, 0.88),
        shared("second", 0.07, 0.88, tokens=True),
        shared("second", 0.005, 0.85, evenly=True),
        shared("second", 0.005, 0.9, rpm=6_000, seconds=90),
    ],
)
def test_key_is_well_used_and_hardly_a_call_is_refused(
    counts: Counts, options: dict[str, Any], refused: float, used: float
) -> None:
    seen = share(counts, **options)
    assert seen.refused <= refused
    assert seen.later_use > used
