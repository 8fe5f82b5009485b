"""`asyncbucket audit`: run a program, and report its calls to model providers that nothing paced."""

import runpy
import shutil
import sys
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from asyncbucket import auditing
from asyncbucket.cli import FAILED, UNPACED, options


def audit(
    *,
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="The program and its arguments.")
    ],
    host: Annotated[
        list[str] | None,
        options.name("A provider's host that asyncbucket doesn't know; may be repeated.", "--host"),
    ] = None,
) -> None:
    """Run a Python program, and report each call to a model provider that no limiter admitted.

    The program runs in this process, with this command's Python; processes that it starts are not
    watched. The report on standard error names host, path, and the line of your code. The exit
    status is 3 if there is any such call, else the program's own.

    Examples:
        asyncbucket audit -- python app.py
        asyncbucket audit --host llm.corp.example -- pytest tests
    """
    run = _program(command[Path(command[0]).name.startswith("python") :])
    with auditing.audit(hosts=host or ()) as seen:
        try:
            run(run_name="__main__")
        except Exception:  # noqa: BLE001 - the program's, not ours
            traceback.print_exc()
            sys.exit(FAILED)
        finally:
            vars(threading)["_shutdown"]()  # as Python does at its end
            typer.echo(seen, err=True)
            if seen.unpaced:
                sys.exit(UNPACED)


def _program(command: list[str]) -> partial[Any]:
    """Return what runs ``command`` in this process, as ``python`` would.

    Raises:
        ValueError: it is no Python program.
    """
    match command:
        case ["-m", module, *_]:
            sys.argv, sys.path[0] = command[1:], str(Path.cwd())
            return partial(runpy.run_module, module, alter_sys=True)
        case [name, *_] if file := name if Path(name).is_file() else _command(name):
            with Path(file).open("rb") as program:
                if not file.endswith(".py") and b"python" not in program.read(400):
                    raise ValueError(
                        f"{name} is no Python program, and what it starts is not watched: give the program "
                        f"after --, as in `uv run asyncbucket audit -- python app.py`"
                    )
            sys.argv, sys.path[0] = [file, *command[1:]], str(Path(file).parent.resolve())
            return partial(runpy.run_path, file)
        case _:
            raise ValueError(f"no script or command {command[0]!r} is found; or give -m MODULE")


def _command(name: str) -> str | None:
    """Return where a command is: beside this Python, or else on the search path."""
    return shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
