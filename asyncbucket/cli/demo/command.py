"""The demo as a command: one run after the other, then the figures, and a clean end at any time."""

import json
import logging
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console

from asyncbucket.cli import INTERRUPTED, interrupts_blocked
from asyncbucket.cli.demo import report
from asyncbucket.cli.demo.outcome import Outcome
from asyncbucket.cli.demo.scenario import DemoOptions, Scenario, scenario_of
from asyncbucket.cli.demo.screen import screen_for
from asyncbucket.cli.exits import DONE, FAILED
from asyncbucket.core.wording import one_line

__all__ = ["DemoOptions", "run"]


def run(options: DemoOptions, *, as_json: bool = False) -> int:
    """Run the demo and return its exit status: 0, 1 if a paced call failed, 130 after Ctrl-C or SIGTERM.

    Raises:
        ValueError: the options don't fit together.
        ImportError: an extra is missing.
    """
    scenario = scenario_of(options)
    console = Console(highlight=False)
    outcomes: list[Outcome] = []
    try:
        with _quiet():
            status = _run(scenario, console, outcomes, silent=as_json)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if as_json:
        print(json.dumps(report.as_dict(scenario, outcomes), indent=2))  # noqa: T201 - the output
    else:
        report.show(console, scenario, outcomes)
    return status


def _run(scenario: Scenario, console: Console, outcomes: list[Outcome], *, silent: bool) -> int:
    """Append each run's outcome to ``outcomes``, so that it is there however this ends."""
    screen = screen_for(console, scenario, silent=silent)
    if not silent:
        console.print(report.headline(scenario), markup=False)
    # LlamaIndex takes seconds to load; by now there is something to read on the screen.
    with interrupts_blocked():
        from asyncbucket.cli.demo.half import run_half
        from asyncbucket.cli.demo.load import Fatal

    for paced in (False, True) if scenario.compare else (True,):
        try:
            outcome = run_half(scenario, screen, paced=paced)
        except Fatal as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)  # noqa: T201 - a command's output
            return FAILED
        if outcome.requests or not outcome.interrupted:
            outcomes.append(outcome)
        if outcome.interrupted:
            return INTERRUPTED
        if not silent:
            console.print(report.summary(outcome), markup=False)
    return FAILED if outcomes[-1].failed else DONE


@contextmanager
def _quiet() -> Generator[None]:
    """Keep logs and warnings of LlamaIndex and others off the screen."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
