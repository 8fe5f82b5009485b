"""The commands of `asyncbucket`, and what they are for."""

import textwrap
from typing import Annotated, Final

import typer

from asyncbucket.cli import demo, doctor, pictures, plan, run, watch

app = typer.Typer(
    add_completion=False,
    epilog="Example: asyncbucket demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes around help and errors do not suit a pipe
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        # A source tree that is not installed has none.
        typer.echo(f"asyncbucket {doctor.version_of('asyncbucket') or '(not installed)'}")
        raise typer.Exit


@app.callback()
def root(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Put any number of concurrent agents behind one rate limit."""


_COMMANDS: Final = (
    (
        demo.demo,
        "Run agents under a provider's limits, with and without pacing.",
        """
        asyncbucket demo
        asyncbucket demo --agents 500 --rpm 2400
        """,
    ),
    (
        plan.plan,
        "Say how long calls take under limits, and what binds.",
        """
        asyncbucket plan --calls 10000 --tokens 800 --rpm 500 --tpm 200000
        asyncbucket plan --tokens prompts.jsonl --preset openai/tier-1/gpt-4o-mini
        asyncbucket plan --calls 900 --poisson 8 --rpm 400 --latency 2 --out a.png
        """,
    ),
    (
        run.run,
        "Send every line of a file to a model, under your limits.",
        """
        asyncbucket run prompts.txt -o answers.jsonl --model gpt-4o-mini --rpm 500
        asyncbucket run batch.jsonl -o out.jsonl --rpm 500 --tpm 200000 --dry-run
        asyncbucket run in.jsonl --concurrency 9 --api-base http://127.0.0.1:8000/v1
        grep -v '^#' a.txt | asyncbucket run - --model gpt-4o-mini --rpm 500 | jq .
        """,
    ),
    (
        watch.watch,
        "Show what running limiters do, live.",
        """
        asyncbucket watch http://127.0.0.1:4294
        asyncbucket watch redis://127.0.0.1:6379/0
        """,
    ),
    (
        pictures.plot,
        "Draw what limiter.trace() recorded.",
        """
        asyncbucket plot trace.jsonl -o out.png
        asyncbucket plot trace.jsonl -o out.svg --dark
        """,
    ),
    (
        doctor.doctor,
        "Check this installation, and say what to fix.",
        """
        asyncbucket doctor
        asyncbucket doctor --store redis://127.0.0.1:6379/0
        """,
    ),
)

for command, purpose, examples in _COMMANDS:
    # A backspace keeps the lines of a paragraph as they are.
    shown = "\b\nExamples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")
    app.command(short_help=purpose, epilog=shown)(command)
