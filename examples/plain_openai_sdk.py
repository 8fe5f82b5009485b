"""OpenAI's own SDK, paced beneath: nothing in the code that calls it changes.

    python examples/plain_openai_sdk.py

It needs no key: a provider on this machine answers, and refuses with 429 what is over its limits. Its
minute lasts three seconds, so that you need not wait for long.
Leave the provider, `base_url` and `api_key` out, set OPENAI_API_KEY, and the same code talks to OpenAI.

Needs: pip install "asyncbucket[http,testing]" openai
"""

import asyncio
import time

from openai import AsyncOpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

# For a real key write "500 RPM", "200k TPM burst 20k", or whatever your account says. A burst for the
# tokens, too: if others use the same key, no more than this goes out before a reply says what is left.
limiter = Limiter("60 requests/3s", "40k tokens/3s burst 10k", concurrency=32, name="openai")


async def main() -> None:
    """Ask eighty questions at once, then stream an answer, then embed them all."""
    with RateLimitedProvider(rpm=60, tpm=40_000, minute=3, latency=(0.05, 0.2)) as provider:
        # Each HTTP attempt is admitted at the transport. `max_retries=0`: one layer retries, or
        # none. This one doesn't; it has nothing to retry as long as nobody is refused.
        async with AsyncOpenAI(
            base_url=provider.base_url,
            api_key="any",
            http_client=limiter.http_client(),
            max_retries=0,
        ) as client:

            async def ask(question: str) -> str:
                # `max_tokens` is what a provider may reserve. Without it the limiter foresees what
                # replies have needed so far. Either way the usage in the reply settles it.
                reply = await client.chat.completions.create(
                    model="gpt-4o-mini",
                    messages=[{"role": "user", "content": question}],
                    max_tokens=100,
                )
                return reply.choices[0].message.content or ""

            start = time.monotonic()
            answers = await asyncio.gather(*(ask(f"Is {n} prime?") for n in range(80)))
            print(f"{len(answers)} answers in {time.monotonic() - start:.1f} s: {answers[-1]!r}")

            stream = await client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": "Tell me a story."}],
                stream=True,
            )
            async with stream:  # the slot is free again when the stream is read or closed
                text = "".join([part.choices[0].delta.content or "" async for part in stream])
            print(f"a stream: {text!r}")

            vectors = await client.embeddings.create(
                model="text-embedding-3-small", input=list(answers)
            )
            print(f"{len(vectors.data)} vectors in one call")

    seen = provider.statistics()
    print(f"{seen.requests} calls, {seen.refused} refused (429)")
    print(limiter)


if __name__ == "__main__":
    asyncio.run(main())
