"""Send the same calls to four kinds of provider through asyncbucket and through its peers.

The provider is the bundled one, in a process of its own: it enforces its limits exactly, and counts
what was sent and refused; the caller counts the calls that were lost. A minute is a real minute, so
back-offs are as long as they are in practice. Each run is a process of its own, too, so its processor
time is its own; several run at once, because each of them waits almost all the time. `ways` sets the
peers up; one that is not installed is left out.

`make peers` takes about half an hour; table and plots go to benchmarks/results.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from asyncbucket.testing.counting import Policy, PolicyName
from benchmarks.harness import progress, served_provider
from benchmarks.plot import OURS, THEIRS, pages
from benchmarks.report import machine_line, versions_line, write_files
from benchmarks.ways import PATIENCE, RPM, TPM, WAYS, Place, Way

CALLS: Final = 400
LATENCY: Final = (0.1, 0.4)
MINUTE_NS: Final = 60_000_000_000
RESULTS: Final = Path(__file__).parent / "results"

COUNTS: Final[dict[PolicyName, str]] = {
    "token_bucket": "a token bucket",
    "sliding_window": "any minute",
    "fixed_window": "the clock's minutes",
    "one_second_slices": "slices of a second",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way came to at one provider."""

    policy: PolicyName
    way: str
    calls: int
    #: Requests that the provider counted, and those of them that it answered with 429.
    sent: int
    refused: int
    #: Calls that raised, in the end, or had no answer after `PATIENCE`.
    lost: int
    seconds: float
    #: The seconds that it takes if each call leaves at the first instant at which it passes.
    ideal: float
    #: Processor time (s) of the caller, and of the proxy if there is one.
    cpu: float


def ideal_seconds(policy: PolicyName, calls: int, begun_ns: int) -> float:
    """Return how long ``calls`` at once take someone who sees the provider's own meter."""
    meter, now = Policy(policy, MINUTE_NS), begun_ns
    for _ in range(calls):
        now += meter.wait(1, RPM, now) or 0
        meter.charge(1, RPM, now)
    return (now - begun_ns) * 1e-9 + sum(LATENCY) / 2


async def drive(way: Way, policy: PolicyName, *, calls: int) -> Outcome:
    """Send ``calls`` chats at once through one way to one provider."""
    logging.disable()  # some peers tell of each retry
    with served_provider(latency=LATENCY, rpm=RPM, tpm=TPM, policy=policy) as provider:
        place = Place(provider.base_url.removesuffix("/v1"))
        async with way.start(place) as chat:
            # The provider's clock, too: where its minutes begin is the same for both.
            begun, cpu = time.monotonic(), _cpu(place.processes)
            tasks = [asyncio.ensure_future(chat(f"Tell me about {n}.")) for n in range(calls)]
            await asyncio.wait(tasks, timeout=PATIENCE)
            seconds, cpu = time.monotonic() - begun, _cpu(place.processes) - cpu
            for task in tasks:
                task.cancel()
            replies = await asyncio.gather(*tasks, return_exceptions=True)
    seen = provider.seen
    errors = [reply for reply in replies if isinstance(reply, BaseException)]
    for kind in sorted({type(error).__name__ for error in errors}):
        sys.stderr.write(f"{way.name}, {policy}: lost calls with {kind}\n")
    ideal = ideal_seconds(policy, calls, round(begun * 1e9))
    return Outcome(
        policy, way.name, calls, seen.requests, seen.refused, len(errors), seconds, ideal, cpu
    )


def _cpu(processes: Sequence[int]) -> float:
    """Return the processor time (s) of ``processes`` so far; this is Linux's way to tell it."""
    ticks = 0
    for pid in processes:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def measure(*, calls: int = CALLS, ways: Sequence[Way] = WAYS, jobs: int) -> list[Outcome]:
    """Send the calls through every way to every provider, ``jobs`` of them at once."""
    slots = asyncio.Semaphore(jobs)

    async def run(way: Way, policy: PolicyName) -> Outcome:
        command = (sys.executable, "-m", "benchmarks.four29", "--calls", str(calls))
        async with slots:
            progress(f"{calls} calls to a {policy} paced by {way.name}")
            process = await asyncio.create_subprocess_exec(
                *command, "--way", way.name, "--policy", policy, stdout=asyncio.subprocess.PIPE
            )
            output, _ = await process.communicate()
        if process.returncode:
            raise SystemExit(f"{way.name} failed at a {policy}")
        return Outcome(**json.loads(output.splitlines()[-1]))

    pairs: list[tuple[Way, PolicyName]] = [(way, policy) for policy in COUNTS for way in ways]
    outcomes = await asyncio.gather(*(run(*pair) for pair in pairs))
    progress()
    return outcomes


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the outcomes as Markdown."""
    yield "| the provider counts by | paced by | s | over the ideal | lost | 429s | CPU, ms a call |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for each in outcomes:
        yield (
            f"| {COUNTS[each.policy]} | {each.way} | {each.seconds:.0f} | {_over(each)} "
            f"| {each.lost} | {each.refused:,} | {1000 * each.cpu / each.calls:.1f} |"
        )


def _over(outcome: Outcome) -> str:
    """Return the time over the ideal, which says nothing if calls were lost."""
    return "" if outcome.lost else f"{outcome.seconds / outcome.ideal:.2f}"


def page(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the table, with what it was measured on."""
    yield from table(outcomes)
    yield ""
    yield machine_line()
    measured = {each.way for each in outcomes}
    yield versions_line(sorted({way.distribution for way in WAYS if way.name in measured}))


_REFUSED: Final = "#d93025"
_LABEL: Final[dict[str, object]] = {"va": "center", "fontsize": 7}


def plot(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Draw for each kind of provider how long it took, and how many 429s, for either theme."""
    told = (
        f"{outcomes[0].calls} calls at once; the provider allows {RPM} requests a minute. Each way of pacing "
        "is set up as its own\ndocumentation shows, and told that limit if it takes one. Nothing is tuned to "
        "how the provider counts."
    )
    for canvas, ink in pages(folder / "four29", 9, 11):
        canvas.suptitle(told, x=0.01, ha="left", fontsize=9)
        grid = canvas.subplots(len(COUNTS), 2, sharex="col", sharey="row")
        for (left, right), policy in zip(grid, COUNTS, strict=True):
            rows = [each for each in outcomes if each.policy == policy][::-1]
            names = [each.way for each in rows]
            colours = [OURS if name == "asyncbucket" else THEIRS for name in names]
            left.barh(names, [each.seconds for each in rows], color=colours)
            ideal = sum(each.ideal for each in rows) / len(rows)
            left.axvline(ideal, color=ink, linewidth=0.8, linestyle=":")
            right.barh(names, [each.refused for each in rows], color=_REFUSED)
            edge = left.get_yaxis_transform()
            for place, each in enumerate(rows):
                if each.lost:
                    lost = f"{each.lost} lost"
                    left.text(1, place, lost, _LABEL, transform=edge, ha="right", color=_REFUSED)
                right.text(each.refused, place, f" {each.refused:,}", _LABEL)
            for axes in (left, right):
                axes.margins(x=0.2)
                axes.tick_params(labelsize=8)
            left.set_title(f"a provider that counts by {COUNTS[policy]}", loc="left", fontsize=9)
        grid[-1][0].set_xlabel("seconds until the last call ended (dotted: the ideal)")
        grid[-1][1].set_xlabel("requests refused with 429")


def main() -> None:
    """Measure, print the table, and write it with the plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.four29", description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS, help="how many at once")
    parser.add_argument("--jobs", type=int, default=6, help="how many runs at once")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--way", choices=[way.name for way in WAYS], help="print this one as JSON")
    parser.add_argument("--policy", choices=[*COUNTS], default="token_bucket")
    options = parser.parse_args()
    if options.way:
        way = next(way for way in WAYS if way.name == options.way)
        outcome = asyncio.run(drive(way, options.policy, calls=options.calls))
        print(json.dumps(asdict(outcome)))
        return
    ways = [way for way in WAYS if way.installed]
    outcomes = asyncio.run(measure(calls=options.calls, ways=ways, jobs=options.jobs))
    print("\n".join(table(outcomes)))
    write_files(options.out / "four29", page(outcomes), [asdict(each) for each in outcomes])
    plot(outcomes, options.out)


if __name__ == "__main__":
    main()
