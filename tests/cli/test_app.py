"""The command line as people see it: help, versions and errors."""

import json
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncbucket.cli import app as cli
from asyncbucket.cli import main

WITHOUT = """
import sys
sys.modules[{module!r}] = None
sys.argv[1:] = {arguments!r}
from asyncbucket.cli import main
main()
"""


def without(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `asyncbucket` as if a module were not installed."""
    program = WITHOUT.format(module=module, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", ["", "demo", "plan", "run", "watch", "plot", "doctor"])
def test_help_has_an_example_and_fits_80_columns(command: str) -> None:
    """The help also says what the command is for."""
    given = [*command.split(), "--help"]

    result = CliRunner().invoke(cli.app, given, prog_name="asyncbucket", terminal_width=80)

    assert result.exit_code == 0
    assert f"asyncbucket {command or 'demo'}" in result.output.partition("Example")[2]
    assert max(map(len, result.output.splitlines())) <= 80


def test_version_option_shows_the_package_version() -> None:
    """`asyncbucket --version` shows it."""
    result = CliRunner().invoke(cli.app, ["--version"])

    assert result.output == f"asyncbucket {version('asyncbucket')}\n"


def test_python_m_asyncbucket_runs_the_command() -> None:
    """`python -m asyncbucket --version` works."""
    result = subprocess.run(
        [sys.executable, "-m", "asyncbucket", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert result.stdout.startswith("asyncbucket ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_cannot_be_written_is_a_one_line_error(option: str) -> None:
    """A full disk is not a bug of ours, so there is no traceback."""
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "asyncbucket", option],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert (result.returncode, result.stderr) == (
        2,
        "error: the output cannot be written (No space left on device): make room\n",
    )


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_missing_extra_names_its_install_command(module: str) -> None:
    """The error is one line without a traceback."""
    result = without(module, "demo")

    assert result.returncode != 0
    assert f'needs {module}: pip install "asyncbucket[cli]"' in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["llama_index", "starlette"])
def test_demo_without_its_dependencies_names_the_install_command(module: str) -> None:
    """LlamaIndex and the bundled provider are extras, too."""
    result = without(module, "demo")

    assert result.returncode == 2
    assert "pip install" in result.stderr
    assert "asyncbucket[" in result.stderr
    assert "Traceback" not in result.stderr


def test_error_is_one_line_with_status_2() -> None:
    """The user can correct an option that does not fit, so there is no traceback."""
    result = CliRunner().invoke(cli.app, ["demo", "--compare"])

    assert result.exit_code == 2
    assert result.stderr == (
        "error: --compare is for a real provider; the bundled one always compares\n"
    )


def test_ctrl_c_before_a_command_starts_exits_with_status_130(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C may come while modules load."""

    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        main()
    signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 130


def test_sigterm_ends_a_command_that_ignores_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's shell makes its background commands ignore Ctrl-C."""

    def terminated(**_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "app", terminated)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        main()
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])
    assert caught.value.code == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "name", "command"),
    [
        ("asyncbucket.cli.app", "app", "plan"),
        ("asyncbucket.cli.demo.half", "run_half", "demo"),
    ],
)
def test_signal_during_an_import_ends_the_command(
    module: str, name: str, command: str, number: int
) -> None:
    """What is raised there may be caught by Python itself, or by who loads an optional module."""
    program = f"""
import contextlib, signal, sys, types
from asyncbucket.cli import main

class Loading(types.ModuleType):
    def __getattr__(self, name):
        if name != {name!r}:
            raise AttributeError(name)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal({number:d})
        return lambda *_, **__: ()

sys.modules[{module!r}] = Loading({module!r})
sys.argv = ["asyncbucket", {command!r}]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_after_a_command_ended_does_not_change_its_status(number: int) -> None:
    """Python takes its time to unload what a command has loaded, and no longer handles signals."""
    program = f"""
import os, sys
from asyncbucket.cli import main

class Unloaded:
    def __del__(self, kill=os.kill, me=os.getpid()):
        kill(me, {number:d})

sys.argv, unloaded = ["asyncbucket", "--version"], Unloaded()
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_bench_outside_a_checkout_points_to_make_bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wheel has no benchmarks."""
    monkeypatch.setattr(cli, "TREE", tmp_path)

    result = CliRunner().invoke(cli.app, ["bench"])

    assert result.exit_code == 1
    assert "run `make bench` in a checkout" in result.stderr


def test_bench_passes_on_options_and_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It passes on the benchmarks' own options and their exit status."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__main__.py").write_text("import sys; sys.exit(sys.argv[1:] == ['--fast'] and 7)")
    monkeypatch.setattr(cli, "TREE", tmp_path)

    assert CliRunner().invoke(cli.app, ["bench", "--fast"]).exit_code == 7


@pytest.mark.parametrize(("typed", "read"), [("500", "500"), ("1,400", "1,400"), ("2k", "2,000")])
def test_numbers_may_be_typed_with_separators_or_a_k_suffix(typed: str, read: str) -> None:
    """They are written the same way in code, in the environment and in a terminal."""
    shown = CliRunner().invoke(
        cli.app, ["plan", "--calls=1", "--tokens=1", f"--tpm={typed}", "--json"]
    )

    (limit,) = json.loads(shown.stdout)["limits"]
    assert limit["limit"] == f"{read} tokens per 60 s"


def test_run_concurrency_takes_a_k_suffix(tmp_path: Path) -> None:
    """The word "auto" is accepted besides."""
    (tmp_path / "in.txt").write_text("Why?")
    typed = [
        "run",
        str(tmp_path / "in.txt"),
        "--dry-run",
        "--model",
        "m",
        "--json",
        "--concurrency",
    ]

    shown = CliRunner().invoke(cli.app, [*typed, "1.5k"])

    (limit,) = json.loads(shown.stdout)["plan"]["limits"]
    assert limit["limit"] == "1,500 at once"


@pytest.mark.parametrize(
    ("option", "typed", "end"),
    [("--rpm", "0", "on"), ("--rpm", "1.5", "on"), ("--agents", "10001", "to 10,000")],
)
def test_invalid_number_is_quoted_with_its_bounds(option: str, typed: str, end: str) -> None:
    """The error has the bounds, and shows how numbers are written."""
    result = CliRunner().invoke(cli.app, ["demo", option, typed])

    assert result.exit_code == 2
    assert f"'{option}': '{typed}' is not a whole number from 1 {end}, such as 500" in result.stderr
