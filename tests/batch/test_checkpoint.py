"""A killed run goes on where it was: nothing is called for twice, and nothing is lost."""

import asyncio
import contextlib
import itertools
import pickle
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.llms.openai import OpenAI
from pydantic import BaseModel

from asyncbucket import Limiter
from asyncbucket.batch import CheckpointError, Item, amap
from asyncbucket.batch.checkpoint import Checkpoint
from asyncbucket.batch.results import name_of
from tests.conftest import until


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


async def run(path: Path, calls: Any, items: Any, **options: Any) -> list[Item[Any, Any]]:
    limiter = Limiter(concurrency=4)
    return [item async for item in amap(limiter, calls, items, checkpoint=path, **options)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


async def test_second_run_restores_all_results_without_a_call(path: Path) -> None:
    second = Calls()
    await run(path, Calls(), range(100))
    items = await run(path, second, range(100), ordered=True)
    assert second.seen == []
    found = [(item.index, item.result, item.restored) for item in items]
    assert found == [(number, {"said": number}, True) for number in range(100)]


async def test_second_run_calls_only_for_unfinished_items(path: Path) -> None:
    first, second = Calls(), Calls()
    async with amap(Limiter(concurrency=1), first, range(100), checkpoint=path) as results:
        for _ in range(10):
            await anext(results)
    items = await run(path, second, reversed(range(50)))
    assert set(second.seen) >= set(range(50)) - set(first.seen)
    assert len(set(first.seen) & set(second.seen)) <= 1  # the one that was in flight
    assert {item.input for item in items} == set(range(50))


@pytest.mark.parametrize("of", ["reader", "loop"])
def test_results_are_saved_at_the_end(path: Path, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    """One is being written then, and two wait for the disk."""
    begun: list[object] = []

    def dump_slowly(result: object) -> bytes:
        begun.append(result)
        time.sleep(0.1)
        return pickle.dumps(result)

    slow = SimpleNamespace(dumps=dump_slowly, loads=pickle.loads)
    monkeypatch.setattr("asyncbucket.batch.checkpoint.pickle", slow)
    calls = Calls()

    async def leave() -> None:
        results = amap(Limiter(concurrency=3), calls, range(3), checkpoint=path)
        reader = asyncio.ensure_future(anext(results))
        await until(lambda: begun and len(calls.seen) == 3)
        await asyncio.sleep(0.01)
        if of == "reader":
            reader.cancel()
            await asyncio.wait([reader])

    asyncio.run(leave())
    assert [item.restored for item in asyncio.run(run(path, calls, range(3)))] == [True] * 3


async def test_items_and_results_go_in_batches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, list[int]] = {"look_up": [], "save": []}

    def count(name: str) -> None:
        method = getattr(Checkpoint, name)

        def counted(checkpoint: Checkpoint, group: Any) -> Any:
            sizes[name].append(len(group))
            return method(checkpoint, group)

        monkeypatch.setattr(Checkpoint, name, counted)

    count("look_up")
    count("save")
    await run(path, Calls(), range(100), workers=20)
    assert sizes["look_up"] == [20] * 5 + [0]
    assert sum(sizes["save"]) == 100
    assert len(sizes["save"]) <= 60


async def test_equal_items_are_called_and_restored_one_by_one(path: Path) -> None:
    first, second = Calls(), Calls()
    await run(path, first, ["why?"] * 10)
    items = await run(path, second, ["why?"] * 12)
    assert (len(first.seen), len(second.seen)) == (10, 2)
    assert sum(item.restored for item in items) == 10


async def test_failed_items_are_retried_by_the_next_run(path: Path) -> None:
    second = Calls()
    await run(path, Calls(3), range(6), errors="collect")
    items = await run(path, second, range(6))
    assert second.seen == [3]
    assert all(item.ok for item in items)


@dataclass(frozen=True)
class Reply:
    """A result that is not plain data."""

    text: str
    tokens: tuple[int, int]


@pytest.mark.parametrize("result", [None, Reply("7", (7, 1))])
async def test_result_is_restored_with_its_type(path: Path, result: object) -> None:
    async def ask(_: int) -> object:
        return result

    await run(path, ask, [7])
    (item,) = await run(path, ask, [7])
    assert (item.result, item.restored) == (result, True)


async def test_result_that_cannot_be_pickled_ends_the_run_and_loses_no_other(path: Path) -> None:
    async def ask(number: int) -> Any:
        return (lambda: None) if number == 3 else number

    results = amap(Limiter(concurrency=4), ask, range(4), checkpoint=path)
    seen = [await anext(results) for _ in range(4)]
    with pytest.raises(CheckpointError, match=r"result of type function cannot be kept.*return wh"):
        await anext(results)
    assert sum(callable(item.result) for item in seen) == 1
    again = amap(Limiter(concurrency=4), ask, range(4), checkpoint=path, ordered=True)
    assert [(await anext(again)).restored for _ in range(4)] == [True, True, True, False]
    await again.aclose()


async def test_result_of_lost_class_is_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(_: int) -> object:
        return Reply("7", (7, 1))

    await run(path, ask, [7])
    monkeypatch.delitem(globals(), "Reply")
    with pytest.raises(CheckpointError, match=r"a result in .*run\.db cannot be r.*importable"):
        await run(path, ask, [7])


async def test_item_that_is_not_plain_data_is_refused(path: Path) -> None:
    with pytest.raises(TypeError, match=r"an item of type list \(it contains object\): give pla"):
        await run(path, Calls(), [[object()]])


class Shape(BaseModel):
    """What a structured model is asked for."""


class Square(Shape):
    """A shape that has more fields than its base."""

    side: int


class Asked(BaseModel):
    """An item that is declared to hold any shape."""

    shape: Shape


@pytest.mark.parametrize(
    ("item", "other", "is_same"),
    [
        ({"a": 1, "b": [b"x"]}, {"b": [b"x"], "a": 1}, True),
        ("1", 1, False),
        ([1], [1.0], False),
        (b"ab", "6162", False),
        (Reply("a", (1, 2)), {"text": "a", "tokens": [1, 2]}, False),
        (Asked(shape=Square(side=1)), Asked(shape=Square(side=2)), False),
        (Asked(shape=Square(side=1)), Asked(shape=Square(side=1)), True),
    ],
    ids=repr,
)
async def test_equal_items_are_one(path: Path, item: Any, other: Any, *, is_same: bool) -> None:
    await run(path, Calls(), [item])
    (found,) = await run(path, Calls(), [other])
    assert found.restored is is_same


class Model:
    """A model that knows its name, and puts it into its answers."""

    def __init__(self, model: str) -> None:
        self.model = model

    async def ask(self, prompt: str) -> str:
        return f"{self.model}: {prompt}"


async def test_checkpoint_of_another_function_or_model_is_refused(path: Path) -> None:
    await run(path, Model("small").ask, ["Why?"])
    assert (await run(path, Model("small").ask, ["Why?"]))[0].restored
    with pytest.raises(CheckpointError, match=r"results of Model\.ask of small, not of .*large: "):
        await run(path, Model("large").ask, ["Why?"])
    with pytest.raises(CheckpointError, match=r"holds results of Model\..*, not of Calls"):
        await run(path, Calls(), ["Why?"])


def test_structured_model_is_named_by_output_class_and_model() -> None:
    model = OpenAI(model="gpt-4o-mini", api_key="x").as_structured_llm(Square)
    assert name_of(model.acomplete) == "StructuredLLM.acomplete for Square of gpt-4o-mini"


async def test_second_run_at_the_same_time_is_refused(path: Path) -> None:
    async with amap(Limiter(concurrency=1), Calls(), itertools.count(), checkpoint=path) as results:
        await anext(results)
        with pytest.raises(CheckpointError, match=r"run.db is in use by another run"):
            await run(path, Calls(), [1])
    assert (await run(path, Calls(), [0]))[0].restored


@pytest.mark.parametrize("content", [b"not mine" * 1_000, b"SQLite format 3\0" + b"?" * 4_080])
async def test_foreign_or_damaged_file_is_refused_unchanged(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run.db is not a ch.* or is damaged \(.*\): "):
        await run(path, Calls(), [1])
    assert path.read_bytes() == content


async def test_database_of_another_program_is_refused_and_left_unchanged(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"run\.db is a database of another program, or a ch"):
        await run(path, Calls(), [1])
    assert path.read_bytes() == before


async def test_file_that_cannot_be_made_is_an_error(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be used as a checkpoint \(unable to open"):
        await run(path / "below", Calls(), [1])
