"""The commands of `asyncbucket`, their options and their help."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from asyncbucket.cli.demo import options as demo_options
from asyncbucket.cli.doctor import options as doctor_options
from asyncbucket.cli.doctor.installed import version_of
from asyncbucket.cli.plan import options as plan_options
from asyncbucket.cli.run import options as run_options
from asyncbucket.cli.trace import options as trace_options
from asyncbucket.cli.watch import options as watch_options

app = typer.Typer(
    add_completion=False,
    epilog="Example: asyncbucket demo --quick",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes around help and errors do not suit a pipe
)

#: A source tree has the benchmarks beside the package; a wheel does not.
TREE: Final = Path(__file__).resolve().parents[2]


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        # A source tree that is not installed has none.
        typer.echo(f"asyncbucket {version_of('asyncbucket') or '(not installed)'}")
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


app.command(
    short_help="Run agents under a provider's limits, with and without pacing.",
    epilog=demo_options.EXAMPLES,
)(demo_options.demo)
app.command(
    short_help="Say how long calls take under limits, and what binds.", epilog=plan_options.EXAMPLES
)(plan_options.plan)
app.command(
    short_help="Send every line of a file to a model, under your limits.",
    epilog=run_options.EXAMPLES,
)(run_options.run)
app.command(short_help="Show what running limiters do, live.", epilog=watch_options.EXAMPLES)(
    watch_options.watch
)
app.command(short_help="Draw what limiter.trace() recorded.", epilog=trace_options.EXAMPLES)(
    trace_options.plot
)
app.command(
    short_help="Check this installation, and say what to fix.",
    epilog=doctor_options.EXAMPLES,
)(doctor_options.doctor)


@app.command(
    short_help="Measure against other limiters (in a source tree).",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measure against other limiters (in a source tree); options go to the benchmarks."""
    if not (TREE / "benchmarks" / "__main__.py").is_file():
        typer.echo(
            "error: the benchmarks come with the source tree alone: run `make bench` in a checkout of "
            "asyncbucket",
            err=True,
        )
        raise typer.Exit(1)
    completed = subprocess.run(  # noqa: S603 - this interpreter, our module
        [sys.executable, "-m", "benchmarks", *context.args], cwd=TREE, check=False
    )
    raise typer.Exit(completed.returncode)
