"""What is drawn in characters: panels, and what a run shows."""

import asyncio
import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from asyncbucket import Limiter
from asyncbucket.cli.run import Job
from asyncbucket.cli.run.screen import Tally, show_progress, summary
from asyncbucket.cli.ui import Bar, Panel, Screen, draw
from asyncbucket.testing import VirtualTime

PANEL = Panel(
    "openai",
    (
        Bar("120 of 300 requests per 60 s", 0.4),
        Bar("9,900 of 10,000 tokens per 60 s", 0.99, "binds", "red"),
    ),
    ("30 waiting (about 6 s)", "120 admitted, 5.0/s now", "10 had to wait, 2.5 s on average"),
)


def console(*, width: int = 80, unicode: bool = True) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), "utf-8" if unicode else "ascii")
    return Console(file=file, width=width, color_system=None)


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize("unicode", [True, False])
def test_panel_fits_its_terminal_with_facts_indented(*, width: int, unicode: bool) -> None:
    on = console(width=width, unicode=unicode)
    with on.capture() as captured:
        on.print(draw([PANEL]))
    title, *below = [line.rstrip() for line in captured.get().splitlines() if line.strip()]
    assert title == "openai"
    assert below[1].endswith("99%  < binds")
    assert ("━━━━" if unicode else "----") in below[1]
    assert all(line.startswith("  ") and len(line) <= width for line in below)
    assert unicode or all(line.isascii() for line in below)


def test_pipe_gets_one_line_per_panel() -> None:
    on = console()
    with on.capture() as captured, Screen(on) as screen:
        screen.show([PANEL, PANEL])
    first, second = captured.get().splitlines()
    assert first == second == str(PANEL)
    assert first.startswith(
        "openai: 120 of 300 requests per 60 s, 9,900 of 10,000 tokens per 60 s (binds), 30 waiting"
    )


# --- what a run shows: on a terminal of 80 columns, in a pipe, and at its end ---


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
JOB = Job(source=Path("in.jsonl"), out=Path("out.jsonl"), rpm=500)


TALLY = Tally(5_000, answered=1_234, answered_earlier=1_000, failed=7, bad=3, seconds=100.0)


@pytest.mark.parametrize(
    ("terminal", "stopped", "times", "expected"),
    [
        (
            True,
            False,
            1,
            r"2,244 of 5,000 ━+ 45% [\d,]+/s, 0:\d\d:\d\d left, 0 in flight, 1 429s, 7 f",
        ),
        (True, True, 1, r"2,244 of 5,000 ━+ 45% stopping, 0 in flight, 1 429s, 7 failed, 3 bad"),
        (False, False, 3, "progress: 2,244 of 5,000, "),  # a line every ten seconds
    ],
)
async def test_progress_is_shown_on_80_columns_or_in_lines(
    *, terminal: bool, stopped: bool, times: int, expected: str, virtual_time: VirtualTime
) -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=terminal, color_system=None)
    limiter = Limiter("500 RPM", clock=virtual_time.clock)
    limiter.pause(0, reason="429")
    with Screen(console) as screen:
        tally = replace(TALLY, stopped=stopped)
        showing = asyncio.create_task(show_progress(screen, tally, limiter))
        await asyncio.sleep(1 if terminal else 35)
        showing.cancel()
        await asyncio.wait([showing])
    output = ESCAPES.sub("", file.getvalue())
    assert len(re.findall(expected, " ".join(output.split()))) >= times
    assert max(map(len, output.splitlines())) <= 80 or not terminal


def test_summary_counts_every_line_and_names_errors() -> None:
    errors = Counter({"http_500": 6, "bad_line": 1})
    tally = replace(TALLY, errors=errors, first_error="over\x1bloaded")
    assert summary(JOB, tally).splitlines() == [
        "done in 1 min 40 s: 1,234 answered and 1,000 earlier, 7 failed, 3 bad lines",
        "0 requests (12.3 answers/s), 0 429s, 0 + 0 tokens",
        "errors: 6 x http_500, 1 x bad_line; the first: over loaded",
        "answers: out.jsonl, failed lines: out.errors.jsonl",
    ]
