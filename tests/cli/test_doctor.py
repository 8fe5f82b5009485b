"""`asyncbucket doctor`: what it finds, and what it advises."""

import json
import socket
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncbucket.cli import doctor
from asyncbucket.cli.app import app


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:

    def pretend(**versions: str) -> None:
        found = {name.replace("_", "-"): number for name, number in versions.items()}
        monkeypatch.setattr(doctor, "version_of", found.get)

    return pretend


def said(findings: Iterable[doctor.Finding]) -> list[tuple[str, str]]:
    return [(each.state, each.found) for each in findings]


def typed(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
    assert len({each["found"] for each in findings}) == len(findings)
    assert all(each.keys() == {"about", "state", "found", "remedy"} for each in findings)
    assert all(each["remedy"] for each in findings if each["state"] != "good")


def test_reachable_store_is_reported_with_its_answer_time(tmp_path: Path) -> None:
    shown = " ".join(typed("--store", f"sqlite:///{tmp_path}/limits.db").split())
    assert " answers in " in shown


def store_finding(url: str) -> dict[str, str]:
    found = json.loads(typed("--json", "--store", url, status=1))
    (finding,) = (each for each in found if each["about"] == "store")
    return {**finding}


def test_unreachable_store_is_named_without_its_password() -> None:
    pytest.importorskip("redis")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    finding = store_finding(f"redis://user:secret@127.0.0.1:{port}/0")  # closed by now
    assert finding["found"].count(f"redis://***@127.0.0.1:{port}/0") == 1
    assert "secret" not in finding["found"]
    assert finding["found"].endswith("; see whether it runs")


def test_store_file_in_missing_folder_is_reported_with_one_remedy(tmp_path: Path) -> None:
    finding = store_finding(f"sqlite:///{tmp_path}/nowhere/limits.db")
    assert f"see that the folder {tmp_path}/nowhere exists" in finding["found"]
    assert finding["remedy"] is None


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        ({}, [("note", "no client is installed, so limiter.transport() has nothing to pace")]),
        (
            {"httpx": "0.28", "openai": "2.54", "llama_index_llms_openai": "1"},
            [
                *(("good", "httpx 0.28"), ("good", "2.54, uses httpx")),
                ("note", "openai's clients, LlamaIndex's OpenAI retry by themselves, and layers of retries multiply"),
            ],
        ),
    ],
)  # fmt: skip
def test_http_clients_sdks_and_retries_are_reported(
    installed: dict[str, str], found: list[tuple[str, str]], only: Callable[..., None]
) -> None:
    only(**installed)
    assert said(doctor.http_clients()) == found


@pytest.mark.parametrize(
    ("httpx2", "state", "found"),
    [
        ("2.16", "good", "3.1.0, uses httpx2"),
        (None, "bad", "3.1.0 uses httpx2, which is not"),
    ],
)
def test_sdk_is_checked_for_the_http_library_of_its_version(
    httpx2: str | None, state: str, found: str, only: Callable[..., None]
) -> None:
    only(openai="3.1.0", httpx="0.28", httpx2=httpx2)
    (sdk,) = (each for each in doctor.http_clients() if each.about == "openai")
    assert sdk.state == state
    assert sdk.found.startswith(found)


def test_version_out_of_range(monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]) -> None:
    wanted = ['llama-index-core<0.15,>=0.14.21; extra == "llama-index"', "rich>=14.2"]
    monkeypatch.setattr(doctor, "requires", {"asyncbucket": wanted}.get)
    only(llama_index_core="0.13.0", rich="13")
    (finding,) = doctor.versions()
    assert (finding.about, finding.state) == ("llama-index-core", "bad")
    assert finding.found.startswith("0.13.0 is not in ")
    assert (finding.remedy or "").startswith('pip install "llama-index-core')


def test_source_tree_is_reported_as_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(doctor, "version", missing)
    monkeypatch.setattr(doctor, "requires", missing)
    assert next(doctor.machine()).found.startswith("(not installed) on ")
    assert list(doctor.versions()) == []


@pytest.mark.parametrize(
    ("variables", "found", "remedy"),
    [
        ({"RPM": "fast"}, "ASYNCBUCKET_RPM: 'fast' is not a number", "ASYNCBUCKET_RPM"),
        (
            {"RPM": "5", "STORE": "redis://127.0.0.1:1/0"},
            "import of asyncbucket.stores.redis halted",
            "ASYNCBUCKET_RPM, ASYNCBUCKET_STORE",
        ),
    ],
)
def test_variable_that_makes_no_limiter_is_bad(
    variables: dict[str, str], found: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "asyncbucket.stores.redis", None)
    for name, value in variables.items():
        monkeypatch.setenv(f"ASYNCBUCKET_{name}", value)
    (finding,) = doctor.settings()
    assert finding.state == "bad"
    assert finding.found.startswith(found)
    assert finding.remedy == f"correct or unset {remedy}"


def test_each_table_of_settings_is_shown_as_its_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ASYNCBUCKET_RPM", "500")
    (tmp_path / "pyproject.toml").write_text(
        "[tool.asyncbucket.chat]\nconcurrency = 7\n[tool.asyncbucket.batch]\ntpm = 'much'\n",
        "utf-8",
    )
    variable, chat, batch = said(doctor.settings())
    assert variable == ("good", "Limiter.from_env(): 500 requests per 60 s")
    assert chat == ("good", "Limiter.from_toml(limiter='chat'): concurrency 7")
    assert batch[0] == "bad"
    assert "[tool.asyncbucket.batch]: tpm: 'much' is not a number" in batch[1]


def test_outdated_preset_in_settings_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncbucket.core.presets._OLD", -1)
    monkeypatch.setenv("ASYNCBUCKET_PRESET", "openrouter/free/any")
    limits, age = said(doctor.settings())
    free = "20 requests per 60 s, 50 requests per day, reset at 00:00 UTC"
    assert limits == ("good", f"Limiter.from_env(): {free}")
    assert age[0] == "note"
    assert age[1].startswith("the limits of 'openrouter/free/any' were read ")
