"""Share one limit among four processes, over Valkey (or Redis) and over a file, as users set it up.

In each process, callers wait for their turn again and again, as fast as they may. What counts is
whether the processes together use the limit and keep it, whether each gets its part, and what a call
costs: trips to the server, by its own count, and CPU time of the processes.

`python -m benchmarks.stores` takes a minute; table and plots go to benchmarks/results. It starts
a server of its own, on loopback.
"""

import argparse
import asyncio
import bisect
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import pyrate_limiter
import redis
import redis.asyncio

import asyncbucket
from benchmarks.harness import Acquire, progress
from benchmarks.plot import labelled_bars, pages
from benchmarks.report import machine_line, versions_line, write_files

#: The limit: calls a second, and how many of them at once.
RATE: Final = 200
BURST: Final = 20
PROCESSES: Final = 4
CALLERS: Final = 25
SECONDS: Final = 10.0
RESULTS: Final = Path(__file__).parent / "results"
_SERVERS: Final = ("valkey-server", "redis-server")

Way: TypeAlias = Callable[[str], Awaitable[Acquire]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the processes came to together."""

    way: str
    calls: int
    #: The most calls in any window of a second.
    fullest: int
    #: The calls of the process that got the fewest, and of the one that got the most.
    least: int
    most: int
    #: How often the server read from its clients, for each call; None without a server.
    trips: float | None
    #: CPU time of all processes (us), for each call.
    cpu: float

    @property
    def used(self) -> float:
        """The part of the limit that was used; what passes at once in the beginning comes on top."""
        return self.calls / (RATE * SECONDS)


async def _asyncbucket(place: str) -> Acquire:
    limit = asyncbucket.Limit("requests", RATE, per=1, burst=BURST)
    limiter = asyncbucket.Limiter(limit, store=place, name="benchmark")

    async def acquire() -> None:
        (await limiter.acquire()).release()

    return acquire


async def _pyrate_limiter(place: str) -> Acquire:
    rates = [pyrate_limiter.Rate(RATE, pyrate_limiter.Duration.SECOND)]
    client = redis.asyncio.Redis.from_url(place)
    bucket: Any = pyrate_limiter.RedisBucket.init(rates, client, "benchmark")
    return pyrate_limiter.Limiter(await bucket).try_acquire_async


#: Each way, and whether it needs a server.
WAYS: Final[dict[str, tuple[Way, bool]]] = {
    "asyncbucket, Valkey": (_asyncbucket, True),
    "asyncbucket, SQLite": (_asyncbucket, False),
    "pyrate-limiter, Valkey": (_pyrate_limiter, True),
}


async def work(name: str, place: str) -> None:
    """Be one of the processes: say when ready, wait for a line, call, and report as JSON."""
    acquire = await WAYS[name][0](place)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)
    passed: list[float] = []
    cpu, end = time.process_time(), time.monotonic() + SECONDS

    async def caller() -> None:
        while True:
            await acquire()
            passed.append(time.monotonic())

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(caller())
    passed = [instant for instant in passed if instant <= end]
    print(json.dumps({"passed": passed, "cpu": time.process_time() - cpu}))


@contextlib.contextmanager
def server(program: str) -> Generator[str]:
    """Run a server on a free port of loopback; yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ("--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no")
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        url = f"redis://127.0.0.1:{port}/0"
        with redis.Redis.from_url(url) as client:
            _wait_for(client)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_for(client: redis.Redis) -> None:
    for _ in range(100):
        with contextlib.suppress(redis.ConnectionError):
            client.ping()
            return
        time.sleep(0.05)
    raise SystemExit("the server does not answer")


def share(name: str, place: str, client: redis.Redis | None) -> Outcome:
    """Let all processes share the limit at ``place``."""
    command = [sys.executable, "-m", "benchmarks.stores", "--worker", name, "--place", place]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    before = _trips(client)
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    reports = [json.loads(worker.communicate()[0]) for worker in workers]
    trips = _trips(client) - before
    counts = [len(report["passed"]) for report in reports]
    passed = sorted(instant for report in reports for instant in report["passed"])
    calls = len(passed)
    return Outcome(
        way=name,
        calls=calls,
        fullest=max(bisect.bisect_left(passed, each + 1) - i for i, each in enumerate(passed)),
        least=min(counts),
        most=max(counts),
        trips=None if client is None else trips / calls,
        cpu=sum(report["cpu"] for report in reports) / calls * 1e6,
    )


def _trips(client: redis.Redis | None) -> int:
    """Return how often the server has read from its clients so far."""
    if client is None:
        return 0
    stats: Any = client.info("stats")
    return int(stats["total_reads_processed"])


def measure() -> list[Outcome]:
    """Share the limit in each way, one after the other."""
    outcomes: list[Outcome] = []
    program = next(filter(None, map(shutil.which, _SERVERS)), None)
    for name, (_, needs_server) in WAYS.items():
        progress(f"{PROCESSES} processes share a limit by {name}")
        if needs_server and program is None:
            sys.stderr.write(f"left out: {name}; apt-get install valkey-server\n")
        elif needs_server:
            with server(str(program)) as url, redis.Redis.from_url(url) as client:
                outcomes.append(share(name, url, client))
        else:
            with tempfile.TemporaryDirectory() as folder:
                outcomes.append(share(name, f"sqlite:///{folder}/limits.db", None))
    progress()
    return outcomes


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the outcomes as Markdown."""
    yield "| shared by | limit used | fullest second | fewest and most calls | trips a call | CPU a call |"
    yield "|---|--:|--:|--:|--:|--:|"
    for each in outcomes:
        trips = "-" if each.trips is None else f"{each.trips:.2f}"
        yield (
            f"| {each.way} | {each.used:.1%} | {each.fullest} of {RATE} "
            f"| {each.least:,} and {each.most:,} | {trips} | {each.cpu:,.0f} µs |"
        )


def page(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the table, with what it was measured on."""
    yield (
        f"{PROCESSES} processes of {CALLERS} callers, {RATE} calls in any second (for asyncbucket at most "
        f"{BURST} at once), for {SECONDS:.0f} s."
    )
    yield ""
    yield from table(outcomes)
    yield ""
    yield machine_line()
    yield versions_line(("asyncbucket", "pyrate-limiter"))


def plot(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Draw how unequal the processes' parts are, and what a call costs, on a light and a dark page."""
    fair = RATE * SECONDS / PROCESSES
    rows = outcomes[::-1]
    for canvas, ink in pages(folder / "stores", 8, 1.9):
        apart, cpu = canvas.subplots(1, 2, sharey=True)
        spread = {each.way: (each.most - each.least) / fair for each in rows}
        labelled_bars(apart, spread, ink, "{:.0%}")
        apart.set_title("how far the processes' shares are apart", loc="left", fontsize=9)
        labelled_bars(cpu, {each.way: each.cpu for each in rows}, ink, "{:.0f} µs")
        cpu.set_title("CPU for each call", loc="left", fontsize=9)
        canvas.suptitle("One limit for four processes: the shorter, the better", fontsize=10)


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write ``stores.md``, ``stores.json`` and the plots."""
    write_files(folder / "stores", page(outcomes), [asdict(each) for each in outcomes])
    plot(outcomes, folder)


def main() -> None:
    """Measure, print the table, and write it with the plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stores", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        asyncio.run(work(options.worker, options.place))
        return
    outcomes = measure()
    print("\n".join(table(outcomes)))
    write(outcomes, options.out)


if __name__ == "__main__":
    main()
