"""What a batch shows while it runs, and how long it says it will take."""

import asyncio
import errno
import io
import itertools
import os
import re
import sys

import pytest

from asyncbucket import Limiter
from asyncbucket.batch import amap
from asyncbucket.batch.progress import Outlook
from asyncbucket.testing import VirtualTime

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_shows_progress_rate_binding_limit_and_failures(
    terminal: object,
    virtual_time: VirtualTime,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal

    async def ask(number: int) -> int:
        await asyncio.sleep(0.1)
        return 1 // (number % 10)

    async def main() -> int:
        results = amap(limiter, ask, range(20), errors="collect", show_progress=True)
        return sum([item.ok async for item in results])

    done = virtual_time.run(main())
    output, shown = capsys.readouterr()
    shown = ESCAPES.sub("", shown)
    assert (output, done) == ("", 18)
    assert re.search(r"20/20 .*in 0:00:\d+  2 failed", shown)
    if terminal:  # in a pipe rich shows only the end
        assert re.search(r"10/20 .*[\d.]+/s  0:00:\d+ left  waiting for requests  1 failed", shown)


async def test_output_printed_beside_a_bar_still_goes_to_stdout(
    virtual_time: VirtualTime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If standard output is a file, it goes there, even with the bar at a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")

    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    async for item in amap(limiter, asyncio.sleep, [0.1, 0.2], show_progress=True):
        sys.stdout.write(f"{item.input}\n")
    assert capsys.readouterr().out == "0.1\n0.2\n"


class Gone(io.StringIO):
    """A file whose reader has gone away."""

    def __init__(self, error: int) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:  # noqa: ARG002 - nobody reads it
        raise OSError(self.error, os.strerror(self.error))

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize("file", [Gone(errno.EPIPE), Gone(errno.EIO), None])
def test_batch_continues_when_its_bar_cannot_be_written(
    file: Gone | None, virtual_time: VirtualTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of a pipe may be gone, the terminal closed, or standard error missing."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", file)

    async def main() -> int:
        limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
        results = amap(limiter, asyncio.sleep, [0.1] * 20, show_progress=True)
        return sum([item.ok async for item in results])

    assert virtual_time.run(main()) == 20


async def test_bar_of_endless_items_shows_a_count_without_time_left(
    virtual_time: VirtualTime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    monkeypatch.setenv("FORCE_COLOR", "1")

    items = itertools.repeat(0.1)
    async with amap(limiter, asyncio.sleep, items, show_progress=True) as results:
        for _ in range(5):
            await anext(results)
    shown = ESCAPES.sub("", capsys.readouterr().err)
    assert "left" not in shown
    assert re.search(r"3 [\d.]+/s  waiting for requests", shown)


def test_time_left_is_estimated_from_limits_before_any_item_is_done() -> None:
    """A thousand at a hundred a minute, ten of them at once, take 9.9 minutes."""
    outlook = Outlook(Limiter("100 RPM burst 10"))
    assert outlook.words(0, {"requests": 1_000}) == ["0:09:54 left"]


def test_time_left_follows_the_measured_rate_when_slower_than_limits() -> None:
    """Two a second are done where five would be allowed."""
    now = 0.0
    outlook = Outlook(Limiter("300 RPM"), clock=lambda: now)
    now = 10.0
    assert outlook.words(20, {"requests": 100}) == ["2/s", "0:00:50 left"]
