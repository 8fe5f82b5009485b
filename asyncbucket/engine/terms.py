"""What limiters are made on: which arguments are allowed, and what type checkers know of them."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeAlias, TypedDict, get_args

from asyncbucket.engine.context import Priority, deadline_of, read_priority
from asyncbucket.engine.limits import Limit, read_limits
from asyncbucket.engine.wording import is_integer, is_number, plain, read_count

#: What people pass as ``concurrency=``: a fixed size, or bounds within which to find it.
Concurrency: TypeAlias = int | Literal["auto"] | tuple[int, int]
#: What to do while a store is gone: see `asyncbucket.stores`.
OnOutage: TypeAlias = Literal["share", "closed", "open"]
#: The bounds of ``"auto"``.
AUTO: Final = (1, 1_000)
#: Bounds for a slot's seconds to live without a heartbeat; at least one heartbeat must fit in.
_SLOT_TTL: Final = (0.1, 86_400)


class LimitKeywords(TypedDict, total=False):
    """Limits by keyword: ``rpm=500`` is ``"500 RPM"``."""

    rps: float | None
    rpm: float | None
    rph: float | None
    rpd: float | None
    tpm: float | None
    tpd: float | None
    itpm: float | None
    otpm: float | None


class Keywords(LimitKeywords, total=False):
    """What `Limiter.child` and `Limiter.key` take by keyword."""

    #: The share compared with its siblings', any positive number; 1 by default.
    weight: float
    #: The most calls in flight; see `Limiter`.
    concurrency: Concurrency | None
    #: The most calls that may wait; the parent's bound applies as well.
    max_queue: int | None
    #: For calls that have none of their own; by default the parent's.
    priority: Priority | Literal["within"] | None
    #: The most seconds to wait, for calls that set none; by default the parent's.
    timeout: float | None


class OtherResources(TypedDict, total=False):
    """Amounts of resources with other names, such as ``images=3``; and dollars.

    They are taken if a limit counts them. No checker can tell such a name from a typing error, so
    where a checker runs, give them in a `Cost`: ``acquire(Cost(images=3))``.
    """

    #: What the call costs in US dollars, for limits and budgets of dollars.
    usd: float


class CallAmounts(OtherResources, total=False):
    """What a call costs, or has cost; see `Limiter.acquire`."""

    requests: float
    tokens: float | None
    input_tokens: float | None
    output_tokens: float | None


class CallKeywords(CallAmounts, total=False):
    """What a call costs, and how long it may wait; see `Limiter.acquire`."""

    timeout: float | None
    deadline: float | None
    priority: Priority | None
    tenant: str | None


@dataclass(frozen=True, slots=True)
class Terms:
    """What a limiter was made on."""

    limits: tuple[Limit, ...] = ()
    weight: float = 1.0
    concurrency: Concurrency | None = None
    max_queue: int | None = None
    #: Of calls that have none of their own; or ``"within"``: see `Limiter.child`.
    priority: int | Literal["within"] | None = None
    timeout: float | None = None

    @classmethod
    def read(cls, limits: Iterable[str | Limit], keywords: Mapping[str, Any]) -> Self:
        """Return terms from the arguments that people give.

        Raises:
            LimitSyntaxError: a limit cannot be read; a ValueError.
            ValueError: a number is out of range.
        """
        others = dict(keywords)
        priority, max_queue = others.pop("priority", None), others.pop("max_queue", None)
        terms = cls(
            weight=read_weight(others.pop("weight", 1.0)),
            concurrency=others.pop("concurrency", None),
            max_queue=None if max_queue is None else read_count(max_queue, "max_queue"),
            priority=priority if priority in (None, "within") else read_priority(priority),
            timeout=others.pop("timeout", None),
            limits=tuple(read_limits(limits, others)),
        )
        read_concurrency(terms.concurrency)
        deadline_of(0, terms.timeout)
        return terms


def read_name(name: str) -> str:
    """Return a limiter's name.

    Raises:
        TypeError: it is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, not {name!r}")
    return name


def read_weight(weight: float) -> float:
    """Return a weight.

    Raises:
        ValueError: it is not a positive finite number.
    """
    if not is_number(weight) or not 1e-6 <= weight <= 1e6:  # noqa: PLR2004 - exact enough in floats
        raise ValueError(f"weight must be a number from 0.000001 to 1,000,000, not {weight!r}")
    return float(weight)


def read_concurrency(value: Concurrency | None) -> tuple[int, int] | None:
    """Return the bounds that ``concurrency=`` asks for; a fixed number is both bounds.

    Raises:
        ValueError: it is not a whole number of at least 1, not ``"auto"``, and not a pair of such numbers
            in ascending order.
    """
    if value is None:
        return None
    if value == "auto":
        return AUTO
    bounds = value if isinstance(value, tuple) else (value, value)
    are_whole = len(bounds) == 2 and all(is_integer(each) and each >= 1 for each in bounds)  # noqa: PLR2004 - a pair
    if not are_whole or bounds[0] > bounds[1]:
        raise ValueError(
            f'concurrency must be a whole number of at least 1, "auto" or an ascending pair of such '
            f"numbers, not {value!r}"
        )
    return int(bounds[0]), int(bounds[1])


def read_on_outage(value: OnOutage) -> OnOutage:
    """Return what to do while a store is gone.

    Raises:
        ValueError: it is not one of the words.
    """
    if value not in get_args(OnOutage):
        words = ", ".join(get_args(OnOutage))
        raise ValueError(f"on_outage must be one of {words}, not {value!r}")
    return value


def read_slot_ttl(seconds: float) -> float:
    """Return the seconds after which a dead process's slots come back.

    Raises:
        ValueError: it is not a number from 0.1 to a day.
    """
    least, most = _SLOT_TTL
    if not is_number(seconds) or not least <= seconds <= most:
        raise ValueError(
            f"slot_ttl must be a number of seconds from {least} to {most:,}, a day, not {seconds!r}"
        )
    return plain(seconds)


def read_clocks(
    clock: Callable[[], int], wall_clock: Callable[[], int] | None
) -> Callable[[int], int]:
    """Return a function that tells what the wall clock shows at an instant of ``clock``.

    Raises:
        TypeError: a clock is not a callable that returns an integer.
    """
    wall = time.time_ns if wall_clock is None else wall_clock
    for name, given, example in ("clock", clock, "monotonic_ns"), ("wall_clock", wall, "time_ns"):
        if not callable(given) or not isinstance(given(), int):
            raise TypeError(
                f"{name} must be a callable that returns integer nanoseconds, such as "
                f"time.{example}, not {given!r}"
            )
    if wall_clock is None and clock is not time.monotonic_ns:  # it is a time of its own
        ahead = time.time_ns() - clock()
        return lambda now: now + ahead
    # Read first, so that what passes between the two makes a reset late, not early.
    return lambda now: now + wall() - clock()
