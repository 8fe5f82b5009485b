"""Make the picture of a trace, as `asyncbucket plot` draws it.

    python docs/pictures/make.py

The provider is the bundled one. Once it answers 429, with a Retry-After of 1.5 s: that is the pause
in the picture.
"""

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, RateLimitError

from asyncbucket import Limiter
from asyncbucket.cli.plan import draw_trace
from asyncbucket.testing import RateLimitedProvider

HERE = Path(__file__).parent


async def paced_program(provider: RateLimitedProvider, limiter: Limiter, *, calls: int) -> None:
    """Send people's calls and twice as many of a batch, all at once, under one limiter."""
    children = limiter.child("chat"), limiter.child("batch", "30 requests/6s")
    async with asyncio.TaskGroup() as group:
        for count, child in zip((calls, 2 * calls), children, strict=True):
            client = AsyncOpenAI(
                base_url=provider.base_url,
                api_key="none",
                max_retries=0,
                http_client=child.http_client(),
            )
            for number in range(count):
                group.create_task(ask(client, "word " * (20 + number % 7 * 20)))


async def ask(client: AsyncOpenAI, text: str) -> None:
    """Ask until there is an answer."""
    while True:
        with contextlib.suppress(RateLimitError):
            await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": text}], max_tokens=40
            )
            return


async def draw(folder: Path) -> None:
    """Draw the trace of a program that gets a 429."""
    options: Any = {"rpm": 60, "tpm": 12_000, "minute": 6.0, "latency": (0.8, 1.6)}
    limiter = Limiter("60 requests/6s", "12k tokens/6s", concurrency=16, name="openai")
    trace = limiter.trace()
    with RateLimitedProvider(**options) as provider:
        program = asyncio.create_task(paced_program(provider, limiter, calls=40))
        await asyncio.sleep(4)
        provider.fail_next(1, status=429, retry_after=1.5)
        await program
    trace.save(str(folder / "trace.jsonl"))
    for name in ("light", "dark"):
        draw_trace(folder / "trace.jsonl", HERE / f"trace-{name}.png", dark=name == "dark")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(draw(Path(folder)))
