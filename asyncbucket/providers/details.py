"""What a refusal says: its codes, the quota that is used up, and when to come back.

The values come from outside, and are parsed with care. A number or a date is a text of at most 64
ASCII characters that matches its grammar in full; any other value is ignored (None). Waits are
clamped to between 0 and a week, so they are always a finite number of seconds that can be slept.
Python's own parsers are too lenient: `float` takes ``nan``, ``inf`` and ``1_0``.

Every provider nests the body in another way, so the strings of a body are collected by their names,
wherever they are, and then read:

- *Codes*: OpenAI's ``error.code`` and ``type``; Anthropic's ``error.details.error_code``;
  OpenRouter's ``error.metadata.limit_source``; Google's ``error.status``.
- *Waits*: Google's ``RetryInfo.retryDelay``, such as "35s".
- *Quotas of a day*, which no back-off outlasts: Google's ``quotaId``, such as
  ``GenerateRequestsPerDayPerProjectPerModel-FreeTier``; the messages of Bedrock ("Too many tokens
  per day"), OpenAI and Groq ("requests per day (RPD)"), Cerebras ("Requests per day limit
  exceeded"); OpenRouter's ``openrouter_free_tier_daily``.
- *Quotas of a month*: the messages to Cohere's trial keys ("1000 API calls / month").

Sources: ai.google.dev/gemini-api/docs/rate-limits, openrouter.ai/docs/api_reference/limits, and
replies in public issues; read in November 2026.

Parsing reads no clock: ``now`` is wall-clock time (`time.time()`), and is needed for dates only.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, Final

from asyncbucket.core.errors import LimitSyntaxError
from asyncbucket.core.limits import Limit

#: The longest wait (s) that is distinguished: a week.
WEEK: Final = 604_800.0

_CODES: Final = frozenset(
    {"code", "type", "Code", "status", "__type", "error_code", "error_type", "limit_source"}
)
_MESSAGES: Final = frozenset({"message", "Message", "quotaId"})
#: How deep strings are looked for, and among how many values: Google's are below six others.
_DEPTH: Final = 8
_MAX_VALUES: Final = 1_000
#: How much of a message is read.
_MAX_MESSAGE: Final = 1_000
_PER_DAY: Final = re.compile(r"per[ _-]?day|\bdaily\b|_daily", re.IGNORECASE)
_PER_MONTH: Final = re.compile(r"/ ?month|per month", re.IGNORECASE)

#: Numbers from these on are instants, in seconds or in milliseconds since 1970.
_EPOCH_SECONDS: Final = 1e9
_EPOCH_MILLISECONDS: Final = 1e12
_MAX_LENGTH: Final = 64
_NUMBER: Final = re.compile(r"[0-9]+(?:\.[0-9]+)?")
#: RFC 9110's form; nobody has written its two older ones for decades.
_HTTP_DATE: Final = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9:]{8} GMT")

#: Where Google's days end: ai.google.dev/gemini-api/docs/rate-limits, read in November 2026.
_GOOGLES_DAY: Final = "00:00 America/Los_Angeles"
#: The seconds until a day ends at Cerebras, whose refusals name no wait.
_RESET: Final = "x-ratelimit-reset-requests-day"
#: If nothing says when, somebody asks once an hour.
_UNKNOWN: Final = 3_600.0
_NOTHING: Final[Mapping[str, Any]] = {}


class Details:
    """Read what the body and the headers of a refusal say; anything may be in them.

    Args:
        body: what was in the reply, or what an SDK made of it.
        headers: the reply's.
    """

    __slots__ = ("_headers", "_strings")

    def __init__(self, body: object, headers: Mapping[str, Any] = _NOTHING) -> None:
        values = islice(_values(body, _DEPTH), _MAX_VALUES)
        self._strings = [(name, value) for name, value in values if isinstance(value, str)]
        self._headers = {str(name).lower(): value for name, value in headers.items()}

    @property
    def codes(self) -> set[str]:
        """The codes and types, in lower case; Anthropic's outer type is always "error"."""
        return {text.lower() for name, text in self._strings if name in _CODES} - {"error"}

    @property
    def is_daily(self) -> bool:
        """Whether a quota of a day is used up."""
        return self._says(_PER_DAY)

    @property
    def is_monthly(self) -> bool:
        """Whether a quota of a month is used up."""
        return self._says(_PER_MONTH)

    @property
    def forbids_retry(self) -> bool:
        """Whether the server asks clients not to try again."""
        return bool(self._headers.get("x-should-retry") == "false")

    def retry_after(self, now: float) -> float | None:
        """Return the seconds that the reply asks to wait, or None if it does not say.

        ``retry-after-ms`` (OpenAI, Azure) takes precedence over ``retry-after``, which is a number
        of seconds or an HTTP date. A date is compared with the reply's own ``date``, so this
        machine's clock does not matter; ``now`` is used if there is none. If there is neither, a
        ``x-ratelimit-reset`` (OpenRouter, Together) says when the limit is full again; and then the
        body. A wait of 0 names no time.
        """
        found = self._headers
        milliseconds = _number(found.get("retry-after-ms"))
        if milliseconds:  # Azure's may be 0 beside a `retry-after` of a second
            return _clamp(milliseconds / 1000)
        seconds = _number(found.get("retry-after"))
        date = _http_date(found.get("retry-after"))
        if seconds is None and date is not None:
            sent_at = _http_date(found.get("date"))
            seconds = date - (now if sent_at is None else sent_at)
        if seconds is None:
            seconds = _reset_in(found.get("x-ratelimit-reset"), now)
        delays = (text for name, text in self._strings if name == "retryDelay")
        return _clamp(seconds or 0) or _reset_in(next(delays, None), now) or None

    def until_next_day(self, now: float) -> float:
        """Return the seconds until a quota of a day is full again.

        Google may name a wait of seconds all the same, so its calendar counts.
        """
        if any(name == "quotaId" for name, _ in self._strings):
            with contextlib.suppress(LimitSyntaxError):  # no data of zones on this machine
                day = Limit("requests", 1, per="day", resets=_GOOGLES_DAY)
                return day.resets_in(round(now * 1e9)) or _UNKNOWN
        return self.retry_after(now) or _reset_in(self._headers.get(_RESET), now) or _UNKNOWN

    def _says(self, pattern: re.Pattern[str]) -> bool:
        texts = (text for name, text in self._strings if name in _MESSAGES or name in _CODES)
        return any(pattern.search(text[:_MAX_MESSAGE]) for text in texts)


def _values(value: object, depth: int, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield all that is in a body, each with the name of its member."""
    yield name, value
    if depth and isinstance(value, Mapping):
        for key, member in value.items():
            yield from _values(member, depth - 1, str(key))
    elif depth and isinstance(value, list):
        for item in value:
            yield from _values(item, depth - 1, name)


def _reset_in(value: object, now: float) -> float | None:
    """Return the seconds until a reset, which is given in seconds (perhaps as "9.5s") or as an instant."""
    number = _number(value.removesuffix("s") if isinstance(value, str) else value)
    if number is None or number < _EPOCH_SECONDS:
        return None if number is None else _clamp(number)
    return _clamp((number / 1000 if number >= _EPOCH_MILLISECONDS else number) - now)


def _number(value: object) -> float | None:
    text = _text(value)
    return float(text) if _NUMBER.fullmatch(text) else None


def _http_date(value: object) -> float | None:
    text = _text(value)
    if not _HTTP_DATE.fullmatch(text):
        return None
    try:
        return parsedate_to_datetime(text).timestamp()
    except ValueError:  # a 31st of February, a 25th hour
        return None


def _text(value: object) -> str:
    """Return a value without surrounding blanks; "" if it cannot be valid."""
    if not isinstance(value, str) or len(value) > _MAX_LENGTH or not value.isascii():
        return ""
    return value.strip(" \t")


def _clamp(seconds: float) -> float:
    return min(max(seconds, 0.0), WEEK)
