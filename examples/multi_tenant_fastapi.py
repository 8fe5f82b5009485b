"""A web service whose tenants share one provider key fairly, and are told when to come back.

    python examples/multi_tenant_fastapi.py

It runs the service, its provider and three tenants on this machine, so you need no key. To serve real
tenants, set OPENAI_API_KEY, remove `base_url` and `api_key` from `AsyncOpenAI`, and run `uvicorn` on
what `service` returns.

A tenant that exceeds its own plan gets 429. If the service as a whole is full, callers get 503. Both
say in `Retry-After` when to try again, and no caller waits longer than `PATIENCE` to hear it. A
question that costs more than a token limit can never pass, and gets 413.

Needs: pip install "asyncbucket[testing]" fastapi httpx openai
"""

import asyncio
import collections
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Literal

import httpx
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse
from openai import AsyncOpenAI
from pydantic import BaseModel

import asyncbucket
from asyncbucket import AcquireTimeout, CostExceedsLimit, Limiter, QueueFull, WouldBlock
from asyncbucket.testing import RateLimitedProvider

#: Seconds after which a caller would rather hear "later" than go on waiting.
PATIENCE = 5.0
#: The most tokens that an answer may have.
MOST = 100


@dataclass(frozen=True)
class Plan:
    """Say what a tenant pays for."""

    rpm: int
    weight: float = 1
    priority: Literal["normal", "batch"] = "normal"


PLANS = {"free": Plan(rpm=60, priority="batch"), "business": Plan(rpm=600, weight=4)}
#: This service's API keys, each with its tenant and plan.
TENANTS = {"key-1": ("acme", "business"), "key-2": ("bob", "free"), "key-3": ("eve", "free")}


class Question(BaseModel):
    """The body of a request."""

    text: str


def service(limiter: Limiter, client: AsyncOpenAI) -> FastAPI:
    """Return the service; all tenants share `limiter`, which is for the provider's key."""
    app = FastAPI()

    async def caller(authorization: Annotated[str, Header()]) -> AsyncIterator[None]:
        """Charge all that runs for this request to its tenant, agents and their tools included."""
        if authorization not in TENANTS:
            raise HTTPException(401)
        tenant, kind = TENANTS[authorization]
        plan = PLANS[kind]
        # Made at a tenant's first request; of tenants long idle, only what they used is remembered.
        limiter.key(tenant, rpm=plan.rpm, weight=plan.weight, max_queue=20)
        with (
            asyncbucket.tenant(tenant),
            asyncbucket.priority(plan.priority),
            asyncbucket.deadline(PATIENCE),
        ):
            yield

    @app.post("/ask", dependencies=[Depends(caller)])
    async def ask(question: Question) -> dict[str, str | None]:
        async with limiter.acquire(tokens=len(question.text) // 4 + MOST) as lease:
            reply = await client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": question.text}],
                max_tokens=MOST,
            )
            if reply.usage is not None:
                lease.settle(tokens=reply.usage.total_tokens)
        return {"answer": reply.choices[0].message.content}

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        """Say whose limit refused the call, and when to come back."""
        assert isinstance(error, AcquireTimeout | QueueFull | WouldBlock)
        return JSONResponse(
            {"error": str(error)},
            status_code=503 if error.limiter == limiter.name else 429,
            headers={"Retry-After": str(max(1, math.ceil(error.retry_after or 1)))},
        )

    async def too_long(_: Request, error: Exception) -> JSONResponse:
        """Say that waiting doesn't help."""
        return JSONResponse({"error": str(error)}, status_code=413)

    for kind in (AcquireTimeout, QueueFull, WouldBlock):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(CostExceedsLimit, too_long)
    return app


async def main() -> None:
    """Let three tenants ask for ten seconds: one that pays, and two on the free plan."""
    with RateLimitedProvider(rpm=100, minute=6, latency=(0.1, 0.3)) as provider:
        limiter = Limiter("100 requests/6s burst 5", concurrency=32, max_queue=100, name="openai")
        client = AsyncOpenAI(base_url=provider.base_url, api_key="any", max_retries=0)
        heard: collections.Counter[tuple[str, int]] = collections.Counter()
        http = httpx.AsyncClient(
            transport=httpx.ASGITransport(service(limiter, client)), base_url="http://service"
        )
        end = asyncio.get_running_loop().time() + 10

        async def user(key: str) -> None:
            while asyncio.get_running_loop().time() < end:
                reply = await http.post(
                    "/ask", json={"text": "Why?"}, headers={"authorization": key}
                )
                heard[TENANTS[key][0], reply.status_code] += 1
                if reply.is_error:
                    await asyncio.sleep(float(reply.headers["retry-after"]))

        async with client, http, asyncio.TaskGroup() as group:
            for key, users in (("key-1", 20), ("key-2", 40), ("key-3", 4)):
                for _ in range(users):
                    group.create_task(user(key))
        for (tenant, status), count in sorted(heard.items()):
            print(f"{tenant}: {count} times {status}")
    print(f"{provider.statistics().requests} calls, {provider.statistics().refused} refused (429)")


if __name__ == "__main__":
    asyncio.run(main())
