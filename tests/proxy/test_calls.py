"""Calls through the proxy: what passes as it is, what is kept, and what is refused.

Real servers on loopback, on the machine's clock: virtual time does not reach them.
"""

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from asyncbucket.cli.proxy import ProxyOptions
from asyncbucket.testing import RateLimitedProvider
from tests.conftest import until
from tests.proxy.conftest import CHAT, Proxied, Upstream, proxied

pytestmark = pytest.mark.real_clock

KEY = "sk-canary-1234567890"
TOOL = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("method", "content", "length"),
    [
        ("POST", b'{"model": "x"}', "14"),
        ("PUT", b"\0" * 5_000_000, "5000000"),  # more than is held, so it passes as a stream
        ("GET", None, None),
    ],
)
async def test_call_reaches_the_provider_as_it_was_sent(
    upstream: Upstream, method: str, content: bytes | None, length: str | None
) -> None:
    async with proxied(f"{upstream.url}/base") as proxy:
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
        sent: Any = {"content": content, "headers": headers, "extensions": exact}
        request = httpx.Request(method, proxy.url, **sent)
        got = await proxy.client.send(request, stream=True)
        raw = b"".join([chunk async for chunk in got.aiter_raw()])
        await until(lambda: not proxy.proxy._held)

    seen = json.loads(gzip.decompress(raw))
    assert got.status_code == 201
    assert (seen["method"], seen["target"]) == (method, f"/base{target}")
    assert seen["body"] == len(content or b"")
    names = [name for name, _ in seen["headers"]]
    assert dict(seen["headers"]).get("content-length") == length
    assert dict(seen["headers"])["host"] == httpx.URL(upstream.url).netloc.decode()
    assert dict(seen["headers"])["x-custom"] == "Ünique"
    assert {"x-hop", "te", "upgrade", "connection", "asyncbucket-priority"}.isdisjoint(names)
    assert len(names) == len(set(names))
    assert got.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert got.headers["content-encoding"] == "gzip"
    assert "keep-alive" not in got.headers


async def test_openai_sdk_needs_only_another_base_url() -> None:
    tools: Any = [{"type": "function", "function": TOOL}]
    with RateLimitedProvider(rpm=600) as provider:
        async with (
            proxied(provider.url, rpm=600, tpm=100_000, concurrency=8) as proxy,
            openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY) as client,
        ):
            whole = await client.chat.completions.create(**CHAT)
            called = await client.chat.completions.create(**CHAT, tools=tools)
            events = await client.chat.completions.create(**CHAT, stream=True)
            parts = [event.choices[0].delta.content or "" async for event in events]
            vectors = await client.embeddings.create(model="e", input=["a", "b"])
            assert whole.choices[0].message.content == "".join(parts) == "You said: salve"
            assert called.choices[0].message.tool_calls
            assert len(vectors.data) == 2
            await proxy.until(in_flight=0, admitted=4)


@pytest.mark.parametrize("learn", [None, True, False])
async def test_limits_that_headers_announce_hold_unless_nothing_is_learned(
    learn: bool | None,  # noqa: FBT001 - a parameter of the test
) -> None:
    with RateLimitedProvider(rpm=600) as provider:
        async with proxied(provider.url, learn=learn) as proxy:
            headers = {"authorization": f"Bearer {KEY}"}
            url = f"{proxy.url}/v1/chat/completions"
            assert (await proxy.client.post(url, json=CHAT, headers=headers)).is_success
            adopted = [limit.units for limit in proxy.proxy.limiter.limits]
    assert adopted == ([] if learn is False else [600])


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


async def test_stalled_call_frees_slot(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncbucket.cli.proxy.app._STALLED", 0.3)
    async with proxied(upstream.url, concurrency=1) as proxy:
        reader, writer = await proxy.connect()
        head = b"POST /x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000000\r\n\r\n"
        writer.write(head + bytes(5_000_000))
        await proxy.until(in_flight=1)
        assert b"408 Request Timeout" in await reader.readline()
        writer.close()
        await proxy.until(in_flight=0)


async def answer(proxy: Proxied, path: str, **headers: str) -> httpx.Response:
    more = {"authorization": f"Bearer {KEY}", **headers}
    return await proxy.client.post(path, json=CHAT, headers=more)


async def test_sdks_raise_their_own_errors_at_once(upstream: Upstream) -> None:
    async with proxied(upstream.url, rpm=1) as proxy:
        began = proxy.limiter.now()
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
    left = 60 - (proxy.limiter.now() - began)
    for each in ours, theirs:
        assert left <= int(each.value.response.headers["retry-after"]) <= 61
    assert proxy.limiter.statistics().refused == 2


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"asyncbucket-tennant": "a"}, 400, "asyncbucket-tennant is not a header of"),
        ({"asyncbucket-timeout": "soon"}, 400, "asyncbucket-timeout: could not convert string to"),
        ({"asyncbucket-timeout": "-1"}, 400, "-timeout: a deadline must be at least 0 s"),
        ({"asyncbucket-priority": "1000"}, 400, "-priority: priority must be 'interac"),
        ({"asyncbucket-priority": "interactive"}, 400, "start the proxy with --trust-priority"),
        ({"asyncbucket-agent": "a/"}, 400, "-agent: the name in NAME or KIND/NAME, such as"),
        ({"asyncbucket-tenant": ""}, 400, "-tenant: a tenant must be a non-empty string"),
        ({"host": "evil.example"}, 403, "only programs on its own machine"),
        ({"origin": "https://evil.example"}, 403, "only programs on its own machine"),
        ({"origin": "null"}, 403, "only programs on its own machine"),
    ],
)
async def test_what_cannot_be_understood_never_reaches_the_provider(
    upstream: Upstream, headers: dict[str, str], status: int, message: str
) -> None:
    async with proxied(upstream.url, rpm=60) as proxy:
        told = await answer(proxy, "/x", **headers)
    assert (told.status_code, upstream.calls) == (status, 0)
    assert message in told.json()["error"]["message"]
    assert KEY not in told.text


@pytest.mark.parametrize(
    ("target", "message"),
    [(b"*", "not as an HTTP proxy"), (b"/" + b"x" * 65_536, "the path is too long")],
)
async def test_odd_path_is_refused(upstream: Upstream, target: bytes, message: str) -> None:
    async with proxied(upstream.url) as proxy:
        exact = {"target": target}
        told = await proxy.client.request("OPTIONS", "/", extensions=exact)
    assert (told.status_code, upstream.calls) == (400, 0)
    assert message in told.text


async def test_provider_out_of_reach_is_502() -> None:
    async with proxied("http://127.0.0.1:1", rpm=60, retries=0) as proxy:
        told = await answer(proxy, "/v1/chat/completions")
    assert told.status_code == 502
    assert "the provider cannot be reached (ConnectError)" in told.json()["error"]["message"]
    assert proxy.limiter.statistics().in_flight == 0


async def test_caller_that_still_waits_when_the_proxy_stops_is_told(upstream: Upstream) -> None:
    async with proxied(upstream.url, rpm=1) as proxy:
        proxy.limiter.acquire_nowait().release()
        call = asyncio.ensure_future(proxy.client.post("/x", json=CHAT))
        await proxy.until(waiting=1)
        for task in asyncio.all_tasks():
            if "run_asgi" in repr(task.get_coro()):  # the server cancels it after a while
                task.cancel()
        told = await call
        await proxy.until(waiting=0)
    assert told.status_code == 503
    assert told.json()["error"]["message"] == "the proxy is shutting down: try again"


async def test_callers_share_by_key_and_the_key_stays_with_the_proxy(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REAL_KEY", "sk-real")
    given = {"tenants_by_key": True, "key_env": "REAL_KEY"}
    async with proxied(upstream.url, rpm=600, **given) as proxy:
        seen: list[dict[str, str]] = []
        for headers in ({"authorization": "Bearer alice"}, {"x-api-key": "bob"}, {}):
            reply = await proxy.client.post("/v1/messages", json=CHAT, headers=headers)
            seen.append({name: value for name, value in reply.json()["headers"] if "sk-" in value})
        shown = (await proxy.client.get(f"{proxy.status_url}/stats")).text

    assert seen[0] == {"authorization": "Bearer sk-real"}
    assert seen[1] == seen[2] == {"x-api-key": "sk-real"}
    assert len(proxy.limiter._all_tenants()._recent) == 3
    assert not any(secret in shown for secret in ("alice", "bob", "sk-real"))


async def test_agents_at_the_limit_all_succeed() -> None:
    """Fifty agents, fifty requests in the provider's (short) minute."""
    with RateLimitedProvider(rpm=50, minute=1, latency=0.01) as provider:
        async with proxied(provider.url, "50 requests/1s burst 50") as proxy:

            async def agent(number: int) -> set[int]:
                own = {"asyncbucket-agent": f"test/a{number}"}
                path = "/v1/chat/completions"
                return {(await answer(proxy, path, **own)).status_code for _ in range(2)}

            statuses = await asyncio.gather(*map(agent, range(50)))
            assert provider.statistics().refused == 0
            agents = proxy.limiter.statistics().agents
    assert set().union(*statuses) == {200}
    assert agents is not None
    assert agents.kinds["test"].running == 50


async def test_thousand_callers_wait_and_those_who_stay_are_served(upstream: Upstream) -> None:
    async with proxied(upstream.url, concurrency=16) as proxy:
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
    assert upstream.calls == 100


async def test_path_behind_v1_is_added_to_a_members_url_which_only_a_restart_changes(
    tmp_path: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(f'[member.one]\nrpm = 60\nbase_url = "{upstream.url}/base"\n')
    async with proxied(None, pool=file) as proxy:
        seen = (await proxy.client.get("/v1/x?debug=1")).json()
        proxy.proxy.reload(lambda: ProxyOptions(upstream=upstream.url))
    assert caplog.messages == ["the settings stay as they are: only a restart can change pool"]
    assert seen["target"] == "/base/x?debug=1"


async def test_upstream_may_have_the_v1_of_its_callers(upstream: Upstream) -> None:
    async with proxied(f"{upstream.url}/v1/") as proxy:
        seen = [(await proxy.client.get(path)).json()["target"] for path in ("/v1/x", "/x")]
    assert seen == ["/v1/x?", "/v1/x?"]
