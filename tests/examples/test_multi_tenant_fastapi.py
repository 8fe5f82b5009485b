"""What the multi-tenant service answers, on virtual time."""

import asyncio
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider, VirtualTime

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_tenant_fastapi.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec: Any = importlib.util.spec_from_file_location("multi_tenant_fastapi", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("limits", "key", "text", "heard"),
    [
        (("600 RPM", 100), "key-2", "Why?", {200: 11, 429: 19}),
        (("60 RPM burst 2", 3), "key-1", "Why?", {200: 5, 503: 3}),
        (("1k TPM", 3), "key-1", "Why? " * 1_000, {413: 1}),
        (("1k TPM", 3), "nobody's", "Why?", {401: 1}),
    ],
    ids=["over the tenant's limit", "full", "too long", "unknown key"],
)
async def test_service_says_whose_limit_refuses_a_question(
    example: Any,
    virtual_time: VirtualTime,
    limits: tuple[str, int],
    key: str,
    text: str,
    heard: dict[int, int],
) -> None:
    provider = RateLimitedProvider(rpm=600, latency=1.0, clock=virtual_time.clock)
    limiter = Limiter(limits[0], max_queue=limits[1], clock=virtual_time.clock)
    model = httpx.AsyncClient(transport=provider.mock_transport())
    service = example.service(limiter, AsyncOpenAI(api_key="any", http_client=model))
    transport = httpx.ASGITransport(service)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
        asked: Any = {"json": {"text": text}, "headers": {"authorization": key}}
        asks = (http.post("/ask", **asked) for _ in range(sum(heard.values())))
        replies = await asyncio.gather(*asks)
    assert Counter(reply.status_code for reply in replies) == heard
    again = [reply.headers["retry-after"] for reply in replies if reply.status_code in (429, 503)]
    assert set(again) <= {"1"}
