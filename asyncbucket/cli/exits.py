"""How a command ends: an error is one line and a status, never a traceback."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import typer

from asyncbucket.cli import INTERRUPTED
from asyncbucket.core.wording import one_line

#: Exit statuses: all is well; it was done, but something is wrong; it cannot be done as requested.
DONE: Final = 0
FAILED: Final = 1
CANNOT_RUN: Final = 2
#: A full disk, a full quota, or a file of the largest possible size.
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def errors_in_one_line(command: str) -> Generator[None]:
    """End ``command`` with one line if the user can correct the error, and silently on Ctrl-C.

    Raises:
        typer.Exit: with the status.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError:  # whoever reads the output has had enough: no error
        raise
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"error: {error_message(error, command)}", err=True)
        raise typer.Exit(CANNOT_RUN) from error


def error_message(error: Exception, command: str = "the command line") -> str:
    """Return what to say of ``error``; our own errors name their remedy already."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"{error.filename or 'the output'} cannot be written ({error.strerror}): make room"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used ({error.strerror}): give another path"
    if not isinstance(error, ModuleNotFoundError):
        return one_line(str(error))
    package = (error.name or "").partition(".")[0]
    return f'{command} needs {package}: pip install "asyncbucket[cli]"'
