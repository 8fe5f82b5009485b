"""`asyncbucket doctor`: what it finds, and what it advises."""

import contextlib
import json
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncbucket.cli import as_ctrl_c
from asyncbucket.cli.app import app
from asyncbucket.cli.doctor import installed, shared, surroundings
from asyncbucket.cli.doctor.findings import Finding, State


def packages(**versions: str) -> Callable[[str], str | None]:
    """Pretend that only these packages are installed."""
    return {name.replace("_", "-"): number for name, number in versions.items()}.get


def said(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """Return what was found, and how serious it is."""
    return [(each.state.value, each.found) for each in findings]


def typed(*arguments: str, status: int = 0) -> str:
    """Run the command and return what it printed."""
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find neither this project's settings nor the machine's."""
    monkeypatch.chdir(tmp_path)


def test_findings_are_listed_and_counted() -> None:
    """In this environment nothing is wrong."""
    shown = typed()

    assert "asyncbucket" in shown
    assert "0 wrong, " in shown.splitlines()[-1]


def test_help_has_an_example_with_a_store() -> None:
    """The example has a store."""
    shown = CliRunner().invoke(app, ["doctor", "--help"]).stdout

    assert "asyncbucket doctor --store redis://127.0.0.1:6379/0" in shown


def test_json_has_each_finding_with_its_remedy() -> None:
    """Every finding that is not good has one."""
    findings = json.loads(typed("--json"))

    assert all(each.keys() == {"about", "state", "found", "remedy"} for each in findings)
    assert all(each["remedy"] for each in findings if each["state"] != "good")


def test_problem_exits_with_status_1() -> None:
    """This stops a deployment."""
    shown = typed("--store", "nowhere://x", status=1)

    assert "BAD" in shown
    assert "1 wrong" in shown


def test_check_that_raises_is_reported_as_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command must not fail because of a broken package."""

    def broken() -> list[Finding]:
        raise TypeError("unsupported\x1b[2J operand")

    monkeypatch.setattr(installed, "tokenizer", broken)

    findings = json.loads(typed("--json", status=1))

    (problem,) = (each for each in findings if each["state"] == "bad")
    assert (problem["about"], problem["found"]) == (
        "broken",
        "looking failed: TypeError: unsupported\x1b[2J operand",
    )
    assert "TypeError: unsupported [2J operand" in typed(status=1)  # it cannot control the terminal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_swallowed_by_an_import_still_ends_doctor(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some packages raise another error instead, which would be a problem found."""

    def loading() -> list[Finding]:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        raise ValueError("broken off")

    monkeypatch.setattr(installed, "sdks", loading)
    before = signal.signal(signal.SIGTERM, as_ctrl_c)
    try:
        assert typed(status=130) == ""
    finally:
        signal.signal(signal.SIGTERM, before)


def test_reachable_store_is_reported_with_its_answer_time(tmp_path: Path) -> None:
    """The store is opened, used for a booking, and asked for its details."""
    shown = " ".join(typed("--store", f"sqlite:///{tmp_path}/limits.db").split())

    assert " answers in " in shown


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_store_server_that_may_forget_bookings_is_noted(policy: str) -> None:
    """It says what the settings mean for a restart, a fail-over and a full memory."""
    good = {"valkey": "8.1.1", "clock": "in step", "memory": "unbounded", "persistence": "none"}
    trap = {"clock": "5 s ahead", "memory": f"9 bytes at most and {policy}"}

    assert list(shared.risky_settings("x", good)) == []
    assert list(shared.risky_settings("x", {"schema": "1"})) == []
    found = said(shared.risky_settings("x", {**trap, "persistence": "snapshots alone"}))
    assert found == [
        ("note", "the clock of x is 5 s ahead"),
        (
            "note",
            "x keeps snapshots alone: after a restart, what was booked since the last one may pass again",
        ),
        ("note", "x may evict a limiter, which begins with nothing left then"),
    ]
    cluster = {
        "clock": "in step or 5 s ahead",
        "memory": f"unbounded or 9 bytes at most and {policy}",
        "persistence": "none or snapshots alone",
    }
    assert len(list(shared.risky_settings("x", cluster))) == 3


def test_unreachable_store_is_named_without_its_password() -> None:
    """The finding says what to do."""
    pytest.importorskip("redis")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"redis://user:secret@127.0.0.1:{port}/0"  # closed by now

    (finding,) = (
        each
        for each in json.loads(typed("--json", "--store", url, status=1))
        if each["about"] == "store"
    )

    assert finding["found"].count(f"redis://user:***@127.0.0.1:{port}/0") == 1
    assert "secret" not in finding["found"]
    assert finding["remedy"] == "start the server, or correct the URL"


def test_store_file_in_missing_folder_is_reported_with_its_remedy(tmp_path: Path) -> None:
    """The finding says what is wrong with the file, and what to do."""
    url = f"sqlite:///{tmp_path}/nowhere/limits.db"
    found = json.loads(typed("--json", "--store", url, status=1))
    (finding,) = (each for each in found if each["about"] == "store")

    assert f"there is no folder {tmp_path}/nowhere" in finding["found"]
    assert finding["remedy"] == "make the file one that can be written, or correct the URL"


def test_missing_http_client_is_a_note() -> None:
    """There may be nothing to pace over HTTP."""
    assert said(installed.http_families(packages())) == [
        (
            "note",
            "neither httpx nor httpx2 is installed, so limiter.transport() has nothing to pace",
        )
    ]


def test_missing_parser_of_durations_is_a_note() -> None:
    """Without it, resets such as 6m0s stay unread."""
    findings = said(installed.http_families(packages(httpx="0.28.1")))

    assert findings == [
        ("good", "httpx 0.28.1"),
        ("note", "headers that say durations such as 6m0s cannot be read"),
    ]


@pytest.mark.parametrize(("number", "family"), [("2.54.0", "httpx"), ("3.1.0", "httpx2")])
def test_sdk_is_reported_with_its_http_library_and_retries(number: str, family: str) -> None:
    """The family changed with version 3."""
    findings = said(installed.sdks(packages(openai=number, httpx="0.28", httpx2="2.16")))

    assert findings[0] == ("good", f"openai {number}, sends by {family}")
    assert findings[1] == (
        "note",
        "its clients try a call 3 times, beneath whatever else retries",
    )


def test_sdk_without_its_http_library_is_bad() -> None:
    """It cannot send anything."""
    findings = said(installed.sdks(packages(openai="3.1.0", httpx="0.28")))

    assert findings == [("bad", "openai 3.1.0 sends by httpx2, which is not installed")]


def test_llama_index_retries_around_sdk_retries_are_noted() -> None:
    """LlamaIndex's model for OpenAI, if installed, adds its own retries."""
    alone = said(installed.llama_index(packages(llama_index_core="0.14.25")))
    both = said(
        installed.llama_index(packages(llama_index_core="0.14.25", llama_index_llms_openai="0.8.3"))
    )

    assert alone == [("good", "llama-index-core 0.14.25")]
    assert both[1] == (
        "note",
        "OpenAI(...) retries 3 times around the SDK's own retries; that multiplies",
    )
    assert said(installed.llama_index(packages())) == []


def test_version_out_of_range_is_bad() -> None:
    """The finding names the range, and how to get into it."""
    wanted = ['llama-index-core<0.15,>=0.14.21; extra == "llama-index"', "stamina>=25.2"]

    (finding,) = installed.ranges(
        packages(llama_index_core="0.13.0", stamina="26.1"), lambda: wanted
    )

    assert finding.state is State.BAD
    assert finding.found.startswith("llama-index-core 0.13.0 is not in ")
    assert finding.remedy is not None
    assert finding.remedy.startswith('pip install "llama-index-core')


def test_version_ranges_are_not_checked_without_metadata() -> None:
    """No package metadata is there to give them."""

    def missing() -> list[str]:
        raise PackageNotFoundError

    assert list(installed.ranges(packages(stamina="1"), missing)) == []


def test_tokenizer_that_may_download_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """The download would fail without a network."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/no/such/folder")

    assert said(installed.tokenizer(packages())) == [
        (
            "note",
            "TIKTOKEN_CACHE_DIR names no folder: tiktoken will download when LlamaIndex counts",
        )
    ]


def test_missing_tokenizer_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are then counted by characters."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr("asyncbucket.llama_index.tokens.bundled_tokenizer", lambda: None)

    (finding,) = installed.tokenizer(packages(llama_index_core="0.14.25"))

    assert finding.found == "wrapped models count tokens by characters: cl100k_base is not at hand"


def test_unreadable_settings_are_bad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This covers the settings of the environment and of the project."""
    monkeypatch.setenv("ASYNCBUCKET_RPM", "fast")
    (tmp_path / "pyproject.toml").write_text("[tool.asyncbucket]\ntpm = 'much'\n", "utf-8")

    (variable,) = surroundings.environment()
    (entry,) = surroundings.project()

    assert variable.state is entry.state is State.BAD
    assert variable.found.startswith("ASYNCBUCKET_RPM: 'fast' is not a number")
    assert variable.remedy == "correct or unset ASYNCBUCKET_RPM"
    assert "tpm: 'much' is not a number" in entry.found


def test_valid_settings_are_shown_as_their_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are shown as the limits that they make."""
    monkeypatch.setenv("ASYNCBUCKET_RPM", "500")
    (tmp_path / "pyproject.toml").write_text("[tool.asyncbucket]\nconcurrency = 7\n", "utf-8")

    assert said(surroundings.environment()) == [
        ("good", "Limiter.from_env(): 500 requests per 60 s")
    ]
    assert said(surroundings.project()) == [("good", "Limiter.from_toml(): concurrency 7")]


def test_each_table_of_pyproject_is_checked_by_itself(tmp_path: Path) -> None:
    """A table that only holds others is fine, even though one of these may not be."""
    (tmp_path / "pyproject.toml").write_text(
        "[tool.asyncbucket.chat]\nrpm = 5\n[tool.asyncbucket.batch]\ntpm = 'much'\n", "utf-8"
    )

    (chat, batch) = said(surroundings.project())

    assert chat == ("good", "Limiter.from_toml(limiter='chat'): 5 requests per 60 s")
    assert batch[0] == "bad"
    assert "[tool.asyncbucket.batch]: tpm: 'much' is not a number" in batch[1]


def test_outdated_preset_in_settings_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not a warning with a line of code."""
    monkeypatch.setattr("asyncbucket.core.presets._OLD", -1)
    monkeypatch.setenv("ASYNCBUCKET_PRESET", "openrouter/free/any")

    (limits, age) = said(surroundings.environment())

    assert limits == ("good", "Limiter.from_env(): 20 requests per 60 s, 50 requests per 86,400 s")
    assert age[0] == "note"
    assert age[1].startswith("the limits of 'openrouter/free/any' were read ")


def test_setting_that_needs_a_missing_extra_is_bad(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other findings are still reported."""
    monkeypatch.setitem(sys.modules, "asyncbucket.stores.redis", None)
    monkeypatch.setenv("ASYNCBUCKET_RPM", "5")
    monkeypatch.setenv("ASYNCBUCKET_STORE", "redis://127.0.0.1:1/0")
    (tmp_path / "pyproject.toml").write_text(
        "[tool.asyncbucket]\nrpm = 5\nstore = 'redis://127.0.0.1:1/0'\n", "utf-8"
    )

    findings = said([*surroundings.environment(), *surroundings.project()])

    assert [(state, "asyncbucket.stores.redis" in found) for state, found in findings] == [
        ("bad", True),
        ("bad", True),
    ]


def test_coarse_clock_is_a_note() -> None:
    """Windows has one."""
    (finding,) = surroundings.clock(0.015625)

    assert finding.found.startswith("time.monotonic() moves in steps of 15.6")
    assert next(surroundings.clock(1e-9)).state is State.GOOD


def test_event_loop_in_use_is_named() -> None:
    """The finding names the loop in use, not one that could be used."""
    uvloop = pytest.importorskip("uvloop")

    (own,) = surroundings.event_loop(uvloop.new_event_loop)
    (usual,) = surroundings.event_loop()

    assert own.found == "uvloop.Loop"
    assert usual.found.startswith("asyncio.")
    assert usual.found.endswith("(uvloop is installed, and not used)")


def test_source_tree_is_reported_as_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding says so."""

    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(installed, "version", missing)

    (finding,) = surroundings.interpreter()

    assert finding.found.startswith("asyncbucket (not installed) on ")
    assert f"{sys.version_info.major}." in finding.found
