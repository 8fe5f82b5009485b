"""What can be typed after `asyncbucket plot`."""

from pathlib import Path
from typing import Annotated, Final

import typer

EXAMPLES: Final = """\b
Examples:
  asyncbucket plot trace.jsonl -o out.png
  asyncbucket plot trace.jsonl -o out.svg --dark
"""

_WRONG: Final = 2


def plot(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="What limiter.trace().save(...) wrote.")
    ],
    *,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="A .png, .svg or .pdf.")],
    dark: Annotated[bool, typer.Option("--dark", help="On a dark ground.")] = False,
) -> None:
    """Draw a trace: admissions against each limit, the line of those who waited, and pauses."""
    try:
        from asyncbucket.cli.trace.picture import draw
        from asyncbucket.cli.trace.story import read

        draw(read(trace), out, dark=dark)
    except (ValueError, ImportError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(_WRONG) from error
    typer.echo(f"drawn: {out}")
