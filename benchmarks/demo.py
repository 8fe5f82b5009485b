"""Draw what `asyncbucket demo` runs: when agents finish, and how many requests are refused.

`python -m benchmarks.demo` takes half a minute; the picture goes to docs/pictures, and the figures
that README quotes are printed.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from rich.console import Console

from asyncbucket import Limiter
from asyncbucket.cli.demo import Trial, run_once, scenario_of
from asyncbucket.cli.ui import Panel, Screen
from benchmarks.plot import OURS, pages
from benchmarks.report import machine_line

PICTURE: Final = Path(__file__).parents[1] / "docs" / "pictures" / "demo"
REFUSED: Final = "#d93025"
CONCURRENCY: Final = 60


class Recorder(Screen):
    """Record a run ten times a second instead of showing it."""

    def __init__(self, run: Trial) -> None:
        super().__init__(Console(quiet=True))
        self.run = run
        #: Seconds since the start, agents finished, and requests refused so far.
        self.points: list[tuple[float, int, int]] = [(0.0, 0, 0)]

    def interval(self, seconds: float) -> float:
        return min(seconds, 0.1)

    def show(self, panels: Sequence[Panel]) -> None:
        del panels
        if self.run.started_ns:
            refused = self.run.provider.statistics().refused
            self.points.append((self.run.seconds, self.run.agents_finished, refused))


def record(limiter: Limiter | None) -> Recorder:
    """Run the agents once."""
    recorder = Recorder(Trial(scenario=scenario_of(), limiter=limiter))
    run_once(recorder.run, recorder)
    recorder.show([])
    return recorder


def draw(recorders: Sequence[Recorder]) -> None:
    """Draw agents that finished beside requests that were refused, over the same seconds."""
    without, paced = recorders
    refusals = [recorder.points[-1][2] for recorder in recorders]
    agents = paced.run.scenario.agents
    for canvas, ink in pages(PICTURE, 8, 3):
        finished, refused = canvas.subplots(1, 2, sharex=True)
        for part, axes in enumerate((finished, refused), 1):
            for recorder, color in (without, REFUSED), (paced, OURS):
                seconds = [point[0] for point in recorder.points]
                axes.step(seconds, [point[part] for point in recorder.points], color, where="post")
            axes.set_xlabel("seconds since the start", fontsize=9)
            axes.set(xlim=(0, 21), ylim=0, xticks=range(0, 21, 5))
            axes.tick_params(labelsize=8)
        finished.set_title(f"agents that have finished, of {agents}", loc="left", fontsize=10)
        finished.axhline(agents, color=ink, lw=0.6, ls=":")
        refused.set_title("requests that the provider refused (429)", loc="left", fontsize=10)
        failed = f"{agents - without.run.agents_finished} gave up by {without.run.seconds:.1f} s"
        _label(
            finished,
            without.run.seconds + 5,
            0.06 * agents,
            f"without asyncbucket:\n{failed}",
            REFUSED,
        )
        done = f"with asyncbucket:\nall after {paced.run.seconds:.1f} s"
        _label(finished, 5, 0.82 * agents, done, OURS)
        _label(
            refused,
            without.run.seconds + 0.5,
            0.9 * refusals[0],
            f"{refusals[0]} without asyncbucket",
            REFUSED,
        )
        _label(refused, 8, 0.04 * refusals[0], f"{refusals[1]} with asyncbucket", OURS)


def _label(axes: Axes, seconds: float, count: float, text: str, color: str) -> None:
    axes.text(seconds, count, text, color=color, fontsize=9)


def main() -> None:
    """Run both, draw them, and print their figures."""
    logging.disable()  # LlamaIndex reports each of its retries
    scenario = scenario_of()
    limiter = Limiter(scenario.requests, scenario.tokens, concurrency=CONCURRENCY)
    recorders = [record(None), record(limiter)]
    draw(recorders)
    for recorder in recorders:
        print(recorder.run.name, recorder.run.figures())
    print(machine_line())


if __name__ == "__main__":
    main()
