"""The commands of `asyncbucket`, and what they are for."""

from typing import Annotated

import typer

from asyncbucket.cli import demo, doctor, pictures, plan, watch
from asyncbucket.cli.run import options as run

app = typer.Typer(
    add_completion=False,
    epilog="Example: asyncbucket demo --quick",
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


for command, examples, purpose in (
    (demo.demo, demo.EXAMPLES, "Run agents under a provider's limits, with and without pacing."),
    (plan.plan, plan.EXAMPLES, "Say how long calls take under limits, and what binds."),
    (run.run, run.EXAMPLES, "Send every line of a file to a model, under your limits."),
    (watch.watch, watch.EXAMPLES, "Show what running limiters do, live."),
    (pictures.plot, pictures.EXAMPLES, "Draw what limiter.trace() recorded."),
    (doctor.doctor, doctor.EXAMPLES, "Check this installation, and say what to fix."),
):
    app.command(short_help=purpose, epilog=examples)(command)
