"""The calls of a plan: how many, what they cost, how long they take, and when they come."""

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final, TypeAlias

from asyncbucket.core.cost import Cost, amounts_of, rounded_up
from asyncbucket.core.limits import Limit
from asyncbucket.core.wording import is_number, named, plain, read_count, shown
from asyncbucket.plan.drive import Call
from asyncbucket.plan.samples import Series

#: The most calls of a plan: they take a minute or two and some gigabytes.
_MOST: Final = 10_000_000
_NANOSECONDS: Final = 1_000_000_000
_TOKENS: Final = frozenset({"tokens", "input_tokens", "output_tokens"})


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

    def instants(self, calls: int, seed: str) -> Iterator[int]:
        """Yield when each call comes, in nanoseconds."""
        rng = random.Random(f"{seed} arrivals")  # noqa: S311 - repeatable, not secret
        now = 0.0
        for _ in range(calls):
            now += rng.expovariate(self.rate)
            yield round(now * _NANOSECONDS)


Arrivals: TypeAlias = Poisson | Iterable[float] | None
"""`Poisson`, the instants at which calls come (seconds), or None: all at once."""


class Load:
    """Yield each call with the instant (ns) at which it comes: the same ones every time.

    Args:
        series: what calls cost and how long they take, under the names that arguments of `plan`
            have.
        calls: see `plan`.
        arrivals: see `plan`.
        seed: see `plan`.
    """

    def __init__(
        self, series: Mapping[str, Series], *, calls: int | None, arrivals: Arrivals, seed: int
    ) -> None:
        self._series = series
        self._seed = f"{seed}"
        self._arrivals = arrivals if isinstance(arrivals, Poisson) else _read_instants(arrivals)
        calls = None if calls is None else read_count(calls, "calls", least=1)
        #: How many calls there are, from whichever argument determines it.
        self.calls = calls or max(each.samples for each in series.values())
        if isinstance(self._arrivals, list):
            self.calls = len(self._arrivals)
        if not self.calls:
            raise ValueError("how many calls? give calls, samples or a file of them, or instants")
        if calls not in (None, self.calls):
            raise ValueError(
                f"calls={calls:,} contradicts the arrivals, which are {self.calls:,} calls; leave "
                "it out"
            )
        if self.calls > _MOST:
            raise ValueError(
                f"{self.calls:,} calls are more than the {_MOST:,} that a plan runs through: plan "
                "a part of them; where limits bind, twice the calls take twice as long"
            )

    def check(self, limits: Iterable[Limit], concurrency: int | None) -> None:
        """Refuse limits on something unknown, which would not bind in the plan.

        Raises:
            ValueError: the message says what is missing.
        """
        limited = {limit.resource for limit in limits}
        tokens = sorted(limited & _TOKENS)
        if tokens and not any(self._series[name].given for name in _TOKENS):
            raise ValueError(
                f"a limit counts {' and '.join(map(named, tokens))}, but nothing says how many a "
                "call has: give tokens=, or input_tokens= and output_tokens="
            )
        for name in sorted(limited - _TOKENS - {"requests"}):
            raise ValueError(
                f"a limit counts {name}, and a plan counts requests and tokens alone: leave it out"
            )
        if concurrency is not None and self._series["latency"].is_zero:
            raise ValueError(
                f"what concurrency={concurrency} allows depends on how long calls take: give "
                "latency= in seconds"
            )

    def __iter__(self) -> Iterator[tuple[int, Call]]:
        instants: Iterable[int] = repeat(0, self.calls)
        if isinstance(self._arrivals, Poisson):
            instants = self._arrivals.instants(self.calls, self._seed)
        elif self._arrivals is not None:
            instants = self._arrivals
        columns = [each.draw(self.calls, self._seed) for each in self._series.values()]
        drawn: tuple[Any, ...] = ()
        call = Call({}, 0)
        for instant, values in zip(instants, zip(*columns, strict=True), strict=True):
            if values != drawn:  # most plans have many calls alike
                call, drawn = _call(dict(zip(self._series, values, strict=True))), values
            yield instant, call


def _call(drawn: dict[str, Any]) -> Call:
    """Return a call from what was drawn for it."""
    tokens, used = drawn["tokens"], _part(drawn["used_tokens"], "tokens")
    sent, received = (_part(drawn[name], name) for name in ("input_tokens", "output_tokens"))
    amounts = dict(tokens if isinstance(tokens, Cost) else amounts_of(1, tokens, sent, received))
    amounts.pop("concurrency", None)
    return Call(
        amounts,
        round(drawn["latency"] * _NANOSECONDS),
        None if used is None else rounded_up(used, "tokens"),
    )


def _part(value: float | Cost | None, name: str) -> float | None:
    """Return a number of units; of a cost, the part that is asked for."""
    return value.get(name, 0) if isinstance(value, Cost) else value


def _read_instants(arrivals: Iterable[float] | None) -> list[int] | None:
    """Return the given instants in nanoseconds, ascending.

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
    return sorted(round(plain(second) * _NANOSECONDS) for second in instants)
