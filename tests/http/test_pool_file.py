"""A pool in a TOML file: what it may say, and where keys may not be."""

import re
from pathlib import Path

import pytest

from asyncbucket import LimitSyntaxError
from asyncbucket.http import Endpoint, read_pool

KEY = "canary-0123456789"
FILE = """
name = "gpt"
prefer = "first"
patience = 0.5

[member.openai]
limits = ["500 RPM", "200k TPM"]
base_url = "https://api.openai.com/v1"
key_env = "THE_KEY"

[member.azure]
rpm = 300
concurrency = "auto"
base_url = "https://east.test/openai/v1?api-version=preview"
key_env = "THE_KEY"
header = "api-key"
models = { "gpt-4o" = "gpt-4o-eu" }

[member.vllm]
concurrency = 8
base_url = "http://gpu:8000/v1"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THE_KEY", KEY)
    return tmp_path / "pool.toml"


async def test_file_has_limits_and_endpoints_and_names_the_variables_of_keys(file: Path) -> None:
    file.write_text(FILE)
    pool, endpoints = read_pool(file)

    members = [(each.name, each.concurrency) for each in pool.members]
    assert members == [("openai", None), ("azure", 4), ("vllm", 8)]
    assert (pool.name, pool._members.prefer) == ("gpt", "first")
    assert [str(limit) for limit in pool.members[1].limits] == ["300 requests per 60 s"]
    wanted: list[Endpoint] = [
        {"base_url": "https://api.openai.com/v1", "headers": {"Authorization": f"Bearer {KEY}"}},
        {
            "base_url": "https://east.test/openai/v1?api-version=preview",
            "headers": {"api-key": KEY},
            "models": {"gpt-4o": "gpt-4o-eu"},
        },
        {"base_url": "http://gpu:8000/v1"},
    ]
    assert list(endpoints.values()) == wanted
    await pool.http_client(endpoints).aclose()


def test_example_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.setenv(name, KEY)
    pool, _ = read_pool(Path(__file__).parents[2] / "examples" / "pool.toml")
    assert [each.name for each in pool.members] == ["openai", "azure"]


async def test_default_store_keeps_limits_and_no_slots_found_by_themselves(file: Path) -> None:
    file.write_text(FILE)
    pool, _ = read_pool(file, store=f"sqlite:///{file.parent}/limits.db")

    assert [each._node.place is not None for each in pool.members] == [True, False, False]
    async with pool.members[0].acquire():
        assert (file.parent / "limits.db").exists()
    await pool.child("calls").aclose()
    await pool.aclose()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (FILE, "[member]", r"it has no members: write a table \[member.NAME\] for each"),
        (FILE, "[member]\nopenai = 5", r"\[member.openai\] is not a table"),
        ("patience", "patient", "'patient' is not known; known: name, prefer, patience, max_queue"),
        ("rpm = 300", "rmp = 300", r"entry 'rmp' of \[member.azure\] is not known"),
        ("http://gpu:8000", "gpu:8000", "the base_url of 'vllm' must be like"),
        ('"THE_KEY"\nheader', f'"{KEY}"\nheader', r"\[member.azure\]: key_env must name an"),
        ('key_env = "THE_KEY"\nheader', "header", r"\[member.azure\]: header is the one"),
        ('key_env = "THE_KEY"\nheader', f'key = "{KEY}"\nheader', "keys stay out of the file"),
        ("api-version=preview", f"key={KEY}", r"\[member.azure\]: keys stay out of the file"),
        ("api-version=preview", f"api-key={KEY}", r"\[member.azure\]: keys stay out of the file"),
        ("https://east", f"https://me:{KEY}@east", "credentials go into headers"),
    ],
)
def test_mistake_is_named_without_a_key(file: Path, before: str, after: str, message: str) -> None:
    assert before in FILE
    file.write_text(FILE.replace(before, after))
    with pytest.raises(LimitSyntaxError, match=message) as refused:
        read_pool(file)

    told: list[BaseException | None] = [refused.value]
    while told[-1] is not None:
        told.append(told[-1].__cause__)
    assert not re.search(KEY, " ".join(map(str, told)))
