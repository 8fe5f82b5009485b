"""What a call costs and how long it takes can be given in many ways."""

import json
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Cost
from asyncbucket.plan import plan

CHAT = {"model": "m", "messages": [{"role": "user", "content": "w" * 4_000}], "max_tokens": 300}
BATCH = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
EMBEDDING = {"model": "text-embedding-3-small", "input": ["w" * 40, "w" * 40]}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    return path


@pytest.mark.parametrize(
    ("sample", "tokens"),
    [
        (800, 800),
        ("w" * 400, 100),
        (Cost(tokens=70), 70),
        ({"tokens": 55}, 55),
        ({"input_tokens": 40, "output_tokens": 2}, 42),
        (CHAT, 1_000),
        (BATCH, 1_000),
        ({"prompt": "w" * 400}, 100),
        (EMBEDDING, 20),
        ({"model": "m", "input": "w" * 400, "max_output_tokens": 300}, 300),
    ],
)
def test_token_sample_of_any_form_is_charged(tmp_path: Path, sample: Any, tokens: int) -> None:
    assert plan(tokens=[sample]).tokens == tokens
    if not isinstance(sample, Cost):
        assert plan(tokens=written(tmp_path, sample)).tokens == tokens
        assert plan(tokens=str(written(tmp_path, sample))).tokens == tokens


def test_request_body_is_charged_by_the_given_profile() -> None:
    assert plan(tokens=[CHAT], profile="azure").tokens == 1_300


def test_input_limit_binds_on_the_input_tokens_of_a_body() -> None:
    planned = plan(tokens=[CHAT] * 4, itpm=2_000, otpm=10_000)
    assert planned.bound_by == "input_tokens"


def test_samples_are_used_once_each_or_drawn_with_replacement() -> None:
    assert plan(calls=3, tokens=[1, 2, 3]).tokens == 6
    planned = plan(calls=3_000, tokens=[100, 300])
    assert planned.calls == 3_000
    assert planned.tokens == pytest.approx(600_000, rel=0.05)


def test_latency_samples_may_be_lines_of_a_log(tmp_path: Path) -> None:
    path = written(tmp_path, 1.5, {"latency": 2.5}, {"seconds": 0.5, "id": 7})
    assert plan(calls=3, latency=path).duration == 2.5


def test_one_sample_may_be_amounts_and_is_rounded_up() -> None:
    assert plan(calls=2, tokens=10.2).tokens == 22
    assert plan(calls=2, tokens={"input_tokens": 40, "output_tokens": 2}).tokens == 84


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"samples\.jsonl, line 3: not JSON: Expecting property name"),
        ("[" * 100_000, r"samples\.jsonl, line 3: its brackets are nested deeper"),
        ("\udc85", r"samples\.jsonl, line 3: not UTF-8 text at byte 0"),
        ('{"cost": 3}', r"tokens: .*samples\.jsonl, line 3: an object with cost gives no tokens"),
        ("{}", "an object with nothing gives no tokens"),
        ("null", "line 3: expected a number, not None"),
        ("NaN", "line 3: expected a finite number from 0 on, not nan"),
        ('{"tokens": "many"}', "line 3: expected a number, not str"),
    ],
)
def test_bad_sample_is_refused_with_its_line_number_empty_ones_counted(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(f"5\n\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        plan(tokens=path)


def test_latency_object_without_a_known_name_lists_them() -> None:
    with pytest.raises(ValueError, match="an object without latency, seconds, duration"):
        plan(latency=[{"time": 3}])


def test_missing_file_of_samples_raises_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plan(tokens=tmp_path / "none.jsonl")
