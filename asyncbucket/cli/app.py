"""The commands of `asyncbucket`, and how they fail: in one line."""

import errno
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from asyncbucket.cli import CANNOT_RUN, INTERRUPTED, audit, demo, doctor, plan, proxy, run, watch
from asyncbucket.engine.errors import AsyncBucketError, UnknownPrice
from asyncbucket.engine.wording import one_line

app = typer.Typer(
    add_completion=False,
    epilog="Example: asyncbucket demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes around help and errors do not suit a pipe
)
#: A full disk, a full quota, or a file of the largest possible size.
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


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


def _with_errors_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """End ``command`` with one line if the user can correct the error, and silently on Ctrl-C."""

    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        try:
            command(**options)
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError:  # whoever reads the output has had enough: no error
            raise
        except (AsyncBucketError, ImportError, OSError, ValueError) as error:
            typer.echo(f"error: {_message(error, command.__name__)}", err=True)
            raise typer.Exit(CANNOT_RUN) from error

    return wrapped


def _message(error: Exception, command: str) -> str:
    """Return what to say of ``error``; our own errors name their remedy already."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"{error.filename or 'the output'} cannot be written ({error.strerror}): make room"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used ({error.strerror}): give another path"
    if UnknownPrice in (type(error), type(error.__cause__)):
        return f"{one_line(str(error))}; here, write it to a TOML file and give --prices"
    if not isinstance(error, ModuleNotFoundError):
        return one_line(str(error))
    package = (error.name or "").partition(".")[0]
    return f'{command} needs {package}: pip install "asyncbucket[cli]"'


COMMANDS: Final = (
    *(demo.demo, plan.plan, run.run, proxy.proxy),
    *(watch.watch, plan.plot, doctor.doctor, audit.audit),
)
for each in COMMANDS:
    said, _, examples = inspect.cleandoc(each.__doc__ or "").partition("Examples:\n")
    # A backspace keeps the lines of a paragraph as they are.
    shown = f"{said}\b\nExamples:\n{textwrap.indent(textwrap.dedent(examples), '  ')}"
    app.command(help=shown)(_with_errors_in_one_line(each))
