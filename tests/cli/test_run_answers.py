"""Which lines are answered: the file of answers alone decides, whatever happens to it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncbucket.cli.run import Job
from asyncbucket.cli.run.lines import Answers, Request, line_of, read_request

JOB = Job(source=Path("in"), model="m")
SETTINGS: dict[str, Any] = {"model": "m"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def prompt(text: str) -> Request:
    request = read_request(1, text.encode(), JOB)
    assert request is not None
    return request


def answer(answers: Answers, *texts: str) -> None:
    for text in texts:
        key, _ = answers.look_up(prompt(text))
        answers.write(key, {"custom_id": text})


def answered(out: Path, *texts: str) -> bytes:
    with Answers(out, SETTINGS) as answers:
        answer(answers, *texts)
        answers.check()
        assert answers.trouble is None
    return out.read_bytes()


def are_done(out: Path, *texts: str) -> list[bool]:
    with Answers(out, SETTINGS) as answers:
        return [answers.look_up(prompt(text))[1] for text in texts]


def test_answers_in_the_file_are_done_and_nothing_is_beside_it(out: Path) -> None:
    answered(out, "a", "b", "b")
    assert are_done(out, "b", "a", "c", "b", "b") == [True, True, False, True, False]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("end", "more"),
    [(None, b'{"id":"batch_req_00'), (None, b'{"i'), (-1, b"")],
    ids=["a kill", "an early kill", "an editor that leaves out the last line's end"],
)
def test_whole_answers_in_a_file_are_done_whatever_its_end(
    out: Path, end: int | None, more: bytes
) -> None:
    whole = answered(out, "a", "b")
    out.write_bytes(whole[:end] + more)
    assert are_done(out, "a", "b", "c") == [True, True, False]
    assert out.read_bytes() == whole


@pytest.mark.parametrize("text", ['{"my": "notes"}\nand more', "notes", "{}\n"])
def test_foreign_line_is_refused_and_left_unchanged(out: Path, text: str) -> None:
    out.write_text(text)
    with pytest.raises(
        ValueError, match=r"^line 1 of .*out.jsonl was not written by .*: remove it"
    ):
        Answers(out, SETTINGS).__enter__()
    assert out.read_text() == text


@pytest.mark.parametrize("name", ["out.jsonl", "symlink", "hardlink"])
def test_second_run_on_the_same_file_is_refused_under_any_name(out: Path, name: str) -> None:
    path = out.with_name(name)
    with Answers(out, SETTINGS):
        if name == "symlink":
            path.symlink_to(out)
        elif name == "hardlink":
            path.hardlink_to(out)
        with pytest.raises(ValueError, match="is being written by another run: let it end"):
            Answers(path, SETTINGS).__enter__()
    assert are_done(path, "a") == [False]


def test_dry_run_reads_without_changing_or_locking(out: Path) -> None:
    answers = Answers(out, SETTINGS)
    answers.read()
    assert not out.exists()
    torn = answered(out, "a") + b'{"id":'
    out.write_bytes(torn)
    answers.read()
    assert answers.look_up(prompt("a"))[1]
    assert out.read_bytes() == torn


def test_run_without_an_answer_leaves_no_file_behind(out: Path) -> None:
    link = out.with_name("link")
    link.symlink_to(out)
    for _ in range(2):
        with pytest.raises(ValueError, match="refused"), Answers(link, SETTINGS):
            raise ValueError("refused")
        assert (out.exists(), link.is_symlink()) == (False, True)


def replace(out: Path) -> None:
    other = out.with_name("other")
    other.write_bytes(out.read_bytes().splitlines(keepends=True)[0])
    other.replace(out)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "truncated": lambda out: os.truncate(out, out.stat().st_size - 9),
    "edited": lambda out: out.write_bytes(out.read_bytes().replace(b"_req_", b"_reg_", 1)),
    "replaced": replace,
}


@pytest.mark.parametrize("later", [(), ("c", "d")], ids=["at the end", "before more answers"])
@pytest.mark.parametrize("how", DAMAGES)
def test_change_during_a_run_is_reported_with_what_is_missing_and_loses_no_later_answer(
    out: Path, how: str, later: tuple[str, ...]
) -> None:
    with Answers(out, SETTINGS) as answers:
        answer(answers, "a", "b")
        DAMAGES[how](out)
        answer(answers, *later)
        answers.check()
    lost = 2 if how == "removed" else 1
    assert answers.trouble is not None
    assert answers.trouble.startswith(f"{out} was changed by another program during the run, and")
    assert f"and {lost} answer" in answers.trouble
    assert answers.trouble.endswith("the same command asks again for what is missing")
    if how == "edited":  # an id that is none
        with pytest.raises(ValueError, match=r"line 1 of .* was not written by"):
            Answers(out, SETTINGS).read()
    else:
        assert sum(are_done(out, "a", "b")) == 2 - lost
        assert all(are_done(out, *later))


def test_line_has_the_members_of_openais_files() -> None:
    line = json.loads(line_of(b"\x01", {"custom_id": "\ud800"}, run={"model": "m"}))
    empty = dict.fromkeys(["response", "error", "usage"])
    assert line == {"id": "batch_req_01", "custom_id": "\ud800", **empty, "run": {"model": "m"}}
