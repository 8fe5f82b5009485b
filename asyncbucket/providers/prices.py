"""What calls cost in dollars: the prices of models, and what a request may cost at most.

The built-in prices are in ``prices.toml``, by provider, each with the provider's page and the day on
which it was read. Providers change them without notice, and your contract may have others: give
yours as ``Limiter(prices=...)``.

A call that limits its output (``max_tokens``) reserves the highest price that it can have: a token
has at least one byte, so a text has at most as many tokens as bytes. Any other call reserves what it
will probably cost. What the provider adds to a request by itself can't be bounded from outside:
pictures, files, earlier turns that it keeps, and searches of its own.

Nothing here is looked up unless a limit or a budget of dollars is in force.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import date
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeAlias

from asyncbucket.engine.cost import Cost
from asyncbucket.engine.errors import UnknownPrice
from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.wording import MICRO, USD, is_number, warn_user
from asyncbucket.levels import count_unpriced_call, effective_limiter, in_force, prices_of
from asyncbucket.providers import facts
from asyncbucket.providers.profiles import Call
from asyncbucket.providers.usage import Usage
from asyncbucket.settings import read_toml

__all__ = ["Price", "PriceWarning", "Prices", "price_of", "read_prices"]

#: What comes behind the name of a model: the day of a snapshot, or "latest".
_SNAPSHOT: Final = re.compile(r"[-@](?:\d{4}-\d{2}-\d{2}|\d{8}|latest)$")
#: What models call themselves in LlamaIndex.
_FIELDS: Final = ("model", "model_name")
#: Tokens that a provider adds to each item of a list, to a call, and to one with tools: Anthropic's
#: tool prompt has up to 530 (its docs, "Tool use", read in 2026).
_PER_ITEM: Final = 8
_PER_CALL: Final = 32
_FOR_TOOLS: Final = 600
#: Prices this many days old cause a warning.
_OLD: Final = 180


class PriceWarning(UserWarning):
    """Say that built-in prices are old."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Say what a model costs, in US dollars for a million tokens.

    >>> Price(input=0.15, cached=0.075, output=0.60)

    Attributes:
        input: what is sent.
        output: what comes back, reasoning included.
        cached: the part of the input that is read from the provider's cache; by default like any.
        written: the part of the input that is written to that cache; by default like any.
        above: prompts of more tokens than this have the prices in ``long``.

    Raises:
        ValueError: a price is not a finite number from 0 on, or only one of ``above`` and ``long``
            is given.
    """

    input: float
    output: float = 0.0
    cached: float | None = None
    written: float | None = None
    above: int | None = None
    long: "Price | None" = None

    def __post_init__(self) -> None:
        """Refuse what is not a price."""
        for name in ("input", "output", "cached", "written"):
            value = getattr(self, name)
            if value is None and name in ("cached", "written"):
                continue
            if not is_number(value) or not 0 <= value <= MICRO:
                raise ValueError(
                    f"{name} must be dollars for a million tokens, such as 0.15, not {value!r}"
                )
        if (self.above is None) != (self.long is None):
            raise ValueError(
                "above= and long= go together: from how many tokens on, and the prices"
            )

    def of(self, usage: Usage) -> float:
        """Return what a call costs that used so much, in dollars, rounded up to a micro-dollar."""
        prompt = usage.input_tokens + usage.cached_beside
        if self.long is not None and prompt > (self.above or 0):
            return self.long.of(usage)
        plain = usage.input_tokens - usage.cached_tokens - usage.written_tokens
        cached = self.input if self.cached is None else self.cached
        written = self.input if self.written is None else self.written
        return _dollars(
            (plain, self.input),
            (usage.cached_tokens + usage.cached_beside, cached),
            (usage.written_tokens, written),
            (usage.output_tokens, self.output),
        )

    def at_most(self, input_tokens: int, output_tokens: int) -> float:
        """Return the most that a call can cost with so many tokens, in dollars."""
        if self.long is not None and input_tokens > (self.above or 0):
            return self.long.at_most(input_tokens, output_tokens)
        dearest = max(self.input, self.cached or 0, self.written or 0)
        return _dollars((input_tokens, dearest), (output_tokens, self.output))


def _dollars(*parts: tuple[int, float]) -> float:
    """Return the price of tokens at dollars a million; a micro-dollar is what one token costs at 1."""
    exact = sum(tokens * round(price * MICRO) for tokens, price in parts)
    return -(-exact // MICRO) / MICRO


#: Prices by the names of models, with wildcards as in ``"gpt-4o*"``; ``"*"`` is for all others.
Prices: TypeAlias = Mapping[str, Price]


def read_prices(given: Prices | str | PathLike[str] | None) -> Prices:
    """Return prices given as a mapping, or in a TOML file.

    A file has a table for each model: ``["gpt-4o-mini"]``, ``input = 0.15``, ``output = 0.60``.

    Raises:
        ValueError, TypeError: what is given has no prices; the message says where.
        OSError: the file cannot be read.
    """
    if given is None:
        return {}
    where = "prices"
    tables: Any = given
    if isinstance(given, str | PathLike):
        where = str(given)
        tables = read_toml(Path(given))
    if not isinstance(tables, Mapping):
        raise TypeError(
            f'{where} must map models to prices, such as {{"gpt-4o-mini": Price(input=0.15, '
            f"output=0.60)}}, not {type(tables).__name__}"
        )
    return {
        str(model): _read_price(price, f"{where}, {model!r}") for model, price in tables.items()
    }


def _read_price(given: object, where: str) -> Price:
    if isinstance(given, Price):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{where}: expected a Price, not {type(given).__name__}")
    known = [each.name for each in fields(Price)]
    unknown = ", ".join(sorted(map(str, given.keys() - set(known))))
    if unknown or "input" not in given:
        what = f"has no {unknown}" if unknown else "needs at least input"
        raise ValueError(f"{where}: a price {what}; it has {', '.join(known)}")
    values: dict[str, Any] = dict(given)
    if "long" in values:
        values["long"] = _read_price(values["long"], f"{where}, long")
    try:
        return Price(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@functools.cache
def _published() -> dict[str, tuple[Price, str, date]]:
    """Return the built-in prices, with their source and date."""
    return {
        model: (_read_price(price, model), provider["source"], provider["dated"])
        for provider in facts("prices.toml").values()
        for model, price in provider["models"].items()
    }


def price_of(model: object, prices: Prices | None = None, *, today: date | None = None) -> Price:
    """Return the price of a model: from ``prices``, or else as its provider publishes it.

    A dated snapshot (``gpt-4o-mini-2024-07-18``) has the price of its model, unless it has its own.
    So has a name behind a slash, such as ``openai/gpt-4o-mini``.

    Args:
        model: its name; only ``"*"`` gives a price to what has none.
        prices: prices that come first; one of ``"*"`` comes last.
        today: the day on which to judge the age of built-in prices; by default today.

    Raises:
        UnknownPrice: there is none; the message says how to give one.

    Warns:
        PriceWarning: the built-in price is over half a year old.
    """
    prices = prices or {}
    name = model if isinstance(model, str) else ""
    names = list(dict.fromkeys((name, _SNAPSHOT.sub("", name))))
    for pattern in (*names, *prices):
        fits = any(pattern == each or fnmatchcase(each, pattern) for each in names)
        if pattern in prices and pattern != "*" and fits:
            return prices[pattern]
    short = (each.rpartition("/")[2] for each in names)
    found = next((each for each in short if each in _published()), None)
    if found is not None:
        return _current(found, today)
    if "*" in prices:
        return prices["*"]
    what, example = (f"the model {name!r}", name) if name else ("a model without a name", "*")
    raise UnknownPrice(
        f"no price is known for {what}, so its calls can't be counted in dollars: give Limiter(...) or "
        f'pace(...) prices={{"{example}": asyncbucket.Price(input=..., output=...)}}, in dollars per '
        f'million tokens; "*" covers all other models'
    )


def _current(model: str, today: date | None) -> Price:
    price, source, dated = _published()[model]
    age = ((date.today() if today is None else today) - dated).days  # noqa: DTZ011 - a day more or less
    if age > _OLD:
        warn_user(
            f"the price of {model!r} was read {age} days ago, on {dated}: compare it with {source}, "
            f"and give yours as Limiter(prices=...)",
            PriceWarning,
        )
    return price


def price_here(limiter: Limiter, model: object) -> Price | None:
    """Return the price of a call of ``limiter`` from here; None if nothing counts dollars.

    Raises:
        UnknownPrice: something does, and nobody knows the price.
    """
    if not in_force(effective_limiter(limiter)).counts(USD):
        return None
    return price_at(limiter, model)


def price_at(limiter: Limiter, model: object) -> Price:
    """Return the price of a call of ``limiter`` that something counts in dollars.

    Raises:
        UnknownPrice: nobody knows it; budgets around this code have seen the call.
    """
    try:
        return price_of(model, prices_of(limiter))
    except UnknownPrice:
        count_unpriced_call()
        raise


def priced(limiter: Limiter, call: Call, cost: Cost | None) -> tuple[Cost | None, Price | None]:
    """Return what an HTTP request reserves, dollars included, and the price of its model.

    The price is None if nothing counts dollars, or the request costs none.

    Raises:
        UnknownPrice: as for `price_here`.
    """
    if cost is None or USD in cost or call.method != "POST":
        return cost, None
    is_charged = call.model is not None or cost.get("tokens")
    price = price_here(limiter, call.model) if is_charged else None
    if price is None:
        return cost, None
    asked = call.asked
    output = asked.output(call.foreseen)
    if asked.max_output is None and asked.writes:
        usd = within_limits(limiter, price.at_most(asked.by_size, output))
    else:
        items = sum(len(each) for each in call.body.values() if isinstance(each, list))
        size = asked.size + asked.extra + items * _PER_ITEM
        usd = price.at_most(size + added_tokens(has_tools="tools" in call.body), output)
    return Cost.of({**cost, USD: round(usd * MICRO)}), price


def added_tokens(*, has_tools: bool) -> int:
    """Return the most tokens that a provider adds to a call by itself."""
    return _PER_CALL + has_tools * _FOR_TOOLS


def within_limits(limiter: Limiter, usd: float) -> float:
    """Return a forecast, cut to what the limits can ever admit: it must not make a call impossible."""
    limits = in_force(effective_limiter(limiter)).limits
    return min([usd, *(limit.units / MICRO for limit in limits if limit.resource == USD)])


def model_of(llm: object, arguments: Mapping[str, Any]) -> object:
    """Return the name of the model that a call of LlamaIndex's ``llm`` asks for."""
    if "model" in arguments:
        return arguments["model"]
    holder = vars(llm)
    return next((holder[name] for name in _FIELDS if holder.get(name)), None)
