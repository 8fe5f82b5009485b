"""`asyncbucket plan`: what people type, see and draw."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from asyncbucket.cli.app import app
from asyncbucket.cli.plan.options import EXAMPLES
from asyncbucket.cli.plan.report import columns_of
from asyncbucket.cli.plot import Canvas
from asyncbucket.plan import AgentTree, plan

EXAMPLE = (
    *("--calls", "10000", "--tokens", "800", "--rpm", "500", "--tpm", "200000"),
    *("--concurrency", "32", "--latency", "1.5"),
)


def typed(*arguments: str, status: int = 0) -> str:
    """Run the command and return what it printed, or its error."""
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_docs_example_prints_sentence_table_and_plot() -> None:
    """It is a sentence, a table and a plot that shows the limit."""
    lines = typed(*EXAMPLE).splitlines()

    assert lines[0] == "39 min 39 s, tokens bind: 10,000 calls with 8,000,000 tokens"
    assert any("200,000 tokens per 60 s" in line and "20 min 2 s (-49 %)" in line for line in lines)
    assert any(line.lstrip().startswith("4.2/s") for line in lines)
    assert "35 min" in lines[-1]


@pytest.mark.parametrize("line", [line for line in EXAMPLES.splitlines() if "plan " in line])
def test_examples_in_help_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example that people copy gives a plan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('"What is a bucket?"\n' * 50, "utf-8")

    _, command, *arguments = shlex.split(line)

    assert command == "plan"
    assert line.strip() in CliRunner().invoke(app, ["plan", "--help"]).stdout
    assert " calls" in typed(*arguments).splitlines()[0]


def test_json_has_the_fields_of_the_plan() -> None:
    """Its fields are those of the plan in Python."""
    planned = plan(calls=100, rpm=60, latency=[1.0, 2.0, 3.0], seed=7)

    shown = json.loads(
        typed("--calls", "100", "--rpm", "60", "--latency", "2", "--json", "--seed", "7")
    )

    assert shown.keys() == planned.as_dict().keys()
    assert shown["bound_by"] == "requests"


def test_numbers_may_have_separators_or_a_k_suffix() -> None:
    """They may have thousands separators or a letter, and so may tokens and latencies."""
    plain = typed("--calls", "3", "--tokens", "2000", "--tpm", "2000", "--json")
    assert typed("--calls", "3", "--tokens", "2k", "--tpm", "2k", "--json") == plain
    assert typed("--calls", "3", "--tokens", "2,000", "--tpm", "2,000", "--json") == plain


def test_token_and_latency_samples_are_read_from_files(tmp_path: Path) -> None:
    """A file of prompts gives tokens, and a log gives latencies."""
    prompts, log = tmp_path / "prompts.jsonl", tmp_path / "log.jsonl"
    prompts.write_text('"What is a bucket?"\n{"prompt": "And a token?"}\n', "utf-8")
    log.write_text("1.5\n2.5\n", "utf-8")

    shown = json.loads(typed("--tokens", str(prompts), "--latency", str(log), "--json"))

    assert (shown["calls"], shown["tokens"], shown["duration"]) == (2, 5 + 16, 2.5)


def test_agent_options_are_planned_as_an_agent_tree() -> None:
    """Each option is a dimension of the tree."""
    tree = AgentTree(agents=2, depth=2, fan_out=3, steps=2)

    shown = json.loads(
        typed(
            *("--agents", "2", "--depth", "2", "--fan-out", "3", "--steps", "2"),
            *("--latency", "1", "--json"),
        )
    )

    assert (shown["calls"], shown["duration"]) == (tree.calls, 4.0)


def test_limits_of_options_texts_and_preset_are_combined() -> None:
    """They come from options, texts and a preset."""
    shown = json.loads(
        typed(
            *("--calls", "5", "--tokens", "10", "--rpd", "9", "--also", "8 RPH"),
            *("--also", "7k TPD", "--preset", "openai/tier-2/gpt-4o-mini", "--json"),
        )
    )

    assert [limit["limit"] for limit in shown["limits"]] == [
        "8 requests per 3,600 s",
        "7,000 tokens per 86,400 s",
        "5,000 requests per 60 s",
        "2,000,000 tokens per 60 s",
        "9 requests per 86,400 s",
    ]


def test_outdated_preset_gives_a_one_line_note_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """The note does not show a line of code as a warning would, and goes to standard error."""
    monkeypatch.setattr("asyncbucket.core.presets._OLD", -1)

    result = CliRunner().invoke(
        app, ["plan", "--calls", "5", "--preset", "openrouter/free/any", "--json"]
    )

    assert result.stderr.startswith("note: the limits of 'openrouter/free/any' were read ")
    assert result.stderr.count("\n") == 1
    assert json.loads(result.stdout)["calls"] == 5


def test_tenant_options_set_calls_and_limits_per_tenant() -> None:
    """Each has its own calls, limits and share."""
    shown = json.loads(
        typed(
            *("--tpm", "60000", "--tokens", "1000", "--latency", "1", "--json"),
            *("--tenant", "acme weight=2 calls=60 latency=3"),
            *("--tenant", "bob calls=30 rpm=20 concurrency=2 priority=batch poisson=1"),
        )
    )

    assert {name: each["calls"] for name, each in shown["tenants"].items()} == {
        "acme": 60,
        "bob": 30,
    }
    assert [limit["tenant"] for limit in shown["limits"]] == [None, "bob", "bob"]


def test_tenants_are_listed_in_a_table() -> None:
    """It is below the table of limits."""
    shown = typed("--rpm", "60", "--tenant", "acme[eu] calls=90", "--tenant", "bob calls=30")

    assert "wait p95" in shown
    assert any(line.split()[:2] == ["acme[eu]", "90"] for line in shown.splitlines())


def test_plot_names_the_tenant_whose_limit_binds() -> None:
    """The caption says whose limit it is."""
    shown = typed("--tenant", "acme calls=90 rpm=60", "--tenant", "bob calls=30 rpm=60")

    assert shown.startswith("84.4 s, requests bind: 120 calls")
    assert "____ is the limit of acme: 60 requests per 60 s" in shown


def test_plan_without_waits_has_no_plot() -> None:
    """There is nothing to see."""
    assert "│" not in typed("--calls", "5", "--rpm", "500")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "error: how many calls? give calls, samples or a file of them, instants, or a tree"),
        (("--tenant", "a"), "error: how many calls? give calls, samples or a file of them"),
        (("--calls", "3", "--tenant", ""), "error: --tenant '': a name comes first, e.g."),
        (
            ("--calls", "3", "--also", "3 images/10s"),
            "error: a limit counts images, but nothing says how many a call takes: plan(..., res",
        ),
        (("--calls", "3", "--also", "many"), "error: 'many' is not a limit; write e.g."),
        (
            ("--calls", "3", "--tokens", "none.jsonl"),
            "error: 'none.jsonl' is neither a number nor a file that is there\n",
        ),
        (
            ("--calls", "3", "--depth", "2"),
            "error: --depth, --fan-out and --steps are about agents",
        ),
        (("--agents", "3", "--poisson", "2"), "error: --poisson and --agents are two ways"),
        (("--calls", "3", "--out", "plan.gif"), "error: a picture must be one of .png, .svg, .pdf"),
        (
            ("--tenant", "a calls=3 pace=2"),
            "error: --tenant 'a calls=3 pace=2': 'pace=2' is not of the form weight=2",
        ),
        (("--tenant", "weight=2 calls=3"), "error: --tenant 'weight=2 calls=3': a name comes fir"),
        (("--tenant", "a calls=few"), "error: --tenant: calls: 'few' is not a whole number"),
        (("--tenant", "a calls=0"), "error: --tenant: calls: '0' is not a whole number from 1 on"),
        (("--calls", "3", "--out", "none/x.svg"), "error: none/x.svg cannot be used (No such"),
        (("--tenant", "a calls=3 poisson=x"), "error: --tenant: poisson must be a number, not 'x'"),
        (("--tenant", "a calls=3", "--tenant", "a calls=4"), "error: --tenant 'a' is given twice"),
        (("--calls", "3", "--rpm", "5", "--latency", "1e300"), "error: a plan covers 292 years"),
        (("--calls", "3", "--rpm", "5", "--poisson", "1e-12"), "error: a plan covers 292 years"),
        (("--calls", "4000000000", "--rpm", "5"), "error: 4,000,000,000 calls are more than the"),
        (("--agents", "9", "--depth", "99", "--fan-out", "9"), "error: agents=9, depth=99, fan_"),
        (("--calls", "3", "--profile", "x"), "error: no profile is called 'x'; known: openai"),
        (("--calls", "3", "--preset", "x"), "error: no preset is called 'x'"),
        (("--calls", "3", "--tokens", "9", "--also", "5 TPM"), "error: no call can ever pass"),
    ],
)
def test_mistake_is_explained_with_status_2(arguments: tuple[str, ...], error: str) -> None:
    """There is no traceback."""
    assert typed(*arguments, status=2).startswith(error)


def test_plot_gives_peak_in_the_unit_of_its_axis() -> None:
    """A bare number would be read as one of those at the axis."""
    shown = typed("--agents", "3", "--rpm", "1", "--steps", "2", "--latency", "5")

    assert re.search(r"limit of 1 request per 60 s, \d+/h the peak\n +120/h ", shown)


@pytest.mark.parametrize("options", [(), ("--dark",)])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_picture_is_drawn_for_light_and_dark_pages(
    tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    """It is drawn for a light or a dark page."""
    path = tmp_path / f"plan.{kind}"

    shown = typed("--calls", "300", "--rpm", "60", "--out", str(path), *options)

    assert shown.endswith(f"drawn: {path}\n")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    if kind == "svg":
        assert (b"#17191c" in content) == bool(options)
        # The burst at the start goes beyond the scale.
        assert re.search(rb"<!-- admitted a second, [0-9.]+ the peak -->", content)


def test_picture_of_a_plan_without_waits_is_drawn(tmp_path: Path) -> None:
    """It has no limit, no alternatives and no duration."""
    path = tmp_path / "plan.png"

    typed("--calls", "3", "--out", str(path))

    assert path.stat().st_size > 1_000


def test_plot_columns_add_up_to_all_admissions() -> None:
    """This holds for all widths of columns and parts."""
    planned = plan(calls=500, rpm=60)
    canvas: Any = Canvas(seconds=planned.duration, width=70)

    columns = columns_of(planned, canvas)

    width = canvas.bins * canvas.bin / canvas.columns
    assert sum(columns) * width == pytest.approx(500)


def test_missing_matplotlib_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error is one line."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    error = typed("--calls", "3", "--out", str(tmp_path / "plan.png"), status=2)

    assert error.endswith('pip install "asyncbucket[plot]"\n')
