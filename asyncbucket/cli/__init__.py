"""The command line: `asyncbucket demo` and its siblings.

Needs `pip install "asyncbucket[cli]"`. Nothing in the package imports this.
"""

import sys

__all__ = ["main"]

#: The status of a command that Ctrl-C ended, as shells have it: 128 + SIGINT.
INTERRUPTED = 130


def main() -> None:
    """Run the command that `sys.argv` names, and exit with its status."""
    try:
        from asyncbucket.cli.app import app

        app(prog_name="asyncbucket")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"click", "rich", "typer"}:
            raise
        sys.exit(f'error: the command line needs {error.name}: pip install "asyncbucket[cli]"')
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
