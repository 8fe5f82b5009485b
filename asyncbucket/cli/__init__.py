"""The command line: `asyncbucket demo` and its siblings.

Needs `pip install "asyncbucket[cli]"`. Nothing in the package imports this.
"""

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

__all__ = ["main"]

#: Exit statuses: all is well; it was done, but something is wrong; it cannot be done.
DONE, FAILED, CANNOT_RUN = 0, 1, 2
#: A run was stopped by its own cap of dollars.
SPENT = 3
#: Calls of an audited program passed no limiter.
UNPACED = 3
#: Ctrl-C or SIGTERM ended a command, as in shells: 128 + SIGINT.
INTERRUPTED = 130


def main() -> None:
    """Run the command that `sys.argv` names, and exit with its status."""
    signal.signal(signal.SIGTERM, as_ctrl_c)
    try:
        with interrupts_blocked():
            from asyncbucket.cli.app import app

        app(prog_name="asyncbucket")
    except ModuleNotFoundError as error:
        package = (error.name or "asyncbucket").partition(".")[0]
        if package == "asyncbucket":
            raise
        sys.stderr.write(f'error: the commands need {package}: pip install "asyncbucket[cli]"\n')
        sys.exit(CANNOT_RUN)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """End a command like Ctrl-C, even where that is ignored, as in the background of a script."""
    interrupt = signal.getsignal(signal.SIGINT)
    (interrupt if callable(interrupt) else signal.default_int_handler)(number, frame)


@contextmanager
def interrupts_blocked() -> Generator[None]:
    """Hold back Ctrl-C and SIGTERM until the end of a block; processes started in it get none at all.

    In the middle of an import they may be lost: Python and some libraries catch whatever is raised
    there. And a terminal sends a Ctrl-C to child processes, too: a Python that is still loading
    would show a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
