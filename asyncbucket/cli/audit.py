"""`asyncbucket audit`: run a program, and report its calls to model providers that nothing paced."""

import os
import runpy
import shutil
import sys
import threading
import traceback
from contextlib import suppress
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
    run = _program(command)
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
    match command[Path(command[0]).name.startswith("python") :]:
        case ["-m", module, *rest]:
            sys.argv, sys.path[0] = [module, *rest], str(Path.cwd())
            return partial(runpy.run_module, module, alter_sys=True)
        case [name, *rest] if file := _found(name):
            sys.argv, sys.path[0] = [file, *rest], str(Path(file).parent.resolve())
            return partial(runpy.run_path, file)
        case _:
            pass
    raise ValueError(
        f"{' '.join(command)!r} is no Python script, command in Python or -m MODULE: what starts "
        f"Python goes first, as in `uv run asyncbucket audit -- python app.py`"
    )


def _found(name: str) -> str | None:
    """Return the file of a script or of a command, this environment's before others, if it is Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    file = name if Path(name).is_file() else shutil.which(name, path=path)
    with suppress(SyntaxError, ValueError):  # a shell script, or no text at all
        if file and not file.endswith(".py"):
            compile(Path(file).read_bytes(), file, "exec")
        return file
    return None
