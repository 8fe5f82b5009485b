"""`amap` for code without an event loop. Threads use the machine's clock."""

import asyncio
import functools
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.batch import CheckpointError, map_sync

pytestmark = pytest.mark.real_clock


def test_plain_function_runs_in_as_many_threads_as_slots() -> None:
    """Four run at once, none of them in this thread, and each call is admitted."""
    limiter = Limiter("6000 RPM", concurrency=4)
    lock, running, most, threads = threading.Lock(), 0, 0, set[str]()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            threads.add(threading.current_thread().name)
        time.sleep(0.02)
        with lock:
            running -= 1
        return number * 2

    items = list(map_sync(limiter, work, range(24), ordered=True))

    assert [item.result for item in items] == [number * 2 for number in range(24)]
    assert most == 4
    assert threading.current_thread().name not in threads
    assert limiter.statistics().admitted == 24


def test_map_awaits_an_async_function() -> None:
    """It gives results, not coroutines."""

    async def double(number: int) -> int:
        return number * 2

    items = list(map_sync(Limiter(concurrency=2), double, [1, 2], ordered=True))

    assert [item.result for item in items] == [2, 4]


def test_paced_function_is_charged_once() -> None:
    """It acquires in its thread, and the batch does not do so again."""
    limiter = Limiter("6000 RPM", concurrency=1)

    @limiter.paced
    def work(number: int) -> int:
        return number

    assert len(list(map_sync(limiter, work, range(5)))) == 5
    assert limiter.statistics().admitted == 5


def test_breaking_out_of_map_ends_its_batch() -> None:
    """Running calls end first, and nothing stays in flight."""
    limiter = Limiter(concurrency=2)
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.02)
        return number

    for _ in map_sync(limiter, work, range(10_000), window=4):
        break

    assert len(begun) <= 6
    assert limiter.statistics().in_flight == 0


def test_program_exits_with_a_map_left_unfinished() -> None:
    """In that case the module itself still refers to the items."""
    program = (
        "from asyncbucket import Limiter\n"
        "items = Limiter(concurrency=2).map(abs, range(100))\n"
        "print(next(items).ok)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30
    )

    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_error_is_raised_unwrapped() -> None:
    """Its traceback leads into the function."""

    def work(_: int) -> int:
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there"):
        list(map_sync(Limiter(concurrency=2), work, range(3)))


def test_map_takes_errors_checkpoint_and_cost_options(tmp_path: Path) -> None:
    """This includes checkpoints, collected errors and costs."""
    limiter = Limiter(tpm=100, concurrency=1)
    calls: list[Any] = []

    def work(number: int) -> int:
        calls.append(number)
        return 10 // number

    def sweep() -> list[bool]:
        options: dict[str, Any] = {"errors": "collect", "checkpoint": tmp_path / "run.db"}
        found = map_sync(limiter, work, [0, 1, 2], ordered=True, cost={"tokens": 10}, **options)
        return [item.ok for item in found]

    assert sweep() == sweep() == [False, True, True]
    assert calls == [0, 1, 2, 0]
    assert limiter.statistics().limits[0].used == 40


@pytest.mark.parametrize("workers", [0, -1, 2.5])
def test_workers_must_be_a_positive_whole_number(workers: Any) -> None:
    """It is refused at once, not with the first result."""
    message = f"workers must be a whole number of at least 1, not {workers}"
    with pytest.raises(ValueError, match=message):
        map_sync(Limiter(concurrency=1), str, [1], workers=workers)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"errors": "ignore"}, "errors must be 'raise' or 'collect', not 'ignore'"),
        ({"window": 0}, "window must be a whole number of at least 1, not 0"),
        ({"cost": 3}, "a cost must be a Cost, a dict such as"),
        ({"show_progress": "dots"}, "show_progress must be True, False, 'rich' or 'tqdm'"),
        ({"order": True}, "unexpected keyword argument 'order'"),
    ],
)
def test_invalid_option_is_refused_at_once(option: dict[str, Any], message: str) -> None:
    """The error does not wait for the first result, which other code may ask for."""
    with pytest.raises((TypeError, ValueError), match=message):
        map_sync(Limiter(concurrency=1), str, [1], **option)


def test_single_string_is_refused_as_items() -> None:
    """It may be the name of a file that should have been opened; this is an error at once, too."""
    with pytest.raises(
        TypeError, match=r"items is one string, which would be a call for each of its 11 characters"
    ):
        map_sync(Limiter(concurrency=1), str, "prompts.txt")


def test_map_works_inside_a_running_event_loop() -> None:
    """A notebook is such a place; and the result need not be iterated."""
    limiter = Limiter("6000 RPM", concurrency=2)

    async def main() -> list[int]:
        map_sync(limiter, abs, [0])
        return [item.result for item in map_sync(limiter, abs, [-1, -2], ordered=True)]

    assert asyncio.run(main()) == [1, 2]
    assert limiter.statistics().admitted == 2


def test_checkpoint_of_map_belongs_to_the_mapped_function(tmp_path: Path) -> None:
    """It is not bound to the wrapper that calls it in a thread."""
    limiter, path = Limiter(concurrency=1), tmp_path / "run.db"
    list(limiter.map(functools.partial(pow, 2), [3], checkpoint=path))

    with pytest.raises(CheckpointError, match="holds results of pow, not of divmod"):
        list(limiter.map(functools.partial(divmod, 2), [3], checkpoint=path))
