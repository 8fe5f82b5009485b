"""Starting, stopping and controlling the provider, in a thread and in a process."""

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import httpx
import pytest

from asyncbucket.testing.provider import ProviderProcess, RateLimitedProvider
from asyncbucket.testing.provider.__main__ import main
from tests.conftest import python

Until: TypeAlias = Callable[[Callable[[], bool]], Awaitable[None]]

CALL: dict[str, Any] = {
    "headers": {"authorization": "Bearer test-key"},
    "json": {"model": "m", "messages": [{"role": "user", "content": "Hello"}]},
}


KINDS = [RateLimitedProvider, ProviderProcess]


def call(provider: RateLimitedProvider | ProviderProcess) -> httpx.Response:
    return httpx.post(f"{provider.base_url}/chat/completions", **CALL)


def refuses_connections(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) != 0


async def test_stopped_provider_leaves_no_thread_or_socket(until: Until) -> None:
    before = set(threading.enumerate())
    async with RateLimitedProvider(latency=60.0) as provider:
        url = provider.url
        async with httpx.AsyncClient() as client:
            pending = asyncio.create_task(
                client.post(f"{provider.base_url}/chat/completions", **CALL)
            )
            await until(lambda: provider.statistics().in_flight == 1)
            begun = time.monotonic()
            await provider.__aexit__(None, None, None)
            assert time.monotonic() - begun < 2
            with pytest.raises(httpx.HTTPError):
                await pending
    assert set(threading.enumerate()) == before
    assert refuses_connections(url)
    assert provider.statistics().in_flight == 0


def test_connections_that_come_as_the_provider_stops_are_closed() -> None:
    for _ in range(3):
        with contextlib.ExitStack() as clients, RateLimitedProvider() as provider:
            parts = urlsplit(provider.url)
            for _ in range(100):
                clients.enter_context(socket.create_connection((parts.hostname, parts.port)))
    gc.collect()  # which warns of what is open, and warnings are errors


@pytest.mark.real_clock
def test_replies_are_not_delayed_by_tcp_acknowledgements() -> None:
    """This runs in real time, the kernel's: 20 calls on one connection take under 20 x 40 ms."""
    with RateLimitedProvider() as provider, httpx.Client() as client:
        url = f"{provider.base_url}/chat/completions"
        client.post(url, **CALL)
        took: list[float] = []
        for _ in range(3):  # a busy machine may spoil one of them
            begun = time.monotonic()
            for _ in range(20):
                client.post(url, **CALL)
            took.append(time.monotonic() - begun)
    assert min(took) < 0.4


def test_stopped_provider_can_be_started_again() -> None:
    provider = RateLimitedProvider(rpm=60)
    assert repr(provider) == ("<RateLimitedProvider rpm=60 not running>")
    for _ in range(2):
        with provider:
            assert call(provider).status_code == 200
            assert repr(provider).endswith(f" {provider.url}>")
            with pytest.raises(RuntimeError, match=f"runs already, at {provider.url}"):
                provider.start()
    assert provider.statistics().admitted == 2


@pytest.mark.parametrize("kind", KINDS)
def test_provider_that_is_not_running_raises_with_remedy(kind: Any) -> None:
    with pytest.raises(RuntimeError, match="isn't running: enter it with `with`"):
        _ = kind().base_url


async def test_provider_process_has_the_interface_of_the_provider() -> None:
    async with ProviderProcess(rpm=600, latency=(0.0, 0.001), policy="sliding_window") as provider:
        assert provider.pid != os.getpid()
        assert repr(provider).endswith(f" {provider.url}>")
        assert provider.url + "/v1" == provider.base_url
        before = time.monotonic_ns()
        assert call(provider).status_code == 200
        (arrival,) = provider.arrivals
        assert before < arrival.time_ns < time.monotonic_ns()
        assert arrival.admitted
        provider.fail_next(status=503)
        assert call(provider).status_code == 503
        provider.reconfigure(rpm=2, latency=(0.0, 0.0))
        assert " rpm=2 " in repr(provider)
        assert call(provider).status_code == 429
        with pytest.raises(ValueError, match="policy can't change while the provider runs"):
            provider.reconfigure(policy="fixed_window")
        with pytest.raises(TypeError, match="unexpected keyword argument 'rpms'"):
            provider.reconfigure(rpms=3)
        with pytest.raises(ValueError, match="tpm must be a whole number of at least 1, not -1"):
            provider.reconfigure(rpm=5, tpm=-1)
        with pytest.raises(RuntimeError, match="runs already"):
            provider.start()
        running = provider.statistics()
    assert (running.admitted, running.errors, running.refused_429) == (2, 1, {"requests": 1})
    assert provider.statistics() == running
    assert provider.pid is None
    assert refuses_connections(provider.url)


def test_provider_process_ends_when_its_parent_is_killed() -> None:
    script = """
import os, signal
from asyncbucket.testing.provider import ProviderProcess
provider = ProviderProcess()
provider.start()
print(provider.url, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = python("-c", script)
    url = done.stdout.split()[0]
    deadline = time.monotonic() + 10
    while not refuses_connections(url):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_port_in_use_is_an_error_at_a_start_that_can_be_retried(kind: Any) -> None:
    with RateLimitedProvider() as first:
        second = kind(port=urlsplit(first.url).port)
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+: .* in use"):
            second.start()
        assert call(first).status_code == 200
    with second:
        assert call(second).status_code == 200


def test_provider_process_leaves_ctrl_c_to_its_parent_and_names_its_death() -> None:
    with ProviderProcess() as provider:
        assert provider.pid is not None
        assert os.getpgid(provider.pid) != os.getpgid(0)  # so no terminal sends it one, either
        os.kill(provider.pid, signal.SIGINT)
        time.sleep(0.05)
        assert call(provider).status_code == 200
        assert provider.statistics().admitted == 1
        os.kill(provider.pid, signal.SIGKILL)
        while not refuses_connections(provider.url):
            time.sleep(0.005)
        with pytest.raises(RuntimeError, match="process doesn't answer"):
            provider.statistics()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_prints_url_at_start_and_statistics_at_end(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "asyncbucket.testing.provider", "--rpm", "60"]
    with subprocess.Popen([*command, "--latency", "0.001"], stdout=-1, text=True) as process:
        assert process.stdout is not None
        base_url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", base_url)
        reply = httpx.post(f"{base_url}/chat/completions", **CALL)
        assert reply.headers["x-ratelimit-limit-requests"] == "60"
        process.send_signal(number)
        said, _ = process.communicate(timeout=10)
    assert json.loads(said)["admitted"] == 1
    assert process.returncode == 0


def test_command_that_cannot_start_ends_with_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["provider", *options])
        with pytest.raises(SystemExit) as caught:
            main()
        return str(caught.value)

    monkeypatch.setattr(signal, "signal", {}.get)
    assert refusal("--rpm", "0") == "error: rpm must be a whole number of at least 1, not 0"
    with RateLimitedProvider() as first:
        port = urlsplit(first.url).port
        assert refusal("--port", f"{port}").startswith(f"error: cannot listen on 127.0.0.1:{port}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rpm": 0}, "rpm must be a whole number of at least 1, not 0"),
        ({"tpm": "100k"}, "tpm must be a whole number of at least 1, not '100k'"),
        ({"reply_tokens": None}, "reply_tokens must be a whole number of at least 0, not None"),
        ({"port": 70_000}, "port must be at most 65535, not 70000"),
        ({"policy": "magic"}, "policy must be one of token_bucket, sliding_window, .* not 'magic'"),
        ({"charge": "magic"}, "charge must be one of openai, usage, not 'magic'"),
        ({"minute": 0}, "minute must be a positive number of seconds, not 0"),
        ({"latency": -1.0}, r"latency must be seconds >= 0 or \(low, high\), not -1.0"),
        ({"latency": (2, 1)}, r"latency must be seconds >= 0 or \(low, high\), not \(2, 1\)"),
        ({"latency": float("nan")}, "latency must be .* not nan"),
        ({"always": 200}, "status must be 400 to 599, not 200"),
        ({"clock": time.monotonic}, "clock must return integer nanoseconds"),
        ({"rpms": 3}, "unexpected keyword argument 'rpms'"),
    ],
)
def test_invalid_option_is_refused_at_once(kind: Any, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**options)


@pytest.mark.parametrize("options", [{"clock": time.time_ns}, {"latency": time.time}])
def test_function_cannot_be_sent_to_a_process(options: Any) -> None:
    with pytest.raises(ValueError, match="can't be sent to another process"):
        ProviderProcess(**options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ({"status": 200}, "status must be 400 to 599, not 200"),
        ({"retry_after": -1}, "retry_after must be finite and >= 0 s, not -1"),
        ({"after_chunks": -1}, "after_chunks must be a whole number of at least 0"),
    ],
)
def test_invalid_failure_is_refused_at_once(kind: Any, failure: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind().fail_next(**failure)
