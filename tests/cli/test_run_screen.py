"""What a run shows: on a terminal of 80 columns, in a pipe, and at its end."""

import asyncio
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from asyncbucket import Limiter
from asyncbucket.cli.run.job import Job, Price, limits_of
from asyncbucket.cli.run.report import headline, summary
from asyncbucket.cli.run.screen import screen_for
from asyncbucket.cli.run.tally import Tally
from asyncbucket.testing import VirtualTime

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def tally_in_the_middle(total: int | None = 5_000) -> Tally:
    """Return the tally of a run halfway through, with every kind of event."""
    tally = Tally(price=Price(0.15, 0.6), total=total)
    tally.earlier, tally.answered, tally.failed, tally.bad = 1_000, 1_234, 7, 3
    tally.refused, tally.sent = 2, 1_250
    tally.input_tokens, tally.output_tokens = 1_203_400, 301_200
    tally.admitted = Counter({"requests": 1_250, "tokens": 1_504_600})
    return tally


def shown(
    time: VirtualTime, tally: Tally, *, terminal: bool, seconds: float, **options: bool
) -> str:
    """Return what is shown within some seconds."""
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=terminal, highlight=False)
    limiter = Limiter("500 RPM", "200k TPM", clock=time.clock)
    screen = screen_for(console, **{"quiet": False} | options)

    async def main() -> None:
        showing = asyncio.create_task(screen.show_until_cancelled(tally, limiter))
        await asyncio.sleep(seconds)
        screen.print_line("stopping")
        showing.cancel()
        await asyncio.wait([showing])

    time.run(main())
    return ESCAPES.sub("", file.getvalue())


def widest(text: str) -> int:
    """Return the length of the longest line."""
    return max(map(len, text.splitlines()))


def test_terminal_of_80_columns_shows_all_figures_uncut(virtual_time: VirtualTime) -> None:
    """Progress, time left, failures and costs are all there, and nothing is cut."""
    output = shown(virtual_time, tally_in_the_middle(), terminal=True, seconds=1.0)

    assert "2,244 of 5,000" in output
    assert re.search(r"\d+ min left", output)
    assert "0 in flight  2 429s  7 failed  3 bad  1,203,400 + 301,200 tokens  $0.3612" in output
    assert widest(output) <= 80


def test_input_of_unknown_length_shows_a_count_without_time_left(virtual_time: VirtualTime) -> None:
    """Input from a pipe has no bar and no time left."""
    output = shown(virtual_time, tally_in_the_middle(None), terminal=True, seconds=1.0)

    assert "2,244 lines" in output
    assert "left" not in output


def test_single_line_is_shown_in_the_singular(virtual_time: VirtualTime) -> None:
    """Input that somebody types may be a single line for a while."""
    assert shown(virtual_time, Tally(bad=1), terminal=True, seconds=1.0).startswith("1 line ")


def test_stopping_run_says_so_and_shows_no_time_left(virtual_time: VirtualTime) -> None:
    """The remaining lines are not done in this run, so no time is given for them."""
    tally = tally_in_the_middle()
    tally.stopping = True

    output = shown(virtual_time, tally, terminal=True, seconds=1.0)

    assert "stopping" in output
    assert "left" not in output


def test_terminal_that_also_shows_answers_gets_plain_progress_lines(
    virtual_time: VirtualTime,
) -> None:
    """A live display would overwrite the answers, so it gets plain lines as a pipe does."""
    output = shown(virtual_time, tally_in_the_middle(), terminal=True, shared=True, seconds=10.5)

    assert output.splitlines()[0].endswith("$0.3612")
    assert len(output.splitlines()) == 2


def test_pipe_gets_a_progress_line_every_ten_seconds(virtual_time: VirtualTime) -> None:
    """It is a log that somebody reads later."""
    output = shown(virtual_time, tally_in_the_middle(), terminal=False, seconds=35.0)

    lines = output.splitlines()
    assert (len(lines), lines[-1]) == (4, "stopping")
    assert "2,244 of 5,000 done" in lines[0]


def test_quiet_shows_nothing(virtual_time: VirtualTime) -> None:
    """It does not even say that it stops."""
    assert shown(virtual_time, tally_in_the_middle(), terminal=True, seconds=1, quiet=True) == ""


def job(**options: object) -> Job:
    """Return a job with limits."""
    limits = limits_of(["40k ITPM"], rpm=500, tpm=200_000)
    given = {"source": "in.jsonl", "out": "out.jsonl", "limits": limits, "model": "gpt-4o-mini"}
    return Job(**(given | options))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_headline_shows_input_model_and_limits_without_password() -> None:
    """It also says where to, without the password that a URL may hold."""
    text = headline(job(api_base="https://me:secret@example.org:8443/v1"), Tally(total=5_000))

    assert text.splitlines() == [
        "in.jsonl, 5,000 lines with gpt-4o-mini; https://example.org:8443/v1",
        "40,000 input tokens a minute, 500 requests a minute, 200,000 tokens a minute, 100 at once",
    ]


def ended(change: Callable[[Tally], None]) -> str:
    """Return the summary of a run that ended after 100 s."""
    tally = tally_in_the_middle()
    tally.started, tally.ended = 0.0, 100.0
    change(tally)
    return summary(job(errors=Path("bad.jsonl")), tally)


def test_summary_counts_every_line_and_lists_reasons() -> None:
    """Every line is counted in one of its numbers, and the most common reasons are listed."""

    def change(tally: Tally) -> None:
        tally.reasons.update({"http_500: overloaded": 6, "line 3: not JSON": 1})

    assert ended(change).splitlines() == [
        "done in 2 min: 1,234 answered and 1,000 earlier, 7 failed, 3 bad lines",
        "1,250 requests (12.3 answers/s), 2 429s, 1,203,400 + 301,200 tokens, $0.3612",
        "  6 x http_500: overloaded",
        "  line 3: not JSON",
        "answers: out.jsonl, failed lines: bad.jsonl",
    ]


def test_stopped_run_says_how_to_go_on_unless_its_error_is_fatal() -> None:
    """It does not if going on is of no use."""

    def stop(tally: Tally) -> None:
        tally.stopping = True

    def fail(tally: Tally) -> None:
        tally.stopping, tally.fatal = True, "HTTP 401"

    assert ended(stop).startswith("stopped after 2 min: ")
    assert ended(stop).endswith("\nthe same command goes on from here")
    assert "goes on" not in ended(fail)


def test_known_failure_reason_is_still_counted_after_many_others() -> None:
    """Even if many others come meanwhile, each with the number of its request."""
    tally = Tally()

    for number in range(30):
        tally.count_reason("timeout")
        tally.count_reason(f"error in request {number}")

    assert tally.reasons["timeout"] == 30
    assert tally.reasons.total() == 60
    assert len(tally.reasons) == 21
