"""A request that fails temporarily is sent again by one layer, and a refusal of ours is not."""

import asyncio
import functools
import gzip
import io as files
from typing import Any, get_args

import httpx
import pytest
from openai import AsyncOpenAI

from asyncbucket import Limiter
from asyncbucket.attempt import Attempt
from asyncbucket.retry import Retrier, Retry
from asyncbucket.testing import RateLimitedProvider, VirtualTime
from asyncbucket.testing.counting import PolicyName
from asyncbucket.waiting import IO
from tests.http.conftest import Server, answering, client_over, either_io
from tests.http.test_sdks import FAMILY

URL = "https://api.openai.com/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
EMPTY_ACCOUNT = b'{"error": {"code": "insufficient_quota"}}'


retrying = functools.partial(client_over, retries=None)


def refused(library: Any, status: int = 429, body: bytes = b"{}", **headers: str) -> Any:
    return answering(library, body, status=status, **{"retry_after_ms": "1", **headers})


def fast() -> Limiter:
    return Limiter("1000 RPM burst 1000", name="openai")


@pytest.mark.heavy
@pytest.mark.parametrize("policy", get_args(PolicyName))
@pytest.mark.parametrize("rpm", [500, 150])
async def test_readme_client_loses_no_call_whatever_the_provider_counts(
    virtual_time: VirtualTime, policy: PolicyName, rpm: int
) -> None:
    """README's limits are the provider's, or more than three times as high."""
    limits: dict[str, Any] = {"rpm": rpm, "tpm": 200_000, "policy": policy}
    provider = RateLimitedProvider(**limits, latency=(0.2, 1.5), clock=virtual_time.clock)
    terms: dict[str, Any] = {"concurrency": 20, "name": "openai", "clock": virtual_time.clock}
    limiter = Limiter("500 RPM", "200k TPM", "10k RPD", **terms)
    inner = provider.mock_transport(family=FAMILY)
    http_client = limiter.http_client(family=FAMILY, transport=inner)
    async with AsyncOpenAI(
        base_url="https://api.openai.com/v1", api_key="k", http_client=http_client, max_retries=0
    ) as client:
        ask = client.chat.completions.create
        await asyncio.gather(*(ask(model="m", messages=HELLO, max_tokens=50) for _ in range(200)))
    assert provider.statistics().admitted == 200
    assert provider.statistics().refused == limiter.statistics().upstream_429


@either_io
@pytest.mark.parametrize("failure", [429, 503, 500, "ReadTimeout", "ConnectError"])
async def test_failed_request_is_admitted_anew(library: Any, io: IO, failure: int | str) -> None:
    limiter = Limiter("1000 RPM burst 1000", concurrency=1)
    first: Any = refused(library, failure) if isinstance(failure, int) else None
    server = Server(first or getattr(library, str(failure))("lost"), answering(library, b"done"))
    client = retrying(library, limiter, server, io=io, retries=Retry(backoff=0.001))
    reply = await io.call(client.post, URL, json={"model": "m"})
    statistics = limiter.statistics()
    bodies = [request.content for request in server.requests]
    assert (reply.text, bodies) == ("done", [b'{"model":"m"}'] * 2)
    assert (statistics.admitted, statistics.in_flight) == (2, 0)
    assert statistics.upstream_429 == (failure == 429)
    # What never left costs nothing.
    assert statistics.limits[0].used == (1 if failure == "ConnectError" else 2)


@pytest.mark.parametrize(
    ("answer", "options", "attempts"),
    [
        ({"status": 500}, {}, 5),
        ({"status": 500}, {"retries": 0}, 1),
        ({"status": 500}, {"retries": Retry(attempts=2, backoff=0.001)}, 2),
        ({"status": 404}, {}, 1),
        ({"status": 429, "retry_after_ms": "0", "body": EMPTY_ACCOUNT}, {}, 1),
        ({"status": 429, "retry_after_ms": "500000"}, {}, 1),
    ],
)
async def test_last_reply_reaches_client_whole(
    library: Any, answer: dict[str, Any], options: dict[str, Any], attempts: int
) -> None:
    body: bytes = answer.get("body", b'{"error": {"message": "no"}}')
    packed: dict[str, Any] = answer | {"body": gzip.compress(body), "content_encoding": "gzip"}
    server = Server(refused(library, **packed))
    limiter = fast()
    async with retrying(library, limiter, server, **options) as client:
        reply = await client.post(URL, json={})
        assert (reply.status_code, reply.content) == (answer["status"], body)
        assert reply.elapsed.total_seconds() >= 0
    assert limiter.statistics().admitted == len(server.requests) == attempts
    assert limiter.statistics().in_flight == 0


async def test_only_a_body_that_can_be_sent_again_is_retried(library: Any) -> None:
    async def parts() -> Any:
        yield b"part"

    forms: list[tuple[dict[str, Any], int]] = [
        ({"content": parts()}, 1),
        ({"files": {"file": files.BytesIO(b"sound")}}, 2),
    ]
    for form, attempts in forms:
        server = Server(refused(library), answering(library, b"done"))
        async with retrying(library, fast(), server) as client:
            reply = await client.post(URL, **form)
        assert reply.status_code == (200 if attempts == 2 else 429)
        assert len(server.requests) == attempts
        bodies = [request.content for request in server.requests]
        assert len({body.partition(b"sound")[1] for body in bodies}) == 1


def above(name: str, limiter: Limiter, payer: Limiter, library: Any, server: Server) -> Any:
    client: Any = retrying(library, limiter, server)

    async def post(_: object = None) -> Any:
        (await client.post(URL, json={})).raise_for_status()

    async def paid_for(_: Attempt) -> Any:
        with await limiter.acquire() as lease, Attempt(limiter, lease, pays=True):
            return await post()

    if name == "transport":
        client = library.AsyncClient(transport=fast().transport(client._transport))
        return post
    attempt = paid_for if name == "paying retrier" else post
    return lambda: Retrier(Retry(), payer).call(attempt)


@pytest.mark.parametrize("name", ["retrier", "another's retrier", "paying retrier", "transport"])
async def test_layers_retry_once_and_count_a_429_once(library: Any, name: str) -> None:
    limiter = fast()
    payer = fast() if name == "another's retrier" else limiter
    server = Server(refused(library), answering(library, b"done"))
    await above(name, limiter, payer, library, server)()
    assert {each.statistics().upstream_429 for each in (limiter, payer)} == {1}
    server = Server(refused(library, 500))
    with pytest.raises(library.HTTPStatusError):
        await above(name, limiter, payer, library, server)()
    assert len(server.requests) == 5


async def test_task_that_outlives_a_retried_attempt_retries_by_itself(library: Any) -> None:
    limiter, go = fast(), asyncio.Event()
    client = retrying(library, limiter, Server(refused(library), answering(library, b"done")))

    async def later() -> Any:
        await go.wait()
        return await client.post(URL, json={})

    async def attempt(_: Attempt) -> asyncio.Task[Any]:
        return asyncio.create_task(later())

    task = await Retrier(Retry(), limiter).call(attempt)
    go.set()
    assert (await task).status_code == 200


async def test_retrying_sdk_is_logged_once(library: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(refused(library, 500))
    limiter = fast()
    async with retrying(library, limiter, server) as client:
        for attempt in range(3):
            await client.get(URL, headers={"x-stainless-retry-count": str(attempt)})
    assert len(server.requests) == limiter.statistics().admitted == 5 + 1 + 1
    (message,) = (each.message for each in caplog.records if each.name == "asyncbucket")
    assert message.startswith(
        "the SDK above the transport of limiter 'openai' retries failed calls, too"
    )
    assert message.endswith("pass max_retries=0 to the SDK")


async def test_sdk_may_retry_in_shadow(caplog: pytest.LogCaptureFixture) -> None:
    """There the transport retries nothing, so nobody is told to switch the SDK's retries off."""
    limiter = Limiter("500 RPM", shadow=True)
    inner = httpx.MockTransport(lambda _: httpx.Response(429))
    async with httpx.AsyncClient(transport=limiter.transport(inner)) as client:
        for retry in "0", "1":
            headers = {"x-stainless-retry-count": retry}
            await client.post("https://api.openai.com/v1/responses", json={}, headers=headers)
    assert limiter.statistics().upstream_429 == 2
    assert "max_retries" not in caplog.text
