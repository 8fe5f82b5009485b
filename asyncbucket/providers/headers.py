"""What a reply's headers say: input from outside, and parsed with care.

A number or a date is a value of at most 64 ASCII characters that matches its grammar in full;
any other value is ignored (None). Waits are clamped to between 0 and a week, so they are always a
finite number of seconds that can be slept. Python's own parsers are too lenient: `float` takes
``nan``, ``inf`` and ``1_0``, and `int` takes ``1_0`` and Arabic digits.

Parsing reads no clock: ``now`` is wall-clock time (`time.time()`), and is needed for dates only.
"""

import re
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

#: The longest wait (s) that is distinguished: a week.
WEEK: Final = 604_800.0

#: Numbers from these on are instants, in seconds or in milliseconds since 1970.
_EPOCH_SECONDS: Final = 1e9
_EPOCH_MILLISECONDS: Final = 1e12

_MAX_LENGTH: Final = 64
_MAX_DIGITS: Final = 15
_NUMBER: Final = re.compile(r"[0-9]+(?:\.[0-9]+)?")
#: RFC 9110's form; nobody has written its two older ones for decades.
_HTTP_DATE: Final = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9:]{8} GMT")


def retry_after(headers: Mapping[str, Any], *, now: float) -> float | None:
    """Return the seconds that a reply asks to wait, or None if it does not say.

    ``retry-after-ms`` (OpenAI, Azure) takes precedence over ``retry-after``, which is a number of
    seconds or an HTTP date. A date is compared with the reply's own ``date`` header, so this
    machine's clock does not matter; ``now`` is used if there is none. If there is neither, a
    ``x-ratelimit-reset`` (OpenRouter, Together) says when the limit is full again.
    """
    milliseconds = _number(header(headers, "retry-after-ms"))
    if milliseconds:  # Azure's may be 0 beside a `retry-after` of a second
        return _clamp(milliseconds / 1000)
    value = header(headers, "retry-after")
    seconds = _number(value)
    if seconds is None:
        date = _http_date(value)
        if date is None:
            return reset_in(header(headers, "x-ratelimit-reset"), now=now)
        sent_at = _http_date(header(headers, "date"))
        seconds = date - (now if sent_at is None else sent_at)
    return _clamp(seconds)


def reset_in(value: object, *, now: float) -> float | None:
    """Return the seconds until a reset, which is given in seconds (perhaps as "9.5s") or as an instant."""
    number = _number(value.removesuffix("s") if isinstance(value, str) else value)
    if number is None or number < _EPOCH_SECONDS:
        return None if number is None else _clamp(number)
    return _clamp((number / 1000 if number >= _EPOCH_MILLISECONDS else number) - now)


def forbids_retry(headers: Mapping[str, Any]) -> bool:
    """Tell whether the server asks clients not to try again (``x-should-retry: false``)."""
    return header(headers, "x-should-retry") == "false"


def header(headers: Mapping[str, Any], name: str) -> object:
    """Return the value of the header ``name`` (in lower case), or None.

    A plain dict is searched without regard to case, as the mappings of httpx and httpx2 are.
    """
    return next((found for key, found in headers.items() if str(key).lower() == name), None)


def header_pairs(headers: Any) -> Iterable[tuple[bytes, bytes]]:
    """Return names and values in bytes, as httpx and httpx2 keep them.

    Their mappings search all headers again for every name.
    """
    pairs: Any = getattr(headers, "raw", headers)
    if isinstance(pairs, list):
        return pairs
    return [(_bytes(name), _bytes(value)) for name, value in headers.items()]


def count(value: bytes) -> int | None:
    """Return a number of one to fifteen digits, or None."""
    value = value.strip(b" \t") if len(value) <= _MAX_LENGTH else b""
    # In bytes, these are ASCII digits.
    return int(value) if value.isdigit() and len(value) <= _MAX_DIGITS else None


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
    """Return a header's value without surrounding blanks; "" if it cannot be valid."""
    if not isinstance(value, str) or len(value) > _MAX_LENGTH or not value.isascii():
        return ""
    return value.strip(" \t")


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")


def _clamp(seconds: float) -> float:
    return min(max(seconds, 0.0), WEEK)
