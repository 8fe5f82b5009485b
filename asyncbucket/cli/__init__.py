"""The command line: `asyncbucket demo` and its siblings.

Needs `pip install "asyncbucket[cli]"`. Nothing in the package imports this.
"""

import signal
import sys
from types import FrameType

__all__ = ["main"]

#: The status of a command that Ctrl-C ended, as shells have it: 128 + SIGINT.
INTERRUPTED = 130


def main() -> None:
    """Run the command that `sys.argv` names, and exit with its status."""
    signal.signal(signal.SIGTERM, _end)
    try:
        from asyncbucket.cli.app import app

        app(prog_name="asyncbucket")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"click", "rich", "typer"}:
            raise
        sys.exit(f'error: the command line needs {error.name}: pip install "asyncbucket[cli]"')
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:  # of help or a version, for no command has begun
        from asyncbucket.cli.ends import WRONG, said

        print(f"error: {said(error)}", file=sys.stderr)  # noqa: T201 - the command's output
        sys.exit(WRONG)


def _end(number: int, frame: FrameType | None) -> None:
    """End as an error would: a terminal whose cursor is hidden has to get it back."""
    del frame
    sys.exit(128 + number)
