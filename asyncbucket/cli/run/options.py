"""What can be typed after `asyncbucket run`."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from asyncbucket.cli.run.job import CONCURRENCY, OPENAI, STANDARD, Job, Price, key_from, limits_of
from asyncbucket.limits import Limit

#: A backspace keeps the lines of a paragraph as they are.
EXAMPLES: Final = """\b
Examples:
  asyncbucket run prompts.txt -o answers.jsonl --model gpt-4o-mini --rpm 500
  asyncbucket run batch.jsonl -o answers.jsonl --rpm 500 --dry-run
  asyncbucket run batch.jsonl -o out.jsonl --api-base http://127.0.0.1:8000/v1
  grep -v '^#' prompts.txt | asyncbucket run - --model gpt-4o-mini | jq .
"""

_WRONG_USAGE: Final = 2


def run(  # noqa: PLR0913 - one for each option
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="Batch lines or prompts, one a line; - is stdin.")
    ],
    *,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Answers as JSONL; - is stdout.")
    ] = STANDARD,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model; default: what the lines say.")
    ] = None,
    rpm: Annotated[int | None, typer.Option(min=1, metavar="N", help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens a minute.")] = None,
    rpd: Annotated[int | None, typer.Option(min=1, metavar="N", help="Requests a day.")] = None,
    tpd: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens a day.")] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="TEXT", help='Any other limit, e.g. "40k ITPM" or "10/s".'),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A provider's published limits.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(metavar="N|auto", help=f"Calls at once; default: {CONCURRENCY}.")
    ] = None,
    api_base: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Any OpenAI-compatible server; default: OpenAI."),
    ] = None,
    key_variable: Annotated[
        str, typer.Option("--key-from", metavar="NAME", help="The variable that holds the key.")
    ] = "OPENAI_API_KEY",
    endpoint: Annotated[
        str, typer.Option(metavar="NAME", help="Of prompts: chat, responses or embeddings.")
    ] = "chat",
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system message before each prompt.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of a reply, where lines don't say.")
    ] = None,
    most: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="The first N lines only.")
    ] = None,
    price: Annotated[
        str | None,
        typer.Option(metavar="IN/OUT", help="Dollars for a million tokens, e.g. 0.15/0.60."),
    ] = None,
    errors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Failed lines; default: beside the answers.")
    ] = None,
    attempts: Annotated[
        int, typer.Option(min=1, metavar="N", help="For one line, the first included.")
    ] = 5,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="S", help="For a reply, without the time in line.")
    ] = 600.0,
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How calls are charged; default: by the host."),
    ] = None,
    latency: Annotated[
        float, typer.Option(min=0, metavar="S", help="What --dry-run takes a call to last.")
    ] = 2.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Send nothing; say how long it would take.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew: answers so far are deleted.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.")
    ] = False,
) -> None:
    """Send every line of a file to a model, under your limits, and write every answer once.

    A line is a request of OpenAI's batch files, the body of one, or a prompt. Answers come as they
    come, with the custom_id and line of the request, as in OpenAI's output files. Killed and started again, it goes on
    where it was and stays under the limits. Ctrl-C lets requests under way finish; again, it drops them.

    Status: 0 when all lines are answered, 1 when some failed (the errors file says why), 2 when none
    can be, 130 after Ctrl-C.
    """
    base = api_base or os.environ.get("OPENAI_BASE_URL") or OPENAI

    def job() -> Job:
        if as_json and out == STANDARD:
            raise ValueError("--json prints on standard output, where the answers go: give -o")
        return Job(
            source=source,
            out=out,
            limits=limits_of(
                [*(limits or ()), *_preset(preset)], rpm=rpm, tpm=tpm, rpd=rpd, tpd=tpd
            ),
            concurrency=_concurrency(concurrency),
            model=model,
            endpoint=_endpoint(endpoint),
            system=system,
            max_tokens=max_tokens,
            api_base=base,
            api_key=None if dry_run else key_from(key_variable, api_base=base),
            profile=profile,
            price=None if price is None else Price.parse(price),
            attempts=attempts,
            timeout=timeout,
            most=most,
            errors=errors,
            restart=restart,
            bounded=concurrency is not None,
        )

    try:
        from asyncbucket.cli.run import command

        if dry_run:
            status = command.dry_run(job(), latency=latency)
        else:
            status = command.run(job(), quiet=quiet, as_json=as_json)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        typer.echo(f'error: run needs {package}: pip install "asyncbucket[cli]"', err=True)
        raise typer.Exit(_WRONG_USAGE) from error
    except BrokenPipeError:  # whoever read it has read enough: no error
        raise
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(_WRONG_USAGE) from error
    raise typer.Exit(status)


def _preset(name: str | None) -> Iterable[Limit]:
    if name is None:
        return ()
    from asyncbucket.presets import preset

    return preset(name)


def _concurrency(text: str | None) -> int | Literal["auto"]:
    if text is None:
        return CONCURRENCY
    if text == "auto":
        return "auto"
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"--concurrency is a number from 1 on, or auto, not {text!r}")
    return number


def _endpoint(name: str) -> Any:
    from asyncbucket.cli.run.job import PATHS

    if name not in PATHS:
        raise ValueError(f"--endpoint is one of {', '.join(PATHS)}, not {name!r}")
    return name
