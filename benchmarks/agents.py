"""When do agents finish? ``python -m benchmarks.agents``: by call, in fair shares, or by agent.

Each mix of agents runs on virtual time under one limiter: calls in order of arrival; a child for
each agent, which share fairly; `asyncbucket.agent` scopes, with no history, with the sizes that 60
earlier agents taught, and told the true sizes.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from asyncbucket import Cost, Limiter, agent
from asyncbucket.testing import virtual_time

Order = Literal["by call", "fair shares", "first agents", "by agent", "true sizes"]
ORDERS: Final[tuple[Order, ...]] = get_args(Order)
RESULTS: Final = Path(__file__).parent / "results"
#: Tokens a minute.
TPM: Final = 400_000


@dataclass(frozen=True)
class Agent:
    """One agent's work: rounds of calls that run side by side, each with its tokens and seconds."""

    kind: str
    arrives: float
    rounds: Sequence[Sequence[tuple[int, float]]]

    @property
    def tokens(self) -> int:
        """What it uses in all."""
        return sum(tokens for each in self.rounds for tokens, _ in each)


def _calls(
    draw: random.Random, rounds: int, beside: int, tokens: int
) -> list[list[tuple[int, float]]]:
    """Return calls of about ``tokens``, each of about two seconds."""
    return [
        [
            (
                max(50, round(tokens * draw.lognormvariate(-0.06, 0.35))),
                draw.lognormvariate(0.6, 0.4),
            )
            for _ in range(beside)
        ]
        for _ in range(rounds)
    ]


def mixed(seed: int, count: int = 150, over: float = 0.0) -> list[Agent]:
    """Return chats of a few calls, agents with tools, and research that fans out."""
    draw = random.Random(seed)
    agents = []
    for _ in range(count):
        kind = draw.choices(["chat", "tools", "research"], [0.5, 0.35, 0.15])[0]
        if kind == "chat":
            rounds = _calls(draw, draw.randint(1, 4), 1, 1_500)
        elif kind == "tools":
            rounds = _calls(draw, draw.randint(5, 14), 1, 4_000)
        else:
            rounds = _calls(draw, draw.randint(3, 6), 6, 5_000)
        agents.append(Agent(kind, draw.uniform(0, over), rounds))
    return agents


def heavy_tailed(seed: int, count: int = 150) -> list[Agent]:
    """Return agents of one kind that call one after the other; lognormal in length, sigma 1."""
    draw = random.Random(seed)
    return [
        Agent("agent", 0.0, _calls(draw, max(1, round(draw.lognormvariate(1.8, 1.0))), 1, 4_000))
        for _ in range(count)
    ]


def mixed_over_600_s(seed: int) -> list[Agent]:
    """Return mixed agents that come within ten minutes."""
    return mixed(seed, over=600.0)


def alike(_seed: int, count: int = 100) -> list[Agent]:
    """Return agents that all do the same."""
    return [Agent("agent", 0.0, [[(4_000, 2.0)]] * 8) for _ in range(count)]


MIXES: Final[dict[str, Callable[[int], list[Agent]]]] = {
    "mixed, all at once": mixed,
    "mixed, over 600 s": mixed_over_600_s,
    "heavy-tailed": heavy_tailed,
    "all alike": alike,
}


@dataclass(frozen=True)
class Result:
    """How long each agent took, and the whole run (s)."""

    seconds: list[float]
    makespan: float
    #: The most tokens admitted in any minute.
    most: int

    @property
    def mean(self) -> float:
        """The mean time of an agent."""
        return statistics.fmean(self.seconds)


def play(agents: Sequence[Agent], order: Order, *, earlier: Sequence[Agent] = ()) -> Result:
    """Run ``agents`` on virtual time, after ``earlier`` ones that teach the sizes."""
    seconds: list[float] = []
    admitted: list[tuple[float, int]] = []

    with virtual_time() as time:
        limiter = Limiter(f"{TPM} TPM burst {TPM // 15}", clock=time.clock)

        @contextlib.contextmanager
        def scope(one: Agent) -> Generator[Limiter]:
            if order == "by call":
                yield limiter
            elif order == "fair shares":
                yield limiter.child(str(id(one)))
            else:
                true = Cost(requests=0, tokens=one.tokens)
                expects = true if order == "true sizes" else None
                with agent(kind=one.kind, expects=expects):
                    yield limiter

        async def call(mine: Limiter, tokens: int, lasts: float) -> None:
            async with mine.acquire(tokens=tokens):
                admitted.append((time.now, tokens))
                await asyncio.sleep(lasts)

        async def run(one: Agent) -> float:
            await asyncio.sleep(one.arrives)
            began = time.now
            with scope(one) as mine:
                for each in one.rounds:
                    await asyncio.gather(*(call(mine, *each_call) for each_call in each))
            return time.now - began

        async def main() -> float:
            if order == "by agent":
                await asyncio.gather(*map(run, earlier))
                await asyncio.sleep(120)
            began = time.now
            seconds[:] = await asyncio.gather(*map(run, agents))
            return time.now - began

        makespan = time.run(main())
    return Result(seconds, makespan, _most(admitted))


def _most(admitted: Sequence[tuple[float, int]]) -> int:
    """Return the most tokens admitted within any minute."""
    most = total = first = 0
    for when, tokens in admitted:
        total += tokens
        while admitted[first][0] <= when - 60:
            total -= admitted[first][1]
            first += 1
        most = max(most, total)
    return most


def table(seed: int) -> Iterator[str]:
    """Yield the lines of a table: what agents of each mix took, in each order."""
    yield "| mix | order | mean, s | to by call | slowest tenth from, s | all, s | most in a minute |"
    yield "|---|---|---|---|---|---|---|"
    for name, mix in MIXES.items():
        agents = mix(seed)
        by_call = play(agents, "by call")
        for order in ORDERS:
            result = play(agents, order, earlier=mix(seed + 1)[:60])
            late = statistics.quantiles(result.seconds, n=10)[-1]
            yield (
                f"| {name} | {order} | {result.mean:.0f} | {result.mean / by_call.mean:.2f} | {late:.0f} | "
                f"{result.makespan:.0f} | {result.most:,} |"
            )


def draw(path: Path, http: dict[Order, list[float]]) -> None:
    """Draw how many agents had finished by when: on virtual time and, if measured, over HTTP."""
    from benchmarks.plot import OURS, THEIRS, pages

    agents, earlier = mixed(1), mixed(2)[:60]
    simulated: dict[Order, list[float]] = {
        order: play(agents, order, earlier=earlier).seconds
        for order in ORDERS
        if order in {"by call", "fair shares", "by agent"}
    }
    panels: list[tuple[str, float, str, dict[Order, list[float]]]] = [
        (f"{len(agents)} agents, 400k tokens a minute", 60.0, "minutes", simulated),
        ("60 LlamaIndex agents over HTTP, 10 calls a second", 1.0, "seconds", http),
    ]
    colours = {"by call": THEIRS, "fair shares": "#c58a2b", "by agent": OURS}
    for canvas, ink in pages(path, 9, 3.2):
        for axes, (title, unit, unit_name, orders) in zip(
            canvas.subplots(1, 2), panels, strict=True
        ):
            for order, seconds in orders.items():
                times = [0.0, *(each / unit for each in sorted(seconds))]
                axes.step(times, range(len(times)), where="post", color=colours[order], label=order)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel(f"{unit_name} since the start", fontsize=9)
            axes.set_ylabel("agents that have finished", fontsize=9)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=8)
            axes.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=ink)


def main() -> None:
    """Print a table; with ``--write``, measure over HTTP too and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    text = "\n".join(table(options.seed))
    print(text)
    if options.write:
        from benchmarks import agents_http

        by_call, whole, refused = agents_http.play(scopes=False)
        by_agent, whole_too, refused_too = agents_http.play(scopes=True)
        draw(RESULTS / "agents", {"by call": by_call, "by agent": by_agent})
        text = (
            f"# When agents finish\n\n`python -m benchmarks.agents --write`, on virtual time, "
            f"{TPM:,} tokens a minute:\n\n{text}\n\n60 LlamaIndex `FunctionAgent`s of three kinds over "
            f"HTTP against the bundled provider: mean {statistics.fmean(by_call):.1f} s by call ({whole:.1f} s in "
            f"all, {refused} refused), {statistics.fmean(by_agent):.1f} s by agent ({whole_too:.1f} s in "
            f"all, {refused_too} refused).\n"
        )
        (RESULTS / "agents.md").write_text(text, "utf-8")
        print(f"wrote {RESULTS}/agents.md and its picture")


if __name__ == "__main__":
    main()
