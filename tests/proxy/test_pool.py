"""One proxy before several providers."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from asyncbucket.proxy.options import read_options
from asyncbucket.testing import RateLimitedProvider
from tests.proxy.servers import proxied

pytestmark = pytest.mark.real_clock
KEY = "sk-canary-1234567890"


async def test_calls_go_on_at_the_others_if_a_provider_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    providers = [RateLimitedProvider(rpm=30, minute=1, latency=0.05) for _ in range(2)]
    file = tmp_path / "pool.toml"
    with providers[0], providers[1]:
        file.write_text(
            "".join(
                f'[member.p{number}]\nlimits = ["30 requests/1s"]\nkey_env = "THE_KEY"\n'
                f'base_url = "{each.base_url}"\n'
                for number, each in enumerate(providers)
            )
        )
        async with proxied(None, pool=str(file)) as proxy:
            client = openai.AsyncOpenAI(
                base_url=f"{proxy.url.rstrip('/')}/v1", api_key="any", max_retries=0
            )

            async def ask(number: int) -> str | None:
                reply = await client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": str(number)}],
                    extra_query={"debug": "1"},
                )
                return reply.choices[0].message.content

            asking = asyncio.gather(*map(ask, range(60)))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(providers[0].stop)
            answers = await asking
            shown = (await proxy.client.get(f"{proxy.status_url}/stats")).json()
            await client.close()
        assert answers == [f"You said: {number}" for number in range(60)]
        assert providers[1].statistics().refused == 0
    assert {"p0", "p1", "pool"} <= {row["name"] for row in shown["limiters"]}
    assert KEY not in str(shown)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"upstream": "https://api.test"}, "say where calls go: --upstream .* or else --pool"),
        ({"key_env": "K", "rpm": 5}, "5 requests per 60 s, key_env cannot go with a pool"),
    ],
)
def test_what_a_pool_says_itself_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(pool="pool.toml", **given)
