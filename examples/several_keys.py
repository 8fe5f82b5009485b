"""Several keys as one: three providers share the calls, and one of them fails and comes back.

    python examples/several_keys.py

You need no key: three providers on this machine answer, with limits of 60, 120 and 500 calls a
minute. Their minute lasts only six seconds, so that you don't wait long.

Needs: pip install "asyncbucket[http,testing]" openai
"""

import asyncio
import logging
import sys
import time
from collections import Counter
from urllib.parse import urlsplit

from openai import AsyncOpenAI

from asyncbucket import Limiter, Pool
from asyncbucket.testing import RateLimitedProvider

CALLS = 250
providers = [RateLimitedProvider(rpm=rpm, minute=6, latency=(0.02, 0.1)) for rpm in (60, 120, 500)]
# One limiter for each key, and one line over all of them.
keys = [Limiter(f"{each.rpm} requests/6s", name=f"key-{each.rpm}") for each in providers]
pool = Pool(*keys, name="gpt-4o-mini")


async def fail(provider: RateLimitedProvider) -> None:
    """Stop a provider, and start it again when the pool has noticed."""
    await asyncio.sleep(0.5)
    provider.port = urlsplit(provider.url).port or 0
    await asyncio.to_thread(provider.stop)
    while not any(state.left_out for state in pool.states()):  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.05)
    print(*pool.states(), sep="\n")
    await asyncio.sleep(0.5)
    await asyncio.to_thread(provider.start)


async def main() -> None:
    """Ask many questions at once, and show who answered."""
    http = pool.http_client(
        {
            key: {"base_url": each.base_url, "headers": {"Authorization": f"Bearer {key.name}"}}
            for key, each in zip(keys, providers, strict=True)
        }
    )
    # The address of any member will do; the credentials are those of the member that takes a call.
    async with AsyncOpenAI(
        base_url=providers[0].base_url, api_key="none", http_client=http, max_retries=0
    ) as client:

        async def ask(number: int) -> str:
            reply = await client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": f"Is {number} prime?"}],
                max_tokens=20,
            )
            return reply.choices[0].message.content or ""

        start = time.monotonic()
        answers, _ = await asyncio.gather(
            asyncio.gather(*map(ask, range(CALLS))), fail(providers[2])
        )
        print(f"{len(answers)} answers to {CALLS} calls in {time.monotonic() - start:.1f} s")

    served = Counter(
        {key.name: each.statistics().admitted for key, each in zip(keys, providers, strict=True)}
    )
    print(dict(served))
    print(f"{sum(each.statistics().refused for each in providers)} refused (429)")


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="log: %(message)s")
    logging.getLogger("stamina").setLevel(logging.ERROR)  # it tells of each call that was cut off
    for provider in providers:
        provider.start()
    try:
        asyncio.run(main())
    finally:
        for provider in providers:
            provider.stop()
