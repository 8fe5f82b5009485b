"""What is said before and after a run."""

from typing import Final

from asyncbucket.batch.outlook import duration
from asyncbucket.cli.run.job import STANDARD, Job
from asyncbucket.cli.run.screen import dollars
from asyncbucket.cli.run.tally import Tally
from asyncbucket.core.limits import Limit
from asyncbucket.core.wording import counted, one_line, rounded, written_out

#: Words for the usual windows.
_WINDOW_NAMES: Final[dict[float, str]] = {1: "a second", 60: "a minute", 86_400: "a day"}


def headline(job: Job, tally: Tally) -> str:
    """Say in a line or two what will be done, and under which limits."""
    limits = [_limit_text(limit) for limit in job.limits]
    limits.append(
        f"{job.concurrency} at once" if job.concurrency != "auto" else "as many as go well"
    )
    lines = "" if tally.total is None else f", {counted(tally.total, 'lines')}"
    model = "" if job.model is None else f" with {job.model}"
    source = "standard input" if job.source == STANDARD else job.source
    return f"{source}{lines}{model}; {job.shown_api_base}\n{', '.join(limits)}"


def summary(job: Job, tally: Tally) -> str:
    """Say in a few lines how it ended."""
    earlier = f" and {tally.earlier:,} earlier" if tally.earlier else ""
    parts = [f"{tally.answered:,} answered{earlier}"]
    parts += [f"{tally.failed:,} failed"] if tally.failed else []
    parts += [counted(tally.bad, "bad lines")] if tally.bad else []
    ended = "stopped after" if tally.stopping else "done in"
    rate = tally.answered / tally.seconds if tally.seconds else 0.0
    lines = [
        f"{ended} {duration(tally.seconds)}: {', '.join(parts)}",
        f"{counted(tally.sent, 'requests')} ({rounded(rate)} answers/s), {tally.refused:,} 429s, "
        f"{tally.input_tokens:,} + {tally.output_tokens:,} tokens"
        + ("" if tally.cost is None else f", {dollars(tally.cost)}"),
        *reasons(tally),
    ]
    if job.out != STANDARD:
        lines.append(f"answers: {job.out}" + _errors(job, tally))
    if tally.stopping and not tally.fatal and job.out != STANDARD:
        lines.append("the same command goes on from here")
    return "\n".join(lines)


def reasons(tally: Tally) -> list[str]:
    """Return the most common reasons why lines have no answer, one per line."""
    return [
        f"  {one_line(reason)}" if count == 1 else f"  {count:,} x {one_line(reason)}"
        for reason, count in tally.reasons.most_common(5)
    ]


def _errors(job: Job, tally: Tally) -> str:
    return f", failed lines: {job.errors_file}" if tally.failed or tally.bad else ""


def _limit_text(limit: Limit) -> str:
    per = _WINDOW_NAMES.get(limit.per, f"per {written_out(limit.per)} s")
    return f"{counted(limit.amount, limit.resource)} {per}"
