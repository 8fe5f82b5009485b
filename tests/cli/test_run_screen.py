"""What a run shows: on a terminal of 80 columns, in a pipe, and at its end."""

import asyncio
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from asyncbucket import Limiter
from asyncbucket.cli.run import Job
from asyncbucket.cli.run.screen import Tally, headline, show_progress, summary
from asyncbucket.cli.ui import Screen
from asyncbucket.testing import VirtualTime

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def tally_in_the_middle() -> Tally:
    tally = Tally(total=5_000)
    tally.answered_earlier, tally.answered, tally.failed, tally.bad = 1_000, 1_234, 7, 3
    tally.refused_429, tally.requests = 2, 1_250
    tally.input_tokens, tally.output_tokens = 1_203_400, 301_200
    return tally


def shown(time: VirtualTime, tally: Tally, *, terminal: bool, seconds: float = 1.0) -> str:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=terminal, color_system=None)
    limiter = Limiter("500 RPM", "200k TPM", clock=time.clock)
    limiter.pause(0, reason="429")
    limiter.pause(0, reason="429")

    async def main() -> None:
        with Screen(console) as screen:
            showing = asyncio.create_task(show_progress(screen, tally, limiter))
            await asyncio.sleep(seconds)
            showing.cancel()
            await asyncio.wait([showing])

    time.run(main())
    return ESCAPES.sub("", file.getvalue())


def test_terminal_of_80_columns_shows_all_figures_uncut(virtual_time: VirtualTime) -> None:
    output = shown(virtual_time, tally_in_the_middle(), terminal=True)
    words = " ".join(output.split())
    assert re.search(
        r"2,244 of 5,000 ━+ 45% [\d,]+/s, 0:\d\d:\d\d left, 0 in flight, 2 429s, 7 failed, 3 bad",
        words,
    )
    assert max(map(len, output.splitlines())) <= 80


def test_stopping_run_says_so_and_shows_no_time_left(virtual_time: VirtualTime) -> None:
    tally = tally_in_the_middle()
    tally.stopped = True
    output = shown(virtual_time, tally, terminal=True)
    assert "stopping" in output
    assert "left" not in output


def test_pipe_gets_a_line_every_ten_seconds(virtual_time: VirtualTime) -> None:
    output = shown(virtual_time, tally_in_the_middle(), terminal=False, seconds=35.0)
    assert output.count("progress: 2,244 of 5,000, ") == 3


def job_with(**options: Any) -> Job:
    given: dict[str, Any] = {
        "source": Path("in.jsonl"),
        "out": Path("out.jsonl"),
        "model": "gpt-4o-mini",
    }
    given |= {"also": ["40k ITPM"], "rpm": 500, "tpm": 200_000}
    return Job(**(given | options))


def test_headline_shows_input_model_and_limits_without_password() -> None:
    job = job_with(api_base="https://me:secret@example.org:8443/v1")
    text = headline(job, Tally(total=5_000), Limiter(*job.limits))
    assert text.splitlines() == [
        "in.jsonl, 5,000 lines with gpt-4o-mini; https://example.org:8443/v1",
        "40,000 input tokens per 60 s, 500 requests per 60 s, 200,000 tokens per 60 s, 100 at once",
    ]


def ended(job: Job | None = None, **changes: object) -> str:
    tally = tally_in_the_middle()
    tally.seconds = 100.0
    for name, value in changes.items():
        setattr(tally, name, value)
    return summary(job or job_with(), tally)


def test_summary_counts_every_line_and_names_errors() -> None:
    errors = Counter({"http_500": 6, "bad_line": 1})
    assert ended(errors=errors, first_error="over\x1bloaded").splitlines() == [
        "done in 1 min 40 s: 1,234 answered and 1,000 earlier, 7 failed, 3 bad lines",
        "1,250 requests (12.3 answers/s), 2 429s, 1,203,400 + 301,200 tokens",
        "errors: 6 x http_500, 1 x bad_line; the first: over loaded",
        "answers: out.jsonl, failed lines: out.errors.jsonl",
    ]


def test_stopped_run_says_how_many_are_left_and_how_to_go_on() -> None:
    stopped = ended(stopped=True)
    assert stopped.startswith(
        "stopped after 1 min 40 s: 1,234 answered and 1,000 earlier, 7 failed"
    )
    assert ", 2,756 left\n" in stopped
    assert stopped.endswith("\nthe same command continues from here")
