"""What a batch shows while it runs, and how long it says it will take."""

import asyncio
import errno
import io
import os
import re
import sys

import pytest

from asyncbucket import Limiter
from asyncbucket.batch import amap
from asyncbucket.batch.progress import Outlook, standard_error
from asyncbucket.testing import VirtualTime

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
