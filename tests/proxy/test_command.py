"""`asyncbucket proxy` as people run it: a process of its own, with real signals."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from asyncbucket.cli.app import app
from tests.proxy.conftest import CHAT, MEBIBYTE, Upstream, served

pytestmark = pytest.mark.real_clock

KEY = "sk-canary-1234567890"


class Running:
    """A proxy in a process of its own, and what it has said."""

    def __init__(self, arguments: tuple[str, ...], **environment: str) -> None:
        command = [sys.executable, "-m", "asyncbucket", "proxy", "--listen", "0", *arguments]
        self.process = subprocess.Popen(
            [*command, "--status", "127.0.0.1:0"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.said = ""
        self.url = self.line(r"base URL (\S+) for")
        self.status_url = self.line(r"status (\S+)/stats")

    def line(self, pattern: str) -> str:
        """Read until a line matches; return what is in the parentheses."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if found := re.search(pattern, line):
                return found[1] if found.groups() else found[0]
        raise AssertionError(f"it ended, and said: {self.said}")

    def ended(self, number: int) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        self.said += self.process.communicate(timeout=30)[1]
        return self.process.returncode

    @property
    def peak_memory(self) -> int:
        """The most bytes that it has had in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1_024


@contextlib.contextmanager
def running(*arguments: str, **environment: str) -> Generator[Running]:
    proxy = Running(arguments, **environment)
    try:
        yield proxy
    finally:
        proxy.process.kill()
        _ = proxy.process.communicate()


def client_of(proxy: Running) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.AsyncClient(base_url=proxy.url, headers=headers, timeout=30)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
async def test_large_bodies_pass_without_being_held() -> None:
    async with served(Upstream()) as upstream:
        anywhere = "--listen", "0.0.0.0:0"
        with running("--upstream", upstream, "--concurrency", "8", *anywhere) as proxy:
            proxy.line(r"warning: other machines can reach 0.0.0.0:\d+, and make calls with a key")
            async with client_of(proxy) as client:
                await client.post("/small", json=CHAT)
                before = proxy.peak_memory

                async def call(_: int) -> int:
                    size = 0
                    body = bytes(10 * MEBIBYTE)
                    async with client.stream("POST", "/big?20", content=body) as reply:
                        async for chunk in reply.aiter_raw():
                            size += len(chunk)
                    return size

                sizes = await asyncio.gather(*map(call, range(4)))
                grown = proxy.peak_memory - before
    assert min(sizes) > 20 * MEBIBYTE
    assert grown < 30 * MEBIBYTE  # forty went up, eighty came down


async def test_kill_and_restart_keep_the_limit_of_a_store(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/limits.db"
    async with served(Upstream()) as upstream:
        given = ("--upstream", upstream, "--also", "3 requests/minute burst 3", "--store", store)
        with running(*given) as proxy:
            async with client_of(proxy) as client:
                began = time.monotonic()
                calls = [await client.post("/x", json=CHAT) for _ in range(3)]
            assert proxy.ended(signal.SIGKILL) == -signal.SIGKILL
        with running(*given) as proxy:
            async with client_of(proxy) as client:
                told = await client.post("/x", json=CHAT, headers={"asyncbucket-timeout": "0.5"})
    assert {call.status_code for call in calls} == {201}
    assert told.status_code == 429
    assert 60 - (time.monotonic() - began) <= int(told.headers["retry-after"]) <= 62


async def test_keys_appear_nowhere_and_signals_mean_what_they_say(tmp_path: Path) -> None:
    config = tmp_path / "proxy.toml"
    async with served(Upstream()) as upstream:
        text = f'[asyncbucket]\nrpm = 600\n[proxy]\nupstream = "{upstream}"\nkey_env = "REAL_KEY"\n'
        config.write_text(text + "tenants_by_key = true\n")
        with running("--config", str(config), REAL_KEY="sk-real-canary") as proxy:
            async with client_of(proxy) as client:
                shown = str((await client.post("/x", json=CHAT)).headers)
                with pytest.raises(httpx.RemoteProtocolError):
                    _ = await client.post("/breaks", json=CHAT)
                proxy.line("the provider broke off a reply")
                for own in ({"asyncbucket-timeout": "soon"}, {"host": "evil.example"}):
                    told = await client.post("/x", json=CHAT, headers=own)
                    shown += str(told.headers) + told.text
                config.write_text(text.replace("600", "5"))
                proxy.process.send_signal(signal.SIGHUP)
                proxy.line("new settings are in force")
                config.write_text("rpm = 5")
                proxy.process.send_signal(signal.SIGHUP)
                proxy.line("the settings stay as they are: .*tables")
                for path in ("/", "/stats", "/metrics", "/healthz"):
                    page = await client.get(proxy.status_url + path)
                    assert page.status_code == 200
                    shown += page.text
                foreign = {"host": "evil.example"}
                refused = await client.get(f"{proxy.status_url}/stats", headers=foreign)
            assert proxy.ended(signal.SIGTERM) == 0
    assert refused.status_code == 403
    assert '"limit":"5 requests per 60 s"' in shown
    assert 'asyncbucket_requests_total{limiter="127.0.0.1' in shown
    assert "canary" not in shown + proxy.said


def test_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = CliRunner().invoke(app, ["proxy", "--upstream", "http://x", "--listen", address])
    assert done.exit_code == 2
    assert f"cannot listen on {address}: Address already in use: change listen or" in done.output
