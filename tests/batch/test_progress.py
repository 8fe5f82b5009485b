"""What a batch shows while it runs, and how long it says it will take."""

import asyncio
import errno
import io
import itertools
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.batch import amap
from asyncbucket.batch.outlook import Outlook, duration
from asyncbucket.testing import VirtualTime

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.mark.parametrize("library", ["rich", "tqdm", True])
def test_bar_shows_progress_rate_binding_limit_and_failures(
    library: Any, virtual_time: VirtualTime, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bar is on standard error, with restored and failed items, if any."""
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)

    async def ask(number: int) -> int:
        await asyncio.sleep(0.1)
        return 1 // (number % 10)

    async def main() -> int:
        results = amap(limiter, ask, range(20), errors="collect", show_progress=library)
        return sum([item.ok async for item in results])

    done = virtual_time.run(main())
    output, shown = capsys.readouterr()

    shown = ESCAPES.sub("", shown)
    assert (output, done) == ("", 18)
    assert "20/20" in shown
    assert "2 failed" in shown
    if library == "tqdm":  # in a pipe rich shows only the end
        assert re.search(r"10/20 .*[\d.]+/s, \d+ s left, waiting for requests, 1 failed", shown)


@pytest.mark.parametrize("library", ["rich", "tqdm"])
def test_output_printed_beside_a_bar_still_goes_to_stdout(
    library: Any,
    virtual_time: VirtualTime,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If standard output is a file, it goes there, even with the bar at a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal

    async def main() -> None:
        limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
        async for item in amap(limiter, asyncio.sleep, [0.1, 0.2], show_progress=library):
            sys.stdout.write(f"{item.input}\n")

    virtual_time.run(main())

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


@pytest.mark.parametrize("library", ["rich", "tqdm"])
@pytest.mark.parametrize("file", [Gone(errno.EPIPE), Gone(errno.EIO), None])
def test_batch_continues_when_its_bar_cannot_be_written(
    file: Gone | None, library: Any, virtual_time: VirtualTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of a pipe may be gone, the terminal closed, or standard error missing."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", file)

    async def main() -> int:
        limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
        results = amap(limiter, asyncio.sleep, [0.1] * 20, show_progress=library)
        return sum([item.ok async for item in results])

    assert virtual_time.run(main()) == 20


def test_bar_of_endless_items_shows_a_count_without_time_left(
    virtual_time: VirtualTime, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no end and no time left, and shows its rate once."""
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)

    async def main() -> None:
        async with amap(
            limiter, asyncio.sleep, itertools.repeat(0.1), show_progress="tqdm"
        ) as results:
            for _ in range(5):
                await anext(results)

    virtual_time.run(main())

    shown = capsys.readouterr().err
    assert "left" not in shown
    assert re.search(r"\r3 items [\d:]+, [\d.]+/s, waiting for requests", shown)
    assert max(each.count("/s") for each in shown.split("\r")) == 1


@pytest.mark.parametrize(
    ("library", "remedy"), [("rich", '"asyncbucket[batch]"'), ("tqdm", "tqdm")]
)
def test_missing_bar_library_names_its_install_command(library: str, remedy: str) -> None:
    """The error comes at once, not with the first result."""
    program = (
        f"import sys; sys.modules[{library!r}] = None\n"
        f"from asyncbucket import Limiter\n"
        f"from asyncbucket.batch import amap\n"
        f"amap(Limiter(rpm=1), print, [], show_progress={library!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert f"ImportError: a progress bar needs {library}: pip install {remedy}" in done.stderr


def test_time_left_is_estimated_from_limits_before_any_item_is_done() -> None:
    """A thousand at a hundred a minute, ten of them at once, take 9.9 minutes."""
    limiter = Limiter("100 RPM burst 10")
    outlook = Outlook(limiter)

    snapshot = outlook.snapshot(0, left={"items": 1_000, "requests": 1_000})

    assert snapshot.rate == 0.0
    assert snapshot.left == pytest.approx(594)


def test_time_left_follows_the_measured_rate_when_slower_than_limits() -> None:
    """Two a second are done where five would be allowed."""
    now = 0.0
    outlook = Outlook(Limiter("300 RPM"), clock=lambda: now)
    now = 10.0

    snapshot = outlook.snapshot(20, left={"items": 100, "requests": 100})

    assert (snapshot.rate, snapshot.left) == (2.0, 50.0)


def test_rate_follows_recent_progress() -> None:
    """A fast start does not promise a fast end."""
    now = 0.0
    outlook = Outlook(Limiter("300 RPM"), clock=lambda: now)
    looks: list[float] = []
    for second in range(1, 100):
        now = float(second)
        looks.append(outlook.snapshot(1_000 + second, left=None).rate)

    assert looks[0] == 1_001.0
    assert looks[-1] == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99.0, "99 s"), (100.0, "2 min"), (5_900.0, "98 min"), (12_000.0, "3 h 20 min")],
)
def test_duration_is_rounded_and_worded_in_everyday_units(seconds: float, words: str) -> None:
    """It has two significant digits."""
    assert duration(seconds) == words
