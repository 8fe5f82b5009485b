"""The pictures that are drawn: of a plan, and of a trace."""

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncbucket import CostExceedsLimit, Limiter
from asyncbucket.cli.app import app
from asyncbucket.telemetry import Trace
from asyncbucket.testing import VirtualTime

run = CliRunner()
PLAN = ("plan", "--calls", "3000", "--rpm", "600", "--out")


@pytest.mark.parametrize("options", [(), ("--dark",)])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plan_is_drawn_light_and_dark(tmp_path: Path, kind: str, options: tuple[str, ...]) -> None:
    path = tmp_path / f"plan.{kind}"
    done = run.invoke(app, [*PLAN, str(path), *options])
    assert done.exit_code == 0, done.output
    assert done.output.endswith(f"drawn: {path}\n")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    if kind == "svg":
        assert (b"#17191c" in content) == bool(options)
        # The burst at the start goes beyond the scale.
        assert re.search(rb"<!-- admitted a second, [0-9.]+ the peak -->", content)
        assert re.search(rb"<!-- 600 requests per 60 s: 10/s in the long run -->", content)


def test_plan_of_few_calls_is_drawn_in_wide_bars(tmp_path: Path) -> None:
    """A bar a call would show a comb of zeros and ones, far above the limit's line."""
    path = tmp_path / "plan.svg"
    assert (
        run.invoke(app, ["plan", "--calls", "50", "--rpm", "10", "--out", str(path)]).exit_code == 0
    )
    (bars,) = re.findall(
        rb'<path d="([^"]+)" clip-path="[^"]+" style="fill: #1f9d55', path.read_bytes()
    )
    assert 0 < bars.count(b"L") <= 2 * 12


def test_plan_without_waits_or_duration_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    assert run.invoke(app, ["plan", "--calls", "3", "--out", str(path)]).exit_code == 0
    assert path.stat().st_size > 1_000


def test_missing_matplotlib_names_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run.invoke(app, [*PLAN, str(tmp_path / "plan.png")])
    assert done.exit_code == 2
    assert done.stderr.endswith('pip install "asyncbucket[plot]"\n')


def drawn(trace: Trace, folder: Path, name: str, *options: str) -> Path:
    trace.save(folder / "trace.jsonl")
    done = run.invoke(app, ["plot", f"{folder}/trace.jsonl", "-o", f"{folder}/{name}", *options])
    assert (done.exit_code, done.output) == (0, f"drawn: {folder}/{name}\n")
    return folder / name


async def test_trace_is_drawn_light_and_dark(virtual_time: VirtualTime, tmp_path: Path) -> None:
    limiter = Limiter("60 RPM burst 2", "1k TPM", clock=virtual_time.clock)
    trace = limiter.trace()

    for number in range(20):
        await limiter.acquire(tokens=10)
        if number == 10:
            limiter.pause(3)
    for name, options in (("light.png", ()), ("dark.svg", ("--dark",))):
        assert drawn(trace, tmp_path, name, *options).stat().st_size > 5_000


@pytest.mark.parametrize("name", ["東京", "$5 {a_month$"])
def test_trace_of_any_name_and_without_admissions_is_drawn(tmp_path: Path, name: str) -> None:
    """The name may lack a font or look like a formula; there is no warning of either."""
    limiter = Limiter("5 RPM", "5 TPM", name=name)
    with limiter.trace() as trace:
        with pytest.raises(CostExceedsLimit):
            limiter.acquire_nowait(tokens=9)
        limiter.pause(1)
    drawn(trace, tmp_path, "out.png")


HEAD = '{"limits": [], "limiter": "a"}\n'


@pytest.mark.parametrize(
    ("text", "out", "message"),
    [
        ("", "out.png", "nothing happened in this trace"),
        ("hello\nworld\n", "out.png", "write one with limiter.trace().save()"),
        ("\udcff\n" * 2, "out.png", "is not a trace, or somebody changed it"),
        (HEAD + '{"at": 1}\n', "out.png", "is not a trace, or somebody changed it"),
        (
            '{"limits": []}\n{"event": "paused"}\n',
            "out.png",
            "is not a trace, or somebody changed it",
        ),
        (
            HEAD + '{"event": "queued", "at": 1, "waiting": 0}\n',
            "out.docx",
            "Format 'docx' is not supported (supported formats: ",
        ),
    ],
)
def test_plot_refuses_other_files(tmp_path: Path, text: str, out: str, message: str) -> None:
    (tmp_path / "trace.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    done = run.invoke(app, ["plot", f"{tmp_path}/trace.jsonl", "-o", f"{tmp_path}/{out}"])
    assert done.exit_code == 2
    assert message in done.stderr
