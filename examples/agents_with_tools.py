"""A swarm of agents with tools: every call of the model and of the tool waits its turn.

    python examples/agents_with_tools.py

It needs no key: a provider on this machine answers, and refuses with 429 what is over its limits. Its
minute lasts three seconds, so that you need not wait for long.
Leave the provider, `api_base` and `api_key` out, set OPENAI_API_KEY, and the same code talks to OpenAI.

Needs: pip install "asyncbucket[openai,testing]"
"""

import asyncio
from typing import Any

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.llms.openai import OpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

CITIES = ("Accra", "Dakar", "Kyoto", "Lima", "Oslo", "Perth", "Quito", "Turin")
AGENTS = 32

# What a key may do belongs together: all who call with this key share this one limiter.
# For a real one write "500 RPM", "200k TPM", or whatever your account says.
openai = Limiter("40 requests/3s", "40k tokens/3s", concurrency=32, name="openai")

# The tool asks a service of its own, with limits of its own.
weather = Limiter("20/s", concurrency=4, name="weather")


async def look_up_weather(city: str) -> str:
    """Look up the weather in a city."""
    await asyncio.sleep(0.05)  # as long as such a service takes
    return f"{city}: 21 degrees, a light wind, no rain until the evening."


async def main() -> None:
    """Let all agents start at once, as if there were no limits."""
    with RateLimitedProvider(rpm=40, tpm=40_000, minute=3, latency=(0.1, 0.4)) as provider:
        url = provider.base_url
        llm = openai.wrap(OpenAI(model="gpt-4o-mini", max_tokens=200, api_base=url, api_key="any"))
        tools: list[Any] = weather.wrap([look_up_weather])

        async def ask(number: int) -> str:
            city = CITIES[number % len(CITIES)]
            # An agent asks the model twice: which tool, and what to make of the tool's answer. It
            # holds a slot only while it does, never while the tool runs. `timeout=None`, because
            # the time in line counts as its running time.
            agent: Any = FunctionAgent(tools=tools, llm=llm, timeout=None)
            return str(await agent.run(user_msg=f"How is the weather in {city}?"))

        answers = await asyncio.gather(*map(ask, range(AGENTS)))

    seen = provider.statistics()
    print(answers[0])
    print(
        f"{len(answers)} agents answered with {seen.requests} calls, {seen.refused} refused (429)"
    )
    for limiter in (openai, weather):
        for bound_by, waits in limiter.statistics().waits.items():
            print(f"{limiter.name}: {waits.count} calls waited for {bound_by}")


if __name__ == "__main__":
    asyncio.run(main())
