"""The boundaries that readers of the code rely on."""

import asyncio
import gc
import inspect
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, Final, TypeAlias

import httpx
import pytest

import asyncbucket
from asyncbucket import Limiter, Pool
from tests.conftest import python

PUBLIC: Final = {name: getattr(asyncbucket, name) for name in asyncbucket.__all__}
MEMBERS: Final = (FunctionType, staticmethod, classmethod, property)

BODY: Final = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Why?"}]}
JSON: Final = {"content-type": "application/json"}
REPLY: Final = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "So."}}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
}


def needs(package: str) -> pytest.MarkDecorator:
    """Skip what needs a package without which the core is tested, too."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


#: It prepares a call, yields, and makes it.
Scenario: TypeAlias = Callable[[], AsyncGenerator[None]]


def frames_of(scenario: Scenario) -> list[str]:
    """Return the module of the core that each Python frame of a call is of."""
    core, found = str(Path(asyncbucket.__file__).parent), list[str]()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(core):
            found.append(Path(frame.f_code.co_filename).stem)

    async def main() -> None:
        steps = scenario()
        await anext(steps)
        gc.collect()
        gc.disable()  # what other tests dropped may have finalizers of ours
        sys.setprofile(note)
        try:
            await anext(steps, None)
        finally:
            sys.setprofile(None)
            gc.enable()

    asyncio.run(main())
    return found


async def used_limiter() -> Limiter:
    """Return a limiter that has worked out what its calls pass."""
    limiter = Limiter("500 RPM", "200k TPM", concurrency=1)
    for _ in range(2):
        async with limiter.acquire(tokens=100):
            pass
    return limiter


async def at_once(*, used: int | None = None) -> AsyncGenerator[None]:
    limiter = await used_limiter()
    yield
    async with limiter.acquire(tokens=100) as lease:
        if used is not None:
            lease.settle(tokens=used)


async def wait_for_slot(limiter: Limiter, **terms: Any) -> AsyncGenerator[None]:
    """Wait until another call gives its slot back; in a line where somebody has waited before."""

    async def call() -> None:
        async with limiter.acquire(tokens=100, **terms):
            pass

    for is_first in (True, False):
        held = [limiter.acquire_nowait(tokens=100) for _ in range(limiter.concurrency or 1)]
        if not is_first:
            yield
        waiting = asyncio.ensure_future(call())
        for _ in range(3):
            await asyncio.sleep(0)
        held.pop().release()
        await waiting
        for lease in held:
            lease.release()


async def at_a_limiter() -> AsyncGenerator[None]:
    async for _ in wait_for_slot(await used_limiter()):
        yield


async def at_a_child() -> AsyncGenerator[None]:
    """It has a limit of its own, its call a priority and a deadline."""
    child = (await used_limiter()).child("chat", rpm=100)
    async for _ in wait_for_slot(child, priority=1, timeout=30):
        yield


async def at_a_pool() -> AsyncGenerator[None]:
    """Two members have one slot each."""
    pool = Pool(*(Limiter("500 RPM", "200k TPM", concurrency=1, name=name) for name in "ab"))
    async for _ in wait_for_slot(pool):
        yield


class Answer(httpx.AsyncBaseTransport, httpx.AsyncByteStream):
    """Answer at once as OpenAI does, with headers about limits."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:  # noqa: ARG002 - all alike
        told = {f"x-ratelimit-{name}-requests": "90000" for name in ("limit", "remaining")}
        return httpx.Response(200, headers={**told, **JSON}, stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield json.dumps(REPLY).encode()


def ample_limiter() -> Limiter:
    """Return a limiter for which no time passes, so that headers are not due again."""
    return Limiter("90k RPM burst 90000", "9M TPM", concurrency=9, clock=lambda: 1)


async def through_http() -> AsyncGenerator[None]:
    client = httpx.AsyncClient(transport=ample_limiter().transport(Answer()))
    post = partial(client.post, "https://api.openai.com/v1/chat/completions", json=BODY)
    for _ in range(3):
        await post()
    yield
    await post()


async def through_a_model() -> AsyncGenerator[None]:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai import OpenAI

    client = httpx.AsyncClient(transport=Answer())
    llm = ample_limiter().wrap(OpenAI(model="gpt-4o", api_key="k", async_http_client=client))
    messages = [ChatMessage("Why?")]
    for _ in range(3):
        await llm.achat(messages)
    yield
    await llm.achat(messages)


@pytest.mark.parametrize(
    ("call", "frames", "modules"),
    [
        (at_once, 12, 3),
        (partial(at_once, used=80), 28, 5),
        (at_a_limiter, 75, 7),
        (at_a_child, 115, 9),
        (at_a_pool, 160, 9),
        pytest.param(through_http, 130, 15, marks=needs("stamina")),
        pytest.param(through_a_model, 150, 18, marks=needs("llama_index")),
    ],
    ids=["idle", "settled", "contended", "contended child", "contended pool", "HTTP", "LlamaIndex"],
)
def test_call_passes_few_frames_in_few_modules(call: Scenario, frames: int, modules: int) -> None:
    """It can be followed by one person; moving code cannot meet it."""
    found = frames_of(call)
    assert len(found) <= frames
    assert len(set(found)) <= modules


def test_public_names_and_their_members_are_documented() -> None:
    """Every public method and property says what it does, itself or where it was declared."""
    assert [name for name, each in PUBLIC.items() if not each.__doc__] == []
    assert [
        f"{name}.{member}"
        for name, each in PUBLIC.items()
        if inspect.isclass(each)
        for member in dir(each)
        if not member.startswith("_")
        and isinstance(inspect.getattr_static(each, member), MEMBERS)
        and not inspect.getdoc(getattr(each, member))
    ] == []


def test_subpackages_load_on_first_access() -> None:
    done = python("-c", "import asyncbucket; print(asyncbucket.telemetry.__name__)")
    assert done.stdout == "asyncbucket.telemetry\n"
    assert asyncbucket.testing is sys.modules["asyncbucket.testing"]
