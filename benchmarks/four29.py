"""Send the same calls through four ways of pacing to four kinds of provider, as users set them up.

Every way drives LlamaIndex's own OpenAI class with the retries that come with it, so refusals cost
more requests, more time and, in the end, failed calls. The bundled provider runs in a process of its
own and enforces its limits exactly; its minute lasts 12 s. What was sent and refused is counted by
the provider, what failed by the caller.

`python -m benchmarks.four29` takes about ten minutes; table and plots go to benchmarks/results.
"""

import argparse
import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import aiolimiter
import httpx
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.llms.openai import OpenAI
from matplotlib.axes import Axes

import asyncbucket
from asyncbucket.testing import ProviderProcess
from asyncbucket.testing.provider.policies import POLICY_NAMES, PolicyName
from benchmarks.harness import progress
from benchmarks.plot import pages
from benchmarks.provider import Chat, chat_through
from benchmarks.report import machine_line, versions_line, write_files

MINUTE: Final = 12.0
RPM: Final = 120
TPM: Final = 12_000
CALLS: Final = 400
CONCURRENCY: Final = 50
MAX_TOKENS: Final = 40
LATENCY: Final = (0.1, 0.4)
#: Longer than any way that works takes; what is still under way then has failed.
PATIENCE: Final = 150.0
RESULTS: Final = Path(__file__).parent / "results"

COUNTS: Final[dict[PolicyName, str]] = {
    "token_bucket": "a token bucket",
    "sliding_window": "any minute",
    "fixed_window": "the clock's minutes",
    "one_second_slices": "slices of a second",
}
Way: TypeAlias = Callable[["Place"], Chat]


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
    failed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where the calls go, and by which client."""

    base_url: str
    policy: PolicyName
    client: httpx.AsyncClient


def _model(place: Place, **options: Any) -> OpenAI:
    return OpenAI(
        model="gpt-4o-mini",
        api_base=place.base_url,
        api_key="none",
        async_http_client=place.client,
        max_tokens=MAX_TOKENS,
        **options,
    )


def _nothing(place: Place) -> Chat:
    return chat_through(_model(place))


def _llama_index(place: Place) -> Chat:
    minutes = 60 / MINUTE
    limiter = TokenBucketRateLimiter(
        requests_per_minute=RPM * minutes, tokens_per_minute=TPM * minutes
    )
    return chat_through(_model(place, rate_limiter=limiter))


def _aiolimiter(place: Place) -> Chat:
    return chat_through(
        _model(place), asyncio.Semaphore(CONCURRENCY), aiolimiter.AsyncLimiter(RPM, MINUTE)
    )


def _asyncbucket(place: Place) -> Chat:
    # Who counts in slices of a second takes no more at once than fits in one, and says so.
    burst = RPM // 60 if place.policy == "one_second_slices" else None
    limiter = asyncbucket.Limiter(
        asyncbucket.Limit("requests", RPM, per=MINUTE, burst=burst),
        asyncbucket.Limit("tokens", TPM, per=MINUTE),
        concurrency=CONCURRENCY,
    )
    return chat_through(limiter.wrap(_model(place)))


WAYS: dict[str, Way] = {
    "nothing": _nothing,
    "LlamaIndex's rate_limiter": _llama_index,
    "aiolimiter + semaphore": _aiolimiter,
    "asyncbucket": _asyncbucket,
}


async def drive(name: str, policy: PolicyName, *, calls: int) -> Outcome:
    """Send ``calls`` chats at once through one way to one provider."""
    many = httpx.Limits(max_connections=None)
    limits: dict[str, Any] = {"rpm": RPM, "tpm": TPM, "minute": MINUTE, "policy": policy}
    with ProviderProcess(latency=LATENCY, **limits) as provider:
        async with httpx.AsyncClient(limits=many, timeout=120) as client:
            chat = WAYS[name](Place(provider.base_url, policy, client))
            start = time.monotonic()
            tasks = [asyncio.ensure_future(chat(f"Tell me about {n}.")) for n in range(calls)]
            await asyncio.wait(tasks, timeout=PATIENCE)
            seconds = time.monotonic() - start
            for task in tasks:
                task.cancel()
            replies = await asyncio.gather(*tasks, return_exceptions=True)
        seen = provider.statistics()
    failed = sum(isinstance(reply, BaseException) for reply in replies)
    return Outcome(policy, name, calls, seen.requests, seen.refused, failed, seconds)


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the outcomes as Markdown."""
    yield "| the provider counts by | paced by | requests sent | refused (429) | calls failed | s |"
    yield "|---|---|--:|--:|--:|--:|"
    for each in outcomes:
        yield (
            f"| {COUNTS[each.policy]} | {each.way} | {each.sent:,} | {each.refused:,} "
            f"| {each.failed:,} of {each.calls:,} | {each.seconds:.1f} |"
        )


def page(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the table, with what it was measured on."""
    yield from table(outcomes)
    yield ""
    yield machine_line()
    yield versions_line(("asyncbucket", "aiolimiter", "llama-index-core"))


_REFUSED: Final = "#d93025"
_ANSWERED: Final = "#1f77b4"


def plot(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Draw what was sent, split by how it was answered, for a light page and for a dark one."""
    for canvas, _ in pages(folder / "four29", 9, 4.8):
        grid = canvas.subplots(2, 2, sharex=True, sharey=True).ravel()
        for axes, policy in zip(grid, POLICY_NAMES, strict=True):
            _bars(axes, policy, [each for each in outcomes if each.policy == policy])
        for axes in grid[2:]:
            axes.set_xlabel("HTTP requests")
        grid[0].legend(loc="lower right", fontsize=8, frameon=False)


def _bars(axes: Axes, policy: PolicyName, outcomes: Sequence[Outcome]) -> None:
    rows = outcomes[::-1]
    names = [each.way for each in rows]
    answered = [each.sent - each.refused for each in rows]
    axes.barh(names, answered, color=_ANSWERED, label="answered")
    refused = [each.refused for each in rows]
    axes.barh(names, refused, left=answered, color=_REFUSED, label="refused with 429")
    for place, each in enumerate(rows):
        lost = f"{each.failed} calls failed" if each.failed else "none failed"
        axes.text(each.sent, place, f"  {lost}", va="center", fontsize=7)
    axes.set_title(f"a provider that counts by {COUNTS[policy]}", loc="left", fontsize=9)
    axes.margins(x=0.25)
    axes.tick_params(labelsize=8)


def measure(*, calls: int = CALLS) -> list[Outcome]:
    """Send the calls through every way to every provider, one after the other."""
    logging.getLogger("llama_index").setLevel(logging.ERROR)  # it warns of each retry
    outcomes: list[Outcome] = []
    for policy in POLICY_NAMES:
        for name in WAYS:
            progress(f"{calls} calls to a {policy} paced by {name}")
            outcomes.append(asyncio.run(drive(name, policy, calls=calls)))
    progress()
    return outcomes


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write ``four29.md``, ``four29.json`` and the plots."""
    write_files(folder / "four29", page(outcomes), [asdict(each) for each in outcomes])
    plot(outcomes, folder)


def main() -> None:
    """Measure, print the table, and write it with the plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.four29", description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS, help="how many at once")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    outcomes = measure(calls=options.calls)
    print("\n".join(table(outcomes)))
    write(outcomes, options.out)


if __name__ == "__main__":
    main()
