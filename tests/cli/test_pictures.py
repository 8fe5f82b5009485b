"""The pictures that are drawn: of a plan, and of a trace."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncbucket import CostExceedsLimit, Limiter
from asyncbucket.cli.app import app
from asyncbucket.testing import VirtualTime

run = CliRunner()
PLAN = ("plan", "--calls", "300", "--rpm", "60", "--out")


@pytest.mark.parametrize("options", [(), ("--dark",)])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plan_is_drawn_for_light_and_dark_pages(
    tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
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
        assert re.search(rb"<!-- 60 requests per 60 s: 1/s in the long run -->", content)


def test_plan_without_waits_or_duration_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"

    assert run.invoke(app, ["plan", "--calls", "3", "--out", str(path)]).exit_code == 0
    assert path.stat().st_size > 1_000


def test_missing_matplotlib_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    done = run.invoke(app, [*PLAN, str(tmp_path / "plan.png")])

    assert done.exit_code == 2
    assert done.stderr.endswith('pip install "asyncbucket[plot]"\n')


def test_plot_draws_a_trace_on_light_or_dark_background(
    virtual_time: VirtualTime, tmp_path: Path
) -> None:
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
        ('{"limits": [], "limiter": "a"}\n', "nothing happened in this trace"),
        ("hello\nworld\n", "write one by limiter.trace().save()"),
        ("\udcff\n" * 2, "no trace, or one that was changed"),
        ('{"limits": [], "limiter": "a"}\n{"at": 1}\n', "no trace, or one that was changed"),
        ('{"limits": []}\n{"event": "paused"}\n', "no trace, or one that was changed"),
    ],
)
def test_plot_refuses_an_invalid_or_empty_trace(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trace.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    done = run.invoke(app, ["plot", str(tmp_path / "trace.jsonl"), "-o", str(tmp_path / "out.png")])
    assert done.exit_code == 2
    assert message in done.stderr


def test_plot_draws_a_trace_without_admissions(tmp_path: Path) -> None:
    limiter = Limiter("5 RPM", "5 TPM")
    with limiter.trace() as trace:
        with pytest.raises(CostExceedsLimit):
            limiter.acquire_nowait(tokens=9)
        limiter.pause(1)
    trace.save(tmp_path / "trace.jsonl")

    done = run.invoke(app, ["plot", str(tmp_path / "trace.jsonl"), "-o", str(tmp_path / "x.png")])

    assert done.exit_code == 0, done.output


def test_plot_marks_whole_units_on_its_axes(virtual_time: VirtualTime, tmp_path: Path) -> None:
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
    (tmp_path / "t").write_text(
        '{"limits": [], "limiter": "a"}\n{"event": "admitted", "at": 1, "cost": {}, "waiting": 0}\n'
    )
    done = run.invoke(app, ["plot", str(tmp_path / "t"), "-o", "out.docx"])
    assert "Format 'docx' is not supported (supported formats: " in done.stderr
