"""`asyncbucket doctor`: what it finds, and what it advises."""

import json
import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncbucket.cli import doctor
from asyncbucket.cli.app import app


def typed(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == status, result.output
    return result.stdout


def test_findings_are_listed_once_each_and_counted_with_their_remedies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes it for a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    lines = typed().splitlines()
    findings = json.loads(typed("--json"))
    assert lines[0].split()[:2] == ["ok", "asyncbucket:"]
    assert lines[-1].startswith("0 wrong, ")
    assert max(map(len, lines)) <= 60
    assert all(line[:6].strip() in {"ok", "note", ""} for line in lines[:-1])
    assert len({each["found"] for each in findings}) == len(findings)
    assert all(each["remedy"] for each in findings if each["state"] != "good")


def test_reachable_store_is_reported_with_its_answer_time(tmp_path: Path) -> None:
    (line,) = [
        line
        for line in typed("--store", f"sqlite:///{tmp_path}/limits.db").splitlines()
        if " answers in " in line
    ]
    assert line.startswith("ok ")
    assert "/limits.db, size " in line


def test_slow_store_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SLOW", 0.0)
    finding = doctor.shared_store(f"sqlite:///{tmp_path}/limits.db")
    assert finding.state == "note"
    assert "keep the store near its workers" in str(finding.remedy)


def test_unreachable_store_is_named_without_its_password() -> None:
    pytest.importorskip("redis")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"redis://user:secret@127.0.0.1:{port}/0"  # closed by now
    (finding,) = (
        each
        for each in json.loads(typed("--json", "--store", url, status=1))
        if each["about"] == "store"
    )
    assert finding["state"] == "bad"
    assert finding["found"].count(f"redis://***@127.0.0.1:{port}/0") == 1
    assert "secret" not in finding["found"]
    assert finding["found"].endswith("; see whether it runs")


def test_store_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        finding = doctor.shared_store(f"redis://127.0.0.1:{mute.getsockname()[1]}/0")
    assert finding.state == "bad"
    assert "no answer within 0.1 s; see whether it runs" in finding.found


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        ({}, [("good", "")]),
        (
            {"httpx": "0.28", "openai": "2.54", "llama-index-llms-openai": "1"},
            [
                ("good", "openai 2.54, llama-index-llms-openai 1, httpx 0.28"),
                (
                    "note",
                    "clients of openai, llama-index-llms-openai retry by themselves, and layers of retries multiply",
                ),
            ],
        ),
    ],
)
def test_packages_and_retries_are_reported(
    installed: dict[str, str], found: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "version_of", installed.get)
    first, *rest = doctor.packages()
    assert first.found.startswith("(not installed) on cpython 3")
    assert [(each.state, each.found) for each in rest] == found


def test_version_of_what_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(doctor, "version", missing)
    assert doctor.version_of("asyncbucket") is None
