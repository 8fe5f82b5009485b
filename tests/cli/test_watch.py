"""What people see of `asyncbucket watch`."""

import asyncio
import json
import socket
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from asyncbucket import Limiter
from asyncbucket.cli.app import app
from asyncbucket.cli.ui import Panel
from asyncbucket.cli.watch import compare
from asyncbucket.engine.statistics import ShadowStatistics
from asyncbucket.telemetry import report
from asyncbucket.testing import VirtualTime

run = CliRunner()


def limit(resource: str, amount: int, used: int, available: int) -> dict[str, Any]:
    shown = f"{amount:,} {resource} per 60 s"
    told = {"limit": shown, "resource": resource, "amount": amount, "used": used}
    return told | {"available": available}


LOOK: dict[str, Any] = {
    "name": "openai",
    "admitted": 120,
    "refused": 2,
    "cancelled": 0,
    "waiting": 30,
    "in_flight": 8,
    "concurrency": 8,
    "paused": 1.5,
    "upstream_429": 1,
    "bound_by": "tokens",
    "waits": {"tokens": {"count": 10, "seconds": 25.0}},
    "limits": [limit("requests", 300, 120, 30), limit("tokens", 10_000, 9_900, 100)],
}


def panel_of(now: dict[str, Any], *before: dict[str, Any]) -> Panel:
    (panel,) = compare([now], before, 2.0)
    return panel


def test_panel_shows_binding_limit_and_estimated_wait() -> None:
    requests, tokens = LOOK["limits"]
    learned: dict[str, Any] = {
        "limits": [requests | {"belief": "the provider announces 60 requests"}, tokens]
    }
    shadow = ShadowStatistics(1_200, 30, 2.5, would_fail=0, prevented=3, refusals=4)
    learned["shadow"] = asdict(shadow)
    panel = panel_of(LOOK | learned, {**LOOK, "admitted": 110})
    assert [(bar.note, bar.style) for bar in panel.bars] == [
        *(("", "green"), ("binds", "red"), ("", "yellow"))
    ]
    assert panel.facts == (
        "paused for 1.5 s more",
        "30 waiting (about 6 s)",
        "the provider announces 60 requests",
        "120 admitted, 5.0/s now",
        f"in shadow: {shadow}",
        "1 refused by the provider (429)",
        "2 turned away",
        "10 had to wait, 2.5 s on average",
    )


def test_dollars_are_shown_as_dollars_and_a_burst_that_binds_as_pace() -> None:
    money = {**limit("usd", 25_000_000, 1_230_000, 23_770_000), "limit": "25 USD per 86,400 s"}
    panel = panel_of({**LOOK, "limits": [money, limit("tokens", 10_000, 4_000, 0)]})
    assert panel.bars[0].label == "1.23 of 25 USD per 86,400 s"
    assert panel.bars[1].note == "binds, paced"


async def test_only_the_limit_that_binds_is_marked(virtual_time: VirtualTime) -> None:
    """Not the day's limit beside the minute's, nor that of a child held up by its parent."""

    def binding(limiter: Limiter) -> list[list[str]]:
        panels = compare(report([limiter])["limiters"], [], 0.0)
        return [[bar.label for bar in panel.bars if bar.note] for panel in panels]

    limiter = Limiter(
        "60 RPM burst 1", "10k RPD", concurrency=2, name="openai", clock=virtual_time.clock
    )
    child = limiter.child("chat", "90 RPM", concurrency=5)
    callers = [asyncio.ensure_future(child.acquire(timeout=60).__aenter__()) for _ in range(3)]
    await asyncio.sleep(0)
    assert binding(limiter) == [["1 of 60 requests per 60 s"], []]
    await asyncio.sleep(10)
    assert child.statistics().bound_by == "concurrency"
    assert binding(limiter) == [["2 of 2 at once"], []]
    for caller in callers:
        caller.cancel()


def test_control_characters_in_names_do_not_reach_the_terminal() -> None:
    limits = [limit("\x1b[2Jimages", 300, 120, 30)]
    shown = str(panel_of({**LOOK, "name": "open\x1b[2Jai\n", "limits": limits}))
    assert shown.isprintable()
    assert shown.startswith("open [2Jai")


def test_watch_shows_a_running_limiter_as_text_or_json() -> None:
    limiter = Limiter("600 RPM", name="openai")
    with limiter.acquire_nowait(), limiter.serve_stats() as server:
        text = run.invoke(app, ["watch", server.url, "--once"])
        told = run.invoke(app, ["watch", server.url, "--once", "--json"])
    assert text.exit_code == 0
    assert text.output.startswith("openai: 1 of 600 requests per 60 s, 0 waiting, 1 in flight")
    assert json.loads(told.output)["limiters"][0]["name"] == "openai"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:s3cret@127.0.0.1:1", "nothing serves statistics at http://***@127"),
        ("http://me:s3cret/x@127.0.0.1", "at http://***@127.0.0.1 (InvalidURL)"),
        ("localhost:4294", "serve_stats() returns, such as http://127.0.0.1:4294\n"),
    ],
)
def test_watch_explains_an_invalid_or_unreachable_url(url: str, message: str) -> None:
    done = run.invoke(app, ["watch", url, "--once"])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "s3cret" not in done.stderr


OK = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [b"220 ready\x1b[2J\r\n", *(OK + page for page in (b"<html>", b"[1]", b"{}", b"null"))],
)
def test_watch_reports_a_server_that_is_no_limiter(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)

        threading.Thread(target=serve).start()
        done = run.invoke(app, ["watch", f"http://127.0.0.1:{server.getsockname()[1]}", "--once"])
    assert done.exit_code == 2
    assert "nothing serves statistics" in done.stderr
    assert done.stderr.count("\n") == 1


def test_watch_shows_the_same_limit_fields_for_store_and_program(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'limits.db'}"

    with Limiter("60 RPM", concurrency=2, store=url, name="openai").acquire_sync():
        pass
    done = run.invoke(app, ["watch", url, "--once", "--json"])
    (seen,) = json.loads(done.stdout)["limiters"]
    (limit,) = seen["limits"]
    (served,) = report([Limiter("60 RPM")])["limiters"][0]["limits"]
    assert limit.keys() == served.keys()
    assert (seen["name"], limit["label"], limit["used"]) == ("openai", "rpm", 1)


def test_watch_ends_well_when_the_program_does() -> None:
    server = Limiter("600 RPM", name="openai").serve_stats()
    threading.Timer(0.3, server.close).start()
    done = run.invoke(app, ["watch", server.url, "--interval", "0.1"])
    assert (done.exit_code, done.stderr) == (0, "the program that was watched has ended\n")
    assert done.stdout.count("openai") >= 1


def test_typed_lines_change_the_limiters_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def press_ctrl_c(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", press_ctrl_c)
    limiter = Limiter("60 RPM", name="openai")
    chat = limiter.child("chat")
    with limiter.serve_stats(port=0, control=True) as server:

        def typed(lines: str, token: object) -> Any:
            return run.invoke(app, ["watch", server.url, "--token", str(token)], input=lines)

        done = typed("9 RPM\nsoon\nopenai/chat: 5 RPM\n", server.token)
        assert (limiter.limits[0].amount, chat.limits[0].amount) == (9, 5)
        assert "openai: 0 of 9 requests per 60 s" in done.stdout
        hint, *said = done.stderr.splitlines()
        assert hint == "Press Ctrl-C to change a limiter, twice to leave."
        assert said[0] == said[4] == "Done."
        assert said[2].startswith("'soon' is not a limit; write e.g.")
        assert "openai/chat: 600 RPM, 200k TPM | concurrency 8 | pause 60" in done.stdout
        wrong = typed("9 RPM\n", "wrong").stderr
        assert "it takes the token that serve_stats(control=True) prints" in wrong
