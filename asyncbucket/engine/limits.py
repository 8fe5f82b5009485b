"""Limits: an amount per window, how people write them, and when those of the calendar reset.

Most limits hold in every sliding window. Others come back in full when a day, a week or a month of
the wall clock begins: see `Calendar`.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias

from asyncbucket.engine.errors import LimitSyntaxError
from asyncbucket.engine.wording import MICRO, USD, counted, is_number, plain, written_out

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

#: What identifies a limit within a limiter: its resource, and its window in seconds.
Key: TypeAlias = tuple[str, float]
#: What can begin anew by the calendar.
Period: TypeAlias = Literal["day", "week", "month"]

_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_RESOURCES: Final = {"r": "requests", "t": "tokens", "it": "input_tokens", "ot": "output_tokens"}
#: Other words for resources. Without them, a limit of "request", or of "r" in "10r/s", would be a
#: limit that no call counts against.
_OTHER_WORDS: Final = {
    **dict.fromkeys(("request", "req", "reqs", "r", "call", "calls"), "requests"),
    "token": "tokens",
    **dict.fromkeys(("dollars", "dollar"), USD),
    "input_token": "input_tokens",
    "output_token": "output_tokens",
}
_CURRENCIES: Final = frozenset(("aud", "cad", "chf", "cny", "eur", "gbp", "inr", "jpy"))
#: A name that is this similar (of 1) to one of the usual ones, or to "request", "token" or "tok", is
#: taken for a typing error.
_NEAR: Final = 0.8
_PREFIXES: Final = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}

#: Windows, in seconds.
_SHORTEST: Final = 1e-3
_LONGEST: Final = 400 * 86_400
#: From this window on, limits of requests are not paced unless ``burst`` says so.
_UNPACED_FROM: Final = 3_600
#: The usual lengths of what begins anew by the calendar.
_PERIODS: Final[dict[float, Period]] = {86_400: "day", 604_800: "week", 2_592_000: "month"}
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
_DIGITS: Final = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9][0-9_]{0,30})(?:\.[0-9]{1,30})?"
_NUMBER: Final = rf"{_DIGITS}[kmb]?"
_AMOUNT: Final = rf"(?P<amount>{_NUMBER})"
_BURST: Final = rf"(?:\s+burst\s+(?P<burst>{_NUMBER}))?"
_SHORT: Final = re.compile(rf"{_AMOUNT}\s*(?P<resource>r|[io]?t)p(?P<unit>[smhd]){_BURST}")
_LONG: Final = re.compile(
    rf"{_AMOUNT}\s*(?P<resource>[a-z_]+)?\s*(?:/|\bper\b)\s*(?:(?P<month>month)|"
    rf"(?P<every>{_DIGITS})?\s*(?P<unit>s|sec|seconds?|m|min|minutes?|h|hours?|d|days?|w|weeks?)){_BURST}"
)
#: What separates a limit from when it resets.
_RESETS: Final = re.compile(r",?\s+resets?(?:\s+at)?\s+", re.IGNORECASE)
_OTHERS: Final = (
    "concurrency",
    "name",
    "max_queue",
    "timeout",
    "store",
    "prices",
    "weight",
    "priority",
)
_SYNTAX: Final = (
    'write e.g. "500 RPM", "200k TPM", "10/s", "100 requests/minute", "3 images/10s", "25 USD/day", '
    'with "burst 20" at the end if wanted'
)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_TIME: Final = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])")
_HOW: Final = 'write e.g. resets="00:00 America/Los_Angeles", or "00:00 UTC"'


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
    period. See `asyncbucket.engine.limits.Calendar` about daylight saving.
    The resource ``usd`` is money, in US dollars: ``Limit("usd", 25, per="day")``.

    Raises:
        LimitSyntaxError: the resource looks like a misspelled one, an amount or burst is not a whole
            number of units from 1 to 1e18, the window is not from 0.001 s to 400 days, the burst is
            above the amount, or ``resets`` names no time of day or no time zone.
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
        per: float | Period = 60,
        burst: float | None = None,
        *,
        resets: str | None = None,
    ) -> None:
        """Refuse what is not a limit; fill in the default burst."""
        put = functools.partial(object.__setattr__, self)
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
        written, *resets = _RESETS.split(" ".join(text.split()), maxsplit=1)
        written = written.lower()
        match = _SHORT.fullmatch(written) or _LONG.fullmatch(written)
        if match is None:
            raise LimitSyntaxError(f"{text!r} is not a limit; {_SYNTAX}")
        found = match.groupdict()
        resource = found["resource"] or "requests"
        every = _read_number(found.get("every") or "1")
        return cls(
            _RESOURCES[resource] if match.re is _SHORT else resource,
            _read_number(found["amount"]),
            per="month" if found.get("month") else every * _SECONDS[found["unit"][0]],
            burst=_read_number(found["burst"]) if found["burst"] else None,
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
        return None if self.resets is None else _read_calendar(_PERIODS[self.per], self.resets)

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
            raise LimitSyntaxError(_unknown(keyword))
        if amount is not None:
            resource, per = KEYWORDS[keyword]
            found.append(Limit(resource, _amount(amount, resource, keyword), per=per))
    seen: dict[Key, Limit] = {}
    for limit in found:
        earlier = seen.setdefault(limit.key, limit)
        if earlier is not limit:
            raise LimitSyntaxError(f"two limits for one window: {earlier} and {limit}; keep one")
    return found


def _unknown(keyword: str) -> str:
    """Say that a keyword is none of a limiter's, and which one was probably meant."""
    import difflib  # only errors come here

    near = difflib.get_close_matches(keyword, (*KEYWORDS, *_OTHERS), n=1, cutoff=_NEAR)
    if near:
        return f"unknown argument {keyword}=: did you mean {near[0]}=?"
    known = ", ".join(KEYWORDS)
    return f"unknown argument {keyword}=: limits by keyword are {known}; else {_SYNTAX}"


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
    usual = {*_RESOURCES.values(), USD}
    if name in usual or name in _OTHER_WORDS:
        return _OTHER_WORDS.get(name, name)
    if name in _CURRENCIES:
        raise LimitSyntaxError(
            f"money is counted in USD, not {name.upper()}: give the limit in USD"
        )
    import difflib  # only limits of other resources come here

    near = difflib.get_close_matches(name, (*usual, "request", "token", "tok"), n=1, cutoff=_NEAR)
    likely, _ = KEYWORDS.get(name.lower(), (near[0] if near else None, 0))
    if likely is not None:
        likely = likely if likely in usual else _OTHER_WORDS.get(likely, "tokens")
        raise LimitSyntaxError(
            f"no call counts against a limit of {name!r}: did you mean {likely}?"
        )
    return name


def read_amount(text: str) -> int:
    """Return a whole number written as in limits: ``500``, ``14,400``, ``200k``.

    Raises:
        LimitSyntaxError: it is none.
    """
    written = str(text).strip().lower()
    number = _read_number(written) if re.fullmatch(_NUMBER, written) else None
    if not isinstance(number, int):
        raise LimitSyntaxError(f"{text!r} is not a number such as 500, 14,400 or 200k")
    return number


def _read_number(text: str) -> float:
    """Read a number such as ``14,400`` or ``1.5k``."""
    number = re.sub("[,_]", "", text)
    prefix = number.lstrip("0123456789.")
    whole, _, part = number.removesuffix(prefix).partition(".")
    digits = int(whole + part) * _PREFIXES[prefix]
    scale: int = 10 ** len(part)
    return digits / scale if digits % scale else digits // scale


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
        remedy = '; a text is a limit by itself, as in Limiter("500 RPM")' * isinstance(value, str)
        raise LimitSyntaxError(
            f"{what} must be a whole number of at least 1, not {value!r}{remedy}"
        )
    if value > _LARGEST:
        raise LimitSyntaxError(f"{what} must be at most {_LARGEST:.0e}; leave it out for no limit")
    return int(value)


@dataclass(frozen=True, slots=True)
class Calendar:
    """Number the days, weeks (from Monday) or months that begin at one time of day in one zone.

    Instants are integer nanoseconds since 1970, UTC.

    Daylight saving: a period begins at its time of day, whatever the clock did before. So a day lasts
    23 or 25 hours when the clock changes. Where a time of day exists twice, the first of the two
    counts. Where it is skipped, the period begins as long after midnight as on other days: for
    02:30, when the clock shows 03:30. (PEP 495 calls both "fold=0".)
    """

    period: Period
    at: time
    zone: "ZoneInfo"

    def number(self, wall: int) -> int:
        """Return the number of the period in which an instant lies; later ones have higher numbers."""
        moment = _EPOCH + timedelta(microseconds=wall // 1_000)
        day = moment.astimezone(self.zone).date()
        number = {
            "day": day.toordinal() + 1,
            "week": (day.toordinal() - 1) // 7 + 1,
            "month": day.year * 12 + day.month,
        }[self.period]
        while self.start(number) > wall:
            number -= 1
        return number

    @functools.lru_cache(maxsize=256)  # noqa: B019 - calendars are few, and kept anyway
    def start(self, number: int) -> int:
        """Return when a period begins."""
        if self.period == "month":
            first = date(number // 12, number % 12 + 1, 1)
        else:
            first = date.fromordinal(7 * number + 1 if self.period == "week" else number)
        return (datetime.combine(first, self.at, self.zone) - _EPOCH) // _MICROSECOND * 1_000

    def __str__(self) -> str:
        return f"{self.at:%H:%M} {self.zone.key}"


@functools.lru_cache(maxsize=256)
def _read_calendar(period: Period, resets: str) -> Calendar:
    """Return the calendar whose periods begin at e.g. "00:00 Europe/Berlin"."""
    import zoneinfo  # only limits that reset need it

    at, _, zone = str(resets).strip().partition(" ")
    match = _TIME.fullmatch(at)
    if match is None:
        raise LimitSyntaxError(
            f"{resets!r} does not begin with a time of day from 00:00 to 23:59: {_HOW}"
        )
    if not zone.strip():
        raise LimitSyntaxError(f"{resets!r} does not say in which time zone: {_HOW}")
    try:
        found = zoneinfo.ZoneInfo(zone.strip())
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise LimitSyntaxError(
            f"{zone.strip()!r} is not a time zone: {_HOW}; if this system knows none, pip install tzdata"
        ) from error
    return Calendar(period, time(int(match[1]), int(match[2])), found)
