"""`asyncbucket plan`: how long calls take under limits, in words, as JSON and as a picture."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from asyncbucket.cli import options
from asyncbucket.plan import Poisson
from asyncbucket.plan import plan as make_plan


def _samples_option(text: str) -> Any:
    return options.text(text, metavar="N|FILE")


def plan(  # noqa: PLR0913 - one for each option
    source: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="The same as --tokens FILE.")
    ] = None,
    *,
    # What is asked.
    calls: Annotated[int | None, options.count("How many calls; default: all samples.")] = None,
    tokens: Annotated[str | None, _samples_option("Tokens a call, or JSONL of prompts.")] = None,
    latency: Annotated[str, _samples_option("Seconds a call takes, or JSONL of them.")] = "0",
    poisson: Annotated[float | None, options.text("Random calls a second.", metavar="N")] = None,
    # What is allowed.
    rpm: options.Rpm = None,
    tpm: options.Tpm = None,
    limits: options.Also = None,
    preset: options.Preset = None,
    concurrency: Annotated[int | None, options.count("Calls in flight at most.")] = None,
    profile: Annotated[str, options.name("Whose charging rules, e.g. anthropic.")] = "openai",
    model: Annotated[str | None, options.name("The model, to say what it costs.")] = None,
    prices: options.PriceFile = None,
    # What is found out, and shown.
    what_if: Annotated[
        bool | None, options.flag("Say what other limits would bring.", "--what-if/--no-what-if")
    ] = None,
    seed: Annotated[int, options.text("Seed of all random numbers.", metavar="N")] = 0,
    out: Annotated[Path | None, options.file("Draw it: .png, .svg or .pdf.")] = None,
    dark: options.Dark = False,
    as_json: options.AsJson = False,
) -> None:
    """Say how long calls take under limits, and what binds.

    The calls run through the real limits on virtual time: nothing is sent, nothing waits.

    Examples:
        asyncbucket plan --calls 10000 --tokens 800 --rpm 500 --tpm 200000
        asyncbucket plan prompts.jsonl --preset openai/tier-1/gpt-4o-mini
        asyncbucket plan --calls 900 --poisson 8 --rpm 400 --latency 2 --out a.png
    """
    if source is not None and tokens is not None:
        raise ValueError(f"{source!r} and --tokens both say what calls cost: give one of them")
    planned = make_plan(
        *(limits or ()),
        *options.preset_limits(preset),
        calls=calls,
        tokens=_samples(tokens or source),
        latency=_samples(latency),
        concurrency=concurrency,
        arrivals=None if poisson is None else Poisson(poisson),
        profile=profile,
        model=model,
        prices=prices,
        what_if=what_if,
        seed=seed,
        rpm=rpm,
        tpm=tpm,
    )
    if out is not None:
        from asyncbucket.cli.pictures import draw_plan

        draw_plan(planned, out, dark=dark)
    typer.echo(json.dumps(planned.as_dict(), indent=2) if as_json else planned)
    if out is not None and not as_json:
        typer.echo(f"drawn: {out}")


def _samples(text: str | None) -> float | Path | dict[str, Any] | None:
    """Return a number, amounts as JSON, or the path of a file of samples.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return None
    for read in (float, options.read_count):
        with contextlib.suppress(ValueError):
            return read(text)
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{text!r} is not JSON: {error}") from None
    if not Path(text).exists():
        raise ValueError(f"{text!r} is neither a number nor a file that is there")
    return Path(text)
