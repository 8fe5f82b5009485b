"""The command line as people see it: help, versions, errors, terminals and signals."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from asyncbucket import Limiter
from asyncbucket.cli import app as cli
from asyncbucket.cli import main
from tests.conftest import python

COMMANDS = sorted(getattr(get_command(cli.app), "commands", {}))


def test_version_option_shows_the_package_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.output == f"asyncbucket {version('asyncbucket')}\n"


@pytest.mark.parametrize(
    ("module", "extra"), [("typer", "cli"), ("llama_index", "cli"), ("uvicorn", "testing")]
)
def test_missing_extra_names_its_install_command(module: str, extra: str) -> None:
    program = f"""
import sys
from asyncbucket.cli import main
sys.modules[{module!r}] = None
sys.argv[1:] = ["demo"]
main()
"""
    result = python("-c", program)
    assert result.returncode == 2
    assert f" {module}" in result.stderr
    assert result.stderr.endswith(f'pip install "asyncbucket[{extra}]"\n')
    assert result.stderr.count("\n") == 1


def test_sigterm_ends_a_command_in_background_of_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's shell makes it ignore Ctrl-C, but not SIGTERM."""

    def ended(**_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "app", ended)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        main()
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])
    assert caught.value.code == 130


LOADED_BY_DEMO = [
    *("llama_index.core.agent.workflow", "llama_index.core.utils"),
    *("llama_index.embeddings.openai", "llama_index.llms.openai", "openai.resources"),
]


@pytest.mark.parametrize(
    ("command", "modules", "number"),
    [("plan", ["asyncbucket.cli.app"], signal.SIGINT), ("demo", LOADED_BY_DEMO, signal.SIGTERM)],
)
def test_signal_during_import_ends_command(command: str, modules: list[str], number: int) -> None:
    program = f"""
import contextlib, signal, sys, types
from asyncbucket.cli import main

class Loading(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith('_'):
            raise AttributeError(name)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal({number:d})
        return lambda *_, **__: ()

for name in {modules!r}:
    sys.modules[name] = Loading(name)
sys.argv = ["asyncbucket", {command!r}]
main()
"""
    done = python("-c", program)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("typed", ["0", "1.5"])
def test_invalid_number_is_quoted_with_its_bounds(typed: str) -> None:
    result = CliRunner().invoke(cli.app, ["demo", "--rpm", typed])
    assert result.exit_code == 2
    assert f"'--rpm': '{typed}' is not a whole number of at least 1, such as 500" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_fits_80_columns(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"], prog_name="asyncbucket")
    assert result.exit_code == 0
    assert f"asyncbucket {command}" in result.output.partition("Examples:")[2]
    assert [line for line in result.output.splitlines() if len(line) > 80] == []
    assert "[[" not in result.output


@pytest.mark.real_clock  # a terminal and a signal: another process's time
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("command", "shown", "number"),
    [("demo", "429s", signal.SIGINT), ("watch", "500 requests", signal.SIGTERM)],
)
def test_signal_ends_what_moves_and_restores_cursor(command: str, shown: str, number: int) -> None:
    ours, theirs = pty.openpty()
    with Limiter("500 RPM").serve_stats() as server, contextlib.ExitStack() as stack:
        arguments = [server.url] if command == "watch" else []
        process = subprocess.Popen(
            [sys.executable, "-m", "asyncbucket", command, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
            start_new_session=True,
        )
        stack.callback(process.kill)
        os.close(theirs)
        seen, is_sent = "", False
        with contextlib.suppress(OSError):  # it has ended, and nobody holds the other side
            while True:
                seen += os.read(ours, 65_536).decode(errors="replace")
                if shown in seen and not is_sent:
                    time.sleep(0.5)  # until it is at work: Python is noisy while it makes a loop
                    os.killpg(process.pid, number)
                    is_sent = True
        os.close(ours)
        assert process.wait() == 130, seen
    assert "Traceback" not in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1
