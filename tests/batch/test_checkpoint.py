"""A killed run goes on where it was: nothing is called for twice, and nothing is lost."""

import asyncio
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from llama_index.llms.openai import OpenAI
from pydantic import BaseModel

from asyncbucket import Limiter
from asyncbucket.batch import Checkpoint, CheckpointError, Item, amap
from asyncbucket.batch.results import name_of


class Calls:
    """An async function that records what it is called for."""

    __qualname__ = "Calls"

    def __init__(self, *fails: Any) -> None:
        self.seen: list[Any] = []
        self.fails = fails

    async def __call__(self, item: Any) -> Any:
        self.seen.append(item)
        await asyncio.sleep(0)
        if item in self.fails:
            raise ValueError(item)
        return {"said": item}


async def run(checkpoint: Any, calls: Any, items: Any, **options: Any) -> list[Item[Any, Any]]:
    """Run a batch to its end."""
    limiter = Limiter(concurrency=4)
    return [item async for item in amap(limiter, calls, items, checkpoint=checkpoint, **options)]


async def test_second_run_restores_all_results_without_a_call(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    first, second = Calls(), Calls()

    await run(path, first, range(200))
    items = await run(path, second, range(200), ordered=True)

    assert sorted(first.seen) == list(range(200))
    assert second.seen == []
    assert [(item.index, item.result, item.restored) for item in items] == [
        (number, {"said": number}, True) for number in range(200)
    ]


async def test_second_run_calls_only_for_unfinished_items(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    first, second = Calls(), Calls()
    async with amap(Limiter(concurrency=1), first, range(100), checkpoint=path) as results:
        done = [(await anext(results)).input for _ in range(10)]

    items = await run(path, second, reversed(range(50)))

    assert set(done) <= set(first.seen)
    assert set(second.seen) >= set(range(50)) - set(first.seen)
    assert len(set(first.seen) & set(second.seen)) <= 1  # the one that was in flight
    assert {item.input for item in items} == set(range(50))


async def test_equal_items_are_called_and_restored_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    first, second = Calls(), Calls()

    await run(path, first, ["why?"] * 10)
    items = await run(path, second, ["why?"] * 12)

    assert (len(first.seen), len(second.seen)) == (10, 2)
    assert sum(item.restored for item in items) == 10


async def test_failed_items_are_retried_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    second = Calls()

    await run(path, Calls(3), range(6), errors="collect")
    items = await run(path, second, range(6))

    assert second.seen == [3]
    assert all(item.ok for item in items)


async def test_none_is_restored_as_a_result(tmp_path: Path) -> None:
    calls = 0

    async def nothing(_: int) -> None:
        nonlocal calls
        calls += 1

    await run(tmp_path / "run.db", nothing, [1])
    (item,) = await run(tmp_path / "run.db", nothing, [1])

    assert calls == 1
    assert (item.result, item.restored) == (None, True)


@dataclass(frozen=True)
class Reply:
    """A result that is not plain data."""

    text: str
    tokens: tuple[int, int]


async def test_picklable_result_is_restored_with_its_type(tmp_path: Path) -> None:
    async def ask(number: int) -> Reply:
        return Reply(str(number), (number, 1))

    await run(tmp_path / "run.db", ask, [7])
    (item,) = await run(tmp_path / "run.db", ask, [7])

    assert item.restored
    assert item.result == Reply("7", (7, 1))


async def test_unpicklable_result_is_handed_out_before_the_error(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def ask(_: int) -> Any:
        return lambda: None

    results = amap(Limiter(concurrency=1), ask, itertools.count(), checkpoint=tmp_path / "run.db")

    async def read() -> None:
        async for item in results:
            seen.append(item.result)  # noqa: PERF401 - it raises in the end

    with pytest.raises(CheckpointError, match=r"result of type function cannot be kept.*dump="):
        await read()
    assert callable(seen[0])


async def test_unpicklable_result_does_not_lose_other_results(tmp_path: Path) -> None:
    again = Calls()

    async def ask(number: int) -> Any:
        return (lambda: None) if number == 3 else number

    ask.__qualname__ = "Calls"
    with pytest.raises(CheckpointError, match="result of type function cannot be kept"):
        await run(tmp_path / "run.db", ask, range(4))
    await run(tmp_path / "run.db", again, range(4))

    assert again.seen == [3]


async def test_custom_dump_and_load_replace_pickle(tmp_path: Path) -> None:
    own = Checkpoint(
        tmp_path / "run.db",
        dump=lambda result: result["said"].encode(),
        load=lambda data: {"said": data.decode()},
    )
    await run(own, Calls(), ["a"])
    (item,) = await run(own, Calls(), ["a"])

    assert (item.result, item.restored) == ({"said": "a"}, True)
    with pytest.raises(CheckpointError, match=r"a result in .*run\.db cannot be read"):
        await run(tmp_path / "run.db", Calls(), ["a"])


async def test_object_item_is_recognised_only_by_its_key(tmp_path: Path) -> None:
    item = object()
    with pytest.raises(
        TypeError,
        match=r"cannot recognize an item of type object \(it contains object\): give Checkpoint\(",
    ):
        await run(tmp_path / "one.db", Calls(), [item])

    keyed = Checkpoint(tmp_path / "two.db", key=lambda _: "the one")

    async def ask(_: object) -> int:
        return 1

    await run(keyed, ask, [item])
    (again,) = await run(keyed, ask, [object()])

    assert again.restored


class Shape(BaseModel):
    """What a structured model is asked for."""


class Colour(BaseModel):
    """Another class that it can be asked for."""


class Square(Shape):
    """A shape that has more fields than its base."""

    side: int


class Asked(BaseModel):
    """An item that is declared to hold any shape."""

    shape: Shape


@pytest.mark.parametrize(
    ("item", "other"),
    [
        ({1: "a"}, {"1": "a"}),
        ({1: "a"}, {True: "a"}),
        ({None: "a"}, {"null": "a"}),
        ((1, 2), [1, 2]),
        ({"at": (1, 2)}, {"at": [1, 2]}),
        ([b"ab"], [["builtins.bytes", "6162"]]),
        ({"a": "b"}, ["builtins.dict", ["a", "b"]]),
        ([1], [1.0]),
        (Asked(shape=Square(side=1)), Asked(shape=Square(side=2))),
    ],
    ids=repr,
)
async def test_similar_items_do_not_share_a_result(tmp_path: Path, item: Any, other: Any) -> None:
    await run(tmp_path / "run.db", Calls(), [item])
    (found,) = await run(tmp_path / "run.db", Calls(), [other])

    assert not found.restored


async def test_dict_item_is_restored_whatever_its_key_types_and_order(tmp_path: Path) -> None:
    await run(tmp_path / "run.db", Calls(), [{1: "a", "b": 2, (3, 4): None}])
    (found,) = await run(tmp_path / "run.db", Calls(), [{(3, 4): None, "b": 2, 1: "a"}])

    assert found.restored


async def test_non_string_key_is_refused(tmp_path: Path) -> None:
    keyed = Checkpoint(tmp_path / "run.db", key=lambda row: row["id"])

    with pytest.raises(TypeError, match=r"key= of a checkpoint must return a string, not 7"):
        await run(keyed, Calls(), [{"id": 7}])
    with pytest.raises(TypeError, match=r"a string, not dict$"):  # the item may be secret
        await run(keyed, Calls(), [{"id": {}}])


class Model:
    """A model that knows its name, and puts it into its answers."""

    def __init__(self, model: str) -> None:
        self.model = model

    async def ask(self, prompt: str) -> str:
        """Answer with the model's name."""
        return f"{self.model}: {prompt}"


async def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    await run(path, Model("small").ask, ["Why?"])

    assert (await run(path, Model("small").ask, ["Why?"]))[0].restored
    with pytest.raises(
        CheckpointError, match=r"holds results of Model\.ask of small, not of .*large"
    ):
        await run(path, Model("large").ask, ["Why?"])


def test_structured_model_is_named_by_output_class_and_model() -> None:
    small, large = OpenAI(model="gpt-4o-mini", api_key="x"), OpenAI(model="gpt-4o", api_key="x")
    names = {
        name_of(model.as_structured_llm(wanted).acomplete)
        for model in (small, large)
        for wanted in (Shape, Colour)
    }

    assert names == {
        f"StructuredLLM.acomplete for {wanted} of {model}"
        for model in ("gpt-4o-mini", "gpt-4o")
        for wanted in ("Shape", "Colour")
    }


async def test_checkpoint_of_another_function_is_refused_unless_named(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    await run(path, Calls(), [1])

    async def other(_: int) -> int:
        return 1

    with pytest.raises(CheckpointError, match=r"holds results of Calls, not of test_.*other"):
        await run(path, other, [1])
    (item,) = await run(Checkpoint(path, name="Calls"), other, [1])
    assert item.restored


async def test_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    async with amap(Limiter(concurrency=1), Calls(), itertools.count(), checkpoint=path) as results:
        await anext(results)
        with pytest.raises(CheckpointError, match=r"run.db is in use by another run"):
            await run(path, Calls(), [1])

    assert (await run(path, Calls(), [0]))[0].restored


@pytest.mark.parametrize("content", [b"not mine" * 1_000, b"SQLite format 3\0" + b"?" * 4_080])
async def test_foreign_or_damaged_file_is_refused_and_left_unchanged(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)

    with pytest.raises(
        CheckpointError, match=r"notes.txt is not a checkpoint, or is damaged \(.*\): "
    ):
        await run(path, Calls(), [1])
    assert path.read_bytes() == content


async def test_database_of_another_program_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "limits.db"
    limiter = Limiter("10 RPM", store=f"sqlite:///{path}", name="x")
    (await limiter.acquire()).release()
    await limiter.aclose()
    before = path.read_bytes()

    with pytest.raises(CheckpointError, match=r"limits\.db is a database of another program: give"):
        await run(path, Calls(), [1])

    assert path.read_bytes() == before


async def test_unreadable_result_error_names_its_checkpoint_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.db"

    async def reply(text: str) -> Reply:
        return Reply(text, (1, 1))

    await run(path, reply, ["a"])
    monkeypatch.delattr(f"{__name__}.Reply")

    with pytest.raises(CheckpointError, match=r"a result in .*run\.db cannot be read: .*Reply"):
        await run(path, reply, ["a"])


async def test_checkpoint_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    await run(path, Calls(), [1])
    with sqlite3.connect(path) as database:
        database.execute("UPDATE about SET value = '3' WHERE name = 'version'")
    database.close()

    with pytest.raises(CheckpointError, match="of version 3, this is version 2"):
        await run(path, Calls(), [1])


def test_dump_and_load_must_be_given_together() -> None:
    with pytest.raises(TypeError, match="give both, or neither"):
        Checkpoint("run.db", dump=str.encode)


@pytest.mark.parametrize("given", [{"key": "id"}, {"dump": "json", "load": "json"}])
def test_checkpoint_refuses_key_dump_and_load_that_are_not_callable(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^(key|dump) must be a function, not str$"):
        Checkpoint("run.db", **given)


KILLED = """
import asyncio, os, sys
from asyncbucket import Limiter
from asyncbucket.batch import amap

async def ask(number):
    await asyncio.sleep(0.002)
    os.write(1, b"%d\\n" % number)  # paid for
    return number

async def main():
    async for item in amap(Limiter(concurrency=8), ask, range(400), checkpoint=sys.argv[1]):
        pass

asyncio.run(main())
"""


@pytest.mark.real_clock
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_run_pays_again_only_for_calls_in_flight(tmp_path: Path) -> None:
    paid: list[int] = []
    for lines in (50, 120, 1):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "run.db")],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            paid += [int(process.stdout.readline()) for _ in range(lines)]
            os.kill(process.pid, signal.SIGKILL)
            paid += [int(line) for line in process.stdout if line.endswith("\n")]
    end = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run.db")],
        capture_output=True,
        text=True,
        check=True,
    )
    paid += map(int, end.stdout.split())

    assert set(paid) == set(range(400))
    # Three kills, eight calls in flight at each, and those whose transaction was not committed yet.
    assert len(paid) - 400 <= 3 * 8 * 3
