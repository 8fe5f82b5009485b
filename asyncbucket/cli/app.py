"""What can be typed after `asyncbucket`: commands, their options and their help."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Final

import typer

from asyncbucket.cli import INTERRUPTED
from asyncbucket.cli.demo.scenario import Wish
from asyncbucket.cli.doctor import options as doctor_options
from asyncbucket.cli.plan import options as plan_options
from asyncbucket.cli.run import options as run_options
from asyncbucket.cli.trace import options as trace_options
from asyncbucket.cli.watch import options as watch_options

app = typer.Typer(
    add_completion=False,
    epilog="Example: asyncbucket demo --quick",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes around help and errors are no help in a pipe
)

#: A source tree has the benchmarks beside the package; a wheel does not.
TREE: Final = Path(__file__).resolve().parents[2]
_WRONG_USAGE: Final = 2

#: A backspace keeps the lines of a paragraph as they are.
_EXAMPLES: Final = """\b
Examples:
  asyncbucket demo
  asyncbucket demo --agents 500 --rpm 2400
  export OPENAI_API_KEY=...
  asyncbucket demo --model gpt-4o-mini --rpm 500 --tpm 200000 --agents 20
"""


def _say_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        try:
            number = version("asyncbucket")
        except PackageNotFoundError:  # run from a source tree
            number = "(not installed)"
        typer.echo(f"asyncbucket {number}")
        raise typer.Exit


@app.callback()
def root(
    *,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say which it is."),
    ] = False,
) -> None:
    """Put any number of concurrent agents behind one rate limit."""


@app.command(
    short_help="Agents under a provider's limits, with and without it.",
    epilog=_EXAMPLES,
)
def demo(  # noqa: PLR0913 - one for each option
    *,
    agents: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many agents run at once.")
    ] = None,
    rpm: Annotated[int | None, typer.Option(min=1, metavar="N", help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens a minute.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Calls in flight at most, when paced.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="A chat model of a real provider.")
    ] = None,
    api_base: Annotated[
        str | None, typer.Option(metavar="URL", help="A real provider; default: OpenAI.")
    ] = None,
    embed_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="An embedding model of it; default: none.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run it without asyncbucket, too.")
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(min=2, max=3600, metavar="S", help="How long the paced run shall take."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --seconds 6.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Run LlamaIndex agents under a provider's limits, without asyncbucket and with it.

    The provider is bundled: it runs on this machine, costs nothing, and refuses with 429 what is
    over its limits. --model or --api-base name a real one. Its key is read from OPENAI_API_KEY,
    its calls cost money, --rpm or --tpm say what the key may do, and asyncbucket paces it; without
    asyncbucket it runs only on request.
    """
    wish = Wish(
        agents=agents,
        rpm=rpm,
        tpm=tpm,
        concurrency=concurrency,
        model=model,
        api_base=api_base,
        embed_model=embed_model,
        compare=compare,
        seconds=6.0 if quick and seconds is None else seconds,
    )
    raise typer.Exit(_demo(wish, as_json=as_json))


def _demo(wish: Wish, *, as_json: bool) -> int:
    """Return the exit status; an error that the user can mend is a line, no traceback."""
    try:
        from asyncbucket.cli.demo import command

        return command.run(wish, as_json=as_json)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        message = f'the demo needs {package}: pip install "asyncbucket[cli]"'
    except (ImportError, ValueError) as error:
        message = str(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    typer.echo(f"error: {message}", err=True)
    return _WRONG_USAGE


app.command(
    short_help="How long calls take under limits, and what binds.", epilog=plan_options.EXAMPLES
)(plan_options.plan)
app.command(
    short_help="Send every line of a file to a model, under your limits.",
    epilog=run_options.EXAMPLES,
)(run_options.run)
app.command(short_help="What running limiters do, live.", epilog=watch_options.EXAMPLES)(
    watch_options.watch
)
app.command(short_help="Draw what limiter.trace() has kept.", epilog=trace_options.EXAMPLES)(
    trace_options.plot
)
app.command(
    short_help="What is set up here, what of it is wrong, and the remedy.",
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
            "error: the benchmarks are in the source tree, which this installation is not: "
            "run `make bench` in a checkout of asyncbucket",
            err=True,
        )
        raise typer.Exit(1)
    done = subprocess.run(  # noqa: S603 - this interpreter, our module
        [sys.executable, "-m", "benchmarks", *context.args], cwd=TREE, check=False
    )
    raise typer.Exit(done.returncode)
