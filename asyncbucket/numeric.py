"""What counts as a number in an argument: numpy's too, but neither bools nor strings."""

from numbers import Integral, Real
from typing import TypeGuard


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
