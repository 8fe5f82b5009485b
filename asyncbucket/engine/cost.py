"""What one call costs: an amount of each resource."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, Self

from asyncbucket.engine.wording import MICRO, USD, in_given_unit, is_number, shown

#: Resources that every call may name, whether or not the limiter limits them.
COMMON: Final = frozenset({"requests", "tokens", "input_tokens", "output_tokens", USD})


def rounded_up(value: float, what: str) -> int:
    """Return an amount of ``what`` in whole units, rounded up; refuse what is not an amount."""
    if not is_number(value):
        raise TypeError(f"{what} must be a number, not {shown(value)}")
    if not 0 <= (value * MICRO if what == USD else value) < math.inf:
        raise ValueError(f"{what} must be finite and not negative, not {value!r}")
    # 1.1 dollars are 1,100,000.0000000002 units in floats.
    return math.ceil(round(value * MICRO, 3) if what == USD else value)


def amounts_of(
    requests: float,
    tokens: float | None,
    input_tokens: float | None,
    output_tokens: float | None,
    others: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Return the whole amounts of one call, and its one slot; see `Cost` for their meaning."""
    if type(requests) is not int or requests < 0:
        requests = rounded_up(requests, "requests")
    if tokens is not None and (type(tokens) is not int or tokens < 0):
        tokens = rounded_up(tokens, "tokens")
    if input_tokens is not None and (type(input_tokens) is not int or input_tokens < 0):
        input_tokens = rounded_up(input_tokens, "input_tokens")
    if output_tokens is not None and (type(output_tokens) is not int or output_tokens < 0):
        output_tokens = rounded_up(output_tokens, "output_tokens")
    sent, received = input_tokens or 0, output_tokens or 0
    if tokens is None:
        tokens = sent + received
    else:  # a part that is not given may be all that the other leaves
        left = max(0, tokens - sent - received)
        sent = left if input_tokens is None else sent
        received = left if output_tokens is None else received
    amounts = {
        "requests": requests,
        "tokens": tokens,
        "input_tokens": sent,
        "output_tokens": received,
        "concurrency": 1,
    }
    if others:
        if "concurrency" in others:
            raise TypeError("a call takes one slot: leave concurrency out of the cost")
        amounts.update((name, rounded_up(amount, name)) for name, amount in others.items())
    if not requests and sum(amounts.values()) == 1:  # the slot alone
        raise ValueError("a call must cost something, usually at least requests=1")
    return amounts


class Cost(Mapping[str, int]):
    """Map each resource to the whole number of units that one call takes of it.

    ``tokens`` is input plus output; it defaults to their sum. If only ``tokens`` is given, the
    split is unknown, so limits of input tokens and of output tokens each count all of it. If one
    part is given with it, the rest is the other part. Amounts are rounded up; resources that cost
    nothing are left out. ``usd`` is given in dollars, and its units are micro-dollars:
    ``Cost(usd=0.5)["usd"]`` is 500,000.

    Raises:
        TypeError: an amount is not a number, or is of ``concurrency``: each call takes one slot.
        ValueError: an amount is negative, NaN or infinite, or the whole cost is nothing.
    """

    __slots__ = ("_amounts",)

    def __init__(
        self,
        *,
        requests: float = 1,
        tokens: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        **resources: float,
    ) -> None:
        self._amounts = _without_slot(
            amounts_of(requests, tokens, input_tokens, output_tokens, resources)
        )

    @classmethod
    def of(cls, amounts: Mapping[str, int]) -> Self:
        """Return the cost with the amounts that `amounts_of` returned, slot included."""
        cost = cls.__new__(cls)
        cost._amounts = _without_slot(amounts)  # noqa: SLF001 - another `Cost`
        return cost

    def __getitem__(self, resource: str) -> int:
        return self._amounts[resource]

    def get(self, resource: str, default: Any = None) -> Any:  # quicker than the mapping's
        return self._amounts.get(resource, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._amounts)

    def __len__(self) -> int:
        return len(self._amounts)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={in_given_unit(amount, name)}" for name, amount in self.items())
        return f"Cost({inside})"


def _without_slot(amounts: Mapping[str, int]) -> dict[str, int]:
    return {name: amount for name, amount in amounts.items() if amount and name != "concurrency"}
