"""How a command ends: what goes wrong is a line and a status, never a traceback."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import typer

from asyncbucket.cli import INTERRUPTED
from asyncbucket.wording import one_line

#: Statuses: all is well; it was done, and something is not; it cannot be done as it was asked for.
DONE: Final = 0
FAILED: Final = 1
WRONG: Final = 2
#: A disk that is full, or full for this user, or a file that is as long as may be.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def in_a_line(command: str) -> Generator[None]:
    """End ``command`` with a line where the user can mend the error, and Ctrl-C without a word.

    Raises:
        typer.Exit: with the status.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError:  # whoever read it has read enough: no error
        raise
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"error: {said(error, command)}", err=True)
        raise typer.Exit(WRONG) from error


def said(error: Exception, command: str = "the command line") -> str:
    """Return what to say of ``error``; errors of our own name their remedy already."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.filename or 'the output'} cannot be written ({error.strerror}): make room"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used ({error.strerror}): give another path"
    if not isinstance(error, ModuleNotFoundError):
        return one_line(str(error))
    package = (error.name or "").partition(".")[0]
    return f'{command} needs {package}: pip install "asyncbucket[cli]"'
