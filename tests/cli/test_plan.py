"""`asyncbucket plan` and `asyncbucket plot`: what people type, see and draw."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncbucket import Cost, CostExceedsLimit, Limiter
from asyncbucket.cli.app import app
from asyncbucket.plan import plan
from asyncbucket.testing import VirtualTime


def typed(line: str, *more: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, [*shlex.split(line), *more])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_docs_example_prints_what_the_plan_says() -> None:
    planned = plan(calls=10_000, tokens=800, rpm=500, tpm=200_000, concurrency=32, latency=1.5)
    options = "--calls 10000 --tokens 800 --rpm 500 --tpm 200000 --concurrency 32 --latency 1.5"
    assert typed(f"plan {options}") == f"{planned}\n"


def test_examples_in_help_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('"What is a bucket?"\n' * 50, "utf-8")
    lines = [line.strip() for line in typed("plan --help").splitlines()]
    examples = [line for line in lines if line.startswith("asyncbucket plan ")]
    assert len(examples) == 3
    for line in examples:
        assert " calls" in typed(line.removeprefix("asyncbucket ")).splitlines()[0]


@pytest.mark.parametrize("tokens", ["2000", "2k", "'{\"tokens\": 2000}'"])
def test_numbers_and_amounts_may_be_written_in_several_ways(tokens: str) -> None:
    told = json.loads(typed(f"plan --calls 3 --tokens {tokens} --tpm 2k --json"))
    assert (told["calls"], told["tokens"], round(told["duration"])) == (3, 6_000, 121)


def test_samples_limits_and_prices_are_read_from_files_and_options(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text('"What is a bucket?"\n{"prompt": "And a token?"}\n', "utf-8")
    (tmp_path / "log").write_text("1.5\n2.5\n", "utf-8")
    (tmp_path / "prices").write_text("[m]\ninput = 1\noutput = 4\n")
    files = f"{tmp_path}/prompts --latency {tmp_path}/log --prices {tmp_path}/prices --model m"
    limits = "--also '9 RPD' --also '7k TPD'"
    told = json.loads(typed(f"plan {files} {limits} --json"))
    assert (told["calls"], told["tokens"], told["duration"]) == (2, 5 + 16, 2.5)
    assert told["usd"] > 0
    limits_read = [limit["limit"] for limit in told["limits"]]
    assert limits_read == ["9 requests per 86,400 s", "7,000 tokens per 86,400 s"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("", "how many calls? give calls, or samples of tokens or latency, in a list or a file"),
        (
            "--calls 3 --tokens none.jsonl",
            "'none.jsonl' is neither a number, JSON, nor an existing file",
        ),
        ("--calls 3 --tokens {", "'{' is neither a number, JSON, nor an existing file"),
        ("a.jsonl --tokens 9", "'a.jsonl' and --tokens both say what calls cost"),
    ],
)
def test_mistake_is_explained_with_status_2(options: str, error: str) -> None:
    assert typed(f"plan {options}", status=2).startswith(f"error: {error}")


async def test_trace_is_drawn(virtual_time: VirtualTime, tmp_path: Path) -> None:
    """The name looks like a formula; a call is refused, and a limit admits nothing."""
    limits = ("60 RPM burst 2", "9 images/hour", "0.50 USD/hour")
    limiter = Limiter(*limits, name="$5 {a_month$", clock=virtual_time.clock)
    with limiter.trace() as trace:
        with pytest.raises(CostExceedsLimit):
            limiter.acquire_nowait(cost=Cost(images=10))
        for _ in range(20):
            await limiter.acquire(usd=0.02)
        limiter.pause(3)
    trace.save(tmp_path / "trace.jsonl")
    assert typed(f"plot {tmp_path}/trace.jsonl -o {tmp_path}/x.svg") == f"drawn: {tmp_path}/x.svg\n"
    content = (tmp_path / "x.svg").read_text()
    for text in ("$5 {a_month$: 20 admissions; paused", "in the last 60 s; limit 60", "waiting"):
        assert f"<!-- {text}" in content
    drawn = " ".join(re.findall(r' d="([^"]+)" clip-path', content))
    assert max(map(float, re.findall(r"[\d.]+", drawn))) < 1_000  # in the picture


@pytest.mark.parametrize(
    ("out", "error"),
    [
        ("x.docx", "Format 'docx' is not supported (supported formats: "),
        ("none/x.svg", "none/x.svg cannot be used (No such"),
        ("x", "'x' has no picture format: end the name in "),
    ],
)
def test_picture_that_cannot_be_drawn_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    paused = {"event": "paused", "at": 0, "seconds": 1}
    head = {"limiter": "openai", "limits": []}
    Path("trace.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(paused)}\n")
    assert typed(f"plot trace.jsonl -o {out}", status=2).startswith(f"error: {error}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert typed("plot trace.jsonl -o x.png", status=2).endswith('"asyncbucket[plot]"\n')


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
    assert message in typed(f"plot {tmp_path}/trace.jsonl -o {tmp_path}/out.png", status=2)
