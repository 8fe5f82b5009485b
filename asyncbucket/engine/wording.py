"""How amounts, times and values are read from people, and written for them."""

import sys
import warnings
from numbers import Integral, Real
from typing import Final, TypeGuard

#: The resource that is given and shown in US dollars, and counted in millionths of one.
USD: Final = "usd"
#: How many units of it are a dollar.
MICRO: Final = 1_000_000
_PACKAGE: Final = __file__.rpartition("engine")[0]
#: Larger amounts are not written out: nobody needs all their digits.
_MOST: Final = 10**18


def named(resource: str) -> str:
    """Return a resource as people call it: "input tokens", "USD"."""
    return "USD" if resource == USD else resource.replace("_", " ")


def counted(amount: int, resource: str) -> str:
    """Return an amount in words: "1 request", "36,055 input tokens", "0.25 USD"."""
    name = named(resource)
    number = written(amount, resource) if amount <= _MOST else f"over {_MOST:,}"
    return f"{number} {name.removesuffix('s') if amount == 1 else name}"


def written(amount: int, resource: str) -> str:
    """Return the number of an amount as people write it: "36,055"; of USD "25", "0.10", "0.000345"."""
    if resource != USD:
        return f"{amount:,}"
    dollars, millionths = divmod(abs(amount), MICRO)
    cents = f".{millionths:06}".rstrip("0").ljust(3, "0") if millionths else ""
    return f"{'-' if amount < 0 else ''}{dollars:,}{cents}"


def usd_written(dollars: float) -> str:
    """Return an amount of dollars as people write it: see `written`."""
    return written(round(dollars * MICRO), USD)


def in_given_unit(amount: int, resource: str) -> float:
    """Return an amount in the unit in which people give it: dollars, or whole units."""
    return amount / MICRO if resource == USD else amount


def shown(value: object) -> str:
    """Return ``value`` if it is a number, else its type, for errors: a string may be a prompt."""
    return repr(value) if value is None or isinstance(value, (int, float)) else type(value).__name__


def one_line(text: str) -> str:
    """Return text from outside in one line, without characters that would control a terminal."""
    return "".join(char if char.isprintable() else " " for char in " ".join(text.split()))


def with_verb(resource: str, verb: str) -> str:
    """Say what a resource does: "input tokens bind", "concurrency binds", "requests allow"."""
    name = named(resource)
    return f"{name} {verb if name.endswith('s') else verb + 's'}"


def rounded(value: float) -> str:
    """Return a number with three digits, or all digits before the point: "0.012", "3,600"."""
    number = float(value)  # before Python 3.12 fractions have no such format
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"  # noqa: PLR2004 - three digits


def in_seconds(value: float) -> str:
    """Return a time in words, of a millisecond at least: "0.25 s", "86,906 s"."""
    return f"{rounded(max(value, 0.001) if value > 0 else value)} s"


def written_out(per: float) -> str:
    """Return a window's seconds with all digits: a month is "2,592,000", not "2.592e+06"."""
    return f"{per:,.9g}"


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether ``value`` is a number, NaN and the infinities included."""
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Tell whether ``value`` is an integer."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def plain(value: float) -> float:
    """Return a number as Python's own: numpy's integers overflow in arithmetic."""
    if type(value) in (int, float):
        return value
    return int(value) if is_integer(value) else float(value)


def read_count(value: int, name: str, *, least: int = 0) -> int:
    """Return a number of calls, or of other units.

    Raises:
        ValueError: it is not a whole number from ``least`` on.
    """
    if not is_number(value) or value != value // 1 or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def warn_user(message: str, kind: type[Warning] = UserWarning) -> None:
    """Warn at the line that called asyncbucket, however deep inside."""
    frame, level = sys._getframe(), 1  # noqa: SLF001 - skip_file_prefixes exists from 3.12 on
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=level)
