"""A limiter that finds its concurrency hears from transports what the server cannot take."""

import httpx
import pytest

from asyncbucket import Limiter

URL = "http://127.0.0.1/v1/chat/completions"


async def concurrency_after(answer: httpx.Response | Exception) -> int | None:
    """Return the number of slots, four at first, after a call that ends in `answer`."""

    def handler(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    limiter = Limiter(concurrency="auto")
    async with httpx.AsyncClient(transport=limiter.transport(httpx.MockTransport(handler))) as http:
        try:
            _ = await http.post(URL, json={"messages": []})
        except httpx.HTTPError as error:
            assert error is answer  # noqa: PT017 - or it would be no answer of the server's
    assert limiter.statistics().in_flight == 0
    return limiter.concurrency


@pytest.mark.parametrize("status", [408, 429, 503, 504, 529])
async def test_overload_cuts_the_number_of_slots(status: int) -> None:
    """Whoever is refused, or answered too late, was one too many."""
    assert await concurrency_after(httpx.Response(status)) == 3


async def test_a_timeout_is_overload_if_the_call_was_sent() -> None:
    """A server that doesn't answer in time has too much to do; one that can't be reached, who knows."""
    assert await concurrency_after(httpx.ReadTimeout("slow")) == 3
    assert await concurrency_after(httpx.ConnectTimeout("nobody there")) == 4
    assert await concurrency_after(httpx.RemoteProtocolError("cut")) == 4


@pytest.mark.parametrize("status", [200, 400, 404, 500])
async def test_other_replies_cut_nothing(status: int) -> None:
    """Success, and errors that fewer calls would not have spared."""
    assert await concurrency_after(httpx.Response(status)) == 4
