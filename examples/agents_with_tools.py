"""A swarm of agents with tools: every call of the model or the tool waits its turn.

    python examples/agents_with_tools.py

You need no key: a provider on this machine answers, and refuses calls above its limits with 429. Its
minute lasts only three seconds, so that you don't wait long.
To use OpenAI, remove the provider, `api_base` and `api_key`, and set OPENAI_API_KEY.

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

# One key, one limiter: everything that uses this key shares it. For a real key, write "500 RPM",
# "200k TPM", or whatever your account says.
openai = Limiter("40 requests/3s", "40k tokens/3s", concurrency=32, name="openai")

# The tool calls another service, which has its own limits.
weather = Limiter("20/s", concurrency=4, name="weather")


async def look_up_weather(city: str) -> str:
    """Look up the weather in a city."""
    await asyncio.sleep(0.05)  # about as long as such a service takes
    return f"{city}: 21 degrees, a light wind, no rain until the evening."


async def main() -> None:
    """Let all agents start at once, as if there were no limits."""
    with RateLimitedProvider(rpm=40, tpm=40_000, minute=3, latency=(0.1, 0.4)) as provider:
        url = provider.base_url
        llm = openai.wrap(OpenAI(model="gpt-4o-mini", max_tokens=200, api_base=url, api_key="any"))
        tools: list[Any] = weather.wrap([look_up_weather])

        async def ask(number: int) -> str:
            city = CITIES[number % len(CITIES)]
            # An agent calls the model twice: to choose a tool, and to answer from its result. It
            # holds a slot only during these calls, never while the tool runs. `timeout=None`,
            # because time in line counts towards the agent's running time.
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
