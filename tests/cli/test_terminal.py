"""What a terminal of 80 columns shows, and a dumb one, and what Ctrl-C does there."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from asyncbucket import Limiter
from asyncbucket.cli.app import app

COMMANDS = sorted(set(getattr(get_command(app), "commands", {})) - {"bench"})
_PATIENCE = 60.0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_fits_80_columns(command: str) -> None:
    """The examples, which people copy, fit into 80 columns, too."""
    result = CliRunner().invoke(app, [command, "--help"], prog_name="asyncbucket")

    assert result.exit_code == 0
    assert f"asyncbucket {command}" in result.output.partition("Examples:")[2]
    assert [line for line in result.output.splitlines() if len(line) > 80] == []


def at_a_terminal(
    folder: Path, *arguments: str, terminal: str, interrupt_after: str = "", by: int = signal.SIGINT
) -> tuple[int, str]:
    """Run a command at a terminal, and interrupt it after a text. Return status and output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncbucket", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env={**os.environ, "TERM": terminal, "COLUMNS": "80"},
        start_new_session=True,
    )
    os.close(theirs)
    seen, end = "", time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if not select.select([ours], [], [], 0.05)[0]:
            continue
        try:
            seen += os.read(ours, 65_536).decode(errors="replace")
        except OSError:  # it has ended, and nobody holds the other side
            break
        if interrupt_after and interrupt_after in seen:
            time.sleep(0.5)  # until it is at work: Python itself is noisy while it makes a loop
            os.killpg(process.pid, by)
            interrupt_after = ""
    os.close(ours)
    process.kill()
    return process.wait(), seen


@pytest.mark.real_clock  # a terminal and a signal: another process's time
@pytest.mark.parametrize("terminal", ["xterm-256color", "dumb"])
def test_ctrl_c_ends_demo_without_traceback_and_restores_cursor(
    terminal: str, tmp_path: Path
) -> None:
    """It ends with status 130 and no traceback, and the cursor is back."""
    status, seen = at_a_terminal(
        tmp_path, "demo", "--seconds", "30", terminal=terminal, interrupt_after="without"
    )

    assert status == 130, seen
    assert "Traceback" not in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h")


@pytest.mark.real_clock  # a terminal and a signal: another process's time
def test_sigterm_ends_watch_without_traceback_and_restores_cursor(tmp_path: Path) -> None:
    """As with Ctrl-C there are status 130, no traceback, and the cursor."""
    with Limiter("500 RPM").serve_stats() as server:
        status, seen = at_a_terminal(
            tmp_path,
            *("watch", server.url),
            terminal="xterm-256color",
            interrupt_after="500 requests",
            by=signal.SIGTERM,
        )

    assert status == 130, seen
    assert "Traceback" not in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1


@pytest.mark.real_clock  # another process's time
def test_dumb_terminal_gets_no_escape_codes_and_no_wide_lines(tmp_path: Path) -> None:
    """A plan is shown as plain text."""
    status, seen = at_a_terminal(
        *(tmp_path, "plan", "--calls", "9000", "--tokens", "800", "--rpm", "500"),
        terminal="dumb",
    )

    assert status == 0, seen
    assert not re.search(r"\x1b", seen)
    assert [line for line in seen.splitlines() if len(line.rstrip()) > 80] == []
