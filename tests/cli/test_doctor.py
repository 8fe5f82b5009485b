"""`asyncbucket doctor`: what it finds, and what it advises."""

import socket
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
    found = [*doctor.packages()]
    lines = typed().splitlines()
    assert any(line.startswith("      -> limiter.wrap(...) and pace(...)") for line in lines)
    assert lines[0].split()[:2] == ["ok", "asyncbucket:"]
    assert lines[-1].startswith("0 wrong, ")
    assert max(map(len, lines)) <= 60
    assert all(line[:6].strip() in {"ok", "note", ""} for line in lines[:-1])
    assert len({each.found for each in found}) == len(found)
    assert all(each.remedy for each in found if each.state != "good")


@pytest.mark.parametrize(("slow", "state"), [(9.0, "good"), (0.0, "note")])
def test_store_is_reported_with_its_answer_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: float, state: str
) -> None:
    monkeypatch.setattr(doctor, "_SLOW", slow)
    finding = doctor.shared_store(f"sqlite:///{tmp_path}/limits.db")
    assert finding.state == state
    assert " answers in " in finding.found
    assert "/limits.db answers in " in finding.found
    assert (finding.remedy is None) == (state == "good")


def test_unreachable_store_is_named_without_its_password() -> None:
    pytest.importorskip("redis")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"redis://user:secret@127.0.0.1:{port}/0"  # closed by now
    said = typed("--store", url, status=1)
    assert "\nBAD   store: " in said
    assert said.count(f"redis://***@127.0.0.1:{port}/0") == 1
    assert "secret" not in said
    assert "; see whether it runs" in said


def test_store_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        finding = doctor.shared_store(f"redis://127.0.0.1:{mute.getsockname()[1]}/0")
    assert finding.state == "bad"
    assert "no answer within 0.1 s; see whether it runs" in finding.found


def test_packages_and_retries_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"httpx": "0.28", "openai": "2.54", "llama-index-llms-openai": "1"}
    monkeypatch.setattr(doctor, "version_of", installed.get)
    first, found, retries = doctor.packages()
    assert first.found.startswith("(not installed) on cpython 3")
    assert found.found == "openai 2.54, llama-index-llms-openai 1, httpx 0.28"
    assert retries.found.startswith("clients of openai, llama-index-llms-openai retry by")
