"""Many items through one function: the results, their order, and what is left at the end."""

import asyncio
import contextlib
import errno
import io
import itertools
import os
import re
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, cast

import anyio
import pytest

from asyncbucket import Cost, CostExceedsLimit, Limiter, priority
from asyncbucket.batch import Item, Results, amap
from asyncbucket.batch.progress import Outlook, standard_error
from asyncbucket.engine.context import inherited, read_priority
from asyncbucket.testing import VirtualTime


class Work:
    """An async function that takes its time and counts its calls."""

    def __init__(self, seconds: Callable[[int], float] = lambda _: 1.0) -> None:
        self.seconds = seconds
        self.begun = self.running = self.most = 0

    async def __call__(self, number: int) -> int:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds(number))
        finally:
            self.running -= 1
        return number * 10


async def odd_ones_fail(number: int) -> int:
    await asyncio.sleep(0.01)
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


async def gathered(results: Results[Any, Any], seen: Any = None) -> list[Item[Any, Any]]:
    seen = [] if seen is None else seen
    async for item in results:
        seen.append(item)
    return list(seen)


async def test_results_arrive_in_order_of_completion(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=3, clock=virtual_time.clock)
    items = await gathered(amap(limiter, Work(lambda n: 3.0 - n), [0, 1, 2]))
    found = [(item.index, item.input, item.result) for item in items]
    assert found == [(2, 2, 20), (1, 1, 10), (0, 0, 0)]
    assert virtual_time.now == 3.0


def twice(number: int) -> dict[str, int]:
    return {"tokens": 2 * number}


@pytest.mark.parametrize("cost", [twice, {"tokens": 30}, Cost(tokens=30)])
async def test_cost_may_be_given_in_three_ways(cost: Any, virtual_time: VirtualTime) -> None:
    limiter = Limiter(tpm=100, clock=virtual_time.clock)
    await gathered(amap(limiter, Work(), [10, 20], cost=cost))
    assert limiter.statistics().limits[0].used == 60


async def test_batch_keeps_only_one_call_in_the_limiters_queue(virtual_time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    async with amap(limiter, Work(), itertools.count()) as results:
        await anext(results)
        await asyncio.sleep(0.5)
        assert limiter.statistics().waiting == 1
        async with limiter.acquire() as lease:
            assert lease.waited == pytest.approx(1.5)


async def test_batch_runs_as_many_workers_as_its_calls_need(virtual_time: VirtualTime) -> None:
    limiter = Limiter("10/s burst 1", clock=virtual_time.clock)
    work = Work(lambda _: 5.0)
    await gathered(amap(limiter, work, range(500)))
    # A window counts a call for a hundredth of its length longer, to allow for network jitter.
    assert 499 / 10 + 5 <= virtual_time.now <= 499 / 10 * 1.01 + 5
    assert work.most == 50


async def test_batch_takes_at_most_a_window_of_items_ahead(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=5, clock=virtual_time.clock)
    numbers = itertools.count()
    async with amap(limiter, Work(), numbers, workers=6) as results:
        for _ in range(3):
            await anext(results)
        await asyncio.sleep(1_000)
    assert next(numbers) == 15


async def test_async_generator_of_items_is_read_and_closed(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=2, clock=virtual_time.clock)
    closed = False

    async def numbers() -> AsyncGenerator[int]:
        nonlocal closed
        try:
            for number in itertools.count():
                await asyncio.sleep(0.5)
                yield number
        finally:
            closed = True

    async with amap(limiter, Work(), numbers()) as results:
        assert [(await anext(results)).input for _ in range(5)] == [0, 1, 2, 3, 4]
    assert closed


async def test_error_is_raised_unwrapped_after_earlier_results(virtual_time: VirtualTime) -> None:
    limiter = Limiter("100 RPM", concurrency=1, clock=virtual_time.clock)
    seen: list[Item[int, int]] = []
    with pytest.raises(ValueError, match=r"^1 is odd$"):
        await gathered(amap(limiter, odd_ones_fail, itertools.count()), seen)
    assert [item.input for item in seen] == [0]
    assert limiter.statistics().limits[0].used == 2


async def test_error_behind_an_item_that_never_started_is_raised(virtual_time: VirtualTime) -> None:
    limiter = Limiter("1 RPM", tpm=100, clock=virtual_time.clock)
    seen: list[Item[int, int]] = []
    results = amap(limiter, Work(), [1, 2, 100], cost=twice, ordered=True)
    with pytest.raises(CostExceedsLimit, match="cost of 200 tokens"):
        await gathered(results, seen)
    assert [item.input for item in seen] == [1]
    assert limiter.statistics().limits[1].used == 0  # the first one's minute is over


async def test_stop_async_iteration_in_the_function_is_an_error_not_the_end() -> None:
    async def nothing(number: int) -> int:
        if number:
            raise StopAsyncIteration
        return number

    with pytest.raises(RuntimeError, match="raised StopAsyncIteration"):
        await gathered(amap(Limiter(concurrency=1), nothing, range(3)))


async def test_collected_errors_come_with_their_items(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=4, clock=virtual_time.clock)
    items = await gathered(amap(limiter, odd_ones_fail, range(4), errors="collect", ordered=True))
    assert [item.ok for item in items] == [True, False, True, False]
    with pytest.raises(ValueError, match="3 is odd"):
        _ = items[3].result


async def test_call_cancelled_from_within_is_a_failed_item(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)

    async def ask(number: int) -> int:
        task = asyncio.ensure_future(asyncio.sleep(1, number))
        if number == 1:
            task.cancel()
        return await task

    items = await gathered(amap(limiter, ask, range(3), errors="collect"))
    assert [item.ok for item in items] == [True, False, True]
    assert "cancelled from within" in str(items[1].error)
    assert limiter.statistics().in_flight == 0


async def test_error_of_the_iterable_is_raised_after_all_results(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=2, clock=virtual_time.clock)
    seen: list[Item[int, int]] = []

    def numbers() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        await gathered(amap(limiter, Work(), numbers()), seen)
    assert sorted(item.input for item in seen) == [0, 1, 2]


async def test_leaving_the_context_waits_for_calls_to_clean_up(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=2, clock=virtual_time.clock)

    async def slow_to_go(_: int) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(2)

    async with amap(limiter, slow_to_go, itertools.count()) as results:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await anext(results)
    assert limiter.statistics().in_flight == 0
    assert virtual_time.now == 7.0


async def test_breaking_out_cancels_calls_in_flight(virtual_time: VirtualTime) -> None:
    limiter = Limiter(concurrency=3, clock=virtual_time.clock)
    work = Work()
    async for _ in amap(limiter, work, itertools.count()):
        break
    for _ in range(3):
        await asyncio.sleep(0)
    assert virtual_time.now == 1.0
    assert (work.running, limiter.statistics().in_flight) == (0, 0)


async def test_cancelled_reader_leaves_no_call_behind(virtual_time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 1", concurrency=3, clock=virtual_time.clock)
    work = Work(lambda _: 100.0)
    task = asyncio.create_task(gathered(amap(limiter, work, itertools.count())))
    await asyncio.sleep(1.5)
    assert work.running == 2
    task.cancel()
    await asyncio.wait([task])
    statistics = limiter.statistics()
    assert (work.running, statistics.in_flight, statistics.waiting) == (0, 0, 0)


async def test_batch_closed_before_its_first_result_calls_nothing() -> None:
    work = Work()
    results = amap(Limiter(concurrency=1), work, [1])
    await results.aclose()
    assert await gathered(results) == []
    assert work.begun == 0


def test_batch_abandoned_at_end_of_event_loop_ends_without_warning() -> None:
    async def main() -> Any:
        results = amap(Limiter(concurrency=2), Work(lambda n: 60.0 * n), itertools.count())
        return results, await anext(results)

    _, item = asyncio.run(main())
    assert item.index == 0


async def test_calls_inherit_the_priority_of_the_reader() -> None:
    async def ask(_: int) -> int | None:
        return getattr(inherited.get(), "priority", None)

    with priority("batch"):
        (item,) = await gathered(amap(Limiter(concurrency=1), ask, [1]))
    assert item.result == read_priority("batch")


async def test_plain_function_is_refused_with_a_hint_at_threads() -> None:
    with pytest.raises(TypeError, match=r"str, which cannot be awaited: .* asyncio\.to_thread"):
        await gathered(amap(Limiter(concurrency=1), cast("Any", str), [1]))


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ("in.txt", {}, "^items is one string, .* a call for each of its 6 characters"),
        ([1], {"errors": "ignore"}, "errors must be 'raise' or 'collect', not 'ignore'"),
        ([1], {"workers": 0}, "workers must be a whole number of at least 1, not 0"),
        ([1], {"cost": {"tokens": 1}, "paced": True}, "give one"),
        ([1], {"cost": 3}, "a cost must be a Cost, a dict such as"),
    ],
)
def test_invalid_option_is_refused(items: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        amap(Limiter(concurrency=1), Work(), items, **options)


# --- what a batch shows while it runs ---


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.mark.parametrize("are_counted", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
async def test_bar_shows_progress_rate_binding_limit_and_failures(
    *,
    terminal: bool,
    are_counted: bool,
    virtual_time: VirtualTime,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is printed meanwhile goes to standard output, even with the bar at a terminal."""
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal

    async def ask(number: int) -> int:
        await asyncio.sleep(0.1)
        return 1 // (number % 10)

    items = range(20) if are_counted else iter(range(20))
    async for item in amap(limiter, ask, items, errors="collect", show_progress=True):
        sys.stdout.write("." * item.ok)
    output, shown = capsys.readouterr()
    shown = ESCAPES.sub("", shown)
    assert output == "." * 18
    of, left = ("/20", r"  0:00:\d+ left") if are_counted else ("", "")
    assert re.search(rf"20{of} .*in 0:00:\d+  2 failed", shown)
    if terminal:  # in a pipe rich shows only the end
        assert re.search(rf"10{of} .*[\d.]+/s{left}  waiting for requests  1 failed", shown)


class Gone(io.StringIO):
    """A file whose reader has gone away."""

    def write(self, text: str) -> int:  # noqa: ARG002 - nobody reads it
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize("file", [Gone(), None])
async def test_batch_continues_when_its_bar_cannot_be_written(
    file: Gone | None, virtual_time: VirtualTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of a pipe may be gone, the terminal closed, or standard error missing."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", file)
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    results = amap(limiter, asyncio.sleep, [0.1] * 20, show_progress=True)
    assert sum([item.ok async for item in results]) == 20


def test_bar_is_drawn_with_what_standard_error_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "utf-8"):
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
        assert standard_error().encoding == encoding


def test_time_left_is_estimated_from_limits_before_any_item_is_done() -> None:
    """A thousand at a hundred a minute, ten of them at once, take 9.9 minutes."""
    assert Outlook(Limiter("100 RPM burst 10")).words(0, 1_000) == ["0:09:54 left"]


def test_time_left_follows_the_measured_rate_when_slower_than_limits() -> None:
    """Two a second are done where five would be allowed."""
    now = 0.0
    outlook = Outlook(Limiter("300 RPM"), clock=lambda: now)
    now = 10.0
    assert outlook.words(20, 100) == ["2/s", "0:00:50 left"]
