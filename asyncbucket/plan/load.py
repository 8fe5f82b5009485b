"""The input of a plan: which calls there are, what they cost, how long they take, when they come."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice, repeat
from typing import Any

from asyncbucket.core.cost import Cost, amounts_of, rounded_up
from asyncbucket.core.limits import Limit
from asyncbucket.core.wording import named, read_count, shown
from asyncbucket.plan.arrivals import AgentTree, Arrivals, Poisson, instants_of, read_instants
from asyncbucket.plan.drive import Call, Follow
from asyncbucket.plan.samples import Samples, Series, Tokens, read_seconds
from asyncbucket.plan.tenants import Tenant

_NANOSECONDS = 1_000_000_000


class Load:
    """Yield the calls of a plan, the same ones each time; see `plan` for the arguments."""

    def __init__(
        self,
        *,
        calls: int | None,
        tokens: Mapping[str, Samples | None],
        used_tokens: Samples | None,
        resources: Mapping[str, Samples],
        latency: Samples | None,
        arrivals: Arrivals,
        read: Tokens,
        seed: str,
    ) -> None:
        self._tokens = {name: Series(value, name, read) for name, value in tokens.items()}
        self._used = Series(used_tokens, "used_tokens", read)
        self._others = {name: Series(value, name, read) for name, value in resources.items()}
        self._latency = Series(0.0 if latency is None else latency, "latency", read_seconds)
        if arrivals is not None and not isinstance(arrivals, (AgentTree, Poisson)):
            arrivals = read_instants(arrivals)
        self._arrivals = arrivals
        self._seed = seed
        #: How many calls there are.
        self.calls = self._count(calls)

    def _all_series(self) -> Iterator[Series]:
        yield from (*self._tokens.values(), self._used, *self._others.values(), self._latency)

    def _count(self, calls: int | None) -> int:
        """Return how many calls there are, from whichever argument determines it."""
        if calls is not None:
            calls = read_count(calls, "calls", least=1)
        if isinstance(self._arrivals, AgentTree):
            total = self._arrivals.calls
        elif isinstance(self._arrivals, list):
            total = len(self._arrivals)
        else:
            total = calls or max(map(len, self._all_series()))
        if not total:
            raise ValueError(
                "how many calls? give calls, samples or a file of them, instants, or a tree of agents"
            )
        if calls not in (None, total):
            raise ValueError(
                f"calls={calls:,} contradicts the arrivals, which are {total:,} calls; leave it out"
            )
        return total

    def check(
        self, limits: Iterable[Limit], concurrency: int | None, *, counted: Container[str]
    ) -> None:
        """Refuse limits on something unknown, which would not bind in the plan.

        Args:
            limits: what these calls pass.
            concurrency: the slots that they share.
            counted: the resources of all limits of the plan, other tenants' included.

        Raises:
            ValueError: the message says what is missing.
        """
        limited = {limit.resource for limit in limits}
        tokens = sorted(limited & self._tokens.keys())
        if tokens and not any(series.given for series in self._tokens.values()):
            raise ValueError(
                f"a limit counts {' and '.join(map(named, tokens))}, but nothing says how many a call has: "
                "give tokens=, or input_tokens= and output_tokens="
            )
        others = limited - self._tokens.keys() - {"requests"}
        for name in sorted(others - self._others.keys()):
            raise ValueError(
                f"a limit counts {name}, but nothing says how many a call takes: "
                f"plan(..., resources={{{name!r}: 1}}) does"
            )
        for name in self._others:
            if name not in counted:
                raise ValueError(f"no limit counts {name}, which resources= names: leave it out")
        if concurrency is not None and self._latency.constant and not self._latency.value:
            raise ValueError(
                f"what concurrency={concurrency} allows depends on how long calls take: give latency= in seconds"
            )

    def arrivals(self) -> tuple[Iterator[tuple[int, Call]], Follow | None]:
        """Return the calls, each with its instant (ns), and a function for the calls that follow one."""
        calls = self._draw()
        tree = self._arrivals
        if not isinstance(tree, AgentTree):
            return zip(instants_of(tree, self.calls, self._seed), calls, strict=True), None

        def generation(count: int, left: int) -> Iterator[Call]:
            return (call._replace(generations=left) for call in islice(calls, count))

        def follow(call: Call) -> Iterable[Call]:
            left = call.generations
            return generation(tree.followers(left), left - 1)

        return zip(repeat(0), generation(tree.agents, tree.generations - 1), strict=False), follow

    def _draw(self) -> Iterator[Call]:
        if all(series.constant for series in self._all_series()):
            return repeat(next(self._generate(1)), self.calls)
        return self._generate(self.calls)

    def _generate(self, count: int) -> Iterator[Call]:
        tokens = zip(
            *(self._values(series, count) for series in self._tokens.values()), strict=True
        )
        others = {name: self._values(series, count) for name, series in self._others.items()}
        used = self._values(self._used, count)
        seconds = self._values(self._latency, count)
        for drawn, latency, used_tokens in zip(tokens, seconds, used, strict=True):
            amounts = _amounts(dict(zip(self._tokens, drawn, strict=True)))
            amounts |= {name: rounded_up(next(values), name) for name, values in others.items()}
            settled = (
                None
                if used_tokens is None
                else {"tokens": rounded_up(_units_of(used_tokens, "tokens"), "tokens")}
            )
            yield Call(amounts, round(latency * _NANOSECONDS), settled)

    def _values(self, series: Series, count: int) -> Iterator[Any]:
        return series.draw(count, self._seed)


def _amounts(drawn: dict[str, float | Cost | None]) -> dict[str, int]:
    """Return what a call takes, slot included, from what was drawn for its tokens."""
    tokens = drawn["tokens"]
    if isinstance(tokens, Cost):
        return {**tokens, "concurrency": 1}
    given, received = (
        None if drawn[name] is None else _units_of(drawn[name], name)
        for name in ("input_tokens", "output_tokens")
    )
    return amounts_of(1, tokens, given, received)


def _units_of(value: float | Cost | None, name: str) -> float:
    """Return a number of units; of a cost, the part that is asked for."""
    if isinstance(value, Cost):
        return value.get(name, 0)
    assert value is not None
    return value


def loads_of(
    everyone: Tenant,
    tenants: Mapping[str, Tenant],
    resources: Mapping[str, Samples],
    read: Tokens,
    seed: int,
) -> dict[str | None, Load]:
    """Return the calls of each tenant; without tenants, those of the plan under None."""
    shared = {field.name: _rereadable(getattr(everyone, field.name)) for field in fields(everyone)}
    if not isinstance(resources, Mapping):
        raise TypeError(
            f'resources must be given by name, such as {{"images": 3}}, not {shown(resources)}'
        )
    resources = {name: _rereadable(samples) for name, samples in resources.items()}

    def load(name: str | None, tenant: Tenant) -> Load:
        if not isinstance(tenant, Tenant):
            type_name = type(tenant).__name__
            raise TypeError(
                f"tenant {name!r} must be a Tenant such as Tenant(calls=3), not {type_name}"
            )

        def given(option: str) -> Any:
            own = getattr(tenant, option)
            return shared[option] if own is None else own

        return Load(
            calls=given("calls"),
            tokens={
                option: given(option) for option in ("tokens", "input_tokens", "output_tokens")
            },
            used_tokens=given("used_tokens"),
            resources=resources,
            latency=given("latency"),
            arrivals=given("arrivals"),
            read=read,
            seed=f"{seed}" if name is None else f"{seed} {name}",
        )

    if not isinstance(tenants, Mapping):
        raise TypeError(
            f'tenants must be given by name, such as {{"acme": Tenant(calls=500)}}, not {shown(tenants)}'
        )
    if not tenants:
        return {None: load(None, Tenant())}
    return {name: load(name, tenant) for name, tenant in tenants.items()}


def _rereadable(value: Any) -> Any:
    """Return samples or instants in a form that every tenant can read, even if given as a generator."""
    return list(value) if isinstance(value, Iterator) else value
