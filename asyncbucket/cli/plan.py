"""`asyncbucket plan`: how long calls take under limits, in words, as JSON and as a picture."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from asyncbucket.cli import options
from asyncbucket.cli.ui import plot, table
from asyncbucket.plan import Plan, Poisson
from asyncbucket.plan import plan as make_plan
from asyncbucket.plan.result import details, rows_of


def _samples_option(text: str) -> Any:
    return options.text(text, metavar="N|FILE")


def plan(  # noqa: PLR0913 - one for each option
    *,
    # What is asked.
    calls: Annotated[int | None, options.count("How many calls; default: all samples.")] = None,
    tokens: Annotated[str | None, _samples_option("Tokens a call, or JSONL of prompts.")] = None,
    input_tokens: Annotated[str | None, _samples_option("Tokens sent, if limited apart.")] = None,
    output_tokens: Annotated[str | None, _samples_option("Tokens expected back.")] = None,
    used_tokens: Annotated[str | None, _samples_option("Tokens really used.")] = None,
    latency: Annotated[str, _samples_option("Seconds a call takes, or JSONL of them.")] = "0",
    poisson: Annotated[float | None, options.text("Random calls a second.", metavar="N")] = None,
    # What is allowed.
    rpm: options.Rpm = None,
    tpm: options.Tpm = None,
    rpd: options.Rpd = None,
    tpd: options.Tpd = None,
    limits: options.Also = None,
    preset: options.Preset = None,
    concurrency: Annotated[int | None, options.count("Calls in flight at most.")] = None,
    profile: Annotated[str, options.name("Whose charging rules, e.g. anthropic.")] = "openai",
    # What is found out, and shown.
    what_if: Annotated[
        bool | None, options.flag("Say what other limits would bring.", "--what-if/--no-what-if")
    ] = None,
    seed: Annotated[int, options.text("Seed of all random numbers.", metavar="N")] = 0,
    out: Annotated[Path | None, options.file("Draw it: .png, .svg or .pdf.")] = None,
    dark: options.Dark = False,
    as_json: options.AsJson = False,
) -> None:
    """Say how long calls take under limits, what binds, and what other limits would bring.

    The calls run through the real limits on virtual time: nothing is sent, nothing waits.
    """
    with options.errors_in_one_line("plan"):
        planned = make_plan(
            *(limits or ()),
            *options.preset_limits(preset),
            calls=calls,
            tokens=_samples(tokens),
            input_tokens=_samples(input_tokens),
            output_tokens=_samples(output_tokens),
            used_tokens=_samples(used_tokens),
            latency=_samples(latency),
            concurrency=concurrency,
            arrivals=None if poisson is None else Poisson(poisson),
            profile=profile,
            what_if=what_if,
            seed=seed,
            rpm=rpm,
            tpm=tpm,
            rpd=rpd,
            tpd=tpd,
        )
        if out is not None:
            from asyncbucket.cli.pictures import draw_plan

            draw_plan(planned, out, dark=dark)
        if as_json:
            typer.echo(json.dumps(planned.as_dict(), indent=2))
            return
        _show(Console(highlight=False), planned)
        if out is not None:
            typer.echo(f"drawn: {out}")


def _samples(text: str | None) -> float | Path | None:
    """Return a number, or the path of a file of samples.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return None
    for read in (float, options.read_count):
        with contextlib.suppress(ValueError):
            return read(text)
    if not Path(text).exists():
        raise ValueError(f"{text!r} is neither a number nor a file that is there")
    return Path(text)


def _show(console: Console, planned: Plan) -> None:
    """Print the plan: a sentence, a table, and the admissions over time."""
    console.print(Text(planned.summary, "bold"))
    for line in details(planned):
        console.print(line, markup=False)
    limit = planned.binding
    if planned.limits:
        shown = table(rows_of(planned))
        if limit is not None:
            shown.rows[planned.limits.index(limit)].style = "bold yellow"
        console.print(shown)
    if limit is not None and limit.rate is not None:
        title = f"admitted over time; ____ is {limit.limit}"
        console.print(plot(console, title, planned.timeline, limit.rate, seconds=planned.duration))
