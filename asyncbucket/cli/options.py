"""What commands share: options and limits, a provider's address and key."""

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias
from urllib.parse import urlsplit, urlunsplit

import typer

from asyncbucket.engine.errors import LimitSyntaxError
from asyncbucket.engine.limits import read_amount
from asyncbucket.limiter import Limiter, Pool
from asyncbucket.stores import without_password

#: Where a provider is unless something else is said.
OPENAI: Final = "https://api.openai.com/v1"
#: Anything shorter is no secret: a word such as "none", for a local server that wants some key.
_SHORTEST_KEY: Final = 8

# Typer's functions return Any, whatever the option's type.


def count(help_text: str, *names: str, or_auto: bool = False, least: int = 1) -> Any:
    """Return an option whose help is ``help_text``: a whole number, or perhaps ``auto``."""

    def read(typed: str) -> int | str:
        try:
            return typed if or_auto and typed == "auto" else read_count(typed, least)
        except ValueError as error:
            raise typer.BadParameter(f"{error}, or auto" if or_auto else str(error)) from None

    return typer.Option(*names, parser=read, metavar="N|auto" if or_auto else "N", help=help_text)


def text(help_text: str, *names: str, metavar: str | None = "TEXT") -> Any:
    """Return an option that takes a text; ``metavar`` names it."""
    return typer.Option(*names, metavar=metavar, help=help_text)


def name(help_text: str, *names: str) -> Any:
    """Return an option that takes a name."""
    return text(help_text, *names, metavar="NAME")


def file(help_text: str, *names: str) -> Any:
    """Return an option that takes a file."""
    return text(help_text, *names, metavar="FILE")


def flag(help_text: str, *names: str) -> Any:
    """Return an option that is a flag."""
    return text(help_text, *names, metavar=None)


def take_from(options: type[Any], command: Callable[..., None]) -> None:
    """Give ``command`` the options that a dataclass has as fields, each with its help."""
    taken: Any = command
    taken.__signature__ = inspect.signature(options)
    taken.__annotations__ = options.__init__.__annotations__


def read_count(typed: str, least: int = 1) -> int:
    """Return a number that is written as in limits: ``500``, ``14,400``, ``200k``.

    Raises:
        ValueError: it is not a number from ``least`` on.
    """
    if typed == "0" and least == 0:
        return 0
    with contextlib.suppress(LimitSyntaxError):
        number = read_amount(typed)
        if number >= 1:
            return number
    raise ValueError(f"{typed!r} is not a whole number of at least {least}, such as 500 or 2k")


Rpm: TypeAlias = Annotated[int | None, count("Requests a minute.")]
Tpm: TypeAlias = Annotated[int | None, count("Tokens a minute.")]
Also: TypeAlias = Annotated[
    list[str] | None, text('Any other limit, e.g. "10k RPD" or "40k ITPM".', "--also")
]
PriceFile: TypeAlias = Annotated[
    Path | None, file("A TOML file of prices, instead of the published ones.", "--prices")
]
PoolFile: TypeAlias = Annotated[
    Path | None,
    file("Several providers: TOML tables [member.NAME] with limits, base_url, key_env.", "--pool"),
]
AsJson: TypeAlias = Annotated[bool, flag("Print JSON instead.", "--json")]
Dark: TypeAlias = Annotated[bool, flag("Draw on a dark background.", "--dark")]


def shown_url(url: str) -> str:
    """Return ``url`` in a form that may be shown: without a password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def check_url(url: str, option: str = "--api-base") -> None:
    """Refuse what is not the URL of a server; ``option`` says where it was given.

    Raises:
        ValueError: the message shows an example.
    """
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    raise ValueError(
        f"{option} must begin with http:// or https:// and a host, such as http://127.0.0.1:8000/v1, "
        f"not {without_password(url)!r}"
    )


def without_keys(text: str, *keys: str | None) -> str:
    """Return ``text`` without ``keys``, which a provider's error may quote."""
    for key in keys:
        if key is not None and len(key) >= _SHORTEST_KEY:
            text = text.replace(key, "***")
    return text


def allowed(limiter: Limiter) -> str:
    """Return in words what ``limiter`` allows, or each member of a pool; empty if nothing is bounded."""
    if isinstance(limiter, Pool):
        return "; ".join(f"{member.name}: {allowed(member)}" for member in limiter.members)
    slots = [] if limiter.concurrency is None else [f"{limiter.concurrency} at once"]
    return ", ".join([*map(str, limiter.limits), *slots])
