"""Days, weeks and months of the wall clock: when a limit that resets comes back in full.

A `Calendar` numbers its periods: `Calendar.number` says in which one an instant lies,
`Calendar.start` when one begins. Instants are integer nanoseconds since 1970, UTC.

Daylight saving: a period begins at its time of day, whatever the clock did before. So a day lasts 23
or 25 hours when the clock changes. Where a time of day exists twice, the first of the two counts.
Where it is skipped, the period begins as long after midnight as on other days: for 02:30, when the
clock shows 03:30. (PEP 495 calls both "fold=0".)
"""

import functools
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from asyncbucket.core.errors import LimitSyntaxError

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

#: What can begin anew by the calendar.
Period: TypeAlias = Literal["day", "week", "month"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_TIME: Final = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])")
_HOW: Final = 'write e.g. resets="00:00 America/Los_Angeles", or "00:00 UTC"'


@dataclass(frozen=True, slots=True)
class Calendar:
    """Number the days, weeks (from Monday) or months that begin at one time of day in one zone."""

    period: Period
    at: time
    zone: "ZoneInfo"

    def number(self, wall: int) -> int:
        """Return the number of the period in which an instant lies; later ones have higher numbers."""
        moment = _EPOCH + timedelta(microseconds=wall // 1_000)
        day = moment.astimezone(self.zone).date()
        number = (
            1
            + {
                "day": day.toordinal(),
                "week": (day.toordinal() - 1) // 7,
                "month": day.year * 12 + day.month - 1,
            }[self.period]
        )
        while self.start(number) > wall:
            number -= 1
        return number

    def start(self, number: int) -> int:
        """Return when a period begins."""
        return _start(self, number)

    def __str__(self) -> str:
        return f"{self.at:%H:%M} {self.zone.key}"


@functools.lru_cache(maxsize=256)
def _start(calendar: Calendar, number: int) -> int:
    if calendar.period == "month":
        first = date(number // 12, number % 12 + 1, 1)
    else:
        first = date.fromordinal(7 * number + 1 if calendar.period == "week" else number)
    moment = datetime.combine(first, calendar.at, calendar.zone)
    return (moment - _EPOCH) // _MICROSECOND * 1_000


@functools.lru_cache(maxsize=256)
def read_calendar(period: Period, resets: str) -> Calendar:
    """Return the calendar whose periods begin at e.g. "00:00 Europe/Berlin".

    Raises:
        LimitSyntaxError: there is no such time of day or zone.
    """
    at, _, zone = resets.strip().partition(" ")
    match = _TIME.fullmatch(at)
    if match is None:
        hint = "write 00:00 for midnight; " if at == "24:00" else ""
        raise LimitSyntaxError(
            f"{resets!r} does not begin with a time of day from 00:00 to 23:59: {hint}{_HOW}"
        )
    if not zone.strip():
        raise LimitSyntaxError(f"{resets!r} does not say in which time zone: {_HOW}")
    return Calendar(period, time(int(match[1]), int(match[2])), _read_zone(zone.strip()))


def _read_zone(name: str) -> "ZoneInfo":
    """Return a time zone; upper and lower case are the same.

    Raises:
        LimitSyntaxError: there is none of that name.
    """
    import zoneinfo  # only limits that reset need it

    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        known = {zone.lower(): zone for zone in zoneinfo.available_timezones()}
    if name.lower() in known:
        return zoneinfo.ZoneInfo(known[name.lower()])
    remedy = _HOW if known else "this machine has none: pip install tzdata"
    raise LimitSyntaxError(f"{name!r} is not a time zone: {remedy}")
