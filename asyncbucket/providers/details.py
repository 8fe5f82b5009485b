"""What the body of a refusal says: its codes, the quota that is used up, and when that is full again.

Every provider nests it in another way, so the strings of a body are collected by their names,
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
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final

from asyncbucket.core.errors import LimitSyntaxError
from asyncbucket.core.limits import Limit
from asyncbucket.providers.headers import header, reset_in

_CODES: Final = frozenset(
    {"code", "type", "Code", "status", "__type", "error_code", "error_type", "limit_source"}
)
_MESSAGES: Final = frozenset({"message", "Message", "quotaId"})
#: How deep strings are looked for, and how many: Google's are below six others.
_DEPTH: Final = 8
_MAX_STRINGS: Final = 100
#: How much of a message is read.
_MAX_LENGTH: Final = 1_000
_PER_DAY: Final = re.compile(r"per[ _-]?day|\bdaily\b|_daily", re.IGNORECASE)
_PER_MONTH: Final = re.compile(r"/ ?month|per month", re.IGNORECASE)

#: Where Google's days end: ai.google.dev/gemini-api/docs/rate-limits, read in November 2026.
_GOOGLES_DAY: Final = "00:00 America/Los_Angeles"
#: The seconds until a day ends at Cerebras, whose refusals name no wait.
_RESET: Final = "x-ratelimit-reset-requests-day"
#: If nothing says when, somebody asks once an hour.
_UNKNOWN: Final = 3_600.0


class Details:
    """Read what an error's body says; anything may be in it.

    Args:
        body: what was in the reply, or what an SDK made of it.
    """

    __slots__ = ("_strings",)

    def __init__(self, body: object) -> None:
        self._strings = list(islice(_strings(body, _DEPTH), _MAX_STRINGS))

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

    def retry_delay(self, now: float) -> float | None:
        """Return the seconds that the body asks to wait, or None."""
        return next(
            (reset_in(t, now=now) for name, t in self._strings if name == "retryDelay"), None
        )

    def until_next_day(self, headers: Mapping[str, Any], wait: float | None, now: float) -> float:
        """Return the seconds until a quota of a day is full again.

        Google may name a wait of seconds all the same, so its calendar counts.

        Args:
            headers: the reply's.
            wait: what the reply asks to wait.
            now: wall-clock time.
        """
        if any(name == "quotaId" for name, _ in self._strings):
            with contextlib.suppress(LimitSyntaxError):  # no data of zones on this machine
                day = Limit("requests", 1, per="day", resets=_GOOGLES_DAY)
                return day.resets_in(round(now * 1e9)) or _UNKNOWN
        return wait or reset_in(header(headers, _RESET), now=now) or _UNKNOWN

    def _says(self, pattern: re.Pattern[str]) -> bool:
        texts = (text for name, text in self._strings if name in _MESSAGES or name in _CODES)
        return any(pattern.search(text[:_MAX_LENGTH]) for text in texts)


def _strings(value: object, depth: int, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield all strings in a body, each with the name of its member."""
    if isinstance(value, str):
        yield name, value
    elif depth and isinstance(value, Mapping):
        for key, member in value.items():
            yield from _strings(member, depth - 1, str(key))
    elif depth and isinstance(value, list):
        for item in value:
            yield from _strings(item, depth - 1, name)
