"""One run of all benchmarks, and its report."""

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path

from asyncbucket.testing.counting import POLICY_NAMES
from benchmarks import cases, stores
from benchmarks.admission import admission
from benchmarks.children import children_crowd, children_idle
from benchmarks.harness import Figure
from benchmarks.plot import plot
from benchmarks.provider import Outcome, refusals
from benchmarks.report import Report
from benchmarks.transport import transport

RESULTS = Path(__file__).parent / "results"
CROWD = (cases.OURS, cases.LEAKY, cases.AIO)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the report, and write it to ``--out``."""
    options = _parser().parse_args(arguments)
    gc.freeze()
    rounds: int = options.rounds or (3 if options.quick else 11)
    figures = [figure() for figure in _figures(rounds, quick=options.quick)]
    outcomes: list[Outcome] = []
    if not options.no_provider:
        calls, policies = (400, POLICY_NAMES[1:2]) if options.quick else (1000, POLICY_NAMES)
        outcomes = refusals(calls=calls, policies=policies)
    report = Report(figures, outcomes)
    print("\n".join(report.lines()))
    report.write(options.out)
    plot(figures, options.out)
    if not options.quick and not options.no_provider:
        stores.write(stores.measure(), options.out)
    sys.stderr.write(f"written to {options.out}\n")
    return 0


def _figures(rounds: int, *, quick: bool) -> list[Callable[[], Figure]]:
    calls = 2_000 if quick else 20_000
    few = min(rounds, 5)
    figures = [
        lambda: cases.idle(rounds=rounds, calls=calls),
        lambda: cases.idle_turning(rounds=rounds, calls=calls),
        lambda: admission(rounds=rounds, calls=calls),
        lambda: children_idle(rounds=rounds, calls=calls),
        lambda: children_crowd(10_000, rounds=few),
        lambda: transport(rounds=rounds, calls=calls // 50),
        lambda: cases.contended(10_000, rounds=rounds, names=CROWD),
    ]
    if not quick:
        crowd = (*CROWD, "llama_index", "langchain", "pyrate-limiter")
        figures += [
            lambda: cases.contended(100_000, rounds=rounds, names=CROWD),
            lambda: cases.contended(1_000, rounds=3, names=crowd),
            lambda: cases.giving_up(100_000, rounds=few),
        ]
    return [*figures, lambda: cases.giving_up(10_000, rounds=few)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure asyncbucket and its peers: python -m benchmarks, or make bench.",
        epilog="Example: python -m benchmarks --quick --no-provider --out /tmp/figures",
    )
    parser.add_argument("--quick", action="store_true", help="a minute instead of half an hour")
    parser.add_argument("--rounds", type=int, help="samples of each contender")
    parser.add_argument("--no-provider", action="store_true", help="leave out the calls over HTTP")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    return parser
