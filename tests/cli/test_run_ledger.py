"""Which lines are answered: the file of answers decides, and the index follows it."""

import contextlib
import errno
import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from asyncbucket.cli.run.job import Job
from asyncbucket.cli.run.ledger import Ledger
from asyncbucket.cli.run.output import answer, append
from asyncbucket.cli.run.request import BadLine, Request, read_request

JOB = Job(source="-", out="-", model="m")
SETTINGS: dict[str, Any] = {"model": "m"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return the path of a file of answers that does not exist yet."""
    return tmp_path / "out.jsonl"


def opened(out: Path, settings: dict[str, Any] = SETTINGS) -> Ledger:
    """Open the ledger as a run does."""
    return Ledger(out, Path(f"{out}.checkpoint"), settings)


def prompt(text: str, line: int = 1) -> Request:
    """Return the request of a prompt."""
    request = read_request(line, text.encode(), JOB)
    assert request is not None
    return request


def answered(ledger: Ledger, request: Request) -> None:
    """Write the answer to a request."""
    key, _ = ledger.look_up(request)
    ledger.write(
        key,
        answer(
            key=key,
            line=request.line,
            custom_id=request.custom_id,
            status=200,
            request_id="",
            body={},
            usage=None,
            attempts=1,
            waited=0,
        ),
    )


def killed(ledger: Ledger) -> None:
    """Close the files as the end of a process does: nothing more is noted."""
    ledger.close()


def is_done(ledger: Ledger, request: Request) -> bool:
    """Tell whether a request is answered."""
    return ledger.look_up(request)[1]


def test_answered_line_is_done_even_if_missing_from_the_index(out: Path) -> None:
    """After a kill right after the write, the index catches up with the file."""
    ledger = opened(out)
    answered(ledger, prompt("a"))
    killed(ledger)

    with opened(out) as again:
        assert is_done(again, prompt("a"))
        assert not is_done(again, prompt("b", 2))


def test_half_written_line_is_cut_off(out: Path) -> None:
    """After a kill during a write, only that line is asked for again."""
    with opened(out) as ledger:
        answered(ledger, prompt("a"))
    whole = out.read_bytes()
    out.write_bytes(whole + b'{"id":"batch_req_00')

    with opened(out) as again:
        assert is_done(again, prompt("a"))
    assert out.read_bytes() == whole


def test_lost_or_broken_index_is_rebuilt_from_the_answers(out: Path) -> None:
    """The answers contain everything it knew about lines."""
    index = Path(f"{out}.checkpoint")
    with opened(out) as ledger:
        answered(ledger, prompt("a"))

    index.unlink()
    with opened(out) as again:
        assert is_done(again, prompt("a"))

    index.write_bytes(b"\0" * 9_000)
    with opened(out) as again:
        assert is_done(again, prompt("a"))


def test_equal_prompts_are_counted_as_separate_lines(out: Path) -> None:
    """If two of three were answered, the third is still to be asked for."""
    with opened(out) as ledger:
        answered(ledger, prompt("a", 1))
        answered(ledger, prompt("a", 2))

    with opened(out) as again:
        assert [is_done(again, prompt("a", line)) for line in (1, 2, 3)] == [True, True, False]


def test_second_line_with_the_same_id_is_bad(out: Path) -> None:
    """Nobody could tell their answers apart."""
    line = {"custom_id": "x", "body": {"messages": [1]}}
    first = read_request(1, json.dumps(line).encode(), JOB)
    second = read_request(7, json.dumps(line).encode(), JOB)
    assert first is not None
    assert second is not None

    with opened(out) as ledger:
        ledger.look_up(first)
        with pytest.raises(BadLine, match="custom_id 'x' is that of line 1 already"):
            ledger.look_up(second)


def test_answers_with_other_settings_are_refused(out: Path) -> None:
    """The file would hold answers of two models."""
    with opened(out) as ledger:
        answered(ledger, prompt("a"))

    with pytest.raises(
        ValueError, match=r"out.jsonl holds answers with model 'm', not 'n'.*--restart"
    ):
        opened(out, {"model": "n"})


def test_settings_may_change_until_a_line_is_answered(out: Path) -> None:
    """A misspelt model has left no answers that could be lost."""
    opened(out).close()
    opened(out, {"model": "n"}).close()

    with opened(out, {"model": "n"}) as ledger:
        answered(ledger, prompt("a"))
    with pytest.raises(ValueError, match="holds answers with model 'n', not 'm'"):
        opened(out)


@pytest.mark.parametrize("text", ['{"my": "notes"}\nand more', '{"my": "notes"}', "notes"])
def test_foreign_file_is_refused_and_left_unchanged(out: Path, text: str) -> None:
    """As it is not a file of answers, nothing is appended or cut off."""
    out.write_text(text)

    with pytest.raises(ValueError, match="was not written by `asyncbucket run`"):
        opened(out)
    assert out.read_text() == text


def test_second_run_on_the_same_file_is_refused(out: Path) -> None:
    """This holds while the first one runs."""
    with (
        opened(out),
        pytest.raises(ValueError, match="is being written by another run: let it end"),
    ):
        opened(out)


def test_admissions_since_the_last_note_survive_a_kill(out: Path) -> None:
    """They are those after the last note of the limiter's bookings."""
    ledger = opened(out)
    ledger.note_admission({"requests": 1})
    ledger.save({"at": 1})
    ledger.note_admission({"requests": 1, "tokens": 5})
    killed(ledger)

    with opened(out) as again:
        assert again.bookings() == {"at": 1}
        assert [admission.cost for admission in again.admissions()] == [
            {"requests": 1, "tokens": 5}
        ]


def test_shortened_file_of_answers_is_read_again(out: Path) -> None:
    """Somebody may remove answers to have them asked for again."""
    with opened(out) as ledger:
        answered(ledger, prompt("a"))
        answered(ledger, prompt("b", 2))
        ledger.save({})
    out.write_bytes(out.read_bytes().splitlines(keepends=True)[1])

    with opened(out) as again:
        assert not is_done(again, prompt("a"))
        assert is_done(again, prompt("b", 2))


def test_restart_discards_answers_but_not_those_of_a_live_run(out: Path) -> None:
    """Removing the files of a running run would lose its answers."""
    with opened(out) as ledger:
        answered(ledger, prompt("a"))
        before = out.read_bytes()
        with pytest.raises(ValueError, match="is being written by another run: let it end"):
            Ledger(out, Path(f"{out}.checkpoint"), SETTINGS, restart=True)
        assert out.read_bytes() == before

    with Ledger(out, Path(f"{out}.checkpoint"), {"model": "n"}, restart=True) as ledger:
        assert out.read_bytes() == b""
        assert not is_done(ledger, prompt("a"))


@pytest.mark.parametrize("kind", ["text", "database"])
def test_foreign_index_is_refused_and_left_unchanged(out: Path, kind: str) -> None:
    """Another program's file may be there, for example a model's weights."""
    index = Path(f"{out}.checkpoint")
    if kind == "text":
        index.write_bytes(b"weights, and many of them " * 100)
    else:
        with contextlib.closing(sqlite3.connect(index)) as database:
            database.execute("CREATE TABLE weights (value REAL)")
    before = index.read_bytes()

    with pytest.raises(ValueError, match=r"checkpoint exists and was not .* give another -o$"):
        opened(out)
    assert index.read_bytes() == before


class FullDisk(io.FileIO):
    """A file with room for a few bytes."""

    room = 10

    def write(self, data: Any, /) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(bytes(data)[: self.room])
        self.room -= written
        return written


def test_line_that_does_not_fit_on_the_disk_leaves_nothing_behind(out: Path) -> None:
    """Half a line would spoil the next one; the error names the file, which the system does not."""
    out.write_bytes(b"before\n")

    with FullDisk(out, "ab") as file, pytest.raises(OSError, match="No space left") as raised:
        append(b"a line of twenty-one\n", file, out)

    assert raised.value.filename == str(out)
    assert out.read_bytes() == b"before\n"


def test_index_that_cannot_be_created_is_named_in_the_error(tmp_path: Path) -> None:
    """The folder may be missing or not writable."""
    with pytest.raises(
        ValueError, match=r"out\.jsonl\.checkpoint, .* \(unable to open .*, or give another -o"
    ):
        opened(tmp_path / "none" / "out.jsonl")
