"""Let `concurrency="auto"` find the capacity of a server that does not tell it, and plot it.

The server listens on loopback and is called over HTTP, through a limiter's transport. It serves so
many calls at once, 0.2 s each, give or take; more of them queue, or are refused with a 429,
depending on the run. That number halves, then quadruples. For each of its values the best fixed
concurrency is that number itself, and it is measured too, by the same means.

`python -m benchmarks.adaptive` takes four minutes; the plots go to benchmarks/results.
"""

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import uvicorn

from asyncbucket import Limiter
from asyncbucket.engine.terms import Concurrency
from benchmarks.plot import pages

#: The time of a call when nothing queues (s), and the standard deviation of its logarithm.
LATENCY: Final = 0.2
SPREAD: Final = 0.2
CAPACITIES: Final = (16, 8, 32)
#: Seconds at each capacity; what is measured are the last of them.
PHASE: Final = 25.0
MEASURED: Final = 15.0
FIXED: Final = 6.0
CALLERS: Final = 80
RESULTS: Final = Path(__file__).parent / "results"

Message = MutableMapping[str, Any]


class Server:
    """Serve `capacity` calls at once; let the others queue, or refuse them."""

    def __init__(self, *, refuses: bool) -> None:
        self.refuses = refuses
        self.capacity = CAPACITIES[0]
        self.serving = 0
        self._changed = asyncio.Condition()
        self._chance = random.Random(5)

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        assert scope["type"] == "http"
        while (await receive()).get("more_body"):
            pass
        status = 200 if await self._serve() else 429
        headers = [(b"content-type", b"application/json"), (b"retry-after-ms", b"100")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"status": status}).encode()})

    async def _serve(self) -> bool:
        async with self._changed:
            if self.refuses and self.serving >= self.capacity:
                return False
            await self._changed.wait_for(lambda: self.serving < self.capacity)
            self.serving += 1
        await asyncio.sleep(LATENCY * self._chance.lognormvariate(-(SPREAD**2) / 2, SPREAD))
        async with self._changed:
            self.serving -= 1
            self._changed.notify()
        return True


@contextlib.asynccontextmanager
async def running(app: Server) -> AsyncGenerator[str]:
    """Serve `app` on its own thread, and yield its address."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:  # noqa: ASYNC110 - uvicorn sets no event
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join)


@dataclass
class Track:
    """What was observed in one run, in seconds since its start."""

    served: list[float] = field(default_factory=list[float])
    sizes: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    refused: int = 0

    def rate(self, start: float, end: float) -> float:
        """Return the calls served in each second from `start` to `end`."""
        return sum(start <= when < end for when in self.served) / (end - start)


async def drive(
    app: Server, url: str, *, concurrency: Concurrency, phases: tuple[int, ...], seconds: float
) -> Track:
    """Call the server as fast as a limiter allows, `seconds` at each of the capacities."""
    track = Track()
    limiter = Limiter(concurrency=concurrency, name="hidden")
    start = time.monotonic()

    async def caller(client: httpx.AsyncClient) -> None:
        while time.monotonic() - start < seconds * len(phases):
            reply = await client.post(f"{url}/v1/chat/completions", json={"messages": []})
            now = time.monotonic() - start
            if reply.status_code == 200:
                track.served.append(now)
            else:
                track.refused += 1
            track.sizes.append((now, limiter.concurrency or 0))

    async with (
        httpx.AsyncClient(transport=limiter.transport(), timeout=60) as client,
        asyncio.TaskGroup() as group,
    ):
        app.capacity = phases[0]
        for _ in range(CALLERS):
            group.create_task(caller(client))
        for capacity in phases[1:]:
            await asyncio.sleep(seconds)
            app.capacity = capacity
    return track


async def compare(*, refuses: bool) -> tuple[Track, dict[int, float]]:
    """Return the run of `"auto"`, and the rate of the best fixed number at each capacity."""
    app = Server(refuses=refuses)
    best: dict[int, float] = {}
    async with running(app) as url:
        for capacity in CAPACITIES:
            fixed = await drive(app, url, concurrency=capacity, phases=(capacity,), seconds=FIXED)
            best[capacity] = fixed.rate(1, FIXED)
        track = await drive(app, url, concurrency="auto", phases=CAPACITIES, seconds=PHASE)
    return track, best


def table(kind: str, track: Track, best: dict[int, float]) -> str:
    """Return the figures as rows of Markdown."""
    rows: list[str] = []
    for number, capacity in enumerate(CAPACITIES):
        end = (number + 1) * PHASE
        rate = track.rate(end - MEASURED, end)
        sizes = [size for when, size in track.sizes if end - MEASURED <= when < end]
        rows.append(
            f"| {kind} | {capacity} | {best[capacity]:.1f} | {rate:.1f} | "
            f"{rate / best[capacity]:.0%} | {sum(sizes) / max(1, len(sizes)):.1f} |"
        )
    return "\n".join(rows)


def plot(tracks: dict[str, Track], best: dict[str, dict[int, float]]) -> None:
    """Draw slots and throughput over time, once for a light page and once for a dark one."""
    for canvas, _ in pages(RESULTS / "adaptive", 10, 6):
        grid = canvas.subplots(2, len(tracks), sharex=True, sharey="row", squeeze=False)
        edges = [number * PHASE for number in range(len(CAPACITIES) + 1)]
        for column, (kind, track) in enumerate(tracks.items()):
            above, below = grid[0, column], grid[1, column]
            above.set_title(f"a server that {kind} what is too much", loc="left", fontsize=10)
            times, sizes = zip(*track.sizes, strict=True)
            above.plot(times, sizes, color="#1f77b4", lw=1.2, label='concurrency="auto"')
            above.stairs(CAPACITIES, edges, color="#d93025", ls="--", label="hidden capacity")
            seconds = range(int(edges[-1]))
            rates = [track.rate(second, second + 1) for second in seconds]
            below.plot([s + 0.5 for s in seconds], rates, color="#1f77b4", lw=1.2, label="auto")
            ideal = [best[kind][capacity] for capacity in CAPACITIES]
            below.stairs(ideal, edges, color="#d93025", ls="--", label="best fixed number")
            below.set_xlabel("seconds")
            for axes in (above, below):
                axes.set_ylim(bottom=0)
                axes.legend(fontsize=8, frameon=False, loc="upper left")
        grid[0, 0].set_ylabel("slots")
        grid[1, 0].set_ylabel("calls served a second")


def main() -> None:
    """Measure both kinds of server, print the table, write it and the plots."""
    RESULTS.mkdir(exist_ok=True)
    tracks: dict[str, Track] = {}
    best: dict[str, dict[int, float]] = {}
    rows = [
        "| a server that | serves at once | best fixed, calls/s | auto, calls/s | of it | slots |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, refuses in (("queues", False), ("refuses", True)):
        tracks[kind], best[kind] = asyncio.run(compare(refuses=refuses))
        rows.append(table(kind, tracks[kind], best[kind]))
    share = tracks["refuses"].refused / len(tracks["refuses"].sizes)
    rows.append(f"\nRefused: {share:.1%} of the calls to the second server.")
    text = "\n".join(rows) + "\n"
    (RESULTS / "adaptive.md").write_text(text, encoding="utf-8")
    plot(tracks, best)
    print(text)


if __name__ == "__main__":
    main()
