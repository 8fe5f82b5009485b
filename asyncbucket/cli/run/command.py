"""The run as a command: its output, and its exit status."""

import asyncio
import json
import logging
import sqlite3
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from asyncbucket.batch.progress import StandardError
from asyncbucket.cli import INTERRUPTED
from asyncbucket.cli.options import CANNOT_RUN, DONE, FAILED
from asyncbucket.cli.run import report
from asyncbucket.cli.run.estimate import as_dict, describe, estimate, plan_calls
from asyncbucket.cli.run.feed import count_lines
from asyncbucket.cli.run.job import STANDARD, Job
from asyncbucket.cli.run.ledger import unusable_error
from asyncbucket.cli.run.screen import screen_for
from asyncbucket.cli.run.tally import Tally
from asyncbucket.cli.run.work import Run
from asyncbucket.core.wording import one_line


def run(job: Job, *, quiet: bool = False, as_json: bool = False) -> int:
    """Run ``job`` and return the exit status: 0, 1 if lines failed, 2 if none can succeed, 130.

    Raises:
        ValueError: the options or files don't fit together.
    """
    job.check()
    file: Any = StandardError()
    console = Console(file=file, highlight=False, emoji=False)
    tally = Tally(price=job.price)
    if job.source != STANDARD:
        tally.total = count_lines(job.source, job.max_lines)
    if not quiet:
        console.print(report.headline(job, tally), markup=False, soft_wrap=True)
    tally.started = time.monotonic()
    interrupted = False
    try:
        with _quiet():
            asyncio.run(_run(job, tally, console, quiet=quiet))
    except (KeyboardInterrupt, asyncio.CancelledError):
        tally.stopping = interrupted = True
    except sqlite3.Error as error:
        raise unusable_error(job.checkpoint, error) from error
    tally.ended = time.monotonic()
    _print_summary(job, tally, console, quiet=quiet, as_json=as_json)
    if tally.fatal is not None:
        return CANNOT_RUN
    if interrupted or tally.stopping:
        return INTERRUPTED
    return FAILED if tally.failed or tally.bad else DONE


async def _run(job: Job, tally: Tally, console: Console, *, quiet: bool) -> None:
    shared = job.out == STANDARD and sys.stdout.isatty()
    await Run(job, tally, screen_for(console, quiet=quiet, shared=shared)).run()


def _print_summary(job: Job, tally: Tally, console: Console, *, quiet: bool, as_json: bool) -> None:
    if not quiet:
        console.print(report.summary(job, tally), markup=False, soft_wrap=True)
    if tally.fatal is not None:
        reason = one_line(tally.fatal)
        console.print(f"error: no request succeeds: {reason}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(tally.as_dict(), indent=2))  # noqa: T201 - a command's output


def dry_run(job: Job, *, latency: float, as_json: bool = False) -> int:
    """Say what ``job`` would take, and return the exit status: 1 if lines are bad."""
    job.check()
    tally = Tally(price=job.price)
    found = asyncio.run(estimate(job, tally))
    planned = plan_calls(job, found, latency=latency)
    if as_json:
        print(json.dumps(as_dict(job, tally, found, planned), indent=2))  # noqa: T201 - a command's output
    else:
        print(describe(job, tally, found, planned))  # noqa: T201 - a command's output
    return FAILED if tally.bad else DONE


@contextmanager
def _quiet() -> Generator[None]:
    """Keep logs off the screen: what they say is counted and shown."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
