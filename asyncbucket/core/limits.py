"""Limits: an amount per window, how people write them, and what they mean."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from asyncbucket.core.errors import LimitSyntaxError
from asyncbucket.core.wording import MICRO, USD, counted, is_number, plain, written_out

if TYPE_CHECKING:
    from asyncbucket.core.calendars import Calendar, Period

#: What identifies a limit within a limiter: its resource, and its window in seconds.
Key: TypeAlias = tuple[str, float]

_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_RESOURCES: Final = {"r": "requests", "t": "tokens", "it": "input_tokens", "ot": "output_tokens"}
#: Other words for resources. Without them, a limit of "request", or of "r" in "10r/s", would be a
#: limit that no call counts against.
_OTHER_WORDS: Final = {
    **dict.fromkeys(("requests", "request", "req", "reqs", "r", "call", "calls"), "requests"),
    **dict.fromkeys(("tokens", "token"), "tokens"),
    **dict.fromkeys(("dollars", "dollar"), USD),
    "input_token": "input_tokens",
    "output_token": "output_tokens",
}
#: A name that is this similar (of 1) to one of these is taken for a typing error.
_NEAR: Final = 0.8
_OFTEN_MISSPELLED: Final = {"tok": "tokens"} | {
    word: meant
    for word, meant in _OTHER_WORDS.items()
    if word.startswith(("request", "token", "input", "output"))
}
_PREFIXES: Final = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}

#: Windows, in seconds.
_SHORTEST: Final = 1e-3
_LONGEST: Final = 400 * 86_400
#: From this window on, limits of requests are not paced unless ``burst`` says so.
_UNPACED_FROM: Final = 3_600
#: The usual lengths of what begins anew by the calendar.
_PERIODS: Final[dict[float, "Period"]] = {86_400: "day", 604_800: "week", 2_592_000: "month"}
#: The most units in one of them.
_LARGEST: Final = 1e18

#: The keyword forms, such as ``rpm=500`` for ``"500 RPM"``: resource and window in seconds.
KEYWORDS: Final = {
    "rps": ("requests", 1),
    "rpm": ("requests", 60),
    "rph": ("requests", 3_600),
    "rpd": ("requests", 86_400),
    "tpm": ("tokens", 60),
    "tpd": ("tokens", 86_400),
    "itpm": ("input_tokens", 60),
    "otpm": ("output_tokens", 60),
}

# A comma only separates thousands: whoever writes "2,5k" means 2,500, not 25,000.
_NUMBER: Final = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9][0-9_]{0,30})(?:\.[0-9]{1,30})?[kmb]?"
_AMOUNT: Final = rf"(?P<amount>{_NUMBER})"
_BURST: Final = rf"(?:\s+burst\s+(?P<burst>{_NUMBER}))?"
_EVERY: Final = r"(?P<every>(?:[0-9]{1,3}(?:,[0-9]{3}){1,2}|[0-9]{1,9})(?:\.[0-9]{1,9})?)?"
_SHORT: Final = re.compile(rf"{_AMOUNT}\s*(?P<resource>r|[io]?t)p(?P<unit>[smhd]){_BURST}")
_LONG: Final = re.compile(
    rf"{_AMOUNT}\s*(?P<resource>[a-z_]+)?\s*(?:/|\bper\b)\s*{_EVERY}\s*"
    rf"(?P<unit>month|s|sec|seconds?|m|min|minutes?|h|hours?|d|days?|w|weeks?){_BURST}"
)
#: What separates a limit from when it resets.
_RESETS: Final = re.compile(r",?\s+resets?(?:\s+at)?\s+", re.IGNORECASE)
_SYNTAX: Final = (
    'write e.g. "500 RPM", "200k TPM", "10/s", "100 requests/minute", "3 images/10s", "25 USD/day", '
    'with "burst 20" at the end if wanted'
)


@dataclass(frozen=True, slots=True, init=False)
class Limit:
    """Allow ``amount`` units of ``resource`` in every window of ``per`` seconds.

    The limit holds in *every* sliding window of that length. ``burst`` paces it as well: at most
    ``burst`` units at once, refilled at ``amount / per``. By default, requests are paced with a
    burst of a tenth (at least 1), so that fan-outs do not come in minute-long waves; windows of an
    hour or more and other resources are not paced. ``burst=amount`` switches pacing off.

    With ``resets="00:00 America/Los_Angeles"`` it holds in each day, week (from Monday) or month of
    the calendar instead, and comes back in full at that time of day. ``per`` is then ``"day"``,
    ``"week"`` or ``"month"``. What was used beyond the amount stays owed, but for no longer than one
    period. See `asyncbucket.core.calendars` about daylight saving.
    The resource ``usd`` is money, in US dollars: ``Limit("usd", 25, per="day")``.

    Raises:
        LimitSyntaxError: the resource looks like a misspelled one, an amount or burst is not a whole number of units from 1 to 1e18, the
            window is not from 0.001 s to 400 days, the burst is above the amount, or ``resets``
            names no time of day or no time zone.
    """

    resource: str
    #: Whole units, or dollars.
    amount: float
    #: Seconds; of a month, those of 30 days.
    per: float
    burst: float | None
    #: The time of day and the zone, if it resets by the calendar.
    resets: str | None

    def __init__(
        self,
        resource: str,
        amount: float,
        per: "float | Period" = 60,
        burst: float | None = None,
        *,
        resets: str | None = None,
    ) -> None:
        """Refuse what is not a limit; fill in the default burst."""
        put = partial(object.__setattr__, self)
        if not isinstance(resource, str) or not resource.isidentifier():
            raise LimitSyntaxError(f"a resource must be a name such as requests, not {resource!r}")
        if resource == "concurrency":
            raise LimitSyntaxError("concurrency has no window: pass concurrency=... instead")
        resource = _read_resource(resource)
        put("resource", resource)
        put("amount", _amount(amount, resource, f"limit of {resource}"))
        put("per", _read_per(per, resets))
        put("resets", resets)
        if resets is not None:
            if not isinstance(resets, str):
                raise LimitSyntaxError(f'resets must be a text such as "00:00 UTC", not {resets!r}')
            if self.per not in _PERIODS:
                raise LimitSyntaxError(
                    f'a limit that resets has per="day", "week" or "month", not {per!r} seconds'
                )
            put("resets", str(self.calendar))
        if burst is None:
            is_paced = resource == "requests" and self.per < _UNPACED_FROM
            put("burst", max(1, self.units // 10) if is_paced else None)
            return
        put("burst", _amount(burst, resource, "burst"))
        if burst > self.amount:
            raise LimitSyntaxError(
                f"a burst of {burst:,} is above the limit of {self}: lower the burst or raise "
                f"the limit"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a limit as people write it: ``"500 RPM"``, ``"14,400 RPD"``, ``"3 images/10s"``.

        Upper and lower case are the same, also in the resource's name.

        Raises:
            LimitSyntaxError: the text is not a limit; the message shows how limits are written.
        """
        if not isinstance(text, str):
            raise LimitSyntaxError(f"a limit must be a string or a Limit, not {text!r}; {_SYNTAX}")
        written, *resets = _RESETS.split(text.strip(), maxsplit=1)
        written = written.lower()
        match = _SHORT.fullmatch(written) or _LONG.fullmatch(written)
        if match is None:
            raise LimitSyntaxError(f"{text!r} is not a limit; {_SYNTAX}")
        resource = match["resource"] or "requests"
        resource = _RESOURCES.get(resource, resource) if match.re is _SHORT else resource
        every = (match.groupdict().get("every") or "1").replace(",", "")
        seconds = float(every) if "." in every else int(every)
        if match["unit"] == "month" and every != "1":
            raise LimitSyntaxError(f"{text!r} is not a limit: months come one at a time; {_SYNTAX}")
        in_parts = _read_resource(resource) == USD
        return cls(
            resource,
            _read_number(match["amount"], text, in_parts=in_parts),
            per="month" if match["unit"] == "month" else seconds * _SECONDS[match["unit"][0]],
            burst=_read_number(match["burst"], text, in_parts=in_parts) if match["burst"] else None,
            resets=resets[0] if resets else None,
        )

    @property
    def units(self) -> int:
        """The amount in the units that are counted: of dollars in micro-dollars."""
        return _units(self.amount, self.resource)

    @property
    def burst_units(self) -> int | None:
        """The burst in the units that are counted."""
        return None if self.burst is None else _units(self.burst, self.resource)

    @property
    def window(self) -> int:
        """The window in nanoseconds."""
        return round(self.per * 1_000_000_000)

    @property
    def key(self) -> Key:
        """What identifies it within a limiter: resource and window."""
        return self.resource, self.per

    @property
    def keyword(self) -> str | None:
        """The keyword that sets this limit, such as ``rpm``, if there is one."""
        return next((word for word, what in KEYWORDS.items() if what == self.key), None)

    @property
    def label(self) -> str:
        """Its label in metrics, independent of the amount: ``rpm``, or ``images/10s``."""
        calendar = self.calendar
        span = f"{self.per:.9g}s" if calendar is None else calendar.period
        return self.keyword or f"{self.resource}/{span}"

    @property
    def calendar(self) -> "Calendar | None":
        """What says when it resets, if it does."""
        if self.resets is None:
            return None
        from asyncbucket.core.calendars import read_calendar  # few limits need it, and datetime

        return read_calendar(_PERIODS[self.per], self.resets)

    def resets_in(self, wall: int) -> float | None:
        """Return the seconds until it resets when a wall clock shows ``wall`` (ns since 1970)."""
        calendar = self.calendar
        if calendar is None:
            return None
        return (calendar.start(calendar.number(wall) + 1) - wall) * 1e-9

    def __str__(self) -> str:
        calendar, amount = self.calendar, counted(self.units, self.resource)
        if calendar is None:
            return f"{amount} per {written_out(self.per)} s"
        return f"{amount} per {calendar.period}, reset at {calendar}"


def read_limits(limits: Iterable[str | Limit], keywords: Mapping[str, Any]) -> list[Limit]:
    """Return the limits given as texts, objects and keywords such as ``rpm=500``, in that order.

    Raises:
        LimitSyntaxError: one of them is not a limit, two limit the same resource over the same window,
            or a keyword is not one of ``KEYWORDS``.
    """
    found = [limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in limits]
    for keyword, amount in keywords.items():
        if keyword not in KEYWORDS:
            known = ", ".join(KEYWORDS)
            raise LimitSyntaxError(f"{keyword}= is not a limit; known: {known}, concurrency")
        if amount is not None:
            resource, per = KEYWORDS[keyword]
            found.append(Limit(resource, _amount(amount, resource, keyword), per=per))
    seen: dict[Key, Limit] = {}
    for limit in found:
        earlier = seen.setdefault(limit.key, limit)
        if earlier is not limit:
            raise LimitSyntaxError(f"two limits for one window: {earlier} and {limit}; keep one")
    return found


def _read_per(per: float | str, resets: str | None) -> float:
    """Return the seconds of a window; of a calendar's period the usual ones."""
    if per == "month" and resets is None:
        raise LimitSyntaxError(
            'months differ in length: say when they begin, e.g. resets="00:00 UTC", or in a text '
            '"1M tokens/month resets 00:00 UTC"; or give days, e.g. "1M tokens/30 days"'
        )
    seconds = next((each for each, name in _PERIODS.items() if name == per), per)
    if not is_number(seconds) or not _SHORTEST <= seconds <= _LONGEST:
        raise LimitSyntaxError(
            f"a window must last from 0.001 to 34,560,000 seconds (400 days), not {per!r}"
        )
    return plain(seconds)


def _read_resource(name: str) -> str:
    """Return the resource that is meant; refuse one that looks like a typing error."""
    if name in _RESOURCES.values():
        return name
    meant = _OTHER_WORDS.get(name)
    if meant is None:
        import difflib  # only limits of other resources come here

        for near in difflib.get_close_matches(name, _OFTEN_MISSPELLED, n=1, cutoff=_NEAR):
            raise LimitSyntaxError(
                f"no call counts against a limit of {name!r}: did you mean {_OFTEN_MISSPELLED[near]}?"
            )
    return meant or name


def read_amount(text: str) -> int:
    """Return a number written as in limits: ``500``, ``14,400``, ``200k``.

    Raises:
        LimitSyntaxError: it is not a number from 1 on.
    """
    return Limit.parse(f"{text} requests/s").units


def _read_number(number: str, text: str, *, in_parts: bool = False) -> float:
    """Read a number such as ``14,400`` or ``1.5k``; ``text`` is the limit that contains it."""
    digits = re.sub("[,_]", "", number)
    prefix = digits.lstrip("0123456789.")
    exact = Fraction(digits.removesuffix(prefix)) * _PREFIXES[prefix]
    if exact.denominator == 1:
        return int(exact)
    if not in_parts:
        raise LimitSyntaxError(f"{text!r} is not a whole number of units; {_SYNTAX}")
    return float(exact)


def _units(amount: float, resource: str) -> int:
    """Return an amount in whole units; part of a micro-dollar is left out."""
    return int(round(amount * MICRO, 3)) if resource == USD else int(amount)


def _amount(value: float, resource: str, what: str) -> float:
    """Return ``value`` if it is a whole positive number of units, or dollars."""
    if resource == USD:
        if not is_number(value) or not 1 / MICRO <= value <= _LARGEST / MICRO:
            raise LimitSyntaxError(f"{what} must be from 0.000001 to 1e12 dollars, not {value!r}")
        return plain(value)
    if not is_number(value) or not 1 <= value < float("inf") or value != int(value):
        raise LimitSyntaxError(f"{what} must be a whole number of at least 1, not {value!r}")
    if value > _LARGEST:
        raise LimitSyntaxError(f"{what} must be at most {_LARGEST:.0e}; leave it out for no limit")
    return int(value)
