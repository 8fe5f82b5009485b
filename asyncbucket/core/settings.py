"""Limits from outside the code: environment variables, and tables in TOML files.

Both give the limiter's own arguments, under the same names: ``limits`` (texts), ``preset``,
keywords such as ``rpm`` and ``tpm``, ``concurrency``, ``max_queue``, ``name``, ``store``, and
``prices``, the path of a file.
"""

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeVar

from asyncbucket.core.errors import LimitSyntaxError
from asyncbucket.core.limits import KEYWORDS, Limit, read_amount
from asyncbucket.core.wording import is_number

L = TypeVar("L")
T = TypeVar("T")

_FILES: Final = ("asyncbucket.toml", "pyproject.toml")
_TABLE: Final = "asyncbucket"
_KNOWN: Final = (
    "limits",
    "preset",
    *KEYWORDS,
    "concurrency",
    "max_queue",
    "name",
    "store",
    "prices",
)


def from_env(
    cls: Callable[..., L],
    prefix: str = "ASYNCBUCKET_",
    *,
    environ: Mapping[str, str] | None = None,
    **arguments: Any,
) -> L:
    """Return a limiter configured by environment variables.

    ``ASYNCBUCKET_RPM=500``, ``_TPM=200k``, ``_CONCURRENCY=20`` (or ``auto``, or ``8-64``),
    ``_LIMITS="10k RPD; 3 images/10s"``, ``_PRESET=openai/tier-1/gpt-4o-mini``, ``_NAME``,
    ``_MAX_QUEUE``, ``_STORE``. Empty variables count as not set.

    Args:
        cls: the class to make: `Limiter`.
        prefix: how the names of the variables begin; no other program's, as ``OPENAI_`` is that of
            a key.
        environ: the variables, by default ``os.environ``.
        arguments: further arguments of the limiter; they override variables of the same name.

    Raises:
        LimitSyntaxError: a variable cannot be read, is not known, or none limits anything; a
            ValueError. The message names the variable.
    """
    variables = os.environ if environ is None else environ
    found: dict[str, Any] = {}
    for variable, text in variables.items():
        name = variable.removeprefix(prefix).lower()
        if variable.startswith(prefix) and text.strip():
            _check_name(name, f"environment variable {variable}", prefix=prefix)
            if arguments.get(name) is None:
                found[name] = with_error_source(variable, partial(_read, name, text.strip()))
    hint = f"set e.g. {prefix}RPM=500 and {prefix}TPM=200k"
    return _make_limiter(cls, found, arguments, where=f"environment variables {prefix}*", hint=hint)


def from_toml(
    cls: Callable[..., L],
    path: str | PathLike[str] | None = None,
    *,
    limiter: str | None = None,
    **arguments: Any,
) -> L:
    """Return a limiter configured by a TOML file: by the table ``[tool.asyncbucket]``.

    In files other than ``pyproject.toml`` it may also be ``[asyncbucket]``, or the whole file.
    Tables inside it that are named like no entry describe further limiters::

        [tool.asyncbucket]
        rpm = 500
        tpm = "200k"
        concurrency = 20

        [tool.asyncbucket.batch]
        limits = ["100 RPM burst 10", "1M TPD"]

    Args:
        cls: the class to make: `Limiter`.
        path: the file; by default the nearest ``asyncbucket.toml``, or ``pyproject.toml`` that has
            the table, from the working directory upwards.
        limiter: the name of a table inside the table; also the limiter's name, unless the table
            sets one.
        arguments: further arguments of the limiter; they override entries of the same name.

    Raises:
        LimitSyntaxError: an entry cannot be read, is not known, or none limits anything; a
            ValueError. The message names the file and the entry.
        FileNotFoundError: there is no such file.
    """
    where, table = _find_table(path)
    tables = _tables_in(table)
    hint = "write e.g. rpm = 500"
    if limiter is not None:
        if limiter not in tables:
            known = ", ".join(tables) or "none"
            raise LimitSyntaxError(f"{where} has no table {limiter!r}; it has {known}")
        where = f"{where[:-1]}.{limiter}]"
        table, tables = {"name": limiter, **tables[limiter]}, {}
    elif tables:
        hint += f", or ask for limiter={min(tables)!r}"
    entries = {name: value for name, value in table.items() if name not in tables}
    return from_table(cls, entries, where=where, hint=hint, **arguments)


def from_table(
    cls: Callable[..., L],
    table: Mapping[str, Any],
    *,
    where: str,
    hint: str = "write e.g. rpm = 500",
    **arguments: Any,
) -> L:
    """Return a limiter configured by a table of a TOML file.

    Args:
        cls: the class to make: `Limiter`.
        table: its entries.
        where: the file and the table, for errors.
        hint: what to do if nothing is limited.
        arguments: as for `from_toml`.

    Raises:
        LimitSyntaxError: as for `from_toml`.
    """
    found: dict[str, Any] = {}
    for name, value in table.items():
        _check_name(name, f"entry {name!r} of {where}")
        if arguments.get(name) is None:
            found[name] = with_error_source(f"{where}: {name}", partial(_read, name, value))
    return _make_limiter(cls, found, arguments, where=where, hint=hint)


def key_in_env(variable: str) -> str:
    """Return the key that an environment variable holds.

    Raises:
        ValueError: it holds none. The message does not name it: some give the key itself.
    """
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            "key_env must name an environment variable that holds the provider's key and nothing "
            "else: export the key in it"
        )
    return key


def _tables_in(table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the tables inside a table that describe further limiters."""
    return {
        name: value
        for name, value in table.items()
        if isinstance(value, Mapping) and name not in _KNOWN
    }


def _make_limiter(
    cls: Callable[..., L],
    found: dict[str, Any],
    arguments: dict[str, Any],
    *,
    where: str,
    hint: str,
) -> L:
    limits = [*found.pop("limits", ()), *found.pop("preset", ())]
    given = {**found, **{name: value for name, value in arguments.items() if value is not None}}
    if not limits and not given.keys() & {*KEYWORDS, "concurrency"}:
        raise LimitSyntaxError(f"{where} limit nothing; {hint}")
    return with_error_source(where, lambda: cls(*limits, **given))


def with_error_source(where: str, make: Callable[[], T]) -> T:
    """Return what ``make`` returns; an error says where it comes from.

    Raises:
        LimitSyntaxError: ``make`` raised a TypeError or a ValueError.
    """
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise LimitSyntaxError(f"{where}: {error}") from error


def _check_name(name: str, what: str, *, prefix: str | None = None) -> None:
    if name not in _KNOWN:
        if prefix is None:
            raise LimitSyntaxError(f"{what} is not known; known: {', '.join(_KNOWN)}")
        known = ", ".join(f"{prefix}{name.upper()}" for name in _KNOWN)
        raise LimitSyntaxError(
            f"{what} is not known; known: {known}; if it is there for something else, give a prefix "
            f"that only the limiter uses, such as {prefix}LIMIT_"
        )


def _read(name: str, value: object) -> Any:
    """Return the argument ``name``, from a text of the environment or a value of TOML."""
    if name == "limits":
        return _limits(value)
    if name == "preset":
        from asyncbucket.core.presets import preset

        return preset(_text(value))
    if name in ("name", "store", "prices"):
        return _text(value)
    if name == "concurrency":
        return _concurrency(value)
    if name == "max_queue" and value == "0":  # nobody waits; other numbers are at least 1
        return 0
    return _number(value)


def _limits(value: object) -> list[Limit]:
    texts: Iterable[Any] = value.split(";") if isinstance(value, str) else _list(value)
    try:
        return [Limit.parse(text) for text in texts if not isinstance(text, str) or text.strip()]
    except LimitSyntaxError as error:
        if not isinstance(value, str):
            raise
        raise LimitSyntaxError(f"{error}; put a semicolon between two limits") from error


def _concurrency(value: object) -> Any:
    if isinstance(value, str):
        if value == "auto":
            return value
        least, _, most = value.partition("-")
        try:
            return (read_amount(least), read_amount(most)) if most else read_amount(value)
        except LimitSyntaxError:
            raise ValueError(
                f"{value!r} is neither a number such as 20, nor 8-64, nor auto"
            ) from None
    return tuple(_list(value)) if isinstance(value, list) else value


def _number(value: object) -> float:
    """Return a number; a text may be written as in limits: "14,400", "200k", "1.5M"."""
    if isinstance(value, str):
        try:
            return read_amount(value)
        except LimitSyntaxError:
            raise ValueError(f"{value!r} is not a number such as 500, 14,400 or 200k") from None
    if not is_number(value):
        raise TypeError(f"{value!r} is not a number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f'{value!r} is not a list such as ["500 RPM", "200k TPM"]')
    return value


def _find_table(path: str | PathLike[str] | None) -> tuple[str, Mapping[str, Any]]:
    """Return the table that describes limiters, preceded by a text that says where it is."""
    if path is not None:
        return _read_table(Path(path), required=True)
    cwd = Path.cwd()
    for folder in (cwd, *cwd.parents):
        for name in _FILES:
            file = folder / name
            if file.is_file() and (found := _read_table(file, required=False))[1]:
                return found
    raise FileNotFoundError(
        f"no {_FILES[0]}, nor a {_FILES[1]} with [tool.{_TABLE}], in {cwd} or above it: write one, "
        "or give its path"
    )


def read_toml(file: Path) -> dict[str, Any]:
    """Return what is in a TOML file.

    Raises:
        LimitSyntaxError: it is none.
        OSError: it cannot be read.
    """
    with file.open("rb") as content:
        try:
            return tomllib.load(content)
        except ValueError as error:
            raise LimitSyntaxError(f"{file} is not valid TOML: {error}") from error


def _read_table(file: Path, *, required: bool) -> tuple[str, Mapping[str, Any]]:
    document = read_toml(file)
    tools = document.get("tool")
    if not isinstance(tools, Mapping):
        tools = {}
    if _TABLE in tools or file.name == _FILES[1]:
        name, table = f"tool.{_TABLE}", tools.get(_TABLE, {})
    else:
        name, table = _TABLE, document.get(_TABLE, document)
    if required and not table:
        raise LimitSyntaxError(f"{file} has no table [{name}]")
    if not isinstance(table, Mapping):
        raise LimitSyntaxError(f"{file}: {_TABLE} is not a table but {table!r}")
    return f"{file}, [{name}]", table
