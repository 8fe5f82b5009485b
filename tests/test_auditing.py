"""Calls that go past every limiter are found, by whatever library and from whatever thread."""

import asyncio
import http.server
import inspect
import os
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, Final

import aiohttp
import boto3  # type: ignore[import-untyped]
import httpx
import httpx2
import pytest
import requests
import urllib3
from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]

from asyncbucket import Limiter, TokenBucket, audit
from asyncbucket.auditing import Audit
from tests.conftest import python

pytest_plugins = ("pytester",)
QUIET: Final = ("-p", "no:cacheprovider", "-p", "no:langsmith_plugin", "-p", "no:asyncio")

HERE: Final = "127.0.0.1"
Calls = Callable[[str], Coroutine[Any, Any, object] | None]


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Print nothing."""


@pytest.fixture(scope="module")
def url() -> Generator[str]:
    with http.server.ThreadingHTTPServer((HERE, 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://{HERE}:{server.server_address[1]}/v1/chat"
        server.shutdown()
        thread.join()


async def by_httpx(url: str) -> None:
    async with httpx.AsyncClient() as client:
        await client.post(url)


async def by_httpx2(url: str) -> None:
    async with httpx2.AsyncClient() as client:
        await client.post(url)


def by_sync_httpx(url: str) -> None:
    httpx.post(url)


async def by_aiohttp(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(url) as reply:
        await reply.read()


def by_requests(url: str) -> None:
    requests.post(url, timeout=5)


def by_urllib3(url: str) -> None:
    with urllib3.PoolManager() as pool:
        pool.request("POST", url)


def by_boto3(url: str) -> None:
    options = Config(signature_version=UNSIGNED, retries={"total_max_attempts": 1})
    client = boto3.client(
        "bedrock-runtime", "us-east-1", endpoint_url=url.rpartition("/v1")[0], config=options
    )
    client.invoke_model(modelId="m", body=b"{}")


async def made(calls: Calls, url: str) -> None:
    coroutine = calls(url)
    if coroutine is not None:
        await coroutine


def line_of(calls: Callable[..., object]) -> str:
    """Return where the last line of ``calls`` is, as an audit shows it."""
    lines, first = inspect.getsourcelines(calls)
    file = Path(inspect.getfile(calls))
    inside = file.is_relative_to(Path.cwd())
    return f"{file.relative_to(Path.cwd()) if inside else file}:{first + len(lines) - 1}"


@pytest.mark.parametrize(
    "calls",
    [by_httpx, by_httpx2, by_sync_httpx, by_requests, by_urllib3, by_boto3],
    ids=lambda calls: calls.__name__,
)
async def test_each_library_is_watched(calls: Calls, url: str) -> None:
    limiter = Limiter("500 RPM")
    with audit(hosts=[HERE]) as seen:
        await asyncio.create_task(made(calls, url))
        async with limiter.acquire():
            await made(calls, url)
    (unpaced,) = seen.unpaced
    path = "/model/m/invoke" if calls is by_boto3 else "/v1/chat"
    assert (unpaced.host, unpaced.path, unpaced.count) == (HERE, path, 1)
    assert unpaced.where == line_of(calls)
    assert seen.paced == 1


async def test_aiohttp_is_watched_and_queries_are_not_shown(url: str) -> None:
    with audit(hosts=[HERE]) as seen:
        await by_aiohttp(f"{url}?key=secret")
        async with Limiter(concurrency=1).acquire():
            await by_aiohttp(url)
    assert [(each.path, each.count) for each in seen.unpaced] == [("/v1/chat", 1)]
    assert seen.paced == 1
    assert "secret" not in f"{seen}{seen!r}"


async def test_paced_transport_is_paced_and_hosts_of_others_are_nobodys_business(url: str) -> None:
    limiter = Limiter("500 RPM")
    with audit(hosts=["10.*"]) as seen:
        await by_httpx(url)
    assert (seen.unpaced, seen.paced) == ([], 0)
    async with httpx.AsyncClient(transport=limiter.transport()) as client:
        with audit(hosts=[HERE]) as seen:
            await asyncio.gather(client.post(url), client.post(url))
    assert (seen.unpaced, seen.paced) == ([], 2)


async def test_tasks_and_threads_know_the_lease_and_the_line_they_come_from(url: str) -> None:
    loop, limiter = asyncio.get_running_loop(), Limiter("500 RPM")
    with audit(hosts=[HERE]) as seen:
        async with limiter.acquire():
            await asyncio.create_task(by_httpx(url))
            await loop.run_in_executor(None, urllib3.request, "POST", url)
            await asyncio.to_thread(urllib3.request, "POST", url)
        assert (seen.unpaced, seen.paced) == ([], 3)
        await loop.run_in_executor(None, urllib3.request, "POST", url)
        await asyncio.to_thread(urllib3.request, "POST", url)
    lines, first = inspect.getsourcelines(
        test_tasks_and_threads_know_the_lease_and_the_line_they_come_from
    )
    last = first + len(lines) - 1
    places = [int(each.where.rpartition(":")[2]) for each in seen.unpaced]
    assert places == [line for line in range(first, last) if line in places]
    assert [lines[line - first].strip()[:24] for line in places] == [
        "await loop.run_in_execut",
        "await asyncio.to_thread(",
    ]


def test_line_that_started_a_task_is_told_not_the_one_that_runs_the_loop(url: str) -> None:
    async def main() -> None:
        async with httpx.AsyncClient() as client:
            await asyncio.create_task(client.post(url))

    with audit(hosts=[HERE]) as seen:
        asyncio.run(main())
    assert [each.where for each in seen.unpaced] == [line_of(main)]


async def test_lease_that_is_over_or_was_never_awaited_paces_nothing(url: str) -> None:
    limiter, bucket = Limiter(concurrency=1), TokenBucket(rate=1, burst=1)
    lease = await limiter.acquire()
    lease.release()
    held = await limiter.acquire()
    with audit(hosts=[HERE]) as seen:
        waiting = asyncio.ensure_future(by_httpx(url))
        asked = limiter.acquire()
        await bucket.acquire()
        await by_httpx(url)
        await waiting
    assert sum(each.count for each in seen.unpaced) == 2
    assert not asked.released
    held.release()


def test_name_look_ups_that_no_watched_call_explains_are_reported() -> None:
    with audit(hosts="localhost") as seen:
        with Limiter("500 RPM").acquire_sync():
            socket.getaddrinfo("localhost", 80)
        socket.getaddrinfo("localhost", 80)
        socket.getaddrinfo(b"localhost", 80)
        socket.getaddrinfo(None, 80)
        with pytest.raises(httpx.ConnectError):
            httpx.post("http://localhost:9/v1")
    assert [(each.host, each.path) for each in seen.unpaced] == [
        *[("localhost", "")] * 2,
        ("localhost", "/v1"),
    ]
    socket.getaddrinfo("localhost", 80)
    assert sum(each.count for each in seen.unpaced) == 3


def test_everything_is_put_back_and_only_one_audit_is_on() -> None:
    before = httpx.HTTPTransport.handle_request, asyncio.BaseEventLoop.create_task
    with audit() as seen:
        assert httpx.HTTPTransport.handle_request is not before[0]
        with pytest.raises(RuntimeError, match="another audit is on in this process"), audit():
            pass
    assert before == (httpx.HTTPTransport.handle_request, asyncio.BaseEventLoop.create_task)
    assert str(seen).startswith(
        "Calls to model providers: 0 unpaced, 0 paced.\nNot seen: hosts that"
    )


def test_libraries_that_are_not_installed_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with audit() as seen:
        assert isinstance(seen, Audit)


def test_fixture_fails_a_test_with_an_unpaced_call(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import socket

        def test_bypass(no_unpaced_calls):
            try:
                socket.getaddrinfo("api.openai.com", 443, flags=socket.AI_NUMERICHOST)
            except OSError:
                pass

        def test_paced(no_unpaced_calls):
            assert not no_unpaced_calls.unpaced
        """
    )
    done = pytester.runpytest_inprocess(*QUIET)
    done.assert_outcomes(passed=2, errors=1)
    done.stdout.fnmatch_lines(["*api.openai.com*test_fixture_fails*.py:5*"])


PROGRAM = """
import sys, urllib3
try:
    urllib3.request("POST", "http://127.0.0.1:9/v1/chat?key=secret", retries=False)
except urllib3.exceptions.HTTPError:
    sys.exit(5)
"""


def test_command_names_each_call_and_exits_with_3(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(PROGRAM)

    def audited(*options: str) -> tuple[int, str]:
        command = ("-m", "asyncbucket", "audit", *options)
        done = python(*command, cwd=tmp_path, env=dict(os.environ))
        return done.returncode, done.stderr

    program = ("--", sys.executable, "app.py")
    status, said = audited("--host", HERE, *program)
    assert (status, said.splitlines()[:-1]) == (
        3,
        [
            "Calls to model providers: 1 unpaced, 0 paced.",
            "      1  127.0.0.1/v1/chat  app.py:4",
        ],
    )
    status, said = audited(*program)
    assert (status, said.splitlines()[0][:42]) == (5, "Calls to model providers: 0 unpaced, 0 pac")
    (tmp_path / "app.sh").write_text("#!/bin/sh\nexec python app.py\n")
    for command in ("/nowhere",), ("python",), ("env", "python", "app.py"), ("app.sh",):
        status, said = audited("--", *command)
        assert status == 2
        assert said == (
            f"error: {' '.join(command)!r} is no Python script, command in Python or -m MODULE: "
            f"what starts Python goes first, as in `uv run asyncbucket audit -- python app.py`\n"
        )


def test_command_waits_for_threads_that_still_call(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import concurrent.futures, socket, threading, time\n"
        "def calls():\n"
        "    time.sleep(0.1)\n"
        "    socket.getaddrinfo('127.0.0.1', 9)\n"
        "threading.Thread(target=calls).start()\n"
        "concurrent.futures.ThreadPoolExecutor().submit(calls)\n"
    )
    command = ("-m", "asyncbucket", "audit", "--host", HERE, "--", "python", "app.py")
    done = python(*command, cwd=tmp_path, env=dict(os.environ))
    assert (done.returncode, done.stderr.splitlines()[1:-1]) == (
        3,
        ["      2  127.0.0.1  app.py:4"],
    )


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        ("sys.exit('no key')", 1, "no key"),
        ("raise ValueError('no key')", 1, "ValueError: no key"),
        ("raise KeyboardInterrupt", 130, ""),
        ("print(*sys.argv, file=sys.stderr)", 0, "app.py --all"),
    ],
)
def test_program_ends_as_it_does_without_audit(
    ends: str, status: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(f"import sys\n{ends}\n")
    command = ("-m", "asyncbucket", "audit", "--", "python", "-m", "app", "--all")
    done = python(*command, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == status
    assert "Calls to model providers: 0 unpaced, 0 paced.\n" in done.stderr
    assert f"{said}\n" in done.stderr
