"""What is drawn in characters."""

import io

import pytest
from rich.console import Console

from asyncbucket.cli.ui import Bar, Panel, Screen, draw

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
