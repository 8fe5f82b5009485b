"""Transports tell a limiter with adaptive concurrency what is too much for the server."""

import asyncio
import contextlib

import httpx
import pytest

from asyncbucket import Limiter
from asyncbucket.testing import VirtualTime

URL = "http://127.0.0.1/v1/chat/completions"


@pytest.mark.parametrize(
    ("answer", "slots"),
    [
        *((httpx.Response(status), 3) for status in (408, 429, 503, 504, 529)),
        *((httpx.Response(status), 4) for status in (200, 400, 404, 500)),
        (httpx.ReadTimeout("slow"), 3),
        (httpx.ConnectTimeout("nobody there"), 4),
        (httpx.RemoteProtocolError("cut"), 4),
    ],
)
async def test_only_what_fewer_calls_would_have_avoided_costs_slots(
    answer: httpx.Response | Exception, slots: int
) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    limiter = Limiter(concurrency="auto")
    assert limiter.concurrency == 4
    async with httpx.AsyncClient(transport=limiter.transport(httpx.MockTransport(handler))) as http:
        with contextlib.suppress(httpx.HTTPError):
            await http.post(URL, json={"messages": []})

    assert limiter.statistics().in_flight == 0
    assert limiter.concurrency == slots


@pytest.mark.heavy
def test_adaptive_concurrency_keeps_server_90_percent_busy(virtual_time: VirtualTime) -> None:
    capacity, latency, seconds = 8, 0.05, 20
    serving = served = 0

    async def handler(_: httpx.Request) -> httpx.Response:
        nonlocal serving, served
        if serving == capacity:
            return httpx.Response(429)
        serving += 1
        await asyncio.sleep(latency)
        serving -= 1
        served += 1
        return httpx.Response(200)

    async def caller(http: httpx.AsyncClient) -> None:
        while virtual_time.now < seconds:
            await http.post(URL, json={"messages": []})

    async def main() -> None:
        limiter = Limiter(concurrency="auto", clock=virtual_time.clock)
        transport = limiter.transport(httpx.MockTransport(handler))
        async with httpx.AsyncClient(transport=transport) as http, asyncio.TaskGroup() as callers:
            for _ in range(20):
                callers.create_task(caller(http))

    virtual_time.run(main())
    assert served >= 0.9 * capacity * seconds / latency
