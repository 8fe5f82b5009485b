"""A request that fails temporarily is sent again by one layer, and a refusal of ours is not."""

import asyncio
import contextlib
import functools
import gzip
import io as files
import itertools
from collections.abc import Callable
from typing import Any, get_args

import httpx
import openai
import pytest
from llama_index.llms.openai import OpenAI
from openai import AsyncOpenAI

from asyncbucket import AcquireTimeout, AsyncBucketError, CostExceedsLimit, Limiter, deadline
from asyncbucket.errors import refusal_in
from asyncbucket.nesting import HeldLease
from asyncbucket.retry import Retrier, Retry
from asyncbucket.testing import RateLimitedProvider, VirtualTime
from asyncbucket.testing.enforcer import PolicyName
from asyncbucket.waiting import ASYNC, IO, SYNC
from tests.http.conftest import answering, chunked, client_over
from tests.http.test_openai_sdk import FAMILY

URL = "https://api.openai.com/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
EMPTY_ACCOUNT = b'{"error": {"code": "insufficient_quota"}}'


retrying = functools.partial(client_over, retries=None)


class Server:
    """Answer one request after the other, the last answer for ever, and note the requests."""

    def __init__(self, *answers: Any) -> None:
        self.bodies: list[bytes] = []
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))

    def __call__(self, request: Any) -> Any:
        self.bodies.append(request.content)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer(request)


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
    clock, family = virtual_time.clock, FAMILY
    provider = RateLimitedProvider(
        rpm=rpm, tpm=200_000, policy=policy, latency=(0.2, 1.5), clock=clock
    )
    limiter = Limiter("500 RPM", "200k TPM", "10k RPD", concurrency=20, name="openai", clock=clock)
    http_client = limiter.http_client(
        family=FAMILY, transport=provider.mock_transport(family=family)
    )
    client = AsyncOpenAI(
        base_url="https://api.openai.com/v1", api_key="k", http_client=http_client, max_retries=0
    )

    calls = (
        client.chat.completions.create(model="m", messages=HELLO, max_tokens=50) for _ in range(200)
    )
    async with client:
        await asyncio.gather(*calls)
    assert provider.statistics().admitted == 200
    assert provider.statistics().refused == limiter.statistics().upstream_429


@pytest.mark.parametrize("io", [ASYNC, SYNC], ids=["async", "sync"])
@pytest.mark.parametrize("failure", [429, 503, 500, "ReadTimeout", "ConnectError"])
async def test_failed_request_is_sent_again_and_each_attempt_is_admitted(
    library: Any, io: IO, failure: int | str
) -> None:
    limiter = Limiter("1000 RPM burst 1000", concurrency=1)
    first: Any = refused(library, failure) if isinstance(failure, int) else None
    server = Server(first or getattr(library, str(failure))("lost"), answering(library, b"done"))
    client = retrying(library, limiter, server, io=io, retries=Retry(backoff=0.001))
    reply = await io.call(client.post, URL, json={"model": "m"})
    statistics = limiter.statistics()
    assert (reply.text, server.bodies) == ("done", [b'{"model":"m"}'] * 2)
    assert (statistics.admitted, statistics.in_flight) == (2, 0)
    assert statistics.upstream_429 == (failure == 429)
    # What never left costs nothing.
    assert statistics.limits[0].used == (1 if failure == "ConnectError" else 2)


@pytest.mark.parametrize(
    ("answer", "options", "attempts"),
    [
        ({"status": 500}, {}, 5),
        ({"status": 500}, {"retries": 0}, 1),
        ({"status": 500}, {"retries": 2}, 3),
        ({"status": 500}, {"retries": Retry(attempts=2, backoff=0.001)}, 2),
        ({"status": 404}, {}, 1),
        ({"status": 429, "retry_after_ms": "0", "body": EMPTY_ACCOUNT}, {}, 1),
        ({"status": 429, "retry_after_ms": "500000"}, {}, 1),
        ({"status": 503, "x_should_retry": "false"}, {}, 1),
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
    assert limiter.statistics().admitted == len(server.bodies) == attempts
    assert limiter.statistics().in_flight == 0


async def test_only_a_body_that_can_be_sent_again_is_retried(library: Any) -> None:
    async def parts() -> Any:
        yield b"part"

    forms: list[tuple[dict[str, Any], int]] = [
        ({"content": parts()}, 1),
        ({"files": {"file": files.BytesIO(b"sound")}}, 2),
        ({"content": b"whole"}, 2),
    ]
    for form, attempts in forms:
        server = Server(refused(library), answering(library, b"done"))
        async with retrying(library, fast(), server) as client:
            reply = await client.post(URL, **form)
        assert reply.status_code == (200 if attempts == 2 else 429)
        assert len(server.bodies) == attempts
        assert len({body.partition(b"sound")[1] for body in server.bodies}) == 1


async def test_connection_lost_within_a_refusal_is_retried(library: Any) -> None:
    body = chunked(library, b"{", error=library.ReadError("gone"))

    def cut(_: Any) -> Any:
        return library.Response(429, headers={"retry-after-ms": "1"}, stream=body)

    server = Server(cut, answering(library, b"done"))
    limiter = Limiter("1000 RPM", concurrency=1)
    retry = Retry(backoff=0.001)
    async with retrying(library, limiter, server, retries=retry) as client:
        assert (await client.post(URL, json={})).text == "done"
    assert body.closed
    assert limiter.statistics().in_flight == 0


async def test_call_is_not_retried_beyond_its_deadline(library: Any) -> None:
    server = Server(refused(library, retry_after_ms="7000"))
    async with retrying(library, fast(), server) as client:
        with deadline(5):
            assert (await client.post(URL, json={})).status_code == 429
    assert len(server.bodies) == 1


def above(name: str, limiter: Limiter, library: Any, server: Server) -> Callable[[], Any]:
    client: Any = retrying(library, limiter, server)

    async def post() -> Any:
        (await client.post(URL, json={})).raise_for_status()

    async def paid_for() -> Any:
        with await limiter.acquire() as lease, HeldLease(limiter, lease):
            return await post()

    if name == "transport":
        outer = fast().transport(client._transport)
        client = library.AsyncClient(transport=outer)
        return post
    attempt = paid_for if name == "paying retrier" else post
    return lambda: Retrier(Retry(), limiter).call(attempt)


@pytest.mark.parametrize("name", ["retrier", "paying retrier", "transport"])
async def test_layers_retry_once_and_count_a_429_once(library: Any, name: str) -> None:
    limiter = fast()
    server = Server(refused(library), answering(library, b"done"))
    await above(name, limiter, library, server)()
    assert limiter.statistics().upstream_429 == 1
    server = Server(refused(library, 500))
    with pytest.raises(library.HTTPStatusError):
        await above(name, limiter, library, server)()
    assert len(server.bodies) == 5


async def test_task_that_outlives_a_retried_attempt_retries_by_itself(library: Any) -> None:
    limiter = fast()
    server = Server(refused(library), answering(library, b"done"))
    client, go = retrying(library, limiter, server), asyncio.Event()

    async def later() -> Any:
        await go.wait()
        return await client.post(URL, json={})

    async def attempt() -> asyncio.Task[Any]:
        return asyncio.create_task(later())

    task = await Retrier(Retry(), limiter).call(attempt)
    go.set()
    assert (await task).status_code == 200


@pytest.mark.parametrize("wrapped_by", ["the same limiter", "another"])
async def test_wrapped_model_above_paced_transport_is_one_layer(wrapped_by: str) -> None:
    limiter = fast()
    payer = limiter if wrapped_by == "the same limiter" else fast()
    provider = RateLimitedProvider()
    transport = limiter.transport(provider.mock_transport())
    async with httpx.AsyncClient(transport=transport) as client:
        llm = payer.wrap(OpenAI(api_key="k", async_http_client=client))
        provider.fail_next(status=429, retry_after=0.001)
        await llm.acomplete("Hello")
        assert {each.statistics().upstream_429 for each in (limiter, payer)} == {1}
        before = provider.statistics().requests
        provider.fail_next(9, status=500, retry_after=0.001)
        with pytest.raises(openai.InternalServerError):
            await llm.acomplete("Hello")
    assert provider.statistics().requests - before == 5


async def test_sdk_that_retries_too_makes_single_attempts_and_is_logged_once(
    library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(refused(library, 500))
    limiter = fast()
    async with retrying(library, limiter, server) as client:
        for attempt in range(3):
            await client.get(URL, headers={"x-stainless-retry-count": str(attempt)})
    assert len(server.bodies) == limiter.statistics().admitted == 5 + 1 + 1
    (record,) = (each for each in caplog.records if each.name == "asyncbucket")
    assert record.message == (
        "the SDK above the transport of limiter 'openai' retries failed calls, too: each of its "
        "retries is one more attempt, after the SDK's own back-off; pass max_retries=0 to the SDK"
    )


async def ask_openai(provider: RateLimitedProvider, limiter: Limiter) -> None:
    http_client = limiter.http_client(family=FAMILY)
    client = AsyncOpenAI(
        base_url=provider.base_url, api_key="k", http_client=http_client, max_retries=0
    )
    await client.chat.completions.create(model="m", messages=HELLO, max_tokens=50)


async def ask_anthropic(provider: RateLimitedProvider, limiter: Limiter) -> None:
    anthropic = pytest.importorskip("anthropic")
    family = anthropic.APIStatusError.__init__.__annotations__["response"].split(".")[0]
    http_client = limiter.http_client(family=family)
    client = anthropic.AsyncAnthropic(
        base_url=provider.url, api_key="k", http_client=http_client, max_retries=0
    )
    await client.messages.create(model="m", messages=HELLO, max_tokens=50)


@pytest.mark.parametrize("ask", [ask_openai, ask_anthropic])
@pytest.mark.parametrize(
    ("limits", "kind"),
    [({"tpm": 10}, CostExceedsLimit), ({"concurrency": 1, "timeout": 0}, AcquireTimeout)],
)
async def test_limiters_refusal_is_found_in_sdk_error_and_not_retried(
    ask: Any, limits: dict[str, Any], kind: type[AsyncBucketError]
) -> None:
    limiter = Limiter(**limits)
    held = limiter.acquire_sync() if kind is AcquireTimeout else contextlib.nullcontext()
    with held, RateLimitedProvider() as provider:
        with pytest.raises(Exception, match=r"^Connection error|^cost of|^not admitted") as caught:
            await ask(provider, limiter)
        assert provider.statistics().requests == 0
    refusal = refusal_in(caught.value)
    assert type(refusal) is kind
    assert limiter.statistics().refused == 1
