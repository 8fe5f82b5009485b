"""Limiters described by the environment and by TOML files."""

import os
from pathlib import Path
from typing import Any

import pytest

import asyncbucket
from asyncbucket import Limiter, LimitSyntaxError
from asyncbucket.core.settings import from_env, from_toml, limiters_in_toml


def env(**variables: str) -> Limiter:
    """Return the limiter that an environment describes."""
    return from_env(
        Limiter, environ={f"ASYNCBUCKET_{name}": text for name, text in variables.items()}
    )


def write(folder: Path, text: str, name: str = "pyproject.toml") -> Path:
    """Write a file."""
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def limits(limiter: Limiter) -> list[str]:
    """Return the limits as strings."""
    return [str(limit) for limit in limiter.limits]


def test_environment_variables_describe_a_limiter() -> None:
    """The variables have the names of its arguments."""
    limiter = env(RPM="500", TPM="200k", CONCURRENCY="20", NAME="openai", MAX_QUEUE="1,000")

    assert limits(limiter) == ["500 requests per 60 s", "200,000 tokens per 60 s"]
    assert (limiter.name, limiter.concurrency, limiter.max_queue) == ("openai", 20, 1_000)


def test_max_queue_variable_may_be_zero_but_rpm_may_not() -> None:
    """``max_queue=0`` means that no call may wait."""
    assert env(RPM="500", MAX_QUEUE="0").max_queue == 0
    with pytest.raises(LimitSyntaxError, match=r"^ASYNCBUCKET_RPM: '0' is not a number"):
        env(RPM="0")


def test_limits_variable_holds_limits_separated_by_semicolons() -> None:
    """Several are separated by semicolons, because numbers may contain commas."""
    limiter = env(LIMITS="14,400 RPD; 3 images/10s burst 1;")

    assert limits(limiter) == ["14,400 requests per 86,400 s", "3 images per 10 s"]


@pytest.mark.filterwarnings("ignore::asyncbucket.core.presets.PresetWarning")
def test_preset_variable_can_be_combined_with_further_limits() -> None:
    """Further limits can be added to a preset."""
    limiter = env(PRESET="openai/tier-2/gpt-4o-mini", RPD="20k")

    assert len(limiter.limits) == 3


@pytest.mark.parametrize(("text", "size"), [("auto", 4), ("8-64", 8), ("7", 7)])
def test_concurrency_variable_takes_number_bounds_or_auto(text: str, size: int) -> None:
    """As in code, it is a number, bounds, or "auto"."""
    concurrency = env(CONCURRENCY=text).concurrency

    assert concurrency is not None
    assert concurrency >= 1
    if text != "auto":
        assert concurrency == size


def test_arguments_override_environment_variables() -> None:
    """Arguments in code override variables."""
    environ = {"ASYNCBUCKET_RPM": "many", "ASYNCBUCKET_TPM": "5k"}

    limiter = from_env(Limiter, environ=environ, rpm=60, name=None)

    assert limits(limiter) == ["5,000 tokens per 60 s", "60 requests per 60 s"]
    assert limiter.name == "default"


def test_prefix_selects_the_variables_of_one_limiter() -> None:
    """Each prefix has its own limiter; empty variables do not count."""
    environ = {"OPENAI_LIMIT_RPM": "60", "ASYNCBUCKET_RPM": "500", "OPENAI_LIMIT_TPM": " "}

    assert limits(from_env(Limiter, "OPENAI_LIMIT_", environ=environ)) == ["60 requests per 60 s"]


def test_prefix_shared_with_other_variables_is_refused() -> None:
    """The error suggests another prefix."""
    environ = {"OPENAI_RPM": "60", "OPENAI_API_KEY": "secret"}

    with pytest.raises(LimitSyntaxError, match=r"OPENAI_API_KEY is not .* as OPENAI_LIMIT_$"):
        from_env(Limiter, "OPENAI_", environ=environ)


def test_from_env_reads_process_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used unless another one is given."""
    for name in [name for name in os.environ if name.startswith("ASYNCBUCKET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASYNCBUCKET_RPM", "60")

    assert limits(from_env(Limiter)) == ["60 requests per 60 s"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, r"environment variables ASYNCBUCKET_\* limit nothing; set e\.g\. ASYNCBUCKET_RPM=500"),
        ({"NAME": "openai"}, "limit nothing"),
        ({"RPM": "fast"}, "ASYNCBUCKET_RPM: 'fast' is not a number such as 500, 14,400 or 200k"),
        ({"RPM": "5 images"}, "ASYNCBUCKET_RPM: '5 images' is not a number such as 500"),
        ({"RPM": "-5"}, "ASYNCBUCKET_RPM: '-5' is not a number"),
        ({"LIMITS": "500 RPX"}, "ASYNCBUCKET_LIMITS: '500 RPX' is not a limit; write e.g."),
        ({"LIMITS": "500 RPM, 2k TPM"}, "'500 RPM, 2k TPM' .* put a semicolon between two limits$"),
        (
            {"CONCURRENCY": "some"},
            "ASYNCBUCKET_CONCURRENCY: 'some' is neither a number such as 20, nor 8-64, nor auto",
        ),
        ({"CONCURRENCY": "0"}, "ASYNCBUCKET_CONCURRENCY: '0' is neither a number such as 20"),
        ({"CONCURRENCY": "-8"}, "ASYNCBUCKET_CONCURRENCY: '-8' is neither a number"),
        ({"CONCURRENCY": "8-"}, "ASYNCBUCKET_CONCURRENCY: '8-' is neither a number"),
        ({"PRESET": "openai"}, "ASYNCBUCKET_PRESET: no preset is called 'openai'"),
        (
            {"RMP": "500"},
            "environment variable ASYNCBUCKET_RMP is not known; known: ASYNC.*_RPM",
        ),
        ({"RPM": "5", "LIMITS": "6 RPM"}, r"ASYNCBUCKET_\*: two limits for one window"),
    ],
)
def test_invalid_environment_variable_is_named(variables: dict[str, str], message: str) -> None:
    """The error says what it should be."""
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


def test_pyproject_table_describes_a_limiter(tmp_path: Path) -> None:
    """It is in the table [tool.asyncbucket]."""
    limiter = from_toml(Limiter, write(tmp_path, TABLE))

    assert limits(limiter) == ["500 requests per 60 s", "200,000 tokens per 60 s"]
    assert (limiter.name, limiter.concurrency, limiter.max_queue) == ("default", 8, 100)


def test_pyproject_subtable_describes_a_named_limiter(tmp_path: Path) -> None:
    """Each has its own table, and is named after it."""
    limiter = from_toml(Limiter, write(tmp_path, TABLE), limiter="batch")

    assert limits(limiter) == ["100 requests per 60 s", "1,000,000 tokens per 86,400 s"]
    assert limiter.limits[0].burst == 10
    assert limiter.name == "batch"


@pytest.mark.parametrize("text", ["rpm = 60", "[asyncbucket]\nrpm = 60\n[other]\nx = 1"])
def test_toml_file_other_than_pyproject_needs_no_tool_table(tmp_path: Path, text: str) -> None:
    """The table may also be the whole file."""
    assert limits(from_toml(Limiter, write(tmp_path, text, "limits.toml"))) == [
        "60 requests per 60 s"
    ]


def test_asyncbucket_toml_accepts_table_copied_from_pyproject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table copied there means the same; errors call it by the name it has there."""
    write(tmp_path, TABLE, "asyncbucket.toml")
    monkeypatch.chdir(tmp_path)

    assert limits(from_toml(Limiter)) == limits(from_toml(Limiter, write(tmp_path, TABLE)))
    with pytest.raises(LimitSyntaxError, match=r"toml, \[tool\.asyncbucket\] has no table 'x'"):
        from_toml(Limiter, limiter="x")


def test_nearest_settings_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project without the table is skipped."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    write(tmp_path, "rpm = 60", "asyncbucket.toml")
    write(inner, "[tool.other]\nx = 1")
    monkeypatch.chdir(inner)

    assert limits(from_toml(Limiter)) == ["60 requests per 60 s"]


def test_missing_settings_file_error_names_files_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the files (unless the machine has one at its root)."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises(
        FileNotFoundError, match=r"no asyncbucket\.toml, nor a pyproject\.toml with"
    ):
        from_toml(Limiter)


def test_arguments_override_file_entries(tmp_path: Path) -> None:
    """Arguments in code override single entries."""
    limiter = from_toml(Limiter, write(tmp_path, TABLE), concurrency=3, rpm=None)

    assert limiter.concurrency == 3
    assert len(limiter.limits) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[tool.asyncbucket]\nrmp = 5",
            r"entry 'rmp' of .*pyproject\.toml, \[tool\.asyncbucket\] is",
        ),
        ("[tool.asyncbucket]\nrpm = 'x'", r"\[tool\.asyncbucket\]: rpm: 'x' is not a number"),
        ("[tool.asyncbucket]\nrpm = true", "rpm: True is not a number"),
        ("[tool.asyncbucket]\nrpm = 5\ntpm.a = 5", r"tpm: \{'a': 5\} is not a number"),
        (
            "[tool.asyncbucket]\nrpm = 5\nconcurrency = {min = 8, max = 64}",
            r"concurrency must be a whole number .* not \{'min': 8, 'max': 64\}",
        ),
        ("[tool.asyncbucket]\nname = 5", "name: 5 is not a string"),
        (
            "[tool.asyncbucket]\nlimits = 5",
            r'limits: 5 is not a list such as \["500 RPM", "200k TPM"\]',
        ),
        ("[tool.asyncbucket]\nlimits = [5]", "a limit must be a string or a Limit, not 5"),
        ("[tool.asyncbucket]\nname = 'a'", r"limit nothing; write e\.g\. rpm = 500"),
        (
            "[tool.asyncbucket.chat]\nrpm = 5",
            r"write e\.g\. rpm = 500, or ask for limiter='chat'$",
        ),
        ("[tool.asyncbucket]\nrpm = 0.5", "rpm must be a whole number of at least 1, not 0.5"),
        ("[tool.other]\nrpm = 5", r"has no table \[tool\.asyncbucket\]"),
        ("tool = 5", r"has no table \[tool\.asyncbucket\]"),
        ("[tool]\nasyncbucket = 5", "asyncbucket is not a table but 5"),
        ("[tool.asyncbucket", "is not valid TOML"),
    ],
)
def test_invalid_file_entry_is_named_in_error(tmp_path: Path, text: str, message: str) -> None:
    """The error names its file and table."""
    with pytest.raises(LimitSyntaxError, match=message):
        from_toml(Limiter, write(tmp_path, text))


def test_missing_table_error_lists_existing_tables(tmp_path: Path) -> None:
    """This helps to find typing errors."""
    with pytest.raises(LimitSyntaxError, match="has no table 'btach'; it has batch"):
        from_toml(Limiter, write(tmp_path, TABLE), limiter="btach")


def test_store_url_from_environment_is_passed_on_unchanged() -> None:
    """They are passed on to `cls` unchanged."""

    def make(*limits: Any, **arguments: Any) -> tuple[Any, ...]:
        return (limits, arguments)

    found = from_env(make, environ={"ASYNCBUCKET_RPM": "5", "ASYNCBUCKET_STORE": "sqlite:///a.db"})

    assert found == ((), {"rpm": 5, "store": "sqlite:///a.db"})


def test_tables_of_limiters_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table itself is None, if it describes a limiter."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "rpm = 500\n[chat]\nrpm = 100\n[batch]\nrpm = 50\n", "asyncbucket.toml")
    assert limiters_in_toml() == [None, "chat", "batch"]


def test_modules_are_found_on_first_use_and_listed() -> None:
    assert asyncbucket.settings.from_env is from_env
    assert asyncbucket.Plan.__name__ == "Plan"
    assert {"Limiter", "presets", "telemetry"} <= set(dir(asyncbucket))
    with pytest.raises(AttributeError, match="has no attribute 'Limitre'"):
        _ = asyncbucket.Limitre
