"""Limits from outside the code: the environment and TOML files."""

from pathlib import Path

import pytest

import asyncbucket
from asyncbucket import Limiter, LimitSyntaxError, Price
from asyncbucket.settings import from_env, from_toml


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


def test_environment_variables_have_names_of_arguments(folder: Path) -> None:
    prices = write(folder, "[m]\ninput = 1\n", "prices.toml")
    limiter = env(RPM="500", TPM="200k", CONCURRENCY="20", NAME="openai", MAX_QUEUE="1,000")
    assert limits(limiter) == ["500 requests per 60 s", "200,000 tokens per 60 s"]
    assert (limiter.name, limiter.concurrency, limiter.max_queue) == ("openai", 20, 1_000)
    stored = env(RPM="500", STORE="sqlite:///a.db", PRICES=str(prices))
    assert stored._prices == {"m": Price(input=1)}
    assert stored._node.place is not None
    assert env(RPM="500", MAX_QUEUE="0").max_queue == 0
    sizes = [env(CONCURRENCY=text).concurrency for text in ("auto", "8-64", "7")]
    assert sizes == [4, 8, 7]


def test_limits_of_one_variable_are_separated_by_semicolons() -> None:
    """Numbers may contain commas."""
    limiter = env(LIMITS="14,400 RPD; 3 images/10s burst 1;")
    assert limits(limiter) == ["14,400 requests per 86,400 s", "3 images per 10 s"]


def test_prefix_selects_variables_and_arguments_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"MY_RPM": "many", "MY_TPM": "5k", "ASYNCBUCKET_RPM": "500", "MY_RPD": " "}
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    limiter = Limiter.from_env("MY_", rpm=60, name=None)
    assert limits(limiter) == ["5,000 tokens per 60 s", "60 requests per 60 s"]
    assert limiter.name == "default"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, r"no limits in environment variables ASYNCBUCKET_\*: set e\.g\. ASYNCBUCKET_RPM=500"),
        ({"NAME": "openai"}, "no limits in environment variables"),
        ({"RPM": "fast"}, "^ASYNCBUCKET_RPM: 'fast' is not a number such as 500, 14,400 or 200k"),
        ({"RPM": "5.5"}, "ASYNCBUCKET_RPM: '5.5' is not a number"),
        ({"RPM": "0"}, r"ASYNCBUCKET_\*: rpm must be a whole number of at least 1, not 0"),
        ({"LIMITS": "500 RPX"}, "ASYNCBUCKET_LIMITS: '500 RPX' is not a limit; write e.g."),
        ({"CONCURRENCY": "some"}, "^ASYNCBUCKET_CONCURRENCY: 'some' is not a number such as"),
        ({"CONCURRENCY": "8-"}, "ASYNCBUCKET_CONCURRENCY: '' is not a number"),
        ({"CONCURRENCY": "8-2"}, r"concurrency must be a whole .* ascending pair .* \(8, 2\)"),
        ({"API_KEY": "5"}, r"entry 'api_key' of environment variables ASYNCBUCKET_\* is not known"),
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


@pytest.mark.parametrize("table", [TABLE, TABLE.replace("tool.", "")])
def test_tables_of_a_file_describe_limiters(folder: Path, table: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"pyproject\.toml"):
        from_toml(Limiter)
    for limiter in (from_toml(Limiter, write(folder, table)), Limiter.from_toml()):
        assert limits(limiter) == ["500 requests per 60 s", "200,000 tokens per 60 s"]
        assert (limiter.name, limiter.concurrency, limiter.max_queue) == ("default", 8, 100)
    batch = from_toml(Limiter, limiter="batch")
    assert limits(batch) == ["100 requests per 60 s", "1,000,000 tokens per 86,400 s"]
    assert (batch.name, batch.limits[0].burst) == ("batch", 10)
    limiter = from_toml(Limiter, concurrency=3, rpm=None)
    assert (limiter.concurrency, len(limiter.limits)) == (3, 2)
    with pytest.raises(LimitSyntaxError, match=r"asyncbucket\] has no table 'x'; it has batch"):
        from_toml(Limiter, limiter="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rmp = 5",
            r"entry 'rmp' of .*pyproject\.toml, \[tool\.asyncbucket\] is not known; known: limits",
        ),
        ("rpm = 'x'", r"\[tool\.asyncbucket\]: rpm: 'x' is not a number"),
        ("rpm = true", "rpm must be a whole number of at least 1, not True"),
        ("rpm = 5\nconcurrency = {min = 8}", r"concurrency must be a whole .* not \{'min': 8\}"),
        ("rpm = 5\nname = 5", "name must be a string, not 5"),
        ("limits = 5", r"\[tool\.asyncbucket\]: limits: 'int' object is not iterable"),
        ("limits = [5]", "a limit must be a string or a Limit, not 5"),
        ("chat.rpm = 5", r"no limits in .*: write e\.g\. rpm = 500, or ask for limiter='chat'$"),
        ("batch.rmp = 5", r"entry 'rmp' of .*asyncbucket\.batch\] is not known"),
        ("[tool.other]\nrpm = 5", r"pyproject\.toml has no table \[tool\.asyncbucket\] or "),
        ("tool = 5", "has no table"),
        ("[tool.asyncbucket", "is not valid TOML"),
    ],
)
def test_invalid_file_entry_is_named_in_error(folder: Path, text: str, message: str) -> None:
    table = "" if "tool" in text else "[tool.asyncbucket]\n"
    limiter = "batch" if "batch" in text else None
    with pytest.raises(LimitSyntaxError, match=message):
        from_toml(Limiter, write(folder, table + text), limiter=limiter)


def test_modules_are_found_on_first_use_and_listed() -> None:
    assert asyncbucket.settings.from_env is from_env
    for name in ("Plan", "Pool", "Price"):
        assert getattr(asyncbucket, name).__name__ == name
    assert {"Limiter", "prices", "telemetry"} <= set(dir(asyncbucket))
    with pytest.raises(AttributeError, match=r"^module 'asyncbucket' has no attribute 'Limitr'$"):
        _ = asyncbucket.Limitr
