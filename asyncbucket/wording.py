"""How amounts, times and values are written for people."""

from typing import Final

#: Amounts above it are not written out: all their digits say nothing more.
_MOST: Final = 10**18


def named(resource: str) -> str:
    """Return a resource as people call it: "input tokens"."""
    return resource.replace("_", " ")


def counted(amount: int, resource: str) -> str:
    """Return an amount as people say it: "1 request", "36,055 input tokens"."""
    name = named(resource)
    number = f"{amount:,}" if amount <= _MOST else f"over {_MOST:,}"
    return f"{number} {name.removesuffix('s') if amount == 1 else name}"


def shown(value: object) -> str:
    """Return ``value`` as an error may show it: a number, else its type, for a string may be a prompt."""
    return repr(value) if value is None or isinstance(value, (int, float)) else type(value).__name__


def one_line(text: str) -> str:
    """Return text from outside in one line, without characters that would steer a terminal."""
    return "".join(each if each.isprintable() else " " for each in " ".join(text.split()))


def does(resource: str, verb: str) -> str:
    """Say what a resource does: "input tokens bind", "concurrency binds", "requests allow"."""
    name = named(resource)
    return f"{name} {verb if name.endswith('s') else verb + 's'}"


def rounded(value: float) -> str:
    """Return a number in three digits, or in all that stand before the point: "0.012", "3,600"."""
    number = float(value)  # fractions have no such format before Python 3.12
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"  # noqa: PLR2004 - three digits


def in_seconds(value: float) -> str:
    """Return a time as people say it: "0.25 s", "86,906 s"."""
    return f"{rounded(value)} s"


def written_out(per: float) -> str:
    """Return a window's seconds in all their digits: a month's are "2,592,000", not "2.592e+06"."""
    return f"{per:,.9g}"
