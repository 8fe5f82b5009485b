"""The calls of a plan: how many, what they cost, how long they take, and when they come.

In dollars a plan says what is likely: replies of the length that a limiter expects, at most
``max_tokens``; and if only the total of the tokens is known, half of it output.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from os import PathLike
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from asyncbucket.engine.cost import Cost
from asyncbucket.engine.errors import UnknownPrice
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Amounts
from asyncbucket.engine.wording import (
    MICRO,
    USD,
    is_number,
    named,
    plain,
    read_count,
    shown,
)
from asyncbucket.providers.prices import Prices, price_of
from asyncbucket.providers.profiles import Call, Profile, profile_named
from asyncbucket.providers.request import FORESEEN, RequestSize, replies_of

T = TypeVar("T")

Sample: TypeAlias = float | str | Cost | Mapping[str, Any]
"""A number; a text, whose tokens are counted; a cost; or an object, as in a line of JSONL."""

Samples: TypeAlias = Sample | PathLike[str] | Iterable[Sample]
"""One sample for every call, samples, or the path of a file of them, one a line: JSON, or plain text."""

NANOSECONDS: Final = 1_000_000_000

_TOKENS: Final = frozenset({"tokens", "input_tokens", "output_tokens"})
#: What a request's body asks with.
_ASKED: Final = frozenset({"messages", "prompt", "input"})
#: How a line begins that is meant as JSON. Other brackets may begin a text.
_JSON_START: Final = re.compile(r'[{"]|\[\s*[\[\]{"\d-]')


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

    def instants(self, calls: int, seed: int) -> Iterator[int]:
        """Yield when each call comes, in nanoseconds."""
        rng = random.Random(f"{seed} arrivals")  # noqa: S311 - repeatable, not secret
        now = 0.0
        for _ in range(calls):
            now += rng.expovariate(self.rate)
            yield round(now * NANOSECONDS)


class PlannedCall(NamedTuple):
    """One call: what it costs, and how long it takes (ns)."""

    amounts: Amounts
    latency: int


class CallCost(NamedTuple):
    """What one call takes of the limits, and what it costs in dollars, if that is known."""

    cost: Cost
    usd: float | None


@dataclass(kw_only=True, eq=False)
class Load:
    """Yield each call with the instant (ns) at which it comes: the same ones every time.

    Attributes:
        tokens, latency, calls, arrivals, profile, model, prices, seed: see `asyncbucket.plan.plan`.
    """

    tokens: Samples | None
    latency: Samples | None
    calls: int | None
    arrivals: Poisson | None
    profile: str
    model: str | None
    prices: Prices
    seed: int
    #: How many calls there are, from whichever argument determines it.
    count: int = field(init=False)
    _costs: "_Series[CallCost]" = field(init=False)
    _lengths: "_Series[int]" = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.arrivals, Poisson | None):
            raise TypeError(
                f"arrivals must be Poisson(8.0), for so many calls a second, not {shown(self.arrivals)}"
            )
        profile = profile_named(self.profile)
        read = partial(read_call, profile=profile, model=self.model, prices=self.prices)
        self._costs = _Series("tokens", self.tokens, read)
        self._lengths = _Series("latency", self.latency, _read_seconds)
        if self.calls is None and not (self._costs.are_many or self._lengths.are_many):
            raise ValueError(
                "how many calls? give calls, or samples of tokens or latency, in a list or a file"
            )
        most = max(len(self._costs.values), len(self._lengths.values))
        self.count = most if self.calls is None else read_count(self.calls, "calls", least=1)

    def check(self, limits: Iterable[Limit], concurrency: int | None) -> None:
        """Refuse limits on something unknown, which would not bind in the plan.

        Raises:
            ValueError: the message says what is missing.
        """
        known = {"requests"} | (_TOKENS if self.tokens is not None else set())
        known |= set() if any(each.usd is None for each in self._costs.values) else {USD}
        for name in sorted({limit.resource for limit in limits} - known):
            raise ValueError(
                f"a limit counts {named(name)}, but nothing says how many a call takes: give tokens=, "
                f"and for dollars model=; or leave the limit out"
            )
        if concurrency is not None and not any(self._lengths.values):
            raise ValueError(
                f"what concurrency={concurrency} allows depends on how long calls take: give "
                "latency= in seconds"
            )

    def dollars(self) -> float | None:
        """Return what all calls likely cost together; None if that is not known of each."""
        bills = [] if self.tokens is None else [each.usd for each in self._costs.values]
        known = [usd for usd in bills if usd is not None]
        return sum(known) * self.count / len(known) if known and known == bills else None

    def __iter__(self) -> Iterator[tuple[int, PlannedCall]]:
        instants: Iterable[int] = repeat(0, self.count)
        if self.arrivals is not None:
            instants = self.arrivals.instants(self.count, self.seed)
        drawn = (each.draw(self.count, self.seed) for each in (self._costs, self._lengths))
        cost, latency = CallCost(Cost(), None), -1
        call = PlannedCall({}, 0)
        for instant, values in zip(instants, zip(*drawn, strict=True), strict=True):
            if values[0] is not cost or values[1] != latency:  # most plans have many calls alike
                cost, latency = values
                usd = round((cost.usd or 0) * MICRO)
                call = PlannedCall({**cost.cost, USD: usd}, latency)
            yield instant, call


class _Series(Generic[T]):
    """Return a value for each call, the same for the same seed.

    Samples are taken in order if there are as many as calls, else drawn with replacement.
    """

    def __init__(self, name: str, given: Samples | None, read: Callable[[Any], T]) -> None:
        """Read what was ``given`` as ``name``; ``read`` turns a sample into a value."""
        self._name = name
        #: Whether there are samples, not one for every call.
        self.are_many = True
        if isinstance(given, str | PathLike):
            samples = _lines(name, Path(given))
        elif isinstance(given, Iterable) and not isinstance(given, Mapping):
            samples = ((f"{name}, sample {n}", sample) for n, sample in enumerate(given, 1))
        else:
            self.are_many, samples = False, iter([(name, 0 if given is None else given)])
        self.values = [_checked(sample, where, read) for where, sample in samples]
        if not self.values:
            raise ValueError(f"{name} has no samples: give at least one")

    def draw(self, calls: int, seed: int) -> Iterable[T]:
        """Return a value for each of ``calls`` calls."""
        rng = random.Random(f"{seed} {self._name}")  # noqa: S311 - repeatable, not secret
        return self.values if len(self.values) == calls else rng.choices(self.values, k=calls)


def _checked(sample: Any, where: str, read: Callable[[Any], T]) -> T:
    try:
        return read(sample)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _lines(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the samples in a file, and where each is; empty lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{name}: {path}, line {number}"
                yield where, _checked(line, where, read_line)


def read_line(line: bytes) -> Any:
    """Return the JSON in a line of a file, or the whole line as a text if it is not JSON.

    Raises:
        ValueError: it is broken JSON, or not UTF-8.
    """
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text at byte {error.start}") from None
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except ValueError as error:
        if _JSON_START.match(text):
            raise ValueError(f"not JSON: {error}") from None
        return text
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if end < len(text) and text.startswith(("{", "[")):
        raise ValueError(f"not JSON: there is more after its end at column {end + 1}")
    return text if end < len(text) else found  # a quotation or a number may begin a text


def read_call(sample: object, *, profile: Profile, model: str | None, prices: Prices) -> CallCost:
    """Return what a call takes of the limits, and what it costs.

    Args:
        sample: see `Sample`; a request is charged as ``profile`` says, and names its model.
        profile: how the provider charges a request.
        model: the model; by default the one that the request names.
        prices: prices that come before the published ones.

    Raises:
        TypeError, ValueError: the sample has no tokens, or nobody knows what ``model`` costs.
    """
    if isinstance(sample, CallCost):
        return sample
    body: Mapping[str, Any] = {}
    if isinstance(sample, Mapping):
        inner = sample.get("body", sample)
        body = inner if isinstance(inner, Mapping) else {}
    cost = _read_tokens(sample, body, profile)
    return CallCost(cost, _bill_of(cost, body, model, prices))


def _read_tokens(sample: object, body: Mapping[str, Any], profile: Profile) -> Cost:
    """Return what a call costs. Four characters of a text are one token: OpenAI's estimate."""
    if isinstance(sample, str):
        size = RequestSize()
        size.add(sample)
        return Cost(tokens=size.by_characters)
    if isinstance(sample, Cost):
        return sample
    if not isinstance(sample, Mapping):
        return Cost(tokens=_number(sample))
    amounts = {name: _number(sample[name]) for name in _TOKENS & sample.keys()}
    if amounts:
        return Cost(**amounts)
    if not body.keys() & _ASKED:
        raise ValueError(
            f"an object with {', '.join(sorted(map(str, sample))) or 'nothing'} gives no "
            "tokens: give tokens, input_tokens and output_tokens, or a request's messages, "
            "prompt or input"
        )
    url = sample.get("url")
    if not isinstance(url, str):  # only embeddings are charged otherwise: they have no reply
        url = "/v1/embeddings" if "embedding" in str(body.get("model")) else "/v1/responses"
    return profile.cost(Call("POST", "", url, body, foreseen=FORESEEN)) or Cost()


def _bill_of(
    cost: Cost, body: Mapping[str, Any], model: str | None, prices: Prices
) -> float | None:
    """Return what a call likely costs in dollars; None if no price is known and the user named no model."""
    try:
        price = price_of(model or body.get("model"), prices)
    except UnknownPrice:
        if model is None:
            return None
        raise
    given, received = cost.get("input_tokens", 0), cost.get("output_tokens", 0)
    if cost.get("tokens", 0) == given == received:  # only the sum is known: half of it is output
        return (price.at_most(given, 0) + price.at_most(0, received)) / 2
    if body.keys() & _ASKED:
        received = min(received, FORESEEN * replies_of(body))
    return price.at_most(given, received)


def _read_seconds(sample: object) -> int:
    """Return a sample of seconds in nanoseconds."""
    return round(_number(sample) * NANOSECONDS)


def _number(value: object) -> float:
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"expected a finite number of at least 0, not {shown(value)}")
    return plain(value)
