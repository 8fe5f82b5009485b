"""`asyncbucket doctor`: what it finds, and what it advises."""

import pytest
from typer.testing import CliRunner

from asyncbucket.cli import doctor
from asyncbucket.cli.app import app


def typed() -> list[str]:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_packages_and_retries_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"httpx": "0.28", "openai": "2.54", "llama-index-llms-openai": "1"}
    monkeypatch.setattr(doctor, "version_of", installed.get)
    here, found, retries, remedy = typed()
    assert here.startswith("asyncbucket (not installed) on cpython 3")
    assert found == "packages: openai 2.54, llama-index-llms-openai 1, httpx 0.28"
    assert retries.startswith(
        "note: clients of openai, llama-index-llms-openai retry by themselves"
    )
    assert remedy.startswith("      -> limiter.wrap(...) and pace(...) leave one layer")


def test_nothing_is_advised_where_no_client_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed()[0].startswith("asyncbucket ")
    monkeypatch.setattr(doctor, "version_of", {"httpx": "0.28"}.get)
    assert typed()[1:] == ["packages: httpx 0.28"]
