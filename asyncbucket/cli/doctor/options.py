"""The options of `asyncbucket doctor`, and how the findings are shown."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Final

import typer

from asyncbucket.cli import interrupts_blocked
from asyncbucket.cli.doctor.findings import Finding, State, bad
from asyncbucket.cli.exits import FAILED, errors_in_one_line
from asyncbucket.cli.option_types import flag_option, text_option
from asyncbucket.core.wording import one_line

EXAMPLES: Final = """\b
Examples:
  asyncbucket doctor
  asyncbucket doctor --store redis://127.0.0.1:6379/0
"""

_SIGNS: Final = {
    State.GOOD: ("ok", "green"),
    State.NOTE: ("note", "yellow"),
    State.BAD: ("BAD", "red"),
}


def doctor(
    *,
    store: Annotated[
        str | None,
        text_option("A store to look at, e.g. redis://host:6379/0.", metavar="URL"),
    ] = None,
    as_json: Annotated[bool, flag_option("Print the findings as JSON.", "--json")] = False,
) -> None:
    """Check what is installed and set up here, and say what to fix.

    The status is 1 if something is wrong. In a store it makes a limiter of its own, which expires.
    """
    with errors_in_one_line("doctor"):
        findings = list(_findings(store))
        if as_json:
            typer.echo(json.dumps([_as_dict(finding) for finding in findings], indent=2))
        else:
            _show(findings)
    if any(finding.state is State.BAD for finding in findings):
        raise typer.Exit(FAILED)


def _findings(store: str | None) -> Iterator[Finding]:
    from asyncbucket.cli.doctor import installed, surroundings

    checks: list[Callable[[], Iterable[Finding]]] = [
        surroundings.interpreter,
        surroundings.event_loop,
        surroundings.clock,
        installed.http_families,
        installed.sdks,
        installed.llama_index,
        installed.ranges,
        installed.tokenizer,
        surroundings.environment,
        surroundings.project,
    ]
    for check in checks:
        with interrupts_blocked():  # most of them load something
            yield from _run_check(check)
    if store is not None:
        from asyncbucket.cli.doctor import shared

        yield from _run_check(partial(shared.store, store))


def _run_check(check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings; a package that breaks when it is loaded is a finding, too."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - others' packages may raise anything
        name = getattr(check, "__name__", "store").replace("_", " ")
        found = f"looking failed: {type(error).__name__}: {error}"
        yield bad(name, found, "reinstall what the message names, or report it with the message")


def _as_dict(finding: Finding) -> dict[str, str | None]:
    return {
        "about": finding.about,
        "state": finding.state.value,
        "found": finding.found,
        "remedy": finding.remedy,
    }


def _show(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        sign, style = _SIGNS[finding.state]
        text = Text(one_line(finding.found))
        if finding.remedy is not None:
            text.append(f"\n-> {finding.remedy}", style)
        table.add_row(Text(sign, style), finding.about, text)
    console.print(Padding(table, (0, 0, 1, 0)))
    wrong = sum(finding.state is State.BAD for finding in findings)
    notes = sum(finding.state is State.NOTE for finding in findings)
    console.print(f"{wrong} wrong, {notes} to note, {len(findings) - wrong - notes} ok")
