"""Limits from outside the code: environment variables and tables in TOML files.

They give the limiter's own arguments, under the same names: ``limits`` (texts), keywords such as
``rpm`` and ``tpm``, ``concurrency``, ``max_queue``, ``name``, ``store``, ``shadow``, and ``prices``,
the path of a file.
"""

import os
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeVar

from asyncbucket.engine.errors import LimitSyntaxError
from asyncbucket.engine.limits import KEYWORDS, Limit, read_amount

L = TypeVar("L")
T = TypeVar("T")

_NUMBERS: Final = (*KEYWORDS, "max_queue")
_KNOWN: Final = ("limits", "concurrency", "name", "store", "prices", "shadow", *_NUMBERS)


def from_env(
    cls: Callable[..., L],
    prefix: str = "ASYNCBUCKET_",
    *,
    environ: Mapping[str, str] | None = None,
    **arguments: Any,
) -> L:
    """Return a limiter configured by environment variables.

    ``ASYNCBUCKET_RPM=500``, ``_TPM=200k``, ``_CONCURRENCY=20`` (or ``auto``, or ``8-64``),
    ``_LIMITS="10k RPD; 3 images/10s"``, ``_NAME``, ``_MAX_QUEUE``, ``_STORE``. Empty variables count as not set.

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
    table = {
        variable.removeprefix(prefix).lower(): text.strip()
        for variable, text in (os.environ if environ is None else environ).items()
        if variable.startswith(prefix) and text.strip()
    }
    return from_table(
        cls,
        table,
        where=f"environment variables {prefix}*",
        hint=f"set e.g. {prefix}RPM=500 and {prefix}TPM=200k",
        spelled=lambda name: prefix + name.upper(),
        **arguments,
    )


def from_toml(
    cls: Callable[..., L],
    path: str | PathLike[str] = "pyproject.toml",
    *,
    limiter: str | None = None,
    **arguments: Any,
) -> L:
    """Return a limiter configured by a table of a TOML file: ``[tool.asyncbucket]``, or ``[asyncbucket]``.

    Tables inside it describe further limiters::

        [tool.asyncbucket]
        rpm = 500
        tpm = "200k"
        concurrency = 20

        [tool.asyncbucket.batch]
        limits = ["100 RPM burst 10", "1M TPD"]

    Args:
        cls: the class to make: `Limiter`.
        path: the file.
        limiter: the name of a table inside the table; also the limiter's name, unless the table
            sets one.
        arguments: further arguments of the limiter; they override entries of the same name.

    Raises:
        LimitSyntaxError: an entry cannot be read, is not known, or none limits anything; a
            ValueError. The message names the file and the entry.
        FileNotFoundError: there is no such file.
    """
    where, table = _table_in(Path(path))
    tables: dict[str, Any] = {
        name: value
        for name, value in table.items()
        if isinstance(value, Mapping) and name not in _KNOWN
    }
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
    spelled: Callable[[str], str] | None = None,
    **arguments: Any,
) -> L:
    """Return a limiter configured by a table of a TOML file, or the like.

    Args:
        cls: the class to make: `Limiter`.
        table: its entries.
        where: the file and the table, for errors.
        hint: what to do if nothing is limited.
        spelled: how errors name an entry; by default after ``where``.
        arguments: as for `from_toml`.

    Raises:
        LimitSyntaxError: as for `from_toml`.
    """
    spelled = spelled or partial("{}: {}".format, where)
    given = {name: value for name, value in arguments.items() if value is not None}
    found: dict[str, Any] = {}
    for name, value in table.items():
        if name not in _KNOWN:
            known = ", ".join(_KNOWN)
            raise LimitSyntaxError(f"entry {name!r} of {where} is not known; known: {known}")
        if name not in given:
            found[name] = with_error_source(spelled(name), partial(_read, name, value))
    limits = found.pop("limits", [])
    given = found | given
    if not limits and not given.keys() & {*KEYWORDS, "concurrency"}:
        raise LimitSyntaxError(f"no limits in {where}: {hint}")
    return with_error_source(where, partial(cls, *limits, **given))


def _read(name: str, value: Any) -> Any:
    """Return the argument ``name``; numbers in texts are written as in limits: "14,400", "200k"."""
    if name == "limits":
        texts = value.split(";") if isinstance(value, str) else value
        return [Limit.parse(text) for text in texts if text != ""]
    if name == "concurrency":
        if isinstance(value, str) and value != "auto":
            value = [read_amount(bound) for bound in value.split("-")]
            return tuple(value) if len(value) > 1 else value[0]
        return tuple(value) if isinstance(value, list) else value
    if name == "shadow" and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    return read_amount(value) if name in _NUMBERS and isinstance(value, str) else value


def with_error_source(where: str, make: Callable[[], T]) -> T:
    """Return what ``make`` returns; an error says where it comes from.

    Raises:
        LimitSyntaxError: ``make`` raised a TypeError or a ValueError.
    """
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise LimitSyntaxError(f"{where}: {error}") from error


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


# --- tables in TOML files ---


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


def _table_in(file: Path) -> tuple[str, Mapping[str, Any]]:
    """Return where in ``file`` the table is that describes limiters; and the table."""
    document = read_toml(file)
    tools = document.get("tool")
    where, table = f"{file}, [asyncbucket]", document.get("asyncbucket")
    if isinstance(tools, Mapping) and "asyncbucket" in tools:
        where, table = f"{file}, [tool.asyncbucket]", tools["asyncbucket"]
    if not isinstance(table, Mapping):
        raise LimitSyntaxError(
            f"{file} has no table [tool.asyncbucket] or [asyncbucket]: write one, such as rpm = 500"
        )
    return where, table
