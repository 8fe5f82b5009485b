"""What the multi-tenant service answers, on virtual time."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from openai import AsyncOpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider, VirtualTime

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_tenant_fastapi.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("multi_tenant_fastapi", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Service:
    """The service under test, and its callers."""

    def __init__(self, example: ModuleType, limiter: Limiter, time: VirtualTime) -> None:
        self.provider = RateLimitedProvider(rpm=600, latency=1.0, clock=time.clock)
        client = AsyncOpenAI(
            api_key="any",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=self.provider.mock_transport()),
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(example.service(limiter, client)),
            base_url="http://service",
        )

    async def ask(self, key: str, text: str = "Why?") -> httpx.Response:
        return await self.http.post("/ask", json={"text": text}, headers={"authorization": key})

    async def ask_at_once(self, key: str, times: int) -> list[tuple[int, str | None]]:
        replies = await asyncio.gather(*(self.ask(key) for _ in range(times)))
        return sorted((reply.status_code, reply.headers.get("retry-after")) for reply in replies)


async def test_tenant_over_its_limit_gets_429_with_retry_after(
    example: ModuleType, virtual_time: VirtualTime
) -> None:

    limiter = Limiter("600 RPM", max_queue=100, clock=virtual_time.clock)
    service = Service(example, limiter, virtual_time)
    heard = await service.ask_at_once("key-2", 30)
    assert [status for status, _ in heard].count(200) == 11
    assert {again for status, again in heard if status == 429} == {"1"}
    assert {status for status, _ in heard} == {200, 429}
    reply = await service.ask("key-1")
    assert reply.json()["answer"].startswith("You said")
    assert limiter.key("acme").statistics().waits == {}


async def test_full_service_answers_503(example: ModuleType, virtual_time: VirtualTime) -> None:

    limiter = Limiter("60 RPM burst 2", max_queue=3, clock=virtual_time.clock)
    service = Service(example, limiter, virtual_time)
    heard = await service.ask_at_once("key-1", 8)
    assert heard == [*[(200, None)] * 5, *[(503, "1")] * 3]
    assert (await service.ask("nobody's")).status_code == 401


async def test_question_above_a_limit_gets_413(
    example: ModuleType, virtual_time: VirtualTime
) -> None:

    limiter = Limiter("1k TPM", clock=virtual_time.clock)
    service = Service(example, limiter, virtual_time)
    reply = await service.ask("key-1", "Why? " * 1_000)
    assert reply.status_code == 413
    assert reply.json()["error"].startswith("cost of 1,350 tokens exceeds the limit of 1,000 ")
    assert (await service.ask("key-1")).status_code == 200
