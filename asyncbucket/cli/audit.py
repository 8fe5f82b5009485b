"""`asyncbucket audit`: run a program, and report its calls to model providers that nothing paced."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Final

import typer

from asyncbucket.auditing import Audit
from asyncbucket.cli import UNPACED, options

#: What each Python process of the program runs first; a `sitecustomize` of its own comes after it.
_FIRST: Final = """\
import importlib.machinery, importlib.util, os, sys
from asyncbucket.auditing import audit_process
folder = os.path.dirname(__file__)
audit_process(folder, {hosts!r})
own = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if p != folder])
if own is not None and own.loader is not None:
    own.loader.exec_module(importlib.util.module_from_spec(own))
"""


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
    """Run a program, and report each call to a model provider that no limiter admitted.

    It watches every Python process that the program starts, and changes none of their calls. The
    report on standard error names host, path, and the line of your code. The exit status is 3 if
    there is any such call, else the program's own.

    Examples:
        asyncbucket audit -- python app.py
        asyncbucket audit --host llm.corp.example -- pytest tests
    """
    with tempfile.TemporaryDirectory(prefix="asyncbucket-") as folder:
        first = _FIRST.format(hosts=host or [])
        Path(folder, "sitecustomize.py").write_text(first, "utf-8")
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        status = _run(command, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        reports = [path.read_text("utf-8") for path in Path(folder).glob("*.json")]
    if not reports:
        raise ValueError(
            f"{command[0]} ran no Python process that exited by itself, so nothing was recorded"
        )
    seen = Audit()
    for report in reports:
        seen.add(report)
    typer.echo(seen, err=True)
    raise typer.Exit(UNPACED if seen.unpaced else status)


def _leave(*_: object) -> None:
    """Leave Ctrl-C to the program, which gets it, too."""


def _run(command: list[str], environ: dict[str, str]) -> int:
    """Run ``command`` to its end, which Ctrl-C asks it for, and return its exit status."""
    signal.signal(signal.SIGINT, _leave)
    try:
        status = subprocess.run(command, env=environ, check=False).returncode  # noqa: S603
    except OSError as error:
        raise ValueError(f"{command[0]} can't be run ({error.strerror}): give a program") from error
    return status if status >= 0 else 128 - status
