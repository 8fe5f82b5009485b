"""`asyncbucket plan`: what people type, see and draw."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncbucket.cli.app import app
from asyncbucket.plan import plan

EXAMPLE = (
    *("--calls", "10000", "--tokens", "800", "--rpm", "500", "--tpm", "200000"),
    *("--concurrency", "32", "--latency", "1.5"),
)


def typed(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_docs_example_prints_what_the_plan_says() -> None:
    planned = plan(calls=10_000, tokens=800, rpm=500, tpm=200_000, concurrency=32, latency=1.5)
    assert typed(*EXAMPLE) == f"{planned}\n"


def test_plan_says_what_a_job_costs(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[m]\ninput = 1\noutput = 4\n")
    options = ("--calls", "10", "--tokens", "100000", "--rpm", "500", "--model", "m")
    told = typed(*options, "--prices", str(prices))
    assert "this job costs 2.50 USD, 1.00 to 4.00\n" in told
    assert typed(*options, status=2).endswith("write it to a TOML file and give --prices\n")


def test_examples_in_help_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('"What is a bucket?"\n' * 50, "utf-8")
    lines = [line.strip() for line in typed("--help").splitlines()]
    examples = [line for line in lines if line.startswith("asyncbucket plan ")]
    assert len(examples) == 3
    for line in examples:
        assert " calls" in typed(*shlex.split(line)[2:]).splitlines()[0]


def test_numbers_may_have_separators_or_a_k_suffix() -> None:
    plain = typed("--calls", "3", "--tokens", "2000", "--tpm", "2000", "--json")
    assert typed("--calls", "3", "--tokens", "2k", "--tpm", "2k", "--json") == plain
    assert typed("--calls", "3", "--tokens", '{"tokens": 2000}', "--tpm", "2k", "--json") == plain


def test_token_and_latency_samples_are_read_from_files(tmp_path: Path) -> None:
    prompts, log = tmp_path / "prompts.jsonl", tmp_path / "log.jsonl"
    prompts.write_text('"What is a bucket?"\n{"prompt": "And a token?"}\n', "utf-8")
    log.write_text("1.5\n2.5\n", "utf-8")
    shown = json.loads(typed("--tokens", str(prompts), "--latency", str(log), "--json"))
    assert (shown["calls"], shown["tokens"], shown["duration"]) == (2, 5 + 16, 2.5)


def test_limits_of_options_texts_and_preset_are_combined() -> None:
    shown = json.loads(
        typed(
            *("--calls", "5", "--tokens", "10", "--also", "9 RPD", "--also", "8 RPH"),
            *("--also", "7k TPD", "--preset", "openai/tier-2/gpt-4o-mini", "--json"),
        )
    )
    assert [limit["limit"] for limit in shown["limits"]] == [
        "9 requests per 86,400 s",
        "8 requests per 3,600 s",
        "7,000 tokens per 86,400 s",
        "5,000 requests per 60 s",
        "2,000,000 tokens per 60 s",
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            (),
            "error: how many calls? give calls, or samples of tokens or latency, in a list or a file",
        ),
        (
            ("--calls", "3", "--tokens", "none.jsonl"),
            "error: 'none.jsonl' is neither a number nor a file that is there\n",
        ),
        (
            ("--calls", "3", "--out", "plan.docx"),
            "error: Format 'docx' is not supported (supported formats: ",
        ),
        (("--calls", "3", "--out", "none/x.svg"), "error: none/x.svg cannot be used (No such"),
        (("--calls", "3", "--profile", "x"), "error: no profile is called 'x'; known: openai"),
        (("--calls", "3", "--preset", "x"), "error: no preset is called 'x'"),
        (("--calls", "3", "--tokens", "{"), "error: '{' is not JSON: Expecting property name"),
        (("a.jsonl", "--tokens", "9"), "error: 'a.jsonl' and --tokens both say what calls cost"),
        (("--calls", "3", "--out", "plan"), "error: 'plan' shows no kind of picture: end it in "),
        (("--calls", "3", "--tokens", "9", "--also", "5 TPM"), "error: no call can ever pass"),
    ],
)
def test_mistake_is_explained_with_status_2(arguments: tuple[str, ...], error: str) -> None:
    assert typed(*arguments, status=2).startswith(error)
