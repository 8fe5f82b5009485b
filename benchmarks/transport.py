"""What a paced transport adds to one HTTP call, in CPU time of this process."""

import json
import time
from collections.abc import AsyncIterator, Callable

import httpx

from asyncbucket import Limiter
from benchmarks.harness import Figure, Sample, measure

_URL = "https://api.openai.com/v1/chat/completions"
_BODY = {
    "model": "gpt-4o-mini",
    "messages": [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "Why is the sky blue? " * 20},
    ],
    "max_tokens": 300,
}
_REPLY = json.dumps(
    {
        "id": "chatcmpl-1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Rayleigh. " * 60}}],
        "usage": {"prompt_tokens": 110, "completion_tokens": 120, "total_tokens": 230},
    }
).encode()
_HEADERS = {
    "content-type": "application/json",
    "content-length": str(len(_REPLY)),
    "openai-processing-ms": "300",
    "x-request-id": "req_1",
    "x-ratelimit-limit-requests": "500000",
    "x-ratelimit-remaining-requests": "499990",
    "x-ratelimit-reset-requests": "6ms",
    "x-ratelimit-limit-tokens": "200000000",
    "x-ratelimit-remaining-tokens": "199990000",
    "x-ratelimit-reset-tokens": "6ms",
}


class _Body(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield _REPLY


class _Server(httpx.AsyncBaseTransport):
    """Answer at once: what is left is the client's own work."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:  # noqa: ARG002 - all alike
        return httpx.Response(200, headers=_HEADERS, stream=_Body())


def _paced(profile: str) -> Callable[[], httpx.AsyncBaseTransport]:
    def make() -> httpx.AsyncBaseTransport:
        limiter = Limiter("500k RPM burst 500000", "200M TPM", concurrency=50)
        made: httpx.AsyncBaseTransport = limiter.transport(_Server(), profile=profile)
        return made

    return make


def _sample(make: Callable[[], httpx.AsyncBaseTransport], calls: int) -> Sample:
    async def sample() -> float:
        async with httpx.AsyncClient(transport=make()) as client:
            await client.post(_URL, json=_BODY)
            start = time.process_time_ns()
            for _ in range(calls):
                await client.post(_URL, json=_BODY)
            return (time.process_time_ns() - start) / calls / 1000

    return sample


def transport(*, rounds: int, calls: int) -> Figure:
    """Measure a chat completion through httpx, without a network, plain and paced."""
    rows = measure(
        {
            "httpx alone": _sample(_Server, calls),
            "paced, OpenAI's profile": _sample(_paced("openai"), calls),
            "paced, the reply's usage settles": _sample(_paced("generic"), calls),
        },
        rounds=rounds,
    )
    more = [round(row.median - rows[0].median) for row in rows[1:]]
    return Figure(
        key="transport",
        title="A chat completion through a paced transport",
        unit="µs CPU",
        note=(
            "Without a network: request and reply are made and read by httpx, and the limiter has "
            f"room. Pacing adds {more[0]} µs, and {more[1]} µs where the reply is searched for its "
            "usage; at most 60 was wanted."
        ),
        rows=rows,
    )
