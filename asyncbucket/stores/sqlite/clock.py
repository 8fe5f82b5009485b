"""One clock for all processes of a machine, which never goes back, whatever the wall clock does.

The wall clock jumps, when people or time servers set it. A jump forward would make a window forget
too early; a jump back would stop all calls until the clock is where it was. So the wall clock is
read once for each boot of the machine. From then on, time is the machine's steady clock, which all
processes share, plus a constant offset; the file keeps that offset with the boot that it belongs
to. A new boot continues from the last instant in the file, or from the wall clock if that is later:
limits of a day survive a restart.

If the system does not identify boots, each process reads the wall clock once, and moves on to the
last instant in the file.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class Reading(NamedTuple):
    """What the file knows of time."""

    #: Which boot `ahead` belongs to; empty if unknown.
    boot: str
    #: How far (ns) the shared clock is ahead of the machine's steady clock.
    ahead: int
    #: The last instant that any process has read.
    last: int


def boot_id() -> str:
    """Return a name for this boot of the machine, or "" if there is none."""
    with contextlib.suppress(OSError):
        return _BOOT.read_text("ascii").strip()
    return ""


def steady() -> int:
    """Return nanoseconds that all processes of this machine share; suspended time is included."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic_ns() if clock_id is None else time.clock_gettime_ns(clock_id)


class SharedClock:
    """Tell the time that all users of a file share, in ns; it is close to the wall clock."""

    def __init__(
        self,
        *,
        wall: Callable[[], int] = time.time_ns,
        steady: Callable[[], int] = steady,
        boot: str | None = None,
    ) -> None:
        self._steady = steady
        self._boot = boot_id() if boot is None else boot
        self._ahead = wall() - steady()

    def read(self, known: Reading | None) -> Reading:
        """Return the current instant, as ``last``, and what else to write into the file."""
        now = self._steady()
        if known is not None:
            if self._boot and known.boot == self._boot:
                self._ahead = known.ahead
            self._ahead = max(self._ahead, known.last - now)
        return Reading(self._boot, self._ahead, now + self._ahead)

    def now(self) -> int:
        """Return the current instant as this process knows it, without reading the file."""
        return self._steady() + self._ahead
