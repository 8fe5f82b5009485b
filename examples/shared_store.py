"""Several processes share one limit: together they stay within it, and nobody is refused.

    python examples/shared_store.py
    python examples/shared_store.py redis://127.0.0.1:6379/0

The limit is kept in a file (SQLite, for processes on one machine) or in Redis or Valkey (for many
machines). Processes with the same store and the same limiter name share it.

You need no key: a provider on this machine answers, and refuses calls above its limits with 429. Its
minute lasts only six seconds, so that you don't wait long.

Needs: pip install "asyncbucket[http,testing]" httpx, and for Redis "asyncbucket[redis]"
"""

import asyncio
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

WORKERS = 4
CALLS = 40


def work(worker: int, store: str, base_url: str) -> None:
    """Run one of the processes, such as a worker of gunicorn or celery."""
    asyncio.run(call_all(worker, store, base_url))


async def call_all(worker: int, store: str, base_url: str) -> None:
    """Make this worker's calls, all at once."""
    # Each process states the whole limit, not its share: what one leaves, the others can use.
    limiter = Limiter("120 requests/6s", concurrency=16, name="openai", store=store)
    start = time.monotonic()
    async with limiter.http_client(headers={"Authorization": "Bearer any"}) as client:

        async def ask(number: int) -> int:
            body = {
                "model": "gpt-4o-mini",
                "messages": [
                    {"role": "user", "content": f"Worker {worker} asks: is {number} odd?"}
                ],
            }
            reply = await client.post(f"{base_url}/chat/completions", json=body)
            return int(reply.status_code)

        statuses = await asyncio.gather(*map(ask, range(CALLS)))
    await limiter.aclose()  # gives back what was booked ahead
    answered, seconds = statuses.count(200), time.monotonic() - start
    print(f"worker {worker}: {answered} of {CALLS} answered in {seconds:.1f} s", flush=True)


def main(store: str) -> None:
    """Start a provider and the workers, and print the result."""
    with RateLimitedProvider(rpm=120, minute=6, latency=0.1) as provider:
        # "spawn", because a forked child may inherit locks that other threads hold.
        processes = multiprocessing.get_context("spawn")
        workers = [
            processes.Process(target=work, args=(worker, store, provider.base_url))
            for worker in range(WORKERS)
        ]
        for each in workers:
            each.start()
        for each in workers:
            each.join()

    seen = provider.statistics()
    print(f"{seen.requests} calls in all, {seen.refused} refused (429)")
    print(f"at most {seen.peak_in_flight} at once, where 16 may be")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(f"sqlite:///{Path(folder, 'limits.db')}")
