"""One limit, several processes: together they send what one may, and nobody is refused.

    python examples/shared_store.py
    python examples/shared_store.py redis://127.0.0.1:6379/0

The limit is kept in a file (SQLite, for the processes of one machine) or in Redis or Valkey (for many
machines). Processes that give the same store and the same name share it.

It needs no key: a provider on this machine answers, and refuses with 429 what is over its limits. Its
minute lasts six seconds, so that you need not wait for long.

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
    """Be one of the processes, such as a worker of gunicorn or celery."""
    asyncio.run(call_all(worker, store, base_url))


async def call_all(worker: int, store: str, base_url: str) -> None:
    """Make this worker's calls, all at once."""
    # Each process says the whole limit, not its share: what is idle here is used there.
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
    await limiter.aclose()  # what was booked ahead goes back to the others
    answered, seconds = statuses.count(200), time.monotonic() - start
    print(f"worker {worker}: {answered} of {CALLS} answered in {seconds:.1f} s", flush=True)


def main(store: str) -> None:
    """Start a provider, and the workers, and see what came of it."""
    with RateLimitedProvider(rpm=120, minute=6, latency=0.1) as provider:
        # "spawn": a forked child would inherit threads in the middle of something.
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
