"""The provider over HTTP: starting and stopping it, its limits and errors, in a test or a terminal."""

import asyncio
import contextlib
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from asyncbucket import testing
from asyncbucket.testing import RateLimitedProvider
from asyncbucket.testing.enforcer import Options, go_duration
from asyncbucket.testing.provider import main
from asyncbucket.testing.pytest_plugin import ProviderFactory
from tests.conftest import python, until

KEY = {"authorization": "Bearer test-key"}
HELLO = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}
CHAT = "/v1/chat/completions"


def call(provider: RateLimitedProvider, path: str = CHAT) -> httpx.Response:
    return httpx.post(f"{provider.url}{path}", headers=KEY, json=HELLO)


async def test_stopped_provider_leaves_no_thread_or_socket() -> None:
    before = set(threading.enumerate())
    async with RateLimitedProvider(latency=60.0) as provider:
        url = provider.url
        pending = asyncio.create_task(asyncio.to_thread(call, provider))
        await until(lambda: provider.statistics().in_flight == 1)
        begun = time.monotonic()
        provider.stop()
        assert time.monotonic() - begun < 2
        with pytest.raises(httpx.HTTPError):
            await pending
    await asyncio.get_running_loop().shutdown_default_executor()
    assert set(threading.enumerate()) == before
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
    assert provider.statistics().in_flight == 0


def test_connections_that_come_as_the_provider_stops_are_closed() -> None:
    for _ in range(3):
        with contextlib.ExitStack() as clients, RateLimitedProvider() as provider:
            parts = urlsplit(provider.url)
            for _ in range(100):
                clients.enter_context(socket.create_connection((parts.hostname, parts.port)))
    gc.collect()  # which warns of what is open, and warnings are errors


def test_stopped_provider_can_be_started_again() -> None:
    provider = RateLimitedProvider(rpm=60)
    for _ in range(2):
        assert repr(provider) == "<RateLimitedProvider not running>"
        with pytest.raises(RuntimeError, match="isn't running: enter it with `with`"):
            _ = provider.base_url
        with provider:
            assert call(provider).status_code == 200
            assert repr(provider) == f"<RateLimitedProvider {provider.url}>"
            with pytest.raises(RuntimeError, match=f"already running, at {provider.url}"):
                provider.start()
    assert provider.statistics().admitted == 2


def test_port_in_use_is_an_error_at_a_start_that_can_be_retried() -> None:
    with RateLimitedProvider() as first:
        second = RateLimitedProvider(port=urlsplit(first.url).port or 0)
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+: .* in use"):
            second.start()
    with second:
        assert call(second).status_code == 200


def test_replies_are_not_delayed_by_tcp_acknowledgements() -> None:
    """The kernel would add 40 ms to each call."""
    with RateLimitedProvider() as provider, httpx.Client(headers=KEY) as client:
        client.post(f"{provider.url}{CHAT}", json=HELLO)
        assert provider._server is not None
        (connection,) = provider._server.server_state.connections
        accepted: Any = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.real_clock
@pytest.mark.parametrize("stream", [True, False])
async def test_slot_comes_back_when_client_disconnects(
    rate_limited_provider: ProviderFactory, *, stream: bool
) -> None:
    """It runs in real time, because a socket must close: an abandoned call frees its slot early."""
    provider = rate_limited_provider(latency=60.0)

    async with httpx.AsyncClient(headers=KEY) as client:
        post = client.post(f"{provider.url}{CHAT}", json={**HELLO, "stream": stream})
        pending = asyncio.create_task(post)
        await until(lambda: provider.statistics().in_flight == 1)
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
    await until(lambda: provider.statistics().in_flight == 0)
    assert provider.statistics().disconnected == 1


def test_reply_reports_limits_and_429_when_to_retry(rate_limited_provider: ProviderFactory) -> None:
    provider = rate_limited_provider(rpm=1, tpm=6_000, policy="sliding_window")
    reply, refused = call(provider), call(provider)
    provider.rpm, provider.tpm = None, 49
    never = call(provider)
    names = ("limit-requests", "remaining-requests", "limit-tokens", "remaining-tokens")
    said = [reply.headers[f"x-ratelimit-{name}"] for name in names]
    assert said == ["1", "0", "6000", "5950"]
    assert reply.headers["x-ratelimit-reset-tokens"].startswith(("59.", "1m0s"))
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
    assert "on requests per min (RPM): Limit 1, Used 1, Requested 1. Please try" in error["message"]
    assert refused.headers["retry-after"] == "60"
    assert 59_000 < int(refused.headers["retry-after-ms"]) <= 60_000
    assert "can never pass" in never.json()["error"]["message"]
    assert "retry-after" not in never.headers
    assert [arrival.admitted for arrival in provider.arrivals] == [True, False, False]
    assert {arrival.tokens for arrival in provider.arrivals} == {50}


def test_429_and_headers_of_messages_are_anthropics(rate_limited_provider: ProviderFactory) -> None:
    provider = rate_limited_provider(rpm=1, policy="sliding_window")
    reply, refused = call(provider, "/v1/messages"), call(provider, "/v1/messages")
    error = refused.json()
    assert (error["type"], error["error"]["type"]) == ("error", "rate_limit_error")
    assert refused.headers["retry-after"] == "60"
    assert reply.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert datetime.fromisoformat(reply.headers["anthropic-ratelimit-requests-reset"]).tzinfo
    assert reply.headers["request-id"].startswith("req_")
    provider.always = 529
    assert call(provider, "/v1/messages").status_code == 429
    provider.rpm = None
    assert call(provider, "/v1/messages").json()["error"]["type"] == "overloaded_error"


def test_wrong_value_set_while_it_runs_is_refused(rate_limited_provider: ProviderFactory) -> None:
    provider: Any = rate_limited_provider()
    wrong = {"latency": -1, "rpm": 0, "latencies": 2.0, "policy": "fixed_window"}
    for name, value in wrong.items():
        with pytest.raises((AttributeError, TypeError, ValueError), match=name):
            setattr(provider, name, value)
    provider.latency = (0.0, 0.01)
    assert call(provider).status_code == 200


def test_scripted_failure_has_given_status_and_wait(rate_limited_provider: ProviderFactory) -> None:
    provider = rate_limited_provider(concurrency=1)
    provider.fail_next(status=503, retry_after=1.5)
    provider.fail_next(status=429, code="insufficient_quota")
    overloaded, quota = call(provider), call(provider)
    assert (overloaded.status_code, overloaded.headers["retry-after-ms"]) == (503, "1500")
    assert quota.json()["error"]["code"] == quota.json()["error"]["type"] == "insufficient_quota"
    assert call(provider).status_code == 200  # a failed call has left its slot
    seen = provider.statistics()
    assert (seen.admitted, seen.errors, seen.disconnected) == (2, 1, 0)
    assert seen.refused_429 == {"scripted": 1}


@pytest.mark.parametrize(("charge", "tokens"), [("openai", 50), ("usage", 2 + 4)])
def test_call_is_charged_by_the_configured_rule(charge: Any, tokens: int) -> None:
    with RateLimitedProvider(charge=charge) as provider:
        call(provider)
        assert provider.statistics().tokens == tokens


@pytest.mark.parametrize(
    ("status", "path", "content", "message"),
    [
        (400, CHAT, b'{"model": "m"}', "KeyError('messages')"),
        (400, CHAT, b'{"model": "m", "messages": []}', "there are no messages"),
        (400, CHAT, b'{"model": "m", "messages": "x", "max_tokens": 0}', "at least 1, not 0"),
        (400, CHAT, b"[" * 100_000, "can't be understood"),
        (400, "/v1/embeddings", b'{"model": "m", "input": []}', "can't be understood"),
        (404, "/v1/nonsense", b"{}", "Invalid URL (POST /v1/nonsense)"),
        (401, CHAT, b"{}", "You didn't provide an API key."),
    ],
)
def test_call_that_cannot_be_read_is_an_error_and_costs_nothing(
    rate_limited_provider: ProviderFactory, status: int, path: str, content: bytes, message: str
) -> None:
    provider = rate_limited_provider()
    headers = {} if status == 401 else KEY
    reply = httpx.post(f"{provider.url}{path}", headers=headers, content=content)
    assert reply.status_code == status
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert message in reply.json()["error"]["message"]
    assert httpx.get(f"{provider.url}{CHAT}", headers=KEY).status_code == 404
    assert provider.statistics().requests == 0


@pytest.mark.parametrize("family", ["httpx", "httpx2"])
async def test_mocked_reply_matches_that_of_the_server(family: Any) -> None:
    library: Any = pytest.importorskip(family)
    provider = RateLimitedProvider(rpm=2, policy="sliding_window")
    transport = provider.mock_transport(family=family)
    async with library.AsyncClient(transport=transport, headers=KEY) as client:
        mocked = await client.post(f"http://provider{CHAT}", json=HELLO)
        with provider:
            real = call(provider)
        refused = await client.post(f"http://provider{CHAT}", json=HELLO)
        provider.rpm = None
        provider.fail_next(2, after_chunks=2)
        with pytest.raises(library.RemoteProtocolError, match="closed in a stream"):
            await client.post(f"http://provider{CHAT}", json={**HELLO, "stream": True})
        unstreamed = await client.post(f"http://provider{CHAT}", json=HELLO)
    assert mocked.json()["choices"] == real.json()["choices"]
    assert set(mocked.headers) == set(real.headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
    assert unstreamed.status_code == 500
    assert (provider.statistics().errors, provider.statistics().in_flight) == (2, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_prints_url_at_start_and_statistics_at_end(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "asyncbucket.testing.provider", "--rpm", "60"]
    with subprocess.Popen(
        [*command, "--latency", "(0.0, 0.001)", "--policy", "fixed_window"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        base_url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", base_url)
        reply = httpx.post(f"{base_url}/chat/completions", headers=KEY, json=HELLO)
        assert reply.headers["x-ratelimit-limit-requests"] == "60"
        process.send_signal(number)
        said, _ = process.communicate(timeout=10)
    assert json.loads(said)["admitted"] == 1
    assert process.returncode == 0


def test_command_explains_each_option(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["provider", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    told = " ".join(capsys.readouterr().out.split())
    assert "--latency SECONDS Seconds that a reply takes, 0.2, or a range, 0.1,0.3; a" in told
    assert "--port N Port on 127.0.0.1; 0 takes a free one. example: python -m" in told
    options = {field.name.replace("_", "-") for field in fields(Options)} - {"cache", "clock"}
    assert set(re.findall(r"--([a-z-]+) [A-Z]+ [A-Z]", told)) == options


def test_command_that_cannot_start_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", {}.get)
    with RateLimitedProvider() as first:
        taken = f"--port={urlsplit(first.url).port}"
        for option, error in (("--rpm=0", "rpm must be a whole"), (taken, "cannot listen on 127")):
            monkeypatch.setattr(sys, "argv", ["provider", option])
            with pytest.raises(SystemExit, match=f"^error: {error}"):
                main()


def test_virtual_time_and_assertions_load_no_web_framework() -> None:
    script = """
import sys
from asyncbucket.testing import assert_never_over, virtual_time
import asyncbucket.testing.pytest_plugin
print(sorted({"starlette", "uvicorn", "openai", "httpx"} & sys.modules.keys()), virtual_time)
"""
    assert python("-c", script, check=True).stdout.startswith("[] <function virtual_time at ")


def test_every_public_name_of_testing_can_be_loaded() -> None:
    assert dir(testing) == sorted(testing.__all__)
    assert [name for name in testing.__all__ if getattr(testing, name).__name__ != name] == []
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = getattr(testing, "nonsense")  # noqa: B009 - a type checker would see it


def test_duration_is_written_in_go_format() -> None:
    seconds = (0, 0.12, 0.999000001, 8.64, 3661.5)
    written = [go_duration(round(each * 1e9)) for each in seconds]
    assert written == ["0s", "120ms", "1s", "8.64s", "61m1.5s"]
