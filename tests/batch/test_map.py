"""`amap` for code without an event loop. Threads use the machine's clock."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limiter
from tests.conftest import python

pytestmark = pytest.mark.real_clock


def test_plain_function_runs_in_as_many_threads_as_slots() -> None:
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

    items = list(limiter.map(work, range(24), ordered=True))
    assert [item.result for item in items] == [number * 2 for number in range(24)]
    assert most == 4
    assert threading.current_thread().name not in threads
    assert limiter.statistics().admitted == 24


def test_breaking_out_of_map_ends_its_batch() -> None:
    limiter = Limiter(concurrency=2)
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.02)

    for _ in limiter.map(work, range(10_000), window=4):
        break
    assert len(begun) <= 6
    assert limiter.statistics().in_flight == 0


def test_program_exits_with_a_map_left_unfinished() -> None:
    program = (
        "from asyncbucket import Limiter\n"
        "items = Limiter(concurrency=2).map(abs, range(100))\n"
        "print(next(items).ok)"
    )
    done = python("-c", program)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_map_takes_errors_checkpoint_and_cost_options(tmp_path: Path) -> None:
    limiter = Limiter(tpm=100, concurrency=1)
    calls: list[Any] = []

    def work(number: int) -> int:
        calls.append(number)
        return 10 // number

    def sweep() -> list[bool]:
        options: dict[str, Any] = {"errors": "collect", "checkpoint": tmp_path / "run.db"}
        found = limiter.map(work, [0, 1, 2], ordered=True, cost={"tokens": 10}, **options)
        return [item.ok for item in found]

    assert sweep() == sweep() == [False, True, True]
    assert calls == [0, 1, 2, 0]
    assert limiter.statistics().limits[0].used == 40


def test_map_works_inside_a_running_event_loop() -> None:
    limiter = Limiter("6000 RPM", concurrency=2)

    async def main() -> list[int]:
        limiter.map(abs, [0])
        return [item.result for item in limiter.map(abs, [-1, -2], ordered=True)]

    assert asyncio.run(main()) == [1, 2]
    assert limiter.statistics().admitted == 2
