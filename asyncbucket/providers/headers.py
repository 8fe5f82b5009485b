"""How long to wait, according to headers: input from outside, and parsed with care.

Every value is a `str` of at most 64 ASCII characters that matches its grammar in full; otherwise it
is ignored (None). Results are clamped to between 0 and a week, so they are always a finite number of
seconds that can be slept. Python's own parsers are too lenient: `float` takes ``nan``, ``inf`` and
``1_0``, `int` takes ``1_0`` and Arabic digits, ``"²".isdigit()`` is true, and `durationpy` skips
whatever is between ``1s`` and ``2s``. So the grammar is checked first, and only then the library
parses the value.

Formats and who sends them:

- ``120``, ``1.5``: a number of seconds (RFC 9110, Azure OpenAI), or of milliseconds if the
  header's name ends in ``-ms`` (OpenAI, Azure OpenAI).
- ``120ms``, ``6m0s``: a Go duration (OpenAI, Groq).
- ``2026-01-31T12:00:00Z``: an instant of RFC 3339 (Anthropic).
- ``Sat, 31 Jan 2026 12:00:00 GMT``: an HTTP date, in the three forms of RFC 9110.

Parsing reads no clock: `now` is wall-clock time (`time.time()`), and is needed for instants only.
"""

import contextlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

#: The longest wait (s) that is distinguished: a week.
WEEK: Final = 604_800.0
#: No header about time is longer.
_MAX_LENGTH: Final = 64

_NUMBER: Final = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_GO_DURATION: Final = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?(?:h|ms|m|us|ns|s))+")
_RFC_3339: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?"
    r"(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_DAYS: Final = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_MONTHS: Final = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_TIME: Final = "[0-9]{2}:[0-9]{2}:[0-9]{2}"
_HTTP_DATE: Final = re.compile(
    rf"{_DAYS}, [0-9]{{2}} {_MONTHS} [0-9]{{4}} {_TIME} GMT"  # the form that is written today
    rf"|{_DAYS}[a-z]{{3,6}}, [0-9]{{2}}-{_MONTHS}-[0-9]{{2}} {_TIME} GMT"  # RFC 850
    rf"|{_DAYS} {_MONTHS} [0-9 ][0-9] {_TIME} [0-9]{{4}}"  # C's asctime
)


def retry_after(headers: Mapping[str, Any], *, now: float) -> float | None:
    """Return the seconds that a reply asks to wait, or None if it does not say.

    ``retry-after-ms`` takes precedence over ``retry-after``, which is a number of seconds or an
    HTTP date. A date is compared with the reply's own ``date`` header, so this machine's clock does
    not matter; `now` is used if there is none.
    """
    milliseconds = number(header(headers, "retry-after-ms"), cap=WEEK * 1000)
    if milliseconds is not None:
        return milliseconds / 1000
    value = header(headers, "retry-after")
    seconds = number(value)
    if seconds is not None:
        return seconds
    return http_date(value, now=_sent_at(headers, now))


def forbids_retry(headers: Mapping[str, Any]) -> bool:
    """Tell whether the server asks clients not to try again (``x-should-retry: false``)."""
    return header(headers, "x-should-retry") == "false"


def full_reset_after(headers: Mapping[str, Any], *, now: float) -> float | None:
    """Return the seconds until all limits that a reply reports are fully available again, or None.

    Any header whose name mentions a rate limit's reset counts, from any provider; without
    durationpy, Go durations are ignored. Instants are compared with the server's clock, as in
    `retry_after`.
    """
    found: list[float] = []
    now = _sent_at(headers, now)
    for name, value in headers.items():
        lower = str(name).lower()
        if "ratelimit" in lower and "reset" in lower:
            with contextlib.suppress(ImportError):
                seconds = reset(value, now=now)
                if seconds is not None:
                    found.append(seconds)
    return max(found, default=None)


def reset(value: object, *, now: float) -> float | None:
    """Return the seconds until a limit is fully available, in any of the formats above, or None."""
    for seconds in (number(value), duration(value), rfc3339(value, now=now)):
        if seconds is not None:
            return seconds
    return http_date(value, now=now)


def number(value: object, *, cap: float = WEEK) -> float | None:
    """Return the value of a bare decimal number, at most `cap`, or None."""
    text = _text(value)
    return min(float(text), cap) if _NUMBER.fullmatch(text) else None


def duration(value: object) -> float | None:
    """Return the seconds of a Go duration (``6m0s``, ``120ms``), or None; a negative one is 0.

    Raises:
        ImportError: the extra ``http`` is not installed.
    """
    text = _text(value)
    if not _GO_DURATION.fullmatch(text):
        return None
    try:
        import durationpy
    except ImportError as error:
        raise ImportError(
            'reading durations needs durationpy: pip install "asyncbucket[http]"'
        ) from error
    try:
        seconds: float = durationpy.from_str(text).total_seconds()
    except (durationpy.DurationError, OverflowError):  # longer than a timedelta can be
        return 0.0 if text.startswith("-") else WEEK
    return _clamp(seconds)


def rfc3339(value: object, *, now: float) -> float | None:
    """Return the seconds from `now` until an instant of RFC 3339, or None; 0 once it is past."""
    text = _text(value)
    if not _RFC_3339.fullmatch(text):
        return None
    try:
        return _clamp(datetime.fromisoformat(text.upper()).timestamp() - now)
    except ValueError:  # a 13th month, a 25th hour
        return None


def http_date(value: object, *, now: float) -> float | None:
    """Return the seconds from `now` until an HTTP date, or None; 0 once it is past."""
    instant = _http_date(value)
    return None if instant is None else _clamp(instant - now)


def header(headers: Mapping[str, Any], name: str) -> object:
    """Return the value of the header `name` (in lower case), or None.

    The mappings of httpx and httpx2 ignore case; a plain dict is searched.
    """
    value = headers.get(name)
    if value is not None:
        return value
    return next((found for key, found in headers.items() if str(key).lower() == name), None)


def _sent_at(headers: Mapping[str, Any], now: float) -> float:
    """Return when a reply was sent, by the server's clock if it says, or else `now`."""
    date = _http_date(header(headers, "date"))
    return now if date is None else date


def _http_date(value: object) -> float | None:
    text = _text(value)
    if not _HTTP_DATE.fullmatch(text):
        return None
    try:
        # Only asctime's form names no zone; it is in GMT, like the others.
        return parsedate_to_datetime(text).replace(tzinfo=UTC).timestamp()
    except ValueError:  # a 31st of February, a 25th hour
        return None


def _text(value: object) -> str:
    """Return a header's value without surrounding blanks; "" if it cannot be valid."""
    if not isinstance(value, str) or len(value) > _MAX_LENGTH or not value.isascii():
        return ""
    return value.strip(" \t")


def _clamp(seconds: float) -> float:
    return min(max(seconds, 0.0), WEEK)
