"""What the tests of `asyncbucket.http` share: both libraries, and scripted inner transports."""

import importlib
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.testing import VirtualClock
from asyncbucket.waiting import ASYNC, IO, SYNC

#: For synchronous calls in tests that have a loop, which they block.
BLOCKS = pytest.mark.filterwarnings("ignore:this call waits for its admission and blocks")
either_io = pytest.mark.parametrize(
    "io", [ASYNC, pytest.param(SYNC, marks=BLOCKS)], ids=["async", "sync"]
)


@pytest.fixture(params=["httpx", "httpx2"])
def library(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def limiter() -> Limiter:
    return Limiter("1000 RPM burst 1000", "100k TPM", concurrency=4)


def chunked(library: Any, *chunks: bytes, error: BaseException | None = None) -> Any:

    class Body(library.AsyncByteStream, library.SyncByteStream):  # type: ignore[misc]
        closed = False

        def __iter__(self) -> Iterator[bytes]:
            yield from chunks
            if error is not None:
                raise error

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for chunk in self:
                yield chunk

        def close(self) -> None:
            self.closed = True
            if error is not None:
                raise error

        async def aclose(self) -> None:
            self.close()

    return Body()


def data(name: str) -> dict[str, Any]:
    """Return what a TOML file beside the tests has."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text("utf-8"))


def filled_in(text: str, stands_for: dict[str, str]) -> str:
    """Return a text from such a file with its words in capitals replaced."""
    for word, meaning in stands_for.items():
        text = text.replace(word, meaning)
    return text


Answer = Callable[[Any], Any]


def answering(library: Any, *chunks: bytes, status: int = 200, **headers: str) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(_: Any) -> Any:
        return library.Response(status, headers=fields, stream=chunked(library, *chunks))

    return answer


class Server:
    """Give one answer after the other, to each host its own; the last one for ever."""

    def __init__(self, *answers: Any, **by_host: list[Any]) -> None:
        self.requests: list[Any] = []
        self._answers = by_host
        self._others = list(answers)

    def __call__(self, request: Any) -> Any:
        self.requests.append(request)
        answers = self._answers.get(self.hosts[-1], self._others)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(request)

    @property
    def hosts(self) -> list[str]:
        """Which hosts were asked, without ``.test``."""
        return [request.url.host.removesuffix(".test") for request in self.requests]


def client_over(
    library: Any, limiter: Limiter, answer: Answer, *, io: IO = ASYNC, retries: Any = 0, **more: Any
) -> Any:
    """Return a paced client whose replies ``answer`` makes."""
    transport = limiter.transport(library.MockTransport(answer), retries=retries, **more)
    return (library.AsyncClient if io is ASYNC else library.Client)(transport=transport)


def in_flight(limiter: Limiter) -> int:
    return limiter.statistics().in_flight


def used(limiter: Limiter, resource: str) -> int:
    return next(u.used for u in limiter.statistics().limits if u.limit.resource == resource)
