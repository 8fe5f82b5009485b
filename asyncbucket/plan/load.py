"""The calls of a plan: how many, what they cost, how long they take, and when they come."""

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final, TypeAlias

from asyncbucket.core.cost import Cost, amounts_of, rounded_up
from asyncbucket.core.limits import Limit
from asyncbucket.core.terms import read_count
from asyncbucket.core.wording import is_number, named, plain, shown
from asyncbucket.plan.drive import Call
from asyncbucket.plan.samples import Samples, Series, Tokens, read_seconds

#: The most calls of a plan: they take a minute or two and some gigabytes.
_MOST: Final = 10_000_000
_NANOSECONDS: Final = 1_000_000_000
_TOKENS: Final = ("tokens", "input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Poisson:
    """Let calls come at random, independently: ``rate`` a second on average."""

    rate: float

    def __post_init__(self) -> None:
        """Refuse an invalid rate."""
        if not is_number(self.rate) or not 0 < self.rate < math.inf:
            raise ValueError(
                f"a rate must be a finite number of calls a second above 0, not {self.rate!r}"
            )


Arrivals: TypeAlias = Poisson | Iterable[float] | None
"""`Poisson`, the instants at which calls come (seconds), or None: all at once."""


class Load:
    """Yield each call with the instant (ns) at which it comes: the same ones every time.

    Args:
        calls: see `asyncbucket.plan.plan`, as for the rest.
        arrivals: see there.
        tokens: what is said of tokens, under the names of the arguments.
        resources: see there.
        latency: see there.
        read: reads a sample of tokens.
        seed: see there.
    """

    def __init__(
        self,
        *,
        calls: int | None,
        arrivals: Arrivals,
        tokens: Mapping[str, Samples | None],
        resources: Mapping[str, Samples],
        latency: Samples | None,
        read: Tokens,
        seed: int,
    ) -> None:
        if not isinstance(resources, Mapping):
            raise TypeError(
                f'resources must be given by name, such as {{"images": 3}}, not {shown(resources)}'
            )
        self._tokens = {name: Series(value, name, read) for name, value in tokens.items()}
        self._others = {name: Series(value, name, read) for name, value in resources.items()}
        self._latency = Series(0.0 if latency is None else latency, "latency", read_seconds)
        self._arrivals = arrivals if isinstance(arrivals, Poisson) else _read_instants(arrivals)
        self._seed = f"{seed}"
        #: How many calls there are.
        self.calls = self._count(None if calls is None else read_count(calls, "calls", least=1))

    def _count(self, calls: int | None) -> int:
        """Return how many calls there are, from whichever argument determines it."""
        series = (*self._tokens.values(), *self._others.values(), self._latency)
        total = calls or max(each.samples for each in series)
        if isinstance(self._arrivals, list):
            total = len(self._arrivals)
        if not total:
            raise ValueError("how many calls? give calls, samples or a file of them, or instants")
        if calls not in (None, total):
            raise ValueError(
                f"calls={calls:,} contradicts the arrivals, which are {total:,} calls; leave it out"
            )
        if total > _MOST:
            raise ValueError(
                f"{total:,} calls are more than the {_MOST:,} that a plan runs through: plan a part "
                "of them; where limits bind, twice the calls take twice as long"
            )
        return total

    def check(self, limits: Iterable[Limit], concurrency: int | None) -> None:
        """Refuse limits on something unknown, which would not bind in the plan.

        Raises:
            ValueError: the message says what is missing.
        """
        limited = {limit.resource for limit in limits}
        tokens = sorted(limited.intersection(_TOKENS))
        if tokens and not any(self._tokens[name].given for name in _TOKENS):
            raise ValueError(
                f"a limit counts {' and '.join(map(named, tokens))}, but nothing says how many a "
                "call has: give tokens=, or input_tokens= and output_tokens="
            )
        for name in sorted(limited - {"requests", *_TOKENS, *self._others}):
            raise ValueError(
                f"a limit counts {name}, but nothing says how many a call takes: "
                f"plan(..., resources={{{name!r}: 1}}) does"
            )
        for name in self._others.keys() - limited:
            raise ValueError(f"no limit counts {name}, which resources= names: leave it out")
        if concurrency is not None and self._latency.is_zero:
            raise ValueError(
                f"what concurrency={concurrency} allows depends on how long calls take: give "
                "latency= in seconds"
            )

    def __iter__(self) -> Iterator[tuple[int, Call]]:
        series = (*self._tokens.values(), self._latency, *self._others.values())
        columns = [each.draw(self.calls, self._seed) for each in series]
        drawn: tuple[Any, ...] = ()
        call = Call({}, 0)
        for instant, values in zip(self._instants(), zip(*columns, strict=True), strict=True):
            if values != drawn:  # most plans have many calls alike
                call, drawn = self._call(*values), values
            yield instant, call

    def _call(
        self,
        tokens: float | Cost | None,
        sent: float | Cost | None,
        received: float | Cost | None,
        used: float | Cost | None,
        latency: float,
        *others: float,
    ) -> Call:
        if isinstance(tokens, Cost):
            amounts = dict(tokens)
        else:
            sent, received = _units(sent, "input_tokens"), _units(received, "output_tokens")
            amounts = amounts_of(1, tokens, sent, received)
            del amounts["concurrency"]
        for name, amount in zip(self._others, others, strict=True):
            amounts[name] = rounded_up(amount, name)
        settled = _units(used, "tokens")
        return Call(
            amounts,
            round(latency * _NANOSECONDS),
            None if settled is None else rounded_up(settled, "tokens"),
        )

    def _instants(self) -> Iterator[int]:
        """Yield when each call comes, in nanoseconds, ascending."""
        if self._arrivals is None:
            yield from repeat(0, self.calls)
        elif isinstance(self._arrivals, Poisson):
            rng = random.Random(f"{self._seed} arrivals")  # noqa: S311 - repeatable, not secret
            now = 0.0
            for _ in range(self.calls):
                now += rng.expovariate(self._arrivals.rate)
                yield round(now * _NANOSECONDS)
        else:
            yield from sorted(round(second * _NANOSECONDS) for second in self._arrivals)


def _units(value: float | Cost | None, name: str) -> float | None:
    """Return a number of units; of a cost, the part that is asked for."""
    return value.get(name, 0) if isinstance(value, Cost) else value


def _read_instants(arrivals: Iterable[float] | None) -> list[float] | None:
    """Return the given instants.

    Raises:
        TypeError: they are not iterable.
        ValueError: one of them is not a finite number of seconds from 0 on.
    """
    if arrivals is None:
        return None
    if not isinstance(arrivals, Iterable):
        raise TypeError(
            f"arrivals must be instants in seconds, or Poisson(8.0) for so many calls a second, not "
            f"{shown(arrivals)}"
        )
    instants = list(arrivals)
    for second in instants:
        if not is_number(second) or not 0 <= second < math.inf:
            raise ValueError(
                f"an arrival must be a finite number of seconds from 0 on, not {second!r}"
            )
    return [plain(second) for second in instants]
