"""The pictures that are drawn: of a plan, and of a trace."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncbucket import Cost, CostExceedsLimit, Limiter
from asyncbucket.cli.app import app
from asyncbucket.testing import VirtualTime

run = CliRunner()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plan.svg", "--calls 3000 --rpm 600"),
        ("plan.svg", "--calls 3000 --rpm 600 --dark"),
        ("plan.png", "--calls 3"),  # nobody waits, and it takes no time
    ],
)
def test_plan_is_drawn_light_and_dark(tmp_path: Path, name: str, options: str) -> None:
    path = tmp_path / name
    done = run.invoke(app, ["plan", *options.split(), "--out", str(path)])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, f"drawn: {path}")
    content = path.read_bytes()
    if name == "plan.svg":
        background = content.partition(b"patch_2")[0]
        assert (b"fill: #ffffff" in background) == ("--dark" not in options)
        assert b"<!-- 600 requests per 60 s: 10/s in the long run -->" in content
    else:
        assert content.startswith(b"\x89PNG")


def test_missing_matplotlib_names_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run.invoke(app, ["plan", "--calls", "3", "--out", str(tmp_path / "plan.png")])
    assert done.exit_code == 2
    assert done.stderr.endswith('pip install "asyncbucket[plot]"\n')


@pytest.mark.parametrize("options", [[], ["--dark"]])
async def test_trace_is_drawn_light_and_dark(
    options: list[str], virtual_time: VirtualTime, tmp_path: Path
) -> None:
    """The name looks like a formula; a call is refused, and a limit admits nothing."""
    limiter = Limiter(
        "60 RPM burst 2", "9 images/hour", name="$5 {a_month$", clock=virtual_time.clock
    )
    with limiter.trace() as trace:
        with pytest.raises(CostExceedsLimit):
            limiter.acquire_nowait(cost=Cost(images=10))
        for _ in range(20):
            await limiter.acquire()
        limiter.pause(3)
    trace.save(tmp_path / "trace.jsonl")
    done = run.invoke(app, ["plot", f"{tmp_path}/trace.jsonl", "-o", f"{tmp_path}/x.svg", *options])
    assert (done.exit_code, done.output) == (0, f"drawn: {tmp_path}/x.svg\n")
    content = (tmp_path / "x.svg").read_text()
    for text in ("$5 {a_month$: 20 admissions; paused", "in the last 60 s; limit 60", "waiting"):
        assert f"<!-- {text}" in content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "is not a trace (KeyError('limiter')); write one with limiter.trace().save()"),
        ("hello\nworld\n", "is not a trace (JSONDecodeError("),
        ('{"limits": [], "limiter": "a"}\n', "nothing happened in this trace"),
    ],
)
def test_plot_refuses_other_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trace.jsonl").write_text(text)
    done = run.invoke(app, ["plot", f"{tmp_path}/trace.jsonl", "-o", f"{tmp_path}/out.png"])
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
