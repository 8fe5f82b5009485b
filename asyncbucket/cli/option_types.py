"""Options of one form each, and limits, which several commands take."""

import warnings
from collections.abc import Iterable
from typing import Annotated, Any, TypeAlias

import typer

from asyncbucket.core.errors import LimitSyntaxError
from asyncbucket.core.limits import Limit, read_amount

# Typer's functions return Any, whatever the option's type.


def count_option(help_text: str, *names: str, maximum: int | None = None) -> Any:
    """Return an option whose help is ``help_text``: a whole number from 1 on, and at most ``maximum``."""

    def read(typed: str) -> int:
        try:
            return read_count(typed, maximum=maximum)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(*names, parser=read, metavar="N", help=help_text)


def text_option(help_text: str, *names: str, metavar: str = "TEXT") -> Any:
    """Return an option that takes a text; ``metavar`` names it."""
    return typer.Option(*names, metavar=metavar, help=help_text)


def name_option(help_text: str, *names: str) -> Any:
    """Return an option that takes a name."""
    return text_option(help_text, *names, metavar="NAME")


def file_option(help_text: str, *names: str) -> Any:
    """Return an option that takes a file."""
    return text_option(help_text, *names, metavar="FILE")


def flag_option(help_text: str, *names: str) -> Any:
    """Return an option that is a flag."""
    return typer.Option(*names, help=help_text)


def read_count(typed: str, *, maximum: int | None = None) -> int:
    """Return a number that is written as in limits: ``500``, ``14,400``, ``200k``.

    Raises:
        ValueError: it is not a number from 1 on, or is above ``maximum``.
    """
    try:
        number = read_amount(typed)
    except LimitSyntaxError:
        number = 0
    if not 1 <= number <= (maximum or number):
        end = "on" if maximum is None else f"to {maximum:,}"
        raise ValueError(f"{typed!r} is not a whole number from 1 {end}, such as 500 or 2k")
    return number


Rpm: TypeAlias = Annotated[int | None, count_option("Requests a minute.")]
Tpm: TypeAlias = Annotated[int | None, count_option("Tokens a minute.")]
Rpd: TypeAlias = Annotated[int | None, count_option("Requests a day.")]
Tpd: TypeAlias = Annotated[int | None, count_option("Tokens a day.")]
Preset: TypeAlias = Annotated[str | None, name_option("A provider's published limits.")]


def preset_limits(preset: str | None) -> Iterable[Limit]:
    """Return the limits of a preset; if it is old, a line on standard error says so.

    Raises:
        ValueError: there is no such preset.
    """
    if preset is None:
        return ()
    from asyncbucket.core.presets import preset as limits_of

    with warnings.catch_warnings(record=True, action="always") as caught:
        limits = limits_of(preset)
    for warning in caught:
        typer.echo(f"note: {warning.message}", err=True)
    return limits
