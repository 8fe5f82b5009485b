"""Say what was measured: a table for people, the samples for machines."""

import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.contenders import VERSIONS
from benchmarks.harness import Figure
from benchmarks.provider import Outcome


@dataclass(frozen=True, slots=True)
class Report:
    """All of one run."""

    figures: Sequence[Figure]
    outcomes: Sequence[Outcome]

    def write(self, folder: Path) -> None:
        """Write ``results.md`` and ``results.json``."""
        content = {
            "machine": machine(),
            "versions": VERSIONS,
            "figures": [_plain(figure) for figure in self.figures],
            "provider": [asdict(outcome) for outcome in self.outcomes],
        }
        write_files(folder / "results", self.lines(), content)

    def lines(self) -> Iterator[str]:
        """Yield the report as markdown."""
        yield "# Benchmarks"
        yield ""
        yield machine_line()
        yield ""
        yield versions_line(VERSIONS)
        yield (
            "Median of the rounds, lowest and highest beside it; lower is better. "
            "`make bench` makes this page."
        )
        for figure in self.figures:
            yield from _table(figure)
        if self.outcomes:
            yield from _refusals(self.outcomes)


def write_files(path: Path, lines: Iterable[str], content: object) -> None:
    """Write ``path.md`` with ``lines``, and ``path.json`` with ``content``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def machine_line() -> str:
    """Return what the figures depend on, as a sentence."""
    return "; ".join(f"{name}: {value}" for name, value in machine().items()) + "."


def versions_line(names: Iterable[str]) -> str:
    """Return the versions of the distributions called ``names``, as a sentence."""
    return ", ".join(f"{name} {version(name)}" for name in names) + "."


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": f"{os.cpu_count()}, {_model()}",
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}",
        "event loop": "asyncio's own",
    }


def _model() -> str:
    """Return what the processor calls itself, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")


def _table(figure: Figure) -> Iterator[str]:
    rounds = len(figure.rows[0].samples)
    yield from ("", f"## {figure.title}", "", f"{figure.note} {rounds} interleaved rounds.", "")
    ours = figure.rows[0].name if not figure.claims else figure.claims[0].ours
    yield f"| | {figure.unit} | lowest | highest | of {ours} |"
    yield "|---|--:|--:|--:|--:|"
    for row in figure.rows:
        ratio = figure.ratio(row.name, ours)
        figures = (row.median, row.low, row.high)
        cells = " | ".join(_number(value) for value in figures)
        yield f"| {row.name} | {cells} | {ratio:.2f} |"
    yield from (f"| {name} | — | | | {why} |" for name, why in figure.absent.items())
    if figure.claims:
        yield ""
    for claim in figure.claims:
        ratio = figure.ratio(claim.ours, claim.theirs)
        verdict = "met" if ratio <= claim.bound else "**missed**"
        yield (
            f"- {claim.ours} takes {ratio:.2f} of {claim.theirs}'s; "
            f"at most {claim.bound:g} was wanted: {verdict}."
        )


def _refusals(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield from ("", "## Calls that a provider refuses", "")
    yield (
        f"{outcomes[0].calls:,} chats at once through LlamaIndex's OpenAI class, at most 50 in "
        "flight, to the bundled provider: 300 requests and 60,000 tokens a minute, which lasts 10 s. "
        "Retries are off. So short a minute leaves 59 ms for what lies between an admission and the "
        "arrival at the provider; a real one leaves 352 ms."
    )
    yield ""
    yield "| provider | paced by | answered | refused (429) | s |"
    yield "|---|---|--:|--:|--:|"
    for each in outcomes:
        yield (
            f"| {each.policy.replace('_', ' ')} | {each.way} | {each.answered:,} "
            f"| {each.refused:,} | {each.seconds:.1f} |"
        )


def _plain(figure: Figure) -> dict[str, Any]:
    return {
        "key": figure.key,
        "title": figure.title,
        "unit": figure.unit,
        "samples": {row.name: row.samples for row in figure.rows},
        "claims": [
            asdict(claim) | {"ratio": figure.ratio(claim.ours, claim.theirs)}
            for claim in figure.claims
        ],
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
