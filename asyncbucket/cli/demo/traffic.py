"""What goes over the wire, counted where every attempt must pass: at the HTTP transport."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx

from asyncbucket.providers.errors import RATE_LIMITED


class Arrival(NamedTuple):
    """One HTTP request, as the provider or, failing that, the client saw it."""

    #: Nanoseconds of `time.monotonic_ns()`.
    time_ns: int
    #: Tokens that it was charged; 0 if unknown.
    tokens: int
    admitted: bool


@dataclass(slots=True)
class Traffic:
    """Count HTTP requests."""

    requests: int = 0
    refused: int = 0
    answered: int = 0
    in_flight: int = 0
    arrivals: list[Arrival] = field(default_factory=list[Arrival])

    def note(self, sent_ns: int, status: int) -> None:
        """Count a reply."""
        self.refused += status == RATE_LIMITED
        self.answered += httpx.codes.is_success(status)
        self.arrivals.append(Arrival(sent_ns, 0, status != RATE_LIMITED))


class CountingTransport(httpx.AsyncBaseTransport):
    """Pass everything on and count it; a request is in flight until its reply has been read."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        # As the OpenAI client has it: an httpx client without limits of its own has 100.
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
        self._inner = httpx.AsyncHTTPTransport(limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        traffic, sent_ns = self._traffic, time.monotonic_ns()
        traffic.requests += 1
        traffic.in_flight += 1
        try:
            response = await self._inner.handle_async_request(request)
        except BaseException:
            traffic.in_flight -= 1
            raise
        traffic.note(sent_ns, response.status_code)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _CountedStream(response.stream, traffic)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _CountedStream(httpx.AsyncByteStream):
    def __init__(self, inner: httpx.AsyncByteStream, traffic: Traffic) -> None:
        self._inner = inner
        self._traffic: Traffic | None = traffic

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            yield chunk

    async def aclose(self) -> None:
        if self._traffic is not None:
            self._traffic.in_flight -= 1
            self._traffic = None
        await self._inner.aclose()
