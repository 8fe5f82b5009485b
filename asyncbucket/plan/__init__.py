"""Know before you pay: how long calls take, what binds, and what other limits would gain.

`plan` runs the calls through the real meters on virtual time (`asyncbucket.plan.drive`), so there
is no second model of a limiter that could be wrong. `calls` decides what calls cost, how long they
take and when they come; `drive` also says what came of it, in numbers and in words. Both are loaded
with the first plan, so that `import asyncbucket` stays light.
"""

from typing import TYPE_CHECKING, Unpack

from asyncbucket.engine.limits import Limit, read_limits
from asyncbucket.engine.terms import LimitKeywords
from asyncbucket.engine.wording import read_count

if TYPE_CHECKING:
    from os import PathLike

    from asyncbucket.limiter import Pool
    from asyncbucket.plan.calls import Poisson, Sample, Samples
    from asyncbucket.plan.drive import Plan, PlannedLimit, PlannedWaits
    from asyncbucket.providers.prices import Prices

__all__ = [
    "Plan",
    "PlannedLimit",
    "PlannedWaits",
    "Poisson",
    "Sample",
    "Samples",
    "plan",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from asyncbucket.plan import calls, drive

    return getattr(drive if name.startswith("Plan") else calls, name)


def plan(  # noqa: PLR0913 - all but the limits by keyword
    *limits: str | Limit,
    calls: int | None = None,
    tokens: "Samples | None" = None,
    concurrency: int | None = None,
    latency: "Samples | None" = None,
    arrivals: "Poisson | None" = None,
    profile: str = "openai",
    model: str | None = None,
    prices: "Prices | str | PathLike[str] | None" = None,
    seed: int = 0,
    pool: "Pool | None" = None,
    **limits_by_keyword: Unpack[LimitKeywords],
) -> "Plan":
    """Predict how long calls take under limits, what binds, and how much other limits would help.

    Nothing waits and nothing is sent: a plan of a thousand calls takes about 10 ms. Up to 100,000
    calls, it also says what each limit that any call waits for would bring if it were doubled, or
    removed. The same arguments give the same plan.

    >>> print(plan(calls=10_000, tokens=800, rpm=500, tpm=200_000, concurrency=32, latency=1.5))

    ``tokens`` and ``latency`` may be one sample for every call; many, taken in order if there are
    as many as calls, else drawn with replacement; or the path of a JSONL file of samples. A sample
    of tokens is a number, a `Cost`, a text (four characters are a token), or an object: amounts
    such as ``{"input_tokens": 900, "output_tokens": 300}``, a request's body, or a line of OpenAI's
    batch files. A sample of latency is a number of seconds.

    All calls stand in one line. To see how tenants, children or agents that start agents share
    limits, run them with a `Limiter` on virtual time: `asyncbucket.testing.virtual_time`.

    Args:
        limits: as for `Limiter`: texts such as ``"500 RPM"`` or `Limit` objects.
        calls: how many; may be omitted if samples determine it. A plan simulates each one.
        tokens: tokens that a call costs.
        concurrency: the most calls in flight at once.
        latency: seconds from a call's admission to its end; none by default.
        arrivals: when calls come: all at once, or `Poisson`.
        profile: how the provider charges a request's body: see `asyncbucket.providers.profiles`.
        model: which model is called, for the plan's ``usd``; by default what requests' bodies name.
        prices: as for `Limiter`.
        seed: the seed of everything that is drawn at random.
        pool: whose members the calls go to, each to the one that can start it first; instead of
            limits and concurrency.
        limits_by_keyword: as for `Limiter`: ``rpm=500``, ``tpm=200_000``...

    Raises:
        LimitSyntaxError: a limit cannot be read; a ValueError.
        CostExceedsLimit: no call can ever pass; if only some cannot, they are counted.
        ValueError, TypeError: something is missing or makes no sense, or nobody knows what
            ``model`` costs; the message says what.
        OSError: a file cannot be read.
    """
    from asyncbucket.plan.calls import Load
    from asyncbucket.plan.drive import Bounds, make_plan
    from asyncbucket.providers.prices import read_prices

    read = tuple(read_limits(limits, limits_by_keyword))
    if concurrency is not None:
        concurrency = read_count(concurrency, "concurrency", least=1)
    members = [Bounds(read, concurrency)]
    if pool is not None:
        if read or concurrency is not None:
            raise ValueError("a pool has the limits of its members: give no others")
        members = [Bounds(each.limits, each.concurrency, each.name) for each in pool.members]
    load = Load(
        tokens=tokens,
        latency=latency,
        calls=calls,
        arrivals=arrivals,
        profile=profile,
        model=model,
        prices=read_prices(prices),
        seed=seed,
    )
    for bounds in members:
        load.check(bounds.limits, bounds.slots)
    return make_plan(load, members)
