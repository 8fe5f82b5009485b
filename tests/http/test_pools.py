"""One client over several providers: each attempt goes to the member that takes it, as its own."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from asyncbucket import AcquireTimeout, Limiter, Pool, deadline, sticky
from asyncbucket.http.endpoints import Endpoint
from asyncbucket.nesting import HeldLease
from asyncbucket.retry import Retry
from asyncbucket.testing import RateLimitedProvider, VirtualClock, VirtualTime
from asyncbucket.waiting import ASYNC, IO, SYNC
from tests.http.conftest import answering, chunked
from tests.http.test_openai_sdk import FAMILY

RPM = {"small": 60, "middle": 120, "large": 500}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
BODY = {"model": "m", "messages": HELLO, "max_tokens": 5}
EMPTY_ACCOUNT = b'{"error": {"code": "insufficient_quota"}}'
#: Members of a pool for tests where a script answers, and what must be seen of each there alone.
ENDPOINTS: dict[str, Endpoint] = {
    "openai": {
        "base_url": "https://openai.test/v1",
        "headers": {"Authorization": "Bearer canary-openai"},
    },
    "azure": {
        "base_url": "https://azure.test:8443/openai/deployments/gpt?api-version=2024-10-21",
        "headers": {"api-key": "canary-azure", "X-Tenant": "canary-tenant"},
    },
    "google": {"base_url": "http://google.test", "params": {"key": "canary-google"}},
}
CANARIES = {
    "openai.test": {"canary-openai"},
    "azure.test": {"canary-azure", "canary-tenant"},
    "google.test": {"canary-google"},
}


class Servers:
    """Answer as each host is told to, the last answer for ever, and note the requests."""

    def __init__(self, library: Any, **answers: list[Any]) -> None:
        self.requests: list[Any] = []
        self._fine = answering(library, b"{}")
        self._answers = answers
        self.transport = library.MockTransport(self._answer)

    def _answer(self, request: Any) -> Any:
        self.requests.append(request)
        answers = self._answers.get(request.url.host.removesuffix(".test"), [self._fine])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(request)

    @property
    def hosts(self) -> list[str]:
        return [request.url.host.removesuffix(".test") for request in self.requests]


def pool_of(*names: str, **options: Any) -> tuple[Pool, dict[Limiter, Endpoint]]:
    """Return a pool of members of these names, in this order, and their endpoints."""
    members = [Limiter("600 RPM", name=name) for name in names or ENDPOINTS]
    given: Any = {"prefer": "first", **options}
    pool = Pool(*members, **given)
    return pool, {member: ENDPOINTS[member.name] for member in members}


def client_of(
    library: Any, pool: Pool, endpoints: dict[Limiter, Endpoint], servers: Servers, io: IO = ASYNC
) -> Any:
    return pool.http_client(
        endpoints,
        family=library.__name__,
        sync=io is SYNC,
        transport=servers.transport,
        headers={"Authorization": "Bearer canary-client", "X-Goog-Api-Key": "canary-client"},
        cookies={"session": "canary-client"},
        params={"key": "canary-client"},
    )


def one_after_the_other(servers: Servers, *names: str) -> Callable[[Any], Limiter]:
    """Return what prefers the first of these members for the first request, and so on."""

    def prefer(members: list[Limiter]) -> Limiter:
        wanted = names[min(len(servers.requests), len(names) - 1)]
        return next((each for each in members if each.name == wanted), members[0])

    return prefer


def seen_in(request: Any) -> set[str]:
    """Return the canaries that a request carries."""
    text = f"{request.url} {request.headers.raw!r}"
    return {word for word in (*set().union(*CANARIES.values()), "canary-client") if word in text}


# --- where a request goes ---


@pytest.mark.parametrize("io", [ASYNC, SYNC], ids=["async", "sync"])
async def test_request_is_rewritten_for_its_member_and_no_credential_leaves_for_another(
    library: Any, io: IO, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "asyncbucket")
    servers = Servers(library)
    pool, endpoints = pool_of(prefer=one_after_the_other(servers, *ENDPOINTS))
    client = client_of(library, pool, endpoints, servers, io)

    replies = [
        await io.call(client.post, "/chat%20s", params={"a": "/"}, json=BODY) for _ in range(3)
    ]

    urls = [str(request.url) for request in servers.requests]
    assert urls == [
        "https://openai.test/v1/chat%20s?a=%2F",
        "https://azure.test:8443/openai/deployments/gpt/chat%20s?a=%2F&api-version=2024-10-21",
        "http://google.test/chat%20s?a=%2F&key=canary-google",
    ]
    hosts = [request.headers["host"] for request in servers.requests]
    assert hosts == ["openai.test", "azure.test:8443", "google.test"]
    for request in servers.requests:
        assert seen_in(request) == CANARIES[request.url.host]
        assert json.loads(request.content) == BODY
    # What the caller sees is what it asked for.
    assert {str(reply.url.host) for reply in replies} == {"openai.test"}
    shown = f"{client._transport!r} {pool!r} {caplog.text} {vars(client._transport)}"
    assert not any(word in shown for words in CANARIES.values() for word in words)


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("https://evil.test/v1/chat/completions", "evil"),
        ("https://openai.test/elsewhere", "openai"),
        ("https://azure.test:8443/openai/deployments/gpt/other", "azure"),
        ("/v1/other", "azure"),
    ],
)
async def test_redirect_carries_no_credentials_but_those_of_the_member_that_gets_it(
    library: Any, location: str, asked: str
) -> None:
    redirect = answering(library, status=307, location=location)
    servers = Servers(library, openai=[redirect, answering(library, b"{}")])
    pool, endpoints = pool_of(prefer=one_after_the_other(servers, "openai", "azure"))
    client = client_of(library, pool, endpoints, servers)

    reply = await client.post("/chat/completions", json=BODY)

    assert (reply.status_code, servers.hosts) == (200, ["openai", asked])
    expected = CANARIES["azure.test"] if asked == "azure" else set()
    assert seen_in(servers.requests[1]) == expected
    assert pool.statistics().admitted == (2 if asked == "azure" else 1)


async def test_model_has_the_name_that_a_member_gives_it(library: Any) -> None:
    pool, endpoints = pool_of("openai", "azure")
    _, azure = endpoints
    endpoints[azure] = {**endpoints[azure], "models": {"m": "mein-gerät"}}
    servers = Servers(library, openai=[library.ConnectError("refused")])
    client = client_of(library, pool, endpoints, servers)

    for model in ("m", "other"):
        await client.post("/chat/completions", json={**BODY, "model": model})

    sent = [json.loads(request.content) for request in servers.requests]
    assert sent == [BODY, {**BODY, "model": "mein-gerät"}, {**BODY, "model": "other"}]
    request = servers.requests[1]
    assert request.headers["content-length"] == str(len(request.content))


async def test_costs_are_the_largest_that_any_member_may_charge(library: Any) -> None:
    """OpenAI counts the prompt or the reply, whichever is longer; Azure counts both."""
    members = [Limiter("100k TPM", name=name) for name in ("a", "b")]
    hosts = ("https://api.openai.com/v1", "https://x.openai.azure.com/openai")
    urls: dict[Limiter, Endpoint] = {
        member: {"base_url": url} for member, url in zip(members, hosts, strict=True)
    }
    servers = Servers(library)
    pool = Pool(*members, prefer="first")
    client = client_of(library, pool, urls, servers)
    costs: list[int] = []
    pool.observe(lambda event: costs.append(getattr(event, "cost", {}).get("tokens", 0)))

    await client.post("/chat/completions", json={**BODY, "max_tokens": 300})

    assert max(costs) == 302


async def test_request_for_no_member_is_refused(library: Any) -> None:
    pool, endpoints = pool_of("openai", "azure")
    client = client_of(library, pool, endpoints, Servers(library))

    for url in ("https://api.openai.com/v1/x", "https://openai.test/v10", "https://azure.test/"):
        with pytest.raises(ValueError, match="for no member of pool 'pool': make the client with"):
            await client.post(url, json=BODY)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"base_ulr": "x"}, ValueError, "'openai' knows no 'base_ulr'"),
        (
            {"headers": "x"},
            TypeError,
            "headers of the endpoint of 'openai' must map names to texts",
        ),
        *(
            ({"headers": {"api-key": key}}, ValueError, "of 'openai' hold a line break, or what is")
            for key in ("canary\n", "canarý")
        ),
        ({"params": {"key": 5}}, TypeError, "params of the endpoint of 'openai' must map"),
        *(
            ({"base_url": url}, ValueError, "base_url of 'openai' must be like .*go into headers")
            for url in (
                "api.x?key=canary",
                5,
                "https://canary:x@h/",
                "https://h:canary",
                "https://",
            )
        ),
    ],
)
def test_endpoint_that_cannot_be_meant_is_refused_without_showing_it(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    pool, endpoints = pool_of("openai", "azure")
    first = pool.members[0]
    wrong: Any = {**endpoints, first: {**endpoints[first], **changed}}

    with pytest.raises(error, match=message) as caught:
        pool.transport(wrong)

    assert "canary" not in str(caught.value)


def test_endpoints_are_needed_for_each_member_of_a_pool_and_for_nobody_else() -> None:
    pool, endpoints = pool_of("openai", "azure")
    nowhere: Any = "x"

    with pytest.raises(
        ValueError, match="endpoints of pool 'pool' lack 'azure': give one for each"
    ):
        pool.transport({pool.members[0]: endpoints[pool.members[0]]})
    with pytest.raises(ValueError, match="name a limiter that is no member: give one for each"):
        pool.http_client({**endpoints, Limiter(): {"base_url": "https://x"}})
    with pytest.raises(TypeError, match="a pool must know where its members are"):
        pool.transport(nowhere)
    with pytest.raises(TypeError, match="endpoints are for a pool"):
        Limiter().http_client(endpoints=endpoints)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


# --- when a member fails ---


@pytest.mark.parametrize("io", [ASYNC, SYNC], ids=["async", "sync"])
@pytest.mark.parametrize(
    ("failure", "reason", "asked"),
    [
        (None, "ConnectError", "openai azure azure"),
        ((b"{}", 401), "HTTP 401", "openai azure azure"),
        ((b"{}", 503), "HTTP 503", "openai azure azure"),
        ((EMPTY_ACCOUNT, 429), "HTTP 429 (insufficient_quota)", "openai azure azure"),
        ((b"{}", 429), None, "openai azure azure"),  # it is paused
        *(((b"{}", status), None, "openai openai") for status in (400, 404, 422)),
    ],
)
async def test_call_that_failed_for_its_member_is_made_at_another_at_once(
    library: Any,
    io: IO,
    failure: tuple[bytes, int] | None,
    reason: str | None,
    asked: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error of the caller is returned as it is."""
    is_paused = failure == (b"{}", 429)
    failed = library.ConnectError("refused")
    if failure is not None:
        headers = {"retry_after": "30"} if is_paused else {}
        failed = answering(library, failure[0], status=failure[1], **headers)
    servers = Servers(library, openai=[failed])
    pool, endpoints = pool_of()
    client = client_of(library, pool, endpoints, servers, io)

    replies = [await io.call(client.post, "/chat/completions", json=BODY) for _ in range(2)]

    assert servers.hosts == asked.split()
    ends = 200 if "azure" in asked or failure is None else failure[1]
    assert [reply.status_code for reply in replies] == [ends, ends]
    assert [state.reason for state in pool.states()] == [reason, None, None]
    told = [f"pool 'pool' leaves out 'openai': {reason}"] if reason else []
    assert [text for text in caplog.messages if "leaves out" in text] == told
    paused = [member.statistics().paused > 29 for member in pool.members]
    assert paused == [is_paused, False, False]
    assert pool.statistics().in_flight == 0


@pytest.mark.parametrize(("retries", "asked"), [(4, 2), (0, 1)])
async def test_when_all_members_are_out_the_last_error_says_so(
    library: Any, retries: int, asked: int
) -> None:
    bad_key = answering(library, b'{"error": {"code": "invalid_api_key"}}', status=401)
    servers = Servers(library, openai=[bad_key], azure=[bad_key])
    pool, endpoints = pool_of("openai", "azure", name="chat")
    transport = pool.transport(endpoints, servers.transport, retries=retries)
    client = library.AsyncClient(transport=transport)

    reply = await client.post("https://openai.test/v1/chat/completions", json=BODY)

    assert (reply.status_code, len(servers.requests)) == (401, asked)
    note = reply.headers.get("x-asyncbucket-note", "")
    if retries:
        assert re.match(
            r"asyncbucket: tried 2 times in 0.\d s; gave up: HTTP 401 .* is not retr", note
        )
        states = r"pool 'chat': 'openai': left out for (1|0.9\d*) s more \(HTTP 401"
        assert re.search(states, note)


def test_lost_connections_of_all_members_are_retried_by_the_policy_and_noted(
    virtual_time: VirtualTime,
) -> None:
    def lost(_: httpx.Request) -> httpx.Response:
        times.append(virtual_time.clock() // 1_000_000_000)
        raise httpx.ConnectError("refused")

    times: list[int] = []
    members = [Limiter("600 RPM", name=name, clock=virtual_time.clock) for name in ("a", "b")]
    pool = Pool(*members)
    endpoints: dict[Limiter, Endpoint] = {
        member: {"base_url": f"http://{member.name}.test"} for member in members
    }
    transport = pool.transport(
        endpoints, httpx.MockTransport(lost), retries=Retry(attempts=4, backoff=2)
    )

    async def main() -> httpx.ConnectError:
        async with httpx.AsyncClient(transport=transport) as client:
            with pytest.raises(httpx.ConnectError) as caught:
                await client.post("http://a.test/x", json={})
        return caught.value

    error = virtual_time.run(main())

    assert len(times) == 4
    assert times[1] == times[0]  # at the other member at once
    assert times[2] - times[1] >= 1  # both are out: as the policy says
    assert error.__notes__[1].startswith(
        "asyncbucket: pool 'pool': 'a': left out for 2 s more (Conn"
    )


def test_calls_do_not_wait_for_members_that_fail_again_and_again(
    virtual_time: VirtualTime,
) -> None:
    clock = virtual_time.clock
    status = 401
    members = [Limiter("600 RPM", name=name, clock=clock, concurrency=2) for name in ("a", "b")]
    pool = Pool(*members)
    endpoints: dict[Limiter, Endpoint] = {
        member: {"base_url": f"http://{member.name}.test"} for member in members
    }

    async def main() -> None:
        nonlocal status
        inner = httpx.MockTransport(lambda _: httpx.Response(status))
        async with pool.http_client(endpoints, family="httpx", transport=inner) as client:
            calls = [client.post("/x", json={}) for _ in range(30)]
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(each) for each in found} == {httpx.Response, AcquireTimeout}
            assert clock() * 1e-9 - started == pytest.approx(7, abs=0.5)
            with pytest.raises(
                AcquireTimeout, match="no member of pool 'pool' works: 'a': left out"
            ):
                await client.post("/x", json={})
            status = 200
            await asyncio.sleep(8)
            assert (await client.post("/x", json={})).status_code == 200
        assert [pool.statistics().waiting, pool.statistics().in_flight] == [0, 0]

    started = clock() * 1e-9
    virtual_time.run(main())


async def test_pool_gives_up_slots_and_charges_once_when_layers_nest(library: Any) -> None:
    """A call that is paid at a member goes there, whichever address the client asked."""
    servers = Servers(library)
    pool, endpoints = pool_of("openai", "azure")
    client = client_of(library, pool, endpoints, servers)

    async with pool.members[1].acquire() as lease:
        with HeldLease(pool.members[1], lease):
            await client.post("/chat/completions", json=BODY)
    async with pool.acquire() as lease:
        with HeldLease(pool, lease):
            await client.post("/chat/completions", json=BODY)

    assert servers.hosts == ["azure", "openai"]
    assert [member.statistics().admitted for member in pool.members] == [1, 1]


async def test_sticky_calls_and_cancelled_streams_work_through_the_client(library: Any) -> None:
    body = chunked(library, b"one", b"two")

    def stream(_: Any) -> Any:
        return library.Response(200, stream=body)

    servers = Servers(library, azure=[stream])
    pool, endpoints = pool_of("azure", "openai", prefer="least_used")
    client = client_of(library, pool, endpoints, servers)

    for _ in range(3):
        with sticky("c17"):
            request = client.build_request("POST", "/chat/completions", json=BODY)
            reply = await client.send(request, stream=True)
            with contextlib.suppress(asyncio.CancelledError):
                async for _ in reply.aiter_bytes():
                    raise asyncio.CancelledError
            await reply.aclose()

    urls = {str(request.url) for request in servers.requests}
    assert urls == {
        "https://azure.test:8443/openai/deployments/gpt/chat/completions?api-version=2024-10-21"
    }
    assert body.closed
    assert (pool.statistics().in_flight, pool.statistics().admitted) == (0, 3)


async def test_call_that_waits_for_all_members_is_cancelled_and_refused_as_at_a_limiter(
    library: Any,
) -> None:
    servers = Servers(library)
    pool, endpoints = pool_of("openai", "azure")
    client = client_of(library, pool, endpoints, servers)
    pool.pause(60)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await client.post("/chat/completions", json=BODY)
    with deadline(1), pytest.raises(AcquireTimeout):
        await client.post("/chat/completions", json=BODY)

    assert (servers.requests, pool.statistics().waiting) == ([], 0)


# --- three providers ---


def test_three_providers_give_the_sum_of_their_limits_and_refuse_nothing(
    virtual_time: VirtualTime,
) -> None:
    clock = virtual_time.clock
    providers = {
        name: RateLimitedProvider(rpm=rpm, latency=0.5, clock=clock) for name, rpm in RPM.items()
    }
    transports = {f"{name}.test": each.mock_transport() for name, each in providers.items()}
    members = [Limiter(f"{rpm} RPM", name=name, clock=clock) for name, rpm in RPM.items()]
    pool = Pool(*members)
    endpoints: dict[Limiter, Endpoint] = {
        member: {"base_url": f"http://{member.name}.test/v1", "headers": {"api-key": "k"}}
        for member in members
    }

    async def by_host(request: httpx.Request) -> httpx.Response:
        reply: httpx.Response = await transports[request.url.host].handle_async_request(request)
        return reply

    async def main() -> list[int]:
        inner = httpx.MockTransport(by_host)
        async with pool.http_client(endpoints, family="httpx", transport=inner) as client:
            calls = (client.post("/chat/completions", json=BODY) for _ in range(500))
            return [reply.status_code for reply in await asyncio.gather(*calls)]

    started = clock()
    assert virtual_time.run(main()) == [200] * 500
    elapsed = (clock() - started) * 1e-9

    assert [each.statistics().refused for each in providers.values()] == [0, 0, 0]
    least = (500 - sum(RPM.values()) / 10) * 60 / sum(RPM.values())  # each begins with a burst
    assert elapsed == pytest.approx(least, rel=0.03)


@pytest.mark.real_clock
@pytest.mark.parametrize("trouble", ["killed and back", "bad key"])
async def test_no_call_is_lost_while_one_of_three_providers_is(
    trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Real HTTP: a connection that is cut, a port where nobody listens, and a provider that is back."""
    minute, calls = 2, 90
    with contextlib.ExitStack() as stack:
        providers = [
            stack.enter_context(RateLimitedProvider(rpm=rpm, minute=minute, latency=0.05))
            for rpm in (20, 40, 60)
        ]
        members = [
            Limiter(f"{each.rpm} requests/{minute}s", name=f"of {each.rpm}", concurrency=20)
            for each in providers
        ]
        pool = Pool(*members)
        endpoints: dict[Limiter, Endpoint] = {
            member: {"base_url": each.base_url, "headers": {"api-key": "k"}}
            for member, each in zip(members, providers, strict=True)
        }
        broken = providers[2]
        broken.port = int(broken.url.rpartition(":")[2])

        async def disturb() -> None:
            await asyncio.sleep(0.4)
            if trouble == "bad key":
                broken.always = 401
                return
            await asyncio.to_thread(broken.stop)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(broken.start)

        async with pool.http_client(endpoints, family="httpx") as client:

            async def ask(number: int) -> Any:
                question = [{"role": "user", "content": f"What is 6 times {number}?"}]
                reply = await client.post("/chat/completions", json={**BODY, "messages": question})
                return reply.raise_for_status().json()["usage"]["total_tokens"]

            answers, _ = await asyncio.gather(asyncio.gather(*map(ask, range(calls))), disturb())

        assert len(answers) == calls
        seen = [each.statistics() for each in providers]
        assert [each.refused for each in seen] == [0, 0, 0]
        told = [text for text in caplog.messages if "leaves out" in text]
        if trouble == "bad key":
            assert sum(each.admitted - each.errors for each in seen) == calls
            assert told == ["pool 'pool' leaves out 'of 60': HTTP 401 (invalid_api_key)"]
        else:
            assert members[2].statistics().in_flight == 0
            assert told[0].startswith("pool 'pool' leaves out 'of 60': Connect")


async def test_openai_sdk_uses_all_members_and_gets_its_own_errors() -> None:
    family = FAMILY
    with RateLimitedProvider() as one, RateLimitedProvider(always=401) as other:
        members = [Limiter("600 RPM", name=name) for name in ("other", "one")]
        pool = Pool(*members, prefer="first")
        endpoints: dict[Limiter, Endpoint] = {
            members[0]: {"base_url": other.base_url, "headers": {"Authorization": "Bearer bad"}},
            members[1]: {"base_url": one.base_url, "headers": {"Authorization": "Bearer good"}},
        }
        async with openai.AsyncOpenAI(
            base_url=other.base_url,
            api_key="none",
            http_client=pool.http_client(endpoints, family=family),
            max_retries=0,
        ) as client:
            reply = await client.chat.completions.create(model="m", messages=HELLO)
            stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
            text = "".join([part.choices[0].delta.content or "" async for part in stream])
            one.always = 401
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.chat.completions.create(model="m", messages=HELLO)

    assert reply.choices[0].message.content == text
    assert "'one': left out" in caught.value.response.headers["x-asyncbucket-note"]
    assert one.statistics().requests == 3
    assert other.statistics().requests == 1


async def test_probe_that_is_answered_lets_others_follow_before_its_stream_ends(
    library: Any,
) -> None:
    members = [Limiter("600 RPM", name="openai", clock=(clock := VirtualClock()))]
    pool = Pool(*members)
    servers = Servers(library, openai=[library.ConnectError("refused"), answering(library, b"x")])
    transport = pool.transport({members[0]: ENDPOINTS["openai"]}, servers.transport, retries=0)
    client = library.AsyncClient(transport=transport, base_url="https://openai.test/v1")
    with pytest.raises(library.ConnectError):
        await client.post("/chat/completions", json=BODY)
    clock.advance(1)

    async with client.stream("POST", "/chat/completions", json=BODY):
        assert pool.states()[0].reason is None
        assert (await client.post("/chat/completions", json=BODY)).status_code == 200
