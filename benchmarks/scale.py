"""Share one limit among many real processes whose event loops block: `python -m benchmarks.scale 4 40`.

Each process has five callers and a loop that blocks for up to a second again and again. What counts: the
fullest window by the store's own clock, how much of the limit is used, Jain's index of the processes'
shares, trips to the server for each call, and outages, which would be false. With `--file`, in a file. For
100 and 200 processes, nothing else should run on the machine.
"""

import argparse
import asyncio
import bisect
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from typing import Any, Final

import redis

from asyncbucket import AcquireTimeout, Limiter, StoreError
from asyncbucket.engine.events import Event, StoreLost

RATE: Final = 100
CALLERS: Final = 5
#: How long (s) a process's loop runs, and is blocked at most, in turns.
RUNS: Final = 3.0
BLOCKED: Final = 1.0


def booked_at(lease: Any) -> Any:
    """Return when the store has booked a call, by its own clock (ns)."""
    meters = [meter for meter, _ in lease._route.meters]  # noqa: SLF001 - as tests do
    booked = (getattr(meter, "_reservation", None) for meter in meters)
    return next(each.booked_at for each in booked if each is not None)


async def work(place: str, seconds: float, blocked: float) -> None:
    """Be one of the processes."""
    limiter = Limiter(f"{RATE}/s", "1M TPM", store=place, name="scale")
    lost: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, StoreLost):
            lost.append(event.reason)

    limiter.observe(note)
    went: list[int] = []
    (await limiter.acquire(tokens=1)).release()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    end = time.monotonic() + seconds

    async def caller() -> None:
        with contextlib.suppress(AcquireTimeout, StoreError):
            while time.monotonic() < end:
                async with limiter.acquire(
                    tokens=20, timeout=max(0.01, end - time.monotonic())
                ) as lease:
                    went.append(booked_at(lease))
                    await asyncio.sleep(0.02)
                    lease.settle(tokens=10)

    async def block() -> None:
        while blocked:
            await asyncio.sleep(random.uniform(0, 2 * RUNS))
            time.sleep(random.uniform(0, blocked))  # noqa: ASYNC251 - what is measured

    blocker = asyncio.create_task(block())
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    blocker.cancel()
    print(json.dumps([went, lost]), flush=True)
    sys.stdin.readline()
    await limiter.aclose()


def measure(number: int, place: str, seconds: float, blocked: float) -> dict[str, Any]:
    """Let ``number`` processes share the limit at ``place``."""
    command = [sys.executable, "-m", "benchmarks.scale", "--worker", place]
    command += ["--seconds", str(seconds), "--blocked", str(blocked)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(number)
    ]
    for each in workers:
        assert each.stdout is not None
        each.stdout.readline()
    is_server = place.startswith("redis")
    client: Any = redis.Redis.from_url(place) if is_server else None
    if client is not None:
        client.config_resetstat()
    for each in workers:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    reports = [json.loads(each.stdout.readline() or "[[],[]]") for each in workers if each.stdout]
    scripts = client.info("commandstats")["cmdstat_evalsha"] if client is not None else {}
    for each in workers:
        assert each.stdin is not None
        each.stdin.close()
    for each in workers:
        each.wait()
    shares = [len(went) for went, _ in reports]
    starts = sorted(start for went, _ in reports for start in went)
    fullest = max(bisect.bisect_left(starts, each + 10**9) - i for i, each in enumerate(starts))
    return {
        "processes": number,
        "fullest": fullest,
        "used": round(len(starts) / (RATE * seconds), 3),
        "jain": round(sum(shares) ** 2 / (number * sum(each**2 for each in shares)), 4),
        "scripts": round(scripts.get("calls", 0) / len(starts), 2),
        "us": scripts.get("usec_per_call"),
        "outages": sum(len(lost) for _, lost in reports),
        "shares": [min(shares), max(shares)],
    }


def main() -> None:
    """Measure, and print a line for each number of processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("processes", nargs="*", type=int, default=[4, 40])
    parser.add_argument("--file", action="store_true", help="in a file instead of on a server")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument(
        "--blocked", type=float, default=BLOCKED, help="the longest block, in seconds"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        asyncio.run(work(options.worker, options.seconds, options.blocked))
        return
    from benchmarks.stores import server  # here: a process would take seconds to import it

    for number in options.processes:
        with contextlib.ExitStack() as stack:
            if options.file:
                place = f"sqlite:///{stack.enter_context(tempfile.TemporaryDirectory())}/limits.db"
            else:
                place = stack.enter_context(server("valkey-server"))
            print(json.dumps(measure(number, place, options.seconds, options.blocked)), flush=True)


if __name__ == "__main__":
    main()
