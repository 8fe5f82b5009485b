"""What other programs on this machine can see of a limiter."""

import asyncio
import json
import os
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.testing import VirtualTime, assert_never_over
from tests.conftest import python


def busy() -> Limiter:
    limiter = Limiter("600 RPM", "10k TPM", concurrency=3, name="openai")
    limiter.child("chat", rpm=100).acquire_nowait(tokens=100).release()
    limiter.key("secret-tenant").acquire_nowait(tokens=50).release()
    limiter.pause(60, reason="429")
    return limiter


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:  # noqa: S310 - our own
        return str(reply.read().decode())


def test_default_port_is_fixed_until_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with busy().serve_stats(port=0) as free:
        port = int(free.url.rpartition(":")[2])
    monkeypatch.setattr("asyncbucket.telemetry.stats.DEFAULT_PORT", port)
    with busy().serve_stats() as first, busy().serve_stats() as second:
        assert first.url == f"http://127.0.0.1:{port}"
        assert second.url != first.url
        with pytest.raises(OSError, match=rf"Address already in use: '127.0.0.1:{port}'$"):
            busy().serve_stats(port=port)


def test_report_is_served_with_children_without_names_of_tenants() -> None:
    with busy().serve_stats() as server:
        assert repr(server) == f"<StatsServer at {server.url}>"
        text = get(server.url)
    root, chat = json.loads(text)["limiters"]
    admitted = {each["name"]: each["admitted"] for each in (root, chat)}
    assert admitted == {"openai": 2, "openai/chat": 1}
    assert root["upstream_429"] == 1
    assert 59 < root["paused"] <= 60
    assert root["limits"][1] == {
        "limit": "10,000 tokens per 60 s",
        "label": "tpm",
        "resource": "tokens",
        "amount": 10_000,
        "per": 60,
        "used": 150,
        "available": 9_850,
        "belief": None,
    }
    assert "secret" not in text


def test_foreign_host_name_gets_403() -> None:
    with busy().serve_stats() as server:
        for host in ("localhost", "127.0.0.1:80", "[::1]", "[::1]:4294"):
            assert "openai" in get(server.url, Host=host)
        for host in ("evil.example", "::1", "[", "localhost.evil.example"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                get(server.url, Host=host)


def test_client_that_disconnects_early_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    with busy().serve_stats() as server:
        port = int(server.url.rpartition(":")[2])
        for request in (b"GET / HTTP/1.1\r\nHost: local", b"GET / HTTP/1.1\r\nHost: local\r\n\r\n"):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(request)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # the connection is reset
        assert "openai" in get(server.url)
        while any(each.name.startswith("Thread-") for each in set(threading.enumerate()) - before):
            time.sleep(0.001)  # the threads that answer
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child_leaves_the_server_to_its_parent() -> None:
    script = """
import os, sys, urllib.request
from asyncbucket import Limiter, WouldBlock

limiter = Limiter("5 RPM", name="openai")
(read, write), (closed_read, closed_write) = os.pipe(), os.pipe()
with limiter.serve_stats() as server:
    if not os.fork():
        server.close()
        os.write(closed_write, b"x")
        os.close(write)
        os.read(read, 1)  # the child lives as long as its parent
        sys.exit()
    os.read(closed_read, 1)
    print(urllib.request.urlopen(server.url).status)
limiter.serve_stats(port=int(server.url.rpartition(":")[2])).close()  # the child keeps no port
"""
    done = python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "200\n", "")


async def test_statistics_read_as_a_sentence(virtual_time: VirtualTime) -> None:
    limiter = Limiter("600 RPM", concurrency=1, name="openai", clock=virtual_time.clock)

    async with limiter.acquire():
        waiting = asyncio.ensure_future(limiter.acquire())
        await asyncio.sleep(1)
        assert str(limiter.statistics()) == (
            "openai: 1 admitted, 1 waiting (concurrency binds), 1 of 1 in flight, 0 refused, "
            "0 cancelled, 0 upstream 429s; 1 of 600 requests per 60 s used"
        )
        limiter.pause(9)
    await asyncio.sleep(1)
    assert "1 waiting, 0 of 1 in flight" in str(limiter.statistics())
    assert "paused for 8 s more" in str(limiter.statistics())
    (await waiting).release()


async def test_trace_keeps_the_last_events(virtual_time: VirtualTime, tmp_path: Path) -> None:
    limiter = Limiter("60 RPM burst 1", "1k TPM", clock=virtual_time.clock, name="openai")

    with limiter.trace() as trace, limiter.trace(last=2) as short:
        for _ in range(5):
            await limiter.child("chat").acquire(tokens=10)
        limiter.pause(1)
    await limiter.acquire()
    assert len(short) == 2
    assert len(trace) == 10  # four of the five were queued first, and one pause
    assert repr(trace) == "<Trace of 'openai', 10 events>"
    assert [units for _, units in trace.amounts("tokens")] == [10] * 5
    assert_never_over(trace.amounts("requests"), limiter.limits[0])
    trace.save(tmp_path / "trace.jsonl")
    head, first, *_, last = map(json.loads, (tmp_path / "trace.jsonl").read_text().splitlines())
    assert head["limiter"] == "openai"
    assert head["limits"][1] == {"resource": "tokens", "amount": 1000, "per": 60, "burst": None}
    assert (first["event"], first["limiter"]) == ("admitted", "openai/chat")
    assert first["cost"]["tokens"] == 10
    paused = {"event": "paused", "at": 4.0, "limiter": "openai", "seconds": 1, "reason": ""}
    assert last == paused


def post(url: str, line: str, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, line.encode(), headers)  # noqa: S310 - our own
    try:
        with urllib.request.urlopen(request) as reply:  # noqa: S310 - our own
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else {"error": text}


def test_line_with_the_token_changes_a_limiter(capsys: pytest.CaptureFixture[str]) -> None:
    limiter = Limiter("600 RPM", concurrency=3, name="openai", shadow=True)
    limiter.child("chat", rpm=100)
    with limiter.serve_stats(port=0, control=True) as server:
        printed = capsys.readouterr().err
        assert printed == f"asyncbucket watch {server.url} --token {server.token}\n"

        def changed(line: str) -> dict[str, Any]:
            status, told = post(server.url, line, Authorization=f"Bearer {server.token}")
            assert (status, "error" in told) == (200, False)
            return told

        root, chat = changed("openai/chat: 7 RPM, 14,400 TPD\n")["limiters"]
        assert [each["amount"] for each in chat["limits"]] == [7, 14_400]
        assert [each["amount"] for each in root["limits"]] == [600]
        assert changed("openai: concurrency 9")["limiters"][0]["concurrency"] == 9
        assert changed("shadow off")["limiters"][0]["shadow"] is None
        assert 29 < changed("pause 30")["limiters"][0]["paused"] <= 30
        assert changed("resume")["limiters"][0]["paused"] == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer é"}, 401),
        ({"Authorization": "{token}", "Origin": "http://127.0.0.1:80"}, 403),
        ({"Authorization": "{token}", "Origin": "https://evil.example"}, 403),
        ({"Authorization": "{token}", "Host": "evil.example"}, 403),
        ({"Authorization": "{token}", "Content-Length": "x"}, 400),
    ],
)
def test_change_without_token_or_from_page_is_refused(headers: dict[str, str], status: int) -> None:
    limiter = busy()
    with limiter.serve_stats(port=0, control=True) as server:
        own = f"Bearer {server.token}"
        given = {name: value.replace("{token}", own) for name, value in headers.items()}
        assert post(server.url, "concurrency 9", **given)[0] == status
    assert limiter.concurrency == 3
    assert str(server.token) not in repr(server)


def test_nothing_changes_where_the_program_asked_for_no_control() -> None:
    with busy().serve_stats(port=0) as server:
        assert server.token is None
        for given in ("", "Bearer ", "Bearer None"):
            assert post(server.url, "concurrency 9", Authorization=given)[0] == 401


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "'' is not a limit; write e.g."),
        ("other: pause 1", "no limiter is called 'other': there are openai, openai/chat"),
        ("concurrency many", "'many' is not a number such as 500"),
        ("pause soon", "'soon' is not a number such as 500"),
        ("pause", "'pause' is not a limit"),
        ("9 RPM, pause 5", "'pause 5' is not a limit"),
        ("shadow on", "'shadow on' is not a limit"),
    ],
)
def test_line_that_cannot_be_understood_changes_nothing(line: str, message: str) -> None:
    limiter = busy()
    before = limiter.limits
    with limiter.serve_stats(port=0, control=True) as server:
        status, told = post(server.url, line, Authorization=f"Bearer {server.token}")
    assert (status, message in told["error"]) == (400, True), told
    assert limiter.limits == before
