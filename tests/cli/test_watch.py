"""What people see of `asyncbucket watch` and `asyncbucket plot`."""

import asyncio
import http.server
import json
import re
import socket
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from asyncbucket import CostExceedsLimit, Limiter
from asyncbucket.cli.app import app
from asyncbucket.cli.watch.screen import draw, plain
from asyncbucket.cli.watch.view import View, compare
from asyncbucket.telemetry import report
from asyncbucket.testing import VirtualTime

run = CliRunner()

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
    "limits": [
        {
            "limit": "300 requests per 60 s",
            "resource": "requests",
            "amount": 300,
            "used": 120,
            "available": 30,
        },
        {
            "limit": "10,000 tokens per 60 s",
            "resource": "tokens",
            "amount": 10_000,
            "used": 9_900,
            "available": 100,
        },
    ],
}


def shown(*, width: int, unicode: bool) -> list[str]:
    """Return the lines of the picture."""
    return plainly([View.of(LOOK, {**LOOK, "admitted": 110}, 2.0)], width=width, unicode=unicode)


def plainly(views: list[View], *, width: int, unicode: bool) -> list[str]:
    """Return the lines of views, drawn without colours."""
    from rich.console import Console

    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(draw(views, width=width, unicode=unicode))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_view_shows_binding_limit_and_estimated_wait() -> None:
    """If thirty wait and five a second pass, the last one waits for six seconds."""
    view = View.of(LOOK, {**LOOK, "admitted": 110}, 2.0)
    assert [bar.binds for bar in view.bars] == [False, True, False]
    assert view.alarming
    assert view.facts == (
        "paused for 1.5 s more",
        "30 waiting (about 6 s)",
        "120 admitted, 5.0/s now",
        "1 refused by the provider (429)",
        "2 turned away",
        "10 had to wait, 2.5 s on average",
    )


def test_pause_that_is_nearly_over_is_not_shown_as_zero() -> None:
    """A short pause is never shown as lasting 0.0 s more."""
    assert View.of({**LOOK, "paused": 0.02}, None, 0.0).facts[0] == "paused for 0.02 s more"


def test_view_marks_only_the_limit_that_binds(virtual_time: VirtualTime) -> None:
    """It is not the day's limit beside the minute's, nor that of a child held up by its parent."""

    async def main() -> None:
        limiter = Limiter(
            "60 RPM burst 1", "10k RPD", concurrency=2, name="openai", clock=virtual_time.clock
        )
        child = limiter.child("chat", "90 RPM", concurrency=5)
        callers = [asyncio.create_task(child.acquire(timeout=60).__aenter__()) for _ in range(3)]
        await asyncio.sleep(0)
        assert binding(limiter) == [["60 requests per 60 s"], []]

        await asyncio.sleep(10)
        assert child.statistics().bound_by == "concurrency"
        assert binding(limiter) == [["2 at once"], []]
        for caller in callers:
            caller.cancel()

    def binding(limiter: Limiter) -> list[list[str]]:
        views = compare(report([limiter])["limiters"], [], 0.0)
        return [[bar.limit for bar in view.bars if bar.binds] for view in views]

    virtual_time.run(main())


def test_view_fits_its_terminal() -> None:
    """This holds at 80 and at 160 columns, with block characters or without."""
    lines = shown(width=80, unicode=True)
    assert lines[0] == "openai"
    assert lines[2].endswith("99% ◀ binds")
    assert max(map(len, lines)) <= 80
    assert max(map(len, shown(width=160, unicode=True))) <= 160
    title, *below = [line for line in shown(width=50, unicode=True) if line]
    assert title == "openai"
    assert all(line.startswith("  ") for line in below)
    ascii_only = shown(width=80, unicode=False)
    assert "[####" in ascii_only[1]
    assert all("█" not in line for line in ascii_only)


@pytest.mark.parametrize("unicode", [True, False])
def test_limit_that_binds_by_its_burst_fits_on_one_line(*, unicode: bool) -> None:
    """Even the longest text fits behind the bar, though the labels leave it little room."""
    wide = {
        "limit": "40,000 tokens per 60 s",
        "resource": "tokens",
        "amount": 40_000,
        "used": 4_000,
        "available": 0,
    }
    view = View.of({**LOOK, "limits": [wide]}, None, 0.0)

    lines = plainly([view], width=70, unicode=unicode)

    assert lines[1].endswith("binds (paced)")


def test_pipe_gets_one_plain_line_per_limiter() -> None:
    """The lines suit grep, and have no colours."""
    (line,) = plain([View.of(LOOK, None, 0.0)])
    assert line.startswith(
        "openai: 120 of 300 requests per 60 s, 9,900 of 10,000 tokens per 60 s (binds), "
    )


def test_control_characters_in_names_do_not_reach_the_terminal() -> None:
    """A limiter may have any name, and what is watched may not be a limiter at all."""
    limits = [{**LOOK["limits"][0], "limit": "300 \x1b[2Jimages per 60 s"}]
    view = View.of({**LOOK, "name": "open\x1b[2Jai\n", "limits": limits}, None, 0.0)
    for shown in ("".join(plain([view])), "".join(plainly([view], width=80, unicode=True))):
        assert shown.isprintable()
        assert shown.startswith("open [2Jai")


def test_watch_shows_a_running_limiter_as_text_or_json() -> None:
    """It uses the limiter's address, and prints lines or JSON."""
    limiter = Limiter("600 RPM", name="openai")
    with limiter.acquire_nowait(), limiter.serve_stats() as server:
        text = run.invoke(app, ["watch", server.url, "--once"])
        told = run.invoke(app, ["watch", server.url, "--once", "--json"])
    assert text.exit_code == 0
    assert text.output.startswith("openai: 1 of 600 requests per 60 s, 0 waiting, 1 in flight")
    assert json.loads(told.output)["limiters"][0]["name"] == "openai"


@pytest.mark.parametrize("name", ["s", "a b#1?", "100%25"])
def test_watch_reads_a_unix_socket_of_any_name(tmp_path: Path, name: str) -> None:
    """It works as with a port, whatever the socket is called."""
    with Limiter("600 RPM", name="openai").serve_stats(path=tmp_path / name) as server:
        assert "openai" in run.invoke(app, ["watch", server.url, "--once"]).output


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        (
            "http://me:s3cret@127.0.0.1:1",
            1,
            "nobody serves statistics at http://me:***@127.0.0.1:1",
        ),
        ("http://127.0.0.1:1", 1, "nobody serves statistics at http://127.0.0.1:1"),
        ("limits", 2, "'limits' is not a limiter to watch"),
        ("localhost:4294", 2, "'localhost:4294' is not a limiter to watch: give the URL that"),
        ("https://example.org", 2, "is not a limiter to watch"),
        ("ftp://example.org", 2, "is not a store"),
        ("http://127.0.0.1:99999", 2, "'http://127.0.0.1:99999' names no port"),
        ("http://me:s3cret/x@127.0.0.1", 2, "'http://me:***@127.0.0.1' names no port: give one"),
    ],
)
def test_watch_explains_an_invalid_or_unreachable_url(url: str, status: int, message: str) -> None:
    """The exit status tells scripts what kind of error it is."""
    done = run.invoke(app, ["watch", url, "--once"])
    assert done.exit_code == status
    assert message in done.stderr


@pytest.mark.parametrize(
    "page",
    [b"<html>", b"[1]", b"{}", b"null", b'{"limiters": 5}', b'{"limiters": [{"name": 1}]}'],
    ids=repr,
)
def test_watch_reports_a_server_that_is_no_limiter(page: bytes) -> None:
    """It is easy to give the wrong port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        done = run.invoke(app, ["watch", f"http://127.0.0.1:{server.server_port}", "--once"])

    assert done.exit_code == 1
    assert "limiter.serve_stats()?\n" in done.stderr
    assert done.stderr.count("\n") == 1


def test_control_characters_of_a_foreign_server_do_not_reach_the_terminal() -> None:
    """Its first line may be anything, and is quoted."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"220 ready\x1b[2J\r\n")

        threading.Thread(target=answer).start()
        done = run.invoke(app, ["watch", f"http://127.0.0.1:{server.getsockname()[1]}", "--once"])

    assert done.exit_code == 1
    assert "(220 ready [2J )" in done.stderr


def test_watch_shows_the_same_limit_fields_for_store_and_program(tmp_path: Path) -> None:
    """A script can read both."""
    url = f"sqlite:///{tmp_path / 'limits.db'}"

    async def main() -> None:
        limiter = Limiter("60 RPM", concurrency=2, store=url, name="openai")
        (await limiter.acquire()).release()
        await limiter.aclose()

    asyncio.run(main())
    done = run.invoke(app, ["watch", url, "--once", "--json"])

    (seen,) = json.loads(done.stdout)["limiters"]
    (limit,) = seen["limits"]
    (served,) = report([Limiter("60 RPM")])["limiters"][0]["limits"]
    assert limit.keys() == served.keys()
    assert (seen["name"], limit["label"], limit["used"]) == ("openai", "rpm", 1)


def test_plot_draws_a_trace_on_light_or_dark_background(
    virtual_time: VirtualTime, tmp_path: Path
) -> None:
    """It draws on a light or a dark background."""
    limiter = Limiter("60 RPM burst 2", "1k TPM", clock=virtual_time.clock)

    async def main() -> None:
        with limiter.trace() as trace:
            for number in range(20):
                await limiter.acquire(tokens=10)
                if number == 10:
                    limiter.pause(3)
            trace.save(tmp_path / "trace.jsonl")

    virtual_time.run(main())
    for name, dark in (("light.png", []), ("dark.svg", ["--dark"])):
        done = run.invoke(
            app, ["plot", str(tmp_path / "trace.jsonl"), "-o", str(tmp_path / name), *dark]
        )
        assert done.exit_code == 0, done.output
        assert (tmp_path / name).stat().st_size > 5_000


@pytest.mark.parametrize("name", ["東京", "$5 {a_month$"])
def test_plot_draws_a_limiter_of_any_name(tmp_path: Path, name: str) -> None:
    """The name may lack a font or look like a formula; there is no warning of either."""
    limiter = Limiter("5 RPM", name=name)
    with limiter.trace() as trace:
        limiter.acquire_nowait().release()
    trace.save(tmp_path / "trace.jsonl")
    out = tmp_path / "out.png"

    done = run.invoke(app, ["plot", str(tmp_path / "trace.jsonl"), "-o", str(out)])

    assert (done.exit_code, done.output) == (0, f"drawn: {out}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing happened in this trace"),
        ("hello\n", "line 1: no trace; write one by limiter.trace().save()"),
        ("\udcff", "line 1: no trace"),
        ('{"limits": [], "limiter": "a"}\n', "nothing happened in this trace"),
        ('{"limits": [], "limiter": "a"}\n{"at": 1}\n', "line 2: no trace"),
        ('{"limits": []}\n{"event": "paused"}\n', "no trace, or one that was changed"),
    ],
)
def test_plot_refuses_an_invalid_or_empty_trace(tmp_path: Path, text: str, message: str) -> None:
    """The error names the line where it was noticed."""
    (tmp_path / "trace.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    done = run.invoke(app, ["plot", str(tmp_path / "trace.jsonl"), "-o", str(tmp_path / "out.png")])
    assert done.exit_code == 2
    assert message in done.stderr


def test_plot_draws_a_trace_without_admissions(tmp_path: Path) -> None:
    """There are only refused calls and a pause, so hardly a line."""
    limiter = Limiter("5 RPM", "5 TPM")
    with limiter.trace() as trace:
        with pytest.raises(CostExceedsLimit):
            limiter.acquire_nowait(tokens=9)
        limiter.pause(1)
    trace.save(tmp_path / "trace.jsonl")

    done = run.invoke(app, ["plot", str(tmp_path / "trace.jsonl"), "-o", str(tmp_path / "x.png")])

    assert done.exit_code == 0, done.output


def test_plot_marks_whole_units_on_its_axes(virtual_time: VirtualTime, tmp_path: Path) -> None:
    """A mark at 2.5 requests would read 2, and if nobody waited all marks would read 0."""
    limiter = Limiter("10/s", name="a", clock=virtual_time.clock)
    with limiter.trace() as trace:
        limiter.acquire_nowait()
    trace.save(tmp_path / "trace.jsonl")

    run.invoke(app, ["plot", str(tmp_path / "trace.jsonl"), "-o", str(tmp_path / "x.svg")])

    texts = re.findall("<!-- (.*) -->", (tmp_path / "x.svg").read_text())
    assert "a: 1 admission" in texts
    title = texts.index("in the last 1 s; limit 10")
    requests = [int(text) for text in texts[:title] if text.isdigit()]
    assert len({mark - before for before, mark in pairwise(requests)}) == 1
    assert [text for text in texts[title:] if text.isdigit()] == ["0", "1"]


def test_plot_error_lists_the_supported_formats(tmp_path: Path) -> None:
    """The error names them."""
    (tmp_path / "t").write_text(
        '{"limits": [], "limiter": "a"}\n{"event": "admitted", "at": 1, "cost": {}, "waiting": 0}\n'
    )
    done = run.invoke(app, ["plot", str(tmp_path / "t"), "-o", "out.gif"])
    assert "a picture must be one of .png, .svg, .pdf, not 'out.gif'" in done.stderr
