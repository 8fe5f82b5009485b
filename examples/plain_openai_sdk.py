"""OpenAI's own SDK, paced at the transport: the code that uses it doesn't change.

    python examples/plain_openai_sdk.py

You need no key: a provider on this machine answers, and refuses calls above its limits with 429. Its
minute lasts only three seconds, so that you don't wait long.
To use OpenAI, remove the provider, `base_url` and `api_key`, and set OPENAI_API_KEY.

Needs: pip install "asyncbucket[http,testing]" openai
"""

import asyncio
import time

from openai import AsyncOpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

# For a real key, write "500 RPM", "200k TPM burst 20k", or whatever your account says. The burst on
# tokens matters if others use the same key: it bounds what goes out before a reply says what is left.
limiter = Limiter("60 requests/3s", "40k tokens/3s burst 10k", concurrency=32, name="openai")


async def main() -> None:
    """Ask eighty questions at once, then stream an answer, then embed them all."""
    with RateLimitedProvider(rpm=60, tpm=40_000, minute=3, latency=(0.05, 0.2)) as provider:
        # Each HTTP attempt is admitted at the transport, which also retries. `max_retries=0` because
        # only one layer should.
        async with AsyncOpenAI(
            base_url=provider.base_url,
            api_key="any",
            http_client=limiter.http_client(),
            max_retries=0,
        ) as client:

            async def ask(question: str) -> str:
                # The provider may reserve `max_tokens`, so the limiter does. Without it, the limiter
                # goes by earlier replies. Either way, the usage in the reply corrects it.
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
            async with stream:  # frees the slot once the stream is read or closed
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
