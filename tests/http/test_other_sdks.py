"""Anthropic's SDK, on httpx or, from version 1 on, httpx2, behaves as without the transport.

LlamaIndex's integration needs an older version, which is among the development dependencies.
"""

from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider

anthropic: Any = pytest.importorskip("anthropic")
FAMILY: Any = anthropic.APIStatusError.__init__.__annotations__["response"].split(".")[0]


async def script(http_client: Any) -> Any:
    """Make a call that is retried and two kinds of streams, and return their results."""
    options = {
        "model": "m",
        "max_tokens": 500,
        "messages": [{"role": "user", "content": "x" * 400}],
    }
    with RateLimitedProvider(rpm=50) as provider:
        provider.fail_next(status=529, retry_after=0.001)
        async with anthropic.AsyncAnthropic(
            base_url=provider.url, api_key="k", http_client=http_client
        ) as client:
            raw = await client.messages.with_raw_response.create(**options)
            stream = await client.messages.create(**options, stream=True)
            events = [event.model_dump_json() async for event in stream]
            async with client.messages.stream(**options) as helper:
                text = [part async for part in helper.text_stream]
    return raw.http_response.text, raw.retries_taken, events, text


async def test_anthropic_sdk_behaves_as_without_transport() -> None:
    limiter = Limiter("500 RPM burst 500", "30k ITPM", "8k OTPM", concurrency=1)
    paced = await script(limiter.http_client(family=FAMILY, profile="anthropic", retries=0))
    assert paced == await script(None)
    requests, given, received = limiter.statistics().limits
    assert limiter.statistics().in_flight == 0
    assert requests.used == 4
    assert requests.available <= 50  # as the provider says
    # The failed attempt stays as reserved, 100 and 256; the three replies are settled.
    assert given.used == 4 * 100
    assert received.used == 256 + 3 * 53
