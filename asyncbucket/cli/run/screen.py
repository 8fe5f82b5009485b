"""What a run has done so far, and how it is shown: while it runs, before it and after it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import anyio

from asyncbucket.batch.progress import Outlook
from asyncbucket.cli.options import allowed
from asyncbucket.cli.run import CONCURRENCY, Job
from asyncbucket.cli.ui import Bar, Panel, Screen
from asyncbucket.engine.wording import counted, one_line, rounded, usd_written, with_verb
from asyncbucket.limiter import Limiter, Pool
from asyncbucket.plan.drive import duration_in_words
from asyncbucket.providers.usage import Usage

#: Seconds between two plain lines of progress.
_LINE_INTERVAL: Final = 10.0


@dataclass(slots=True)
class Tally:
    """Count lines, requests and tokens."""

    #: Lines that are requests or should be.
    total: int = 0
    answered: int = 0
    answered_earlier: int = 0
    failed: int = 0
    #: Lines that could not be read.
    bad: int = 0
    #: Requests that were sent, refused ones and those without a reply included.
    requests: int = 0
    refused_429: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    #: The codes of errors, and how many lines each of them failed; and what the first one said.
    errors: Counter[str] = field(default_factory=Counter[str])
    first_error: str = ""
    seconds: float = 0.0
    #: Whether it was told to stop.
    stopped: bool = False
    #: Dollars that all runs into the file have spent, if there is a cap; and whether that stopped it.
    usd: float | None = None
    out_of_usd: bool = False
    #: Why no call can succeed, if none can.
    fatal: str | None = None
    #: Whether it ended before anything could be answered; then it leaves no file.
    refused: bool = False

    def count_error(self, code: str, message: str) -> None:
        """Count why a line has no answer."""
        self.errors[code] += 1
        self.first_error = self.first_error or message

    def count_answer(self, usage: Usage | None) -> None:
        """Count an answer and its tokens."""
        self.answered += 1
        if usage is not None:
            self.input_tokens += usage.input_tokens
            self.output_tokens += usage.output_tokens

    @property
    def done(self) -> int:
        """Lines that are finished, in this run or an earlier one."""
        return self.answered_earlier + self.answered + self.failed + self.bad

    @property
    def left(self) -> int:
        """Lines that are not finished."""
        return self.total - self.done

    def as_dict(self) -> dict[str, Any]:
        """Return it in values that JSON can hold."""
        names = ["answered", "answered_earlier", "failed", "bad", "seconds", "requests"]
        names += ["refused_429", "input_tokens", "output_tokens", "usd", "stopped", "errors"]
        lines = {"lines": self.total, "left": self.left}
        return lines | {name: getattr(self, name) for name in names}


def progress(tally: Tally, outlook: Outlook) -> Panel:
    """Return what is shown while it runs."""
    done, total, now = tally.done, tally.total, outlook.limiter.statistics()
    facts = outlook.words(tally.answered + tally.failed, tally.left)
    binds = outlook.bound_by()
    facts += [] if binds is None else [with_verb(binds, "bind")]
    if tally.stopped:  # the rest is left for the next run
        facts = ["stopping"]
    facts += [f"{now.in_flight:,} in flight", f"{now.upstream_429:,} 429s"]
    facts += [f"{tally.failed:,} failed"] if tally.failed else []
    facts += [f"{tally.bad:,} bad"] if tally.bad else []
    bar = Bar(f"{done:,} of {total:,}", done / max(1, total))
    return Panel("progress", (bar,), tuple(facts))


async def show_progress(screen: Screen, tally: Tally, limiter: Limiter) -> None:
    """Show the progress until cancelled; ``limiter`` has the limits."""
    outlook = Outlook(limiter, clock=anyio.current_time)
    while True:
        await anyio.sleep(screen.interval(_LINE_INTERVAL))
        screen.show([progress(tally, outlook)])


def headline(job: Job, tally: Tally, limiter: Limiter) -> str:
    """Say in a line or two what will be done, and under which limits."""
    slots = f"{job.concurrency or CONCURRENCY} at once"
    limits = [allowed(limiter)] if isinstance(limiter, Pool) else [*map(str, job.limits)]
    limits += [] if job.max_usd is None else [f"{usd_written(job.max_usd)} USD in all"]
    limits += ["as many as the server handles" if job.concurrency == "auto" else slots]
    model = "" if job.model is None else f" with {job.model}"
    lines = counted(tally.total, "lines")
    return f"{job.source}, {lines}{model}; {job.destination}\n{', '.join(limits)}"


def summary(job: Job, tally: Tally) -> str:
    """Say in a few lines how it ended."""
    earlier = f" and {tally.answered_earlier:,} earlier" if tally.answered_earlier else ""
    parts = [f"{tally.answered:,} answered{earlier}"]
    parts += [f"{tally.failed:,} failed"] if tally.failed else []
    parts += [counted(tally.bad, "bad lines")] if tally.bad else []
    parts += [f"{tally.left:,} left"] if tally.stopped and tally.left else []
    ended = "stopped after" if tally.stopped else "done in"
    rate = tally.answered / tally.seconds if tally.seconds else 0.0
    requests = f"{counted(tally.requests, 'requests')} ({rounded(rate)} answers/s)"
    tokens = f"{tally.input_tokens:,} + {tally.output_tokens:,} tokens"
    lines = [
        f"{ended} {duration_in_words(round(tally.seconds, 1))}: {', '.join(parts)}",
        f"{requests}, {tally.refused_429:,} 429s, {tokens}",
    ]
    files = [f"answers: {job.out}"] if tally.answered or tally.answered_earlier else []
    if tally.errors and not tally.refused:
        lines.append(errors_of(tally))
        files.append(f"failed lines: {job.errors_file}")
    if files:
        lines.append(", ".join(files))
    if tally.usd is not None:
        spent = f"{usd_written(tally.usd)} of {usd_written(job.max_usd or 0)} USD spent"
        rest = "; the next request may cost more than is left" if tally.out_of_usd else ""
        lines.append(spent + rest)
    if tally.stopped:
        how = " with a larger --max-usd" if tally.out_of_usd else ""
        lines.append(f"the same command{how} continues from here")
    return "\n".join(lines)


def errors_of(tally: Tally) -> str:
    """Return the most common codes of errors, and the first error in words."""
    codes = ", ".join(f"{count:,} x {code}" for code, count in tally.errors.most_common(5))
    return one_line(f"errors: {codes}; the first: {tally.first_error}")
