"""A user's program as type checkers see it: every line says what type it expects.

`test_types.py` checks it against the installed wheel, under mypy's strict mode and basedpyright.
"""

import asyncio
from typing import TYPE_CHECKING, Any, assert_type

import httpx
import httpx2

import asyncbucket
from asyncbucket import Limiter, Pool, pace
from asyncbucket.batch import Item, Results

if TYPE_CHECKING:
    from collections.abc import Coroutine


class Model:
    """Stand for a LlamaIndex model: as far as types go, any class may be wrapped."""

    async def acomplete(self, prompt: str) -> str:
        return prompt


def wrapping_keeps_the_type(limiter: Limiter, model: Model) -> None:
    assert_type(limiter.wrap(model), Model)
    assert_type(limiter.wrap([model]), list[Any])
    assert_type(pace(model, rpm=500, tpm=200_000, concurrency=20), Model)


async def acquiring_gives_a_lease(limiter: Limiter) -> None:
    async with limiter.acquire(input_tokens=900, output_tokens=300, timeout=30) as lease:
        assert_type(lease, asyncbucket.Lease)
        lease.settle(tokens=800)
        assert_type(lease.waited, float)
        assert_type(lease.bound_by, str | None)
        assert_type(lease.cost, asyncbucket.Cost)
    assert_type(await limiter.acquire(tokens=5, priority="batch", tenant="acme"), asyncbucket.Lease)
    with limiter.acquire_sync(tokens=5) as lease:
        lease.release()
    task = asyncio.ensure_future(limiter.acquire())
    assert_type(await task, asyncbucket.Lease)


def pacing_keeps_the_signature(limiter: Limiter) -> None:
    def tokens(prompt: str, *, loud: bool = False) -> float:
        return len(prompt) / 4 + loud

    @limiter.paced(tokens=tokens, priority="interactive")
    async def ask(prompt: str, *, loud: bool = False) -> int:
        return len(prompt) + loud

    @limiter.paced
    def plain(number: int) -> str:
        return str(number)

    assert_type(plain(3), str)
    coroutine: Coroutine[Any, Any, int] = ask("salve", loud=True)
    coroutine.close()
    ask(3).close()  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def any_client_takes_a_transport(limiter: Limiter) -> None:
    """One transport serves clients of both libraries, async and synchronous."""
    transport = limiter.transport(httpx.AsyncHTTPTransport(), profile="openai", learn=False)
    httpx.AsyncClient(transport=transport, mounts={"all://": limiter.transport_sync()})
    httpx.Client(transport=transport, mounts={"all://": transport})
    httpx2.AsyncClient(transport=transport, mounts={"all://": transport})
    httpx2.Client(transport=transport, mounts={"all://": limiter.transport_sync()})
    assert transport.limiter is limiter
    limiter.transport(famly="httpx")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client: httpx2.Client = limiter.http_client(family="httpx2", sync=True)
    client.close()
    limiter.http_client(rutes={})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def pools_are_limiters_of_several_keys(one: Limiter, other: Limiter, model: Model) -> None:
    pool = Pool(one, other, prefer="first")
    async with pool.acquire(tokens=5, sticky="c17", timeout=30) as lease:
        limiter: Limiter = lease.limiter
        assert limiter in pool.members
        lease.member_failed("HTTP 401")
    assert_type(pool.wrap([model, model]), Model)
    pool.http_client({one: {"base_url": "https://x", "headers": {"api-key": "k"}}}, sync=True)
    pool.transport({one: {"base_ulr": "https://x"}})  # type: ignore[typeddict-unknown-key,typeddict-item]  # pyright: ignore[reportArgumentType]


async def batches_know_their_items(limiter: Limiter, model: Model) -> None:
    async def measure(prompt: str) -> int:
        return len(prompt)

    results = limiter.amap(measure, ["salve"], ordered=True, checkpoint="run.db")
    assert_type(results, Results[str, int])
    async for item in results:
        assert_type(item, Item[str, int])
        assert_type(item.result, int)
        assert_type(item.input, str)
    async for answer in limiter.amap(model.acomplete, ["salve"]):
        assert_type(answer.result, str)


def limiters_are_made_from_outside() -> None:
    class Mine(Limiter):
        pass

    assert_type(Mine.from_toml("limits.toml"), Mine)
    Limiter("500 RPM", asyncbucket.Limit("tokens", 200_000, per=60), concurrency="auto")


def typos_are_found(limiter: Limiter, model: Model) -> None:
    limiter.wrap(model, chlid="a")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    limiter.transport(route={})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    limiter.amap(model.acomplete, [], orderd=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    limiter.acquire(token=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Limiter(rmp=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    limiter.reconfigure(rmp=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    asyncbucket.pace(model, rmp=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    asyncbucket.plan(calls=9, rmp=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    limiter.http_client(route={})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
