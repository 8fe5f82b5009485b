"""Transports tell a limiter with adaptive concurrency what is too much for the server."""

import asyncio

import httpx
import pytest

from asyncbucket import Limiter
from asyncbucket.testing import VirtualTime

URL = "http://127.0.0.1/v1/chat/completions"


async def concurrency_after(answer: httpx.Response | Exception) -> int | None:
    """Return the number of slots, at first four, after a call that ends in `answer`."""

    def handler(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    limiter = Limiter(concurrency="auto")
    async with httpx.AsyncClient(transport=limiter.transport(httpx.MockTransport(handler))) as http:
        try:
            _ = await http.post(URL, json={"messages": []})
        except httpx.HTTPError as error:
            assert error is answer  # noqa: PT017 - any other error would not be the server's answer
    assert limiter.statistics().in_flight == 0
    return limiter.concurrency


@pytest.mark.parametrize("status", [408, 429, 503, 504, 529])
async def test_overload_reply_cuts_slots(status: int) -> None:
    assert await concurrency_after(httpx.Response(status)) == 3


async def test_timeout_cuts_slots_only_if_call_was_sent() -> None:
    assert await concurrency_after(httpx.ReadTimeout("slow")) == 3
    assert await concurrency_after(httpx.ConnectTimeout("nobody there")) == 4
    assert await concurrency_after(httpx.RemoteProtocolError("cut")) == 4


@pytest.mark.parametrize("status", [200, 400, 404, 500])
async def test_reply_that_is_not_overload_cuts_no_slots(status: int) -> None:
    """Neither success nor errors that fewer calls would not have avoided cost slots."""
    assert await concurrency_after(httpx.Response(status)) == 4


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
