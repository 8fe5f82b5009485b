"""Hundreds of prompts, killed half-way and started again: no stored answer is paid for twice.

    python examples/batch_with_resume.py

You need no key: a provider on this machine answers, and refuses calls above its limits with 429. To
use OpenAI, remove `provider` and `**account`, and set OPENAI_API_KEY.

Needs: pip install "asyncbucket[batch,openai,testing]"
"""

import asyncio
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from llama_index.llms.openai import OpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

PROMPTS = [f"Name a city whose name has {n} letters." for n in range(300)]


async def answer_all(base_url: str, checkpoint: str) -> None:
    """Answer the prompts that have no answer yet, and print how it went."""
    limiter = Limiter("6000 RPM", "1M TPM", concurrency=10, name="openai")
    account: dict[str, Any] = {"api_base": base_url, "api_key": "any"}
    llm = limiter.wrap(OpenAI(model="gpt-4o-mini", max_tokens=30, **account))

    # The wrapped model acquires by itself, so `amap` doesn't charge the call again. Each
    # result is in the checkpoint before the loop gets it.
    restored = called = 0
    text = ""
    async for item in limiter.amap(llm.acomplete, PROMPTS, checkpoint=checkpoint):
        restored += item.restored
        called += not item.restored
        text = item.result.text
    print(f"{restored} from the checkpoint, {called} asked for, the last said {text!r}")


def run(base_url: str, checkpoint: str) -> None:
    """Run in a process of its own."""
    asyncio.run(answer_all(base_url, checkpoint))


def main() -> None:
    """Start a run, kill it as `kill -9` does, and start it again."""
    with (
        RateLimitedProvider(rpm=6_000, tpm=1_000_000, latency=(0.05, 0.15)) as provider,
        tempfile.TemporaryDirectory() as folder,
    ):
        arguments = (provider.base_url, str(Path(folder) / "run.db"))
        context = multiprocessing.get_context("spawn")
        first = context.Process(target=run, args=arguments)
        first.start()
        while provider.statistics().admitted < len(PROMPTS) // 2:
            first.join(0.01)
        first.kill()
        first.join()
        print(f"killed after {provider.statistics().admitted} calls")

        second = context.Process(target=run, args=arguments)
        second.start()
        second.join()
        seen = provider.statistics()
        again = seen.admitted - len(PROMPTS)
        print(
            f"{seen.admitted} calls for {len(PROMPTS)} prompts: {again} were in flight at the kill"
        )
        print(f"{seen.refused} refused (429)")


if __name__ == "__main__":
    main()
