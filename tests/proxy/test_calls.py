"""Calls through the proxy: what passes as it is, what is kept, and what is refused.

Real servers on loopback, on the machine's clock: virtual time does not reach them.
"""

import asyncio
import gzip
import json
from collections.abc import AsyncGenerator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from asyncbucket import Price
from asyncbucket.testing import RateLimitedProvider
from tests.proxy.servers import Proxied, proxied, served, until

pytestmark = pytest.mark.real_clock

KEY = "sk-canary-1234567890"
CHAT: dict[str, Any] = {"model": "gpt", "messages": [{"role": "user", "content": "salve"}]}
TOOL = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}


class Upstream:
    """A provider that shows what it got, and does what its path says."""

    def __init__(self) -> None:
        self.calls = 0
        self.is_cut_off = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        path, body, more = scope["path"], bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.is_cut_off.set()
                return
            body += message["body"]
            more = message["more_body"]
        headers = [(b"set-cookie", b"a=1"), (b"Set-Cookie", b"b=2"), (b"keep-alive", b"timeout=5")]
        if path == "/hangs":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.is_cut_off.set()
        elif path == "/breaks":
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
        elif path == "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            watch = asyncio.ensure_future(receive())
            while not watch.done():
                await send({"type": "http.response.body", "body": b"x" * 999, "more_body": True})
                await asyncio.sleep(0.001)
            self.is_cut_off.set()
        else:
            headers.append((b"content-encoding", b"gzip"))
            shown = {
                "method": scope["method"],
                "target": (scope["raw_path"] + b"?" + scope["query_string"]).decode(),
                "headers": [(name.decode(), value.decode()) for name, value in scope["headers"]],
                "body": len(body),
            }
            await send({"type": "http.response.start", "status": 201, "headers": headers})
            content = gzip.compress(json.dumps(shown).encode())
            await send({"type": "http.response.body", "body": content})


@pytest.fixture
async def upstream() -> AsyncGenerator[tuple[Upstream, str]]:
    app = Upstream()
    async with served(app) as url:
        yield app, url


@pytest.mark.parametrize(
    ("method", "content", "length"),
    [
        ("POST", b'{"model": "x"}', "14"),
        ("PUT", b"\0" * 5_000_000, "5000000"),  # more than is held, so it passes as a stream
        ("GET", None, None),
        ("DELETE", None, None),
    ],
)
async def test_call_reaches_the_provider_as_it_was_sent(
    upstream: Any, method: str, content: bytes | None, length: str | None
) -> None:
    async with proxied(f"{upstream[1]}/base") as proxy:
        target = "/v1/files/a%2Fb%7e'|c?q=%20&key=a%2Bb"
        headers: dict[str, Any] = {
            "x-custom": b"\xc3\x9cnique",
            "connection": "x-hop, keep-alive",
            "x-hop": "1",
            "te": "trailers",
            "upgrade": "h2c",
            "asyncbucket-priority": "batch",
        }
        exact = {"target": target.encode()}
        request = httpx.Request(
            method, proxy.url, content=content, headers=headers, extensions=exact
        )
        got = await proxy.client.send(request, stream=True)
        raw = b"".join([chunk async for chunk in got.aiter_raw()])

    seen = json.loads(gzip.decompress(raw))
    assert got.status_code == 201
    assert (seen["method"], seen["target"]) == (method, f"/base{target}")
    assert seen["body"] == len(content or b"")
    names = [name for name, _ in seen["headers"]]
    assert dict(seen["headers"]).get("content-length") == length
    assert dict(seen["headers"])["host"] == httpx.URL(upstream[1]).netloc.decode()
    assert dict(seen["headers"])["x-custom"] == "Ünique"
    assert {"x-hop", "te", "upgrade", "connection", "asyncbucket-priority"}.isdisjoint(names)
    assert len(names) == len(set(names))
    assert got.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert got.headers["content-encoding"] == "gzip"
    assert "keep-alive" not in got.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_sdk_needs_only_another_base_url(stream: bool) -> None:  # noqa: FBT001
    with RateLimitedProvider(rpm=600) as provider:
        async with (
            proxied(provider.url, rpm=600, tpm=100_000, concurrency=8) as proxy,
            openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY) as client,
        ):
            tools: Any = [{"type": "function", "function": TOOL}]
            if stream:
                events = await client.chat.completions.create(**CHAT, stream=True)
                text = "".join([event.choices[0].delta.content or "" async for event in events])
            else:
                whole = await client.chat.completions.create(**CHAT)
                text = whole.choices[0].message.content or ""
                vectors = await client.embeddings.create(model="e", input=["a", "b"])
                assert len(vectors.data) == 2
                called = await client.chat.completions.create(**CHAT, tools=tools)
                assert called.choices[0].message.tool_calls
            assert text == "You said: salve"
            await proxy.until(in_flight=0, admitted=1 if stream else 3)


async def test_anthropic_sdk_needs_only_another_base_url() -> None:
    asked: Any = {**CHAT, "max_tokens": 64}
    tool: Any = {"name": "add", "description": "Add.", "input_schema": TOOL["parameters"]}
    with RateLimitedProvider(rpm=600) as provider:
        async with (
            proxied(provider.url, "100k ITPM", rpm=600, profile="anthropic") as proxy,
            anthropic.AsyncAnthropic(base_url=proxy.url, api_key=KEY) as client,
        ):
            whole = await client.messages.create(**asked)
            called = await client.messages.create(**asked, tools=[tool])
            async with client.messages.stream(**asked) as events:
                text = "".join([part async for part in events.text_stream])

            assert whole.content[0].type == "text"
            assert called.stop_reason == "tool_use"
            assert text == whole.content[0].text
            await proxy.until(in_flight=0, admitted=3)


@pytest.mark.parametrize(
    ("path", "state"),
    [("/hangs", {"in_flight": 1}), ("/endless", {"in_flight": 1}), ("/waits", {"waiting": 1})],
)
async def test_caller_that_hangs_up_frees_its_place(
    upstream: Any, path: str, state: dict[str, int]
) -> None:
    app, url = upstream
    async with proxied(url, concurrency=1) as proxy:
        held = proxy.limiter.acquire_nowait() if path == "/waits" else None
        call = asyncio.ensure_future(proxy.client.post(path, json=CHAT))
        await proxy.until(**state)
        await until(lambda: held or app.calls)
        call.cancel()
        await proxy.until(in_flight=0 if held is None else 1, waiting=0)

        if held is None:
            await asyncio.wait_for(app.is_cut_off.wait(), 5)
        else:
            assert app.calls == 0


async def refused(proxy: Proxied, path: str, **headers: str) -> httpx.Response:
    """Return what a caller is told whose call is refused."""
    more = {"authorization": f"Bearer {KEY}", **headers}
    return await proxy.client.post(path, json=CHAT, headers=more)


async def test_sdks_raise_their_own_errors_at_once(upstream: Any) -> None:
    async with proxied(upstream[1], rpm=1) as proxy:
        proxy.limiter.acquire_nowait().release()
        own = {"asyncbucket-timeout": "1"}
        async with (
            openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY) as first,
            anthropic.AsyncAnthropic(base_url=proxy.url, api_key=KEY) as second,
        ):
            with pytest.raises(openai.RateLimitError, match="requests") as ours:
                await first.chat.completions.create(**CHAT, extra_headers=own)
            with pytest.raises(anthropic.RateLimitError, match="requests") as theirs:
                await second.messages.create(**CHAT, max_tokens=9, extra_headers=own)
    for each in ours, theirs:
        assert 50 < int(each.value.response.headers["retry-after"]) <= 61
    assert proxy.limiter.statistics().refused == 2


@pytest.mark.parametrize(
    ("path", "headers", "status", "message"),
    [
        ("/x", {"asyncbucket-tennant": "a"}, 400, "asyncbucket-tennant is not a header of"),
        ("/x", {"asyncbucket-timeout": "soon"}, 400, "-timeout: 'soon' is not a number of sec"),
        ("/x", {"asyncbucket-timeout": "nan"}, 400, "asyncbucket-timeout: "),
        ("/x", {"asyncbucket-priority": "1000"}, 400, "-priority: priority must be 'interac"),
        ("/x", {"asyncbucket-agent": "a/"}, 400, "-agent: 'a/' is neither NAME nor KIND/NAME"),
        (
            "/x",
            {"asyncbucket-tenant": ""},
            400,
            "asyncbucket-tenant: a tenant must be a non-empty string",
        ),
        ("/x", {"upgrade": "websocket", "connection": "upgrade"}, 400, "WebSockets cannot pass"),
        ("/x", {"host": "evil.example"}, 403, "only programs on its own machine"),
        ("/x", {"origin": "https://evil.example"}, 403, "only programs on its own machine"),
        ("/x", {"origin": "null"}, 403, "only programs on its own machine"),
        ("/x", {"origin": "http://["}, 403, "only programs on its own machine"),
    ],
)
async def test_what_cannot_be_understood_never_reaches_the_provider(
    upstream: Any, path: str, headers: dict[str, str], status: int, message: str
) -> None:
    app, url = upstream
    async with proxied(url, rpm=60) as proxy:
        told = await refused(proxy, path, **headers)

    assert (told.status_code, app.calls) == (status, 0)
    assert message in told.json()["error"]["message"]
    assert KEY not in told.text


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"GET /" + b"x" * 65_536 + b" HTTP/1.1\r\nhost: localhost\r\n", b"HTTP/1.1 400"),
        # As to a proxy of HTTP, which this is not.
        (b"GET http://evil.example/ HTTP/1.1\r\nhost: localhost\r\n", b"not as an HTTP proxy"),
        (b"CONNECT evil.example:443 HTTP/1.1\r\nhost: localhost\r\n", b"not as an HTTP proxy"),
        (b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n", b"not as an HTTP proxy"),
        (b"POST /x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n", b""),  # and it leaves
    ],
)
async def test_request_that_no_client_sends_takes_nothing(
    upstream: Any, sent: bytes, told: bytes
) -> None:
    async with proxied(f"{upstream[1]}/base", concurrency=1) as proxy:
        reader, writer = await proxy.connect()
        writer.write(sent + b"connection: close\r\n\r\n")
        if not told:
            writer.write_eof()
        got = await reader.read()
        writer.close()
        await proxy.until(admitted=0, in_flight=0)
    assert told in got


async def test_caller_that_stalls_gives_its_slot_back(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has none before the part of its body has come that may be held."""
    monkeypatch.setattr("asyncbucket.proxy.app._STALLED", 0.3)
    async with proxied(upstream[1], concurrency=1) as proxy:
        reader, writer = await proxy.connect()
        writer.write(b"POST /x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000000\r\n\r\n")
        await asyncio.sleep(0.1)
        assert proxy.limiter.statistics().in_flight == 0
        writer.write(bytes(5_000_000))
        await proxy.until(in_flight=1)
        assert b"408 Request Timeout" in await reader.readline()
        writer.close()
        await proxy.until(in_flight=0)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_provider_out_of_reach_is_502_in_its_own_format(path: str) -> None:
    async with proxied("http://127.0.0.1:1", rpm=60) as proxy:
        proxy.serving._proxy._transport = proxy.limiter.transport(retries=0)
        told = await refused(proxy, path)

    assert told.status_code == 502
    assert "the provider cannot be reached (ConnectError)" in told.json()["error"]["message"]
    assert proxy.limiter.statistics().in_flight == 0


async def test_caller_that_still_waits_when_the_proxy_stops_is_told(upstream: Any) -> None:
    async with proxied(upstream[1], rpm=1) as proxy:
        proxy.limiter.acquire_nowait().release()
        call = asyncio.ensure_future(proxy.client.post("/x", json=CHAT))
        await proxy.until(waiting=1)
        for task in asyncio.all_tasks():
            if "run_asgi" in repr(task.get_coro()):  # the server cancels it after a while
                task.cancel()
        told = await call
        await proxy.until(waiting=0)
    assert told.status_code == 503
    assert told.json()["error"]["message"] == "the proxy stops: try again"


async def test_reply_that_breaks_off_breaks_off_at_the_caller(upstream: Any) -> None:
    async with proxied(upstream[1], concurrency=1) as proxy:
        with pytest.raises(httpx.RemoteProtocolError):
            await proxy.client.get("/breaks")
        await proxy.until(in_flight=0)


async def test_callers_share_by_key_and_the_key_stays_with_the_proxy(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REAL_KEY", "sk-real")
    given = {"tenants_by_key": True, "key_env": "REAL_KEY"}
    async with proxied(upstream[1], rpm=600, **given) as proxy:
        seen: list[dict[str, str]] = []
        for headers in ({"authorization": "Bearer alice"}, {"x-api-key": "bob"}, {}):
            reply = await proxy.client.post("/v1/messages", json=CHAT, headers=headers)
            seen.append({name: value for name, value in reply.json()["headers"] if "sk-" in value})
        refusal = await refused(proxy, "/v1/messages", **{"asyncbucket-tenant": "alice"})
        shown = (await proxy.client.get(f"{proxy.status_url}/stats")).text

    assert seen[0] == {"authorization": "Bearer sk-real"}
    assert seen[1] == seen[2] == {"x-api-key": "sk-real"}
    assert len(proxy.limiter._all_tenants()._recent) == 3
    assert refusal.status_code == 400
    assert not any(secret in shown for secret in ("alice", "bob", "sk-real"))


async def test_agents_at_the_limit_all_succeed() -> None:
    """Fifty agents, fifty requests in the provider's (short) minute."""
    with RateLimitedProvider(rpm=50, minute=1, latency=0.01) as provider:
        async with proxied(provider.url, "50 requests/1s burst 50") as proxy:

            async def agent(number: int) -> list[int]:
                own = {"authorization": "Bearer k", "asyncbucket-agent": f"test/a{number}"}
                replies = [
                    await proxy.client.post("/v1/chat/completions", json=CHAT, headers=own)
                    for _ in range(2)
                ]
                return [reply.status_code for reply in replies]

            statuses = await asyncio.gather(*map(agent, range(50)))
            assert provider.statistics().refused == 0
            agents = proxy.limiter.statistics().agents
    assert {status for each in statuses for status in each} == {200}
    assert agents is not None
    assert agents.kinds["test"].running == 50


async def test_thousand_callers_wait_and_those_who_stay_are_served(upstream: Any) -> None:
    app, url = upstream
    async with proxied(url, concurrency=16) as proxy:
        held = [proxy.limiter.acquire_nowait() for _ in range(16)]

        async def call() -> bytes:
            reader, writer = await proxy.connect()
            writer.write(b"GET /x HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            try:
                return await reader.read()
            finally:
                writer.close()

        calls = [asyncio.ensure_future(call()) for _ in range(1_000)]
        await proxy.until(waiting=1_000)
        for each in calls[100:]:
            each.cancel()
        await proxy.until(waiting=100)
        for lease in held:
            lease.release()
        replies = await asyncio.gather(*calls[:100])
    assert {reply[:12] for reply in replies} == {b"HTTP/1.1 201"}
    assert app.calls == 100


async def test_calls_are_charged_in_dollars() -> None:
    prices = {"gpt-4o-mini": Price(input=1, output=1)}
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}
    async with (
        RateLimitedProvider(charge="usage") as provider,
        proxied(provider.url, "1 USD/day", prices=prices) as proxy,
    ):
        path, headers = "/v1/chat/completions", {"authorization": "Bearer any"}
        reply = await proxy.client.post(path, json=body, headers=headers)
        await proxy.until(in_flight=0)
        assert reply.status_code == 200
        assert proxy.limiter.statistics().limits[0].used == provider.statistics().tokens
        reply = await proxy.client.post(path, json={**body, "model": "m"}, headers=headers)
        assert (reply.status_code, reply.headers["x-should-retry"]) == (429, "false")
        assert "no price is known for the model 'm'" in reply.text
