"""The options of `asyncbucket plot`."""

from pathlib import Path
from typing import Annotated, Final

import typer

from asyncbucket.cli.exits import errors_in_one_line
from asyncbucket.cli.option_types import file_option, flag_option

EXAMPLES: Final = """\b
Examples:
  asyncbucket plot trace.jsonl -o out.png
  asyncbucket plot trace.jsonl -o out.svg --dark
"""


def plot(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="What limiter.trace().save(...) wrote.")
    ],
    *,
    out: Annotated[Path, file_option("A .png, .svg or .pdf.", "-o", "--out")],
    dark: Annotated[bool, flag_option("Draw on a dark background.", "--dark")] = False,
) -> None:
    """Draw a trace: admissions against each limit, the line of those who waited, and pauses."""
    with errors_in_one_line("plot"):
        from asyncbucket.cli.trace.history import read
        from asyncbucket.cli.trace.picture import draw

        draw(read(trace), out, dark=dark)
        typer.echo(f"drawn: {out}")
