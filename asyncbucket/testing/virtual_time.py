"""Virtual time: an event loop that jumps to its next timer when there is nothing else to do.

Code that waits is slow to test and, on a real clock, never behaves the same twice. On this loop
`await asyncio.sleep(3600)` returns at once, and afterwards the clock reads exactly 3,600 s::

    with virtual_time() as time:
        limiter = Limiter("500 RPM", clock=time.clock)
        time.run(main(limiter))
        assert time.now == 60.0

How it works. asyncio's loop asks its selector to wait "until I/O is ready, or at most until the
next timer". `_JumpingSelector` never waits for a timer: it checks whether I/O is ready and, if not,
moves the clock by the time-out and returns. Everything else is asyncio's own loop. So this rests on
two public interfaces, `SelectorEventLoop(selector)` and `loop.time()`, and one private name,
`_clock_resolution`, by which the loop decides which timers are due.

What is guaranteed:

- *Exact*. Time is kept in integer nanoseconds; `loop.time()` is those nanoseconds as a float. A
  timer runs at its own instant rounded up to a nanosecond, never before it and never a microsecond
  late, so `clock()` can be compared with `==`. Time stands still while code runs.
- *Deterministic*. Timers run in order of their instants; those of one instant in the order of
  asyncio's heap.
- *No hang*. If nothing is ready, no timer is set and the main task isn't done, `DeadlockError`
  names the tasks that wait and where. Sleeping for centuries (`math.inf`, 1e18) sets no timer.
- *Executors*. Work given to `run_in_executor` (`asyncio.to_thread`) takes no virtual time: while
  any is running, the loop really waits for it and the clock stands still.
- *Other threads and sockets* are unknown to the loop: a callback from `call_soon_threadsafe` or
  data on a socket is served when it arrives, and a loop with timers may have jumped by then. If no
  timer is left, the loop gives them a real second before it reports a deadlock.

Rejected: patching `time.monotonic` (it affects code that isn't under test), and advancing the clock
by hand from the test (the test must then know every instant at which the code under test waits;
`VirtualTime.advance` exists for synchronous code). Trio's `MockClock(autojump_threshold=0)` is the
model.
"""

import asyncio
import math
import selectors
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from pathlib import PurePath
from typing import Any, Self, TypeVar, TypeVarTuple

from asyncbucket.engine.wording import is_number

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NANOSECONDS = 1_000_000_000

NOISE = 2
"""Units in the last place by which a sum of floats may miss the intended instant."""

LATEST_START = 10_000_000_000
"""Seconds (317 years) beyond which a float of seconds is too coarse for the short waits of a limiter."""

LAST_CHANCE = 1.0
"""Real seconds that threads and sockets get to wake a loop that has no timer left."""


class DeadlockError(RuntimeError):
    """Nothing is ready, no timer is set, and the main task isn't done: it would hang for ever."""


class VirtualClock:
    """A clock that moves only when told to; call it for integer nanoseconds.

    It is what `Limiter(..., clock=...)` and `TokenBucket(..., clock=...)` take. Loops that share a
    clock must run one after the other, not at once.

    Raises:
        ValueError: `start` is not a number of seconds from 0 to 10,000,000,000.
    """

    __slots__ = ("_now",)

    def __init__(self, start: float = 0.0) -> None:
        if not is_number(start) or not 0 <= start <= LATEST_START:
            raise ValueError(f"start must be seconds from 0 to {LATEST_START:,}, not {start!r}")
        self._now: int = round(start * NANOSECONDS)

    def __repr__(self) -> str:
        return f"<VirtualClock at {self.seconds} s>"

    def __call__(self) -> int:
        return self._now

    @property
    def seconds(self) -> float:
        """The time as float seconds, the same value as `loop.time()`."""
        return self._now / NANOSECONDS

    def check_loop(self, loop: object) -> None:
        """Raise unless `loop` runs on this clock; a limiter asks when a call has to wait there.

        Raises:
            RuntimeError: `loop` would never wake the call, because nothing on it moves this clock.
        """
        if getattr(loop, "clock", None) is not self:
            raise RuntimeError(
                f"a call would wait forever: its limiter's clock ({self.seconds} s) does not move on this "
                f"{type(loop).__name__}; take the fixture virtual_time in the async test itself, run the "
                "test by virtual_time.run(main()), or make the limiter without clock="
            )

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`.

        Raises:
            ValueError: If `seconds` is negative, NaN or infinite.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be finite and at least 0, not {seconds}")
        self._now += round(seconds * NANOSECONDS)

    def advance_to(self, when: float) -> None:
        """Move to `when` (seconds), rounded up to a nanosecond, and by at least one.

        Sums of floats miss the intended nanosecond by a few units in the last place (0.1 + 0.2 is
        0.30000000000000004), so rounding up allows for that much.
        """
        noise = NOISE * math.ulp(when) * NANOSECONDS
        self._now = max(self._now + 1, math.ceil(when * NANOSECONDS - noise))


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that leaves waiting to the loop: it polls, and asks the loop if nothing is ready.

    `idle` takes the time-out and returns how many real seconds to wait for I/O.
    """

    idle: Callable[[float | None], float]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        return super().select(self.idle(timeout))


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop on virtual time; `loop.clock` is its clock.

    Usable wherever a loop factory is: `asyncio.Runner(loop_factory=VirtualTimeLoop)`.

    Args:
        clock: The clock to move; by default its own, from 0.
    """

    #: A timer is due if it is earlier than now plus this, which the loop reads after the time. If it
    #: were less than what `advance_to` allows for, the loop would creep up to a timer by nanoseconds;
    #: if more, it would run a timer before its instant.
    _clock_resolution = 0.0

    def __init__(self, clock: VirtualClock | None = None) -> None:
        # Before super(): the base class registers its self-pipe and asks for the time.
        self.clock = VirtualClock() if clock is None else clock
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._jobs: set[asyncio.Future[Any]] = set()
        selector = _JumpingSelector()
        selector.idle = self._on_idle
        super().__init__(selector)
        self._io = selector
        self._own_files = len(selector.get_map())

    def time(self) -> float:
        now = self.clock.seconds
        self._clock_resolution = 2 * NOISE * math.ulp(now)
        return now

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Any = None
    ) -> asyncio.TimerHandle:
        if not when < 2 * LATEST_START:  # never: the loop would jump towards it day by day
            return asyncio.TimerHandle(when, callback, args, self, context)
        return super().call_at(when, callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        job = super().run_in_executor(executor, func, *args)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        # From Python 3.12 on it sets a timer, which must not be jumped over.
        joining = self.create_future()
        self._jobs.add(joining)
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self._jobs.discard(joining)

    async def all_blocked(self) -> None:
        """Wait until every other task is blocked on a timer, on I/O or on another task.

        No time passes. A test uses it to say "by now they all wait" without a sleep.
        """
        waiter = self.create_future()
        self._idle_waiters.append(waiter)
        await waiter

    def _on_idle(self, timeout: float | None) -> float:
        """Do what an idle loop does next; return the real seconds to wait for I/O afterwards."""
        if self._jobs:
            # The job's completion wakes the selector through the loop's self-pipe. The wait is
            # bounded, so that after a wake-up for anything else the loop checks its work again.
            return LAST_CHANCE
        if self._idle_waiters:
            for waiter in self._idle_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle_waiters.clear()
        elif timeout is None:
            self._give_last_chance()
        else:
            self.clock.advance_to(self.time() + timeout)
        return 0.0

    def _give_last_chance(self) -> None:
        may_be_woken = threading.active_count() > 1 or len(self._io.get_map()) > self._own_files
        if not (may_be_woken and selectors.DefaultSelector.select(self._io, LAST_CHANCE)):
            raise DeadlockError(self._describe_deadlock())

    def _describe_deadlock(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        names: dict[str, list[str]] = {}
        for task in tasks:
            names.setdefault(_where(task), []).append(task.get_name())
        lines = [
            f"  {first}{f' and {len(others):,} more' if others else ''}: {where}"
            for where, (first, *others) in names.items()
        ]
        head = f"deadlock at {self.time()} s of virtual time: nothing is ready and no timer is set"
        return "\n".join([f"{head}; these tasks wait:", *(lines or ["  none"])])


def _where(task: asyncio.Task[Any]) -> str:
    """Return where a task waits: its coroutines from the outermost to the suspended one."""
    places: list[str] = []
    coroutine: Any = task.get_coro()
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            file = PurePath(frame.f_code.co_filename).name
            places.append(f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})")
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return " > ".join(places)


class VirtualTime:
    """A stretch of virtual time: one clock, and loops that run on it one after the other.

    `run` may be called several times; time continues where it stopped. `virtual_time()` returns
    this.

    Args:
        start: Seconds at which the clock starts, at most 10,000,000,000. Near zero a float of seconds
            is exact to the nanosecond; from 24 days on it isn't.
        debug: asyncio's debug mode.
    """

    def __init__(self, *, start: float = 0.0, debug: bool | None = None) -> None:
        self.clock = VirtualClock(start)
        self._runner = asyncio.Runner(debug=debug, loop_factory=self.new_loop)

    def __repr__(self) -> str:
        return f"<VirtualTime at {self.now} s>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def now(self) -> float:
        """Seconds of virtual time."""
        return self.clock.seconds

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main` on virtual time and return what it returns.

        Raises:
            DeadlockError: When nothing is ready, no timer is set and `main` isn't done.
            RuntimeError: When called inside a running event loop.
        """
        return self._runner.run(main)

    def new_loop(self) -> VirtualTimeLoop:
        """Make another loop on the same clock, for `asyncio.Runner(loop_factory=...)`."""
        return VirtualTimeLoop(self.clock)

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass at once, as if code had been busy that long.

        For synchronous code between two steps of a test; asynchronous code just sleeps.
        """
        self.clock.advance(seconds)

    async def all_blocked(self) -> None:
        """Wait until every other task of the running loop is blocked; no time passes."""
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualTimeLoop):
            raise TypeError(f"all_blocked() needs a VirtualTimeLoop, this is {loop!r}")
        await loop.all_blocked()

    def close(self) -> None:
        """Cancel what is still running and close the loop. Leaving the context does this."""
        self._runner.close()


def virtual_time(*, start: float = 0.0, debug: bool | None = None) -> VirtualTime:
    """Open a stretch of virtual time; see the module for what is guaranteed, `VirtualTime` for Args.

    Example:
        with virtual_time() as time:
            time.run(asyncio.sleep(3600))
            assert time.now == 3600.0
    """
    return VirtualTime(start=start, debug=debug)
