"""The options of `asyncbucket plot`."""

from pathlib import Path
from typing import Annotated, Final

import typer

from asyncbucket.cli.ends import in_a_line
from asyncbucket.cli.typed import file, switch

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
    out: Annotated[Path, file("A .png, .svg or .pdf.", "-o", "--out")],
    dark: Annotated[bool, switch("Draw on a dark background.", "--dark")] = False,
) -> None:
    """Draw a trace: admissions against each limit, the line of those who waited, and pauses."""
    with in_a_line("plot"):
        from asyncbucket.cli.trace.picture import draw
        from asyncbucket.cli.trace.story import read

        draw(read(trace), out, dark=dark)
        typer.echo(f"drawn: {out}")
