"""`asyncbucket run`: a file of requests or prompts in, a file of answers out, under your limits.

Here is what can be typed. From the inside out: `job` says what is to be done, and reads the lines,
`answers` is the file that comes out, `work` sends and writes, `screen` counts and shows.
"""

import os
from typing import Annotated

import typer

from asyncbucket.cli import options
from asyncbucket.cli.run.job import CONCURRENCY, STANDARD, Job, api_key
from asyncbucket.core.limits import read_limits


def run(  # noqa: PLR0913 - one for each option
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="Batch lines or prompts, one a line; - is stdin.")
    ],
    *,
    out: Annotated[str, options.file("Answers as JSONL; - is stdout.", "--out", "-o")] = STANDARD,
    model: Annotated[str | None, options.name("The model; default: what the lines say.")] = None,
    # What is allowed.
    rpm: options.Rpm = None,
    tpm: options.Tpm = None,
    limits: options.Also = None,
    preset: options.Preset = None,
    concurrency: Annotated[
        str | None, options.text(f"Calls at once; default: {CONCURRENCY}.", metavar="N|auto")
    ] = None,
    max_usd: Annotated[
        float | None, options.text("Stop before it costs more dollars than this.", metavar="USD")
    ] = None,
    prices: options.PriceFile = None,
    # Where requests go, and what is in them.
    api_base: Annotated[
        str | None, options.text("Any OpenAI-compatible server; default: OpenAI.", metavar="URL")
    ] = None,
    endpoint: Annotated[
        str, options.name("Where prompts go: chat, responses, embeddings.")
    ] = "chat",
    system: Annotated[str | None, options.text("The system message before each prompt.")] = None,
    max_tokens: Annotated[int | None, options.count("For a reply, if the line sets none.")] = None,
    pool: options.PoolFile = None,
    # How often, and how.
    attempts: Annotated[int, options.count("Attempts for a line, the first included.")] = 5,
    dry_run: Annotated[
        bool, options.flag("Send nothing; say how long it would take.", "--dry-run")
    ] = False,
    restart: Annotated[
        bool, options.flag("Start over: delete the answers so far.", "--restart")
    ] = False,
    # What is shown.
    quiet: Annotated[bool, options.flag("Show nothing but errors.", "--quiet", "-q")] = False,
    as_json: Annotated[
        bool, options.flag("Print the summary as JSON on stdout.", "--json")
    ] = False,
) -> None:
    """Send every line of a file to a model, under your limits.

    A line is a request of OpenAI's batch files, the body of one, or a prompt. Every answer is
    written once, as it arrives, with the custom_id and line of the request, as in OpenAI's output files.
    The key is read from OPENAI_API_KEY.
    With --pool, each request goes to whichever provider in that file can start it first.
    Killed and started again, it continues where it stopped and stays under the limits. Ctrl-C lets
    the requests under way finish; a second one drops them.

    Status: 0 when all lines are answered, 1 when some failed (the errors file says why), 2 when none
    can be, 3 when --max-usd stopped it, 130 after Ctrl-C.

    Examples:
        asyncbucket run prompts.txt -o answers.jsonl --model gpt-4o-mini --rpm 500
        asyncbucket run batch.jsonl -o out.jsonl --rpm 500 --max-usd 2.50 --dry-run
        asyncbucket run in.jsonl --concurrency 9 --api-base http://127.0.0.1:8000/v1
        grep -v '^#' a.txt | asyncbucket run - --model gpt-4o-mini --rpm 500 | jq .
    """
    base = api_base or os.environ.get("OPENAI_BASE_URL") or options.OPENAI
    from asyncbucket.cli.run import work

    of_one_provider = {
        "--rpm": rpm,
        "--tpm": tpm,
        "--also": limits,
        "--preset": preset,
        "--concurrency": concurrency,
        "--max-usd": max_usd,
        "--prices": prices,
        "--api-base": api_base,
    }
    given = [name for name, value in of_one_provider.items() if value is not None]
    if pool is not None and given:
        raise ValueError(
            f"{', '.join(given)} cannot go with --pool: write it into the members' tables in {pool}"
        )
    if as_json and out == STANDARD and not dry_run:
        raise ValueError("--json prints on standard output, where the answers go: give -o")
    also = [*(limits or ()), *options.preset_limits(preset)]
    job = Job(
        source=source,
        out=out,
        limits=tuple(read_limits(also, {"rpm": rpm, "tpm": tpm})),
        concurrency=options.read_concurrency(concurrency),
        max_usd=max_usd,
        prices=prices,
        model=model,
        endpoint=endpoint,
        system=system,
        max_tokens=max_tokens,
        api_base=base,
        api_key=None if dry_run or pool else api_key(base),
        pool=pool,
        attempts=attempts,
        restart=restart,
    )
    job.check()
    status = (
        work.dry_run(job, as_json=as_json)
        if dry_run
        else work.run(job, quiet=quiet, as_json=as_json)
    )
    raise typer.Exit(status)
