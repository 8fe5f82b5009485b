"""Limiters described by the environment and by TOML files."""

import os
from pathlib import Path
from typing import Any

import pytest

import asyncbucket
from asyncbucket import Limiter, LimitSyntaxError, Price
from asyncbucket.core.settings import from_env, from_toml


def env(**variables: str) -> Limiter:
    environ = {f"ASYNCBUCKET_{name}": text for name, text in variables.items()}
    return from_env(Limiter, environ=environ)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "pyproject.toml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def limits(limiter: Limiter) -> list[str]:
    return [str(limit) for limit in limiter.limits]


def test_environment_variables_have_names_of_arguments() -> None:
    limiter = env(RPM="500", TPM="200k", CONCURRENCY="20", NAME="openai", MAX_QUEUE="1,000")
    assert limits(limiter) == ["500 requests per 60 s", "200,000 tokens per 60 s"]
    assert (limiter.name, limiter.concurrency, limiter.max_queue) == ("openai", 20, 1_000)
    assert env(RPM="500", MAX_QUEUE="0").max_queue == 0


def test_prices_may_be_named_by_their_file(folder: Path) -> None:
    path = write(folder, "[m]\ninput = 1\n", "prices.toml")
    assert env(LIMITS="25 USD/day", PRICES=str(path))._prices == {"m": Price(input=1)}


@pytest.mark.filterwarnings("ignore::asyncbucket.core.presets.PresetWarning")
def test_limits_and_preset_variables_can_be_combined() -> None:
    """Limits are separated by semicolons, because numbers may contain commas."""
    limiter = env(LIMITS="14,400 RPD; 3 images/10s burst 1;", PRESET="openai/tier-2/gpt-4o-mini")
    assert {"14,400 requests per 86,400 s", "3 images per 10 s"} < set(limits(limiter))
    assert len(limiter.limits) == 4


@pytest.mark.parametrize(("text", "size"), [("auto", 4), ("8-64", 8), ("7", 7)])
def test_concurrency_variable_takes_number_bounds_or_auto(text: str, size: int) -> None:
    assert env(CONCURRENCY=text).concurrency == size


def test_prefix_selects_the_variables_of_one_limiter_and_arguments_go_first() -> None:
    environ = {"MY_RPM": "many", "MY_TPM": "5k", "ASYNCBUCKET_RPM": "500", "MY_RPD": " "}
    limiter = from_env(Limiter, "MY_", environ=environ, rpm=60, name=None)
    assert limits(limiter) == ["5,000 tokens per 60 s", "60 requests per 60 s"]
    assert limiter.name == "default"
    environ = {"OPENAI_RPM": "60", "OPENAI_API_KEY": "secret"}
    with pytest.raises(LimitSyntaxError, match=r"OPENAI_API_KEY is not .* as OPENAI_LIMIT_$"):
        from_env(Limiter, "OPENAI_", environ=environ)


def test_from_env_reads_process_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ASYNCBUCKET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASYNCBUCKET_RPM", "60")
    assert limits(Limiter.from_env()) == ["60 requests per 60 s"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, r"environment variables ASYNCBUCKET_\* limit nothing; set e\.g\. ASYNCBUCKET_RPM=500"),
        ({"NAME": "openai"}, "limit nothing"),
        ({"RPM": "fast"}, "ASYNCBUCKET_RPM: 'fast' is not a number such as 500, 14,400 or 200k"),
        ({"RPM": "5 images"}, "ASYNCBUCKET_RPM: '5 images' is not a number such as 500"),
        ({"RPM": "-5"}, "ASYNCBUCKET_RPM: '-5' is not a number"),
        ({"RPM": "0"}, "^ASYNCBUCKET_RPM: '0' is not a number"),
        ({"LIMITS": "500 RPX"}, "ASYNCBUCKET_LIMITS: '500 RPX' is not a limit; write e.g."),
        ({"LIMITS": "500 RPM, 2k TPM"}, "'500 RPM, 2k TPM' .* put a semicolon between two limits$"),
        ({"CONCURRENCY": "some"}, "'some' is neither a number such as 20, nor 8-64, nor auto"),
        ({"CONCURRENCY": "0"}, "ASYNCBUCKET_CONCURRENCY: '0' is neither a number such as 20"),
        ({"CONCURRENCY": "-8"}, "ASYNCBUCKET_CONCURRENCY: '-8' is neither a number"),
        ({"CONCURRENCY": "8-"}, "ASYNCBUCKET_CONCURRENCY: '8-' is neither a number"),
        ({"PRESET": "openai"}, "ASYNCBUCKET_PRESET: no preset is called 'openai'"),
        ({"RMP": "5"}, "environment variable ASYNCBUCKET_RMP is not known; known: ASYNC.*_RPM"),
        ({"RPM": "5", "LIMITS": "6 RPM"}, r"ASYNCBUCKET_\*: two limits for one window"),
    ],
)
def test_invalid_environment_variable_is_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(LimitSyntaxError, match=message):
        env(**variables)


TABLE = """
[tool.asyncbucket]
rpm = 500
tpm = "200k"
concurrency = [8, 64]
max_queue = 100

[tool.asyncbucket.batch]
limits = ["100 RPM burst 10", "1M TPD"]
"""


def test_tables_of_pyproject_describe_limiters(folder: Path) -> None:
    file = write(folder, TABLE)
    limiter = from_toml(Limiter, file)
    assert limits(limiter) == ["500 requests per 60 s", "200,000 tokens per 60 s"]
    assert (limiter.name, limiter.concurrency, limiter.max_queue) == ("default", 8, 100)
    batch = from_toml(Limiter, file, limiter="batch")
    assert limits(batch) == ["100 requests per 60 s", "1,000,000 tokens per 86,400 s"]
    assert (batch.name, batch.limits[0].burst) == ("batch", 10)
    limiter = from_toml(Limiter, file, concurrency=3, rpm=None)
    assert (limiter.concurrency, len(limiter.limits)) == (3, 2)


@pytest.mark.parametrize("text", ["rpm = 60", "[asyncbucket]\nrpm = 60\n[other]\nx = 1"])
def test_toml_file_other_than_pyproject_needs_no_tool_table(folder: Path, text: str) -> None:
    assert limits(Limiter.from_toml(write(folder, text, "limits.toml"))) == ["60 requests per 60 s"]


def test_asyncbucket_toml_accepts_table_copied_from_pyproject(folder: Path) -> None:
    write(folder, TABLE, "asyncbucket.toml")
    assert limits(from_toml(Limiter)) == limits(from_toml(Limiter, write(folder, TABLE)))
    with pytest.raises(LimitSyntaxError, match=r"toml, \[tool\.asyncbucket\] has no table 'x'"):
        from_toml(Limiter, limiter="x")


def test_nearest_settings_file_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project without the table is skipped; there may be none (unless at the machine's root)."""
    inner = folder / "a" / "b"
    inner.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no asyncbucket\.toml, nor a pyproject\.toml"):
        from_toml(Limiter)
    write(folder, "rpm = 60", "asyncbucket.toml")
    write(inner, "[tool.other]\nx = 1")
    monkeypatch.chdir(inner)
    assert limits(from_toml(Limiter)) == ["60 requests per 60 s"]


def test_store_url_is_passed_on_unchanged() -> None:
    def make(*limits: Any, **arguments: Any) -> tuple[Any, ...]:
        return (limits, arguments)

    found = from_env(make, environ={"ASYNCBUCKET_RPM": "5", "ASYNCBUCKET_STORE": "sqlite:///a.db"})
    assert found == ((), {"rpm": 5, "store": "sqlite:///a.db"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rmp = 5", r"entry 'rmp' of .*pyproject\.toml, \[tool\.asyncbucket\] is"),
        ("rpm = 'x'", r"\[tool\.asyncbucket\]: rpm: 'x' is not a number"),
        ("rpm = true", "rpm: True is not a number"),
        ("rpm = 5\ntpm.a = 5", r"tpm: \{'a': 5\} is not a number"),
        ("rpm = 5\nconcurrency = {min = 8}", r"concurrency must be a whole .* not \{'min': 8\}"),
        ("name = 5", "name: 5 is not a string"),
        ("limits = 5", r'limits: 5 is not a list such as \["500 RPM", "200k TPM"\]'),
        ("limits = [5]", "a limit must be a string or a Limit, not 5"),
        ("name = 'a'", r"limit nothing; write e\.g\. rpm = 500"),
        ("chat.rpm = 5", r"write e\.g\. rpm = 500, or ask for limiter='chat'$"),
        ("rpm = 0.5", "rpm must be a whole number of at least 1, not 0.5"),
        ("[tool.other]\nrpm = 5", r"has no table \[tool\.asyncbucket\]"),
        ("tool = 5", r"has no table \[tool\.asyncbucket\]"),
        ("[tool]\nasyncbucket = 5", "asyncbucket is not a table but 5"),
        ("[tool.asyncbucket", "is not valid TOML"),
    ],
)
def test_invalid_file_entry_is_named_in_error(folder: Path, text: str, message: str) -> None:
    table = "" if "tool" in text else "[tool.asyncbucket]\n"
    with pytest.raises(LimitSyntaxError, match=message):
        from_toml(Limiter, write(folder, table + text))


def test_missing_table_is_named_beside_those_there_are(folder: Path) -> None:
    write(folder, "rpm = 500\n[chat]\nrpm = 100\n[batch]\nrpm = 50\n", "asyncbucket.toml")
    with pytest.raises(LimitSyntaxError, match="has no table 'btach'; it has chat, batch"):
        from_toml(Limiter, limiter="btach")


def test_modules_are_found_on_first_use_and_listed() -> None:
    assert asyncbucket.settings.from_env is from_env
    for name in ("Plan", "Pool", "Price"):
        assert getattr(asyncbucket, name).__name__ == name
    assert {"Limiter", "presets", "telemetry"} <= set(dir(asyncbucket))
    with pytest.raises(AttributeError, match=r"^module 'asyncbucket' has no attribute 'Limitr'$"):
        _ = asyncbucket.Limitr
