"""The options of `asyncbucket watch`."""

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer

from asyncbucket.cli.exits import FAILED, error_message, errors_in_one_line
from asyncbucket.cli.option_types import flag_option

EXAMPLES: Final = """\b
Examples:
  asyncbucket watch http://127.0.0.1:4294
  asyncbucket watch unix:///run/limits.sock --once
  asyncbucket watch redis://127.0.0.1:6379/0
"""


def watch(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The URL of limiter.serve_stats(), or of a store.")
    ],
    *,
    interval: Annotated[
        float, typer.Option(min=0.1, max=60, metavar="S", help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, flag_option("Look once, then exit.", "--once")] = False,
    as_json: Annotated[bool, flag_option("Print a line of JSON for each look.", "--json")] = False,
) -> None:
    """Show what running limiters do: how full each limit is, what binds, and who waits.

    A program must call limiter.serve_stats() to be watched; programs that share a store are seen in
    the store. End it with Ctrl-C.
    """
    from asyncbucket.cli.watch.source import SourceError, source

    with errors_in_one_line("watch"):
        readings = _readings(source(url), None if once else interval)
        try:
            if as_json:
                for reading in readings:
                    typer.echo(json.dumps(reading))
            else:
                _show(readings, once=once)
        except SourceError as error:
            typer.echo(f"error: {error_message(error)}", err=True)
            raise typer.Exit(FAILED) from error


def _readings(read: Any, interval: float | None) -> Iterator[dict[str, Any]]:
    while True:
        yield read()
        if interval is None:
            return
        time.sleep(interval)


def _show(readings: Iterator[dict[str, Any]], *, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from asyncbucket.cli.plot import shows_blocks
    from asyncbucket.cli.watch.screen import draw, plain

    console = Console(highlight=False)
    unicode = shows_blocks(console)
    can_draw = console.is_terminal and not console.is_dumb_terminal
    if once or not can_draw:
        for views in _views(readings):
            if can_draw:
                console.print(draw(views, width=console.width, unicode=unicode))
            else:
                typer.echo("\n".join(plain(views)))
        return
    with Live(console=console, screen=False, auto_refresh=False) as live:
        for views in _views(readings):
            live.update(draw(views, width=console.width, unicode=unicode), refresh=True)


def _views(readings: Iterator[dict[str, Any]]) -> Iterator[list[Any]]:
    from asyncbucket.cli.watch.view import compare

    before: list[dict[str, Any]] = []
    last = time.monotonic()
    for reading in readings:
        now = time.monotonic()
        yield compare(reading["limiters"], before, now - last)
        before, last = reading["limiters"], now
