"""What a job costs in dollars: the most likely sum, and between what it will be.

Three things are uncertain. How long is a reply? If ``max_tokens`` limits it, from nothing to that;
otherwise nobody knows the most. How are tokens split, if only their total is known? From all input
to all output. And are samples like the calls that come? The sum of N calls like k samples has a
standard error of ``N * s * sqrt(1/k + 1/N)``, with s the standard deviation of the samples' prices;
the range has 1.96 times that on both sides.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncbucket.core.cost import Cost
from asyncbucket.core.errors import UnknownPrice
from asyncbucket.core.wording import usd_written
from asyncbucket.providers.prices import Prices, price_of
from asyncbucket.providers.request import FORESEEN, RequestSize, replies_of

#: Standard errors on each side of a range that holds 95 % of a normal distribution.
_SIDES: Final = 1.96


@dataclass(frozen=True, slots=True)
class PlannedDollars:
    """What calls cost, in dollars; ``print`` it.

    Attributes:
        least: what they cost at least, with 95 % certainty if samples stand for calls.
        likely: the most likely sum.
        most: what they cost at most; None if nothing limits the replies.
    """

    least: float
    likely: float
    most: float | None

    def __str__(self) -> str:
        likely, least = dollars(self.likely), dollars(self.least)
        if self.most is None:
            return f"this job costs {likely} USD, at least {least}: nothing limits the replies"
        if (self.least, self.most) == (self.likely, self.likely):
            return f"this job costs {likely} USD"
        return f"this job costs {likely} USD, {least} to {dollars(self.most)}"


def dollars(amount: float) -> str:
    """Return an amount in cents or, below ten cents, with two digits that count."""
    return f"{amount:,.2f}" if amount >= 0.1 else usd_written(float(f"{amount:.2g}"))  # noqa: PLR2004


def bill_of(
    cost: Cost, sample: object, model: str | None, prices: Prices | None
) -> PlannedDollars | None:
    """Return what a call costs; None if nothing says which model it is for.

    Args:
        cost: its tokens.
        sample: what they were read from: a request's body may name its model and limit its reply.
        model: the model; by default the one that the body names.
        prices: prices that come before the published ones.

    Raises:
        UnknownPrice: nobody knows what ``model`` costs.
    """
    body: Mapping[str, Any] = {}
    if isinstance(sample, Mapping):
        inner = sample.get("body", sample)
        body = inner if isinstance(inner, Mapping) else {}
    name = model or body.get("model")
    if name is None:
        return None
    try:
        price = price_of(name, prices)
    except UnknownPrice:
        if model is None:
            return None
        raise
    given, received = cost.get("input_tokens", 0), cost.get("output_tokens", 0)
    if cost.get("tokens", 0) == given == received:  # only the sum is known
        ends = sorted((price.at_most(given, 0), price.at_most(0, received)))
        return PlannedDollars(ends[0], sum(ends) / 2, ends[1])
    whole, least = price.at_most(given, received), price.at_most(given, 0)
    if not body.keys() & {"messages", "prompt", "input"}:
        return PlannedDollars(whole, whole, whole)
    asked = RequestSize()
    asked.add_options(body)
    if received and asked.max_output is None:
        return PlannedDollars(least, whole, None)
    expected = min(received, FORESEEN * replies_of(body))
    return PlannedDollars(least, price.at_most(given, expected), whole)


def add_up(bills: Sequence[PlannedDollars | None], calls: int) -> PlannedDollars | None:
    """Return what ``calls`` calls cost that are like those of ``bills``; None if one is unknown."""
    known = [bill for bill in bills if bill is not None]
    if len(known) < len(bills) or not known:
        return None
    samples, each = len(known), [bill.likely for bill in known]
    error = 0.0
    if 1 < samples != calls:
        error = _SIDES * calls * statistics.stdev(each) * math.sqrt(1 / samples + 1 / calls)
    scale = calls / samples
    bounds = [bill.most for bill in known if bill.most is not None]
    return PlannedDollars(
        likely=scale * sum(each),
        least=max(0.0, scale * sum(bill.least for bill in known) - error),
        most=None if len(bounds) < samples else scale * sum(bounds) + error,
    )
