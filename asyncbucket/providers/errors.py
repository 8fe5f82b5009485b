"""What a failed call means: whether another attempt may succeed, and when.

Errors are judged by their shape, so no SDK needs to be imported: those of OpenAI, Anthropic, httpx
and httpx2 are alike, and others are close enough. A `Verdict` contains only a status, a code of a
few letters and a clamped number of what they carry.

What they carry comes from outside, and is parsed with care. A number or a date is a short text that
matches its grammar in full; any other value is ignored. (Python's `float` takes ``nan``, ``inf`` and
``1_0``.) Waits are clamped to between 0 and a week. Every provider nests
the body of a refusal in another way, so its strings are collected by their names, wherever they are,
and then read:

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import islice
from time import time as wall_clock
from typing import Any, Final

from asyncbucket.engine.errors import AsyncBucketError, LimitSyntaxError
from asyncbucket.engine.limits import Limit
from asyncbucket.providers import facts

#: The lowest HTTP status that is an error.
FIRST_ERROR: Final = 400
_RATE_LIMITED: Final = 429
_FIRST_SERVER_ERROR: Final = 500
_UNAVAILABLE: Final = 503
_OVERLOADED: Final = 529
#: Payment required: by OpenRouter also if calls in flight may cost more than is left; then it says
#: how long to wait (openrouter.ai/docs/api_reference/limits, read in November 2026).
_PAYMENT_REQUIRED: Final = 402
#: Request time-out, too many requests, unavailable, gateway time-out; Groq's for flex capacity,
#: Anthropic's and Google's.
_OVERLOADED_STATUSES: Final = frozenset({408, _RATE_LIMITED, 498, 503, 504, 529})
#: OpenAI's types of refusals.
_RESOURCES: Final = frozenset({"requests", "tokens"})
_TRANSIENT_STATUSES: Final = frozenset({408, 409, _RATE_LIMITED, 498})
#: A bad key, an empty balance, a key without the right.
_NO_ACCESS: Final = frozenset({401, 402, 403})

#: The codes and class names in ``errors.toml``.
_NAMES: Final = {name: frozenset(names) for name, names in facts("errors.toml").items()}
EXHAUSTED: Final = _NAMES["exhausted"]
#: A 404 of Azure's that is about the deployment, which a member of a pool has in its address.
_NO_DEPLOYMENT: Final = "deploymentnotfound"
_CODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: Among how many values strings are looked for.
_MAX_VALUES: Final = 1_000
#: How much of a message is read.
_MAX_MESSAGE: Final = 1_000
_PER_DAY: Final = re.compile(r"per[ _-]?day|\bdaily\b|_daily", re.IGNORECASE)
_PER_MONTH: Final = re.compile(r"/ ?month|per month", re.IGNORECASE)
#: Both bound the length of what they match.
_NUMBER: Final = re.compile(r"[ \t]*([0-9]{1,64}(?:\.[0-9]{1,64})?)[ \t]*")
#: RFC 9110's form; nobody has written its two older ones for decades.
_HTTP_DATE: Final = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9:]{8} GMT")
#: Numbers from these on are instants, in seconds or in milliseconds since 1970.
_EPOCH_SECONDS: Final = 1e9
_EPOCH_MILLISECONDS: Final = 1e12
#: Why all wait if a quota of a day is used up.
DAILY: Final = "daily quota"
#: The longest wait (s) that is distinguished: a week.
WEEK: Final = 604_800.0
#: Where Google's days end: ai.google.dev/gemini-api/docs/rate-limits, read in November 2026.
_GOOGLES_DAY: Final = "00:00 America/Los_Angeles"
#: The seconds until a day ends at Cerebras, whose refusals name no wait.
_RESET: Final = "x-ratelimit-reset-requests-day"
#: If nothing says when, somebody asks once an hour.
_UNKNOWN: Final = 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Say what an error means for the call that met it."""

    #: Whether another attempt may succeed.
    retry: bool
    #: What happened, in a few words; nothing in it is from outside except a status and a code.
    reason: str
    #: Seconds that the server asks to wait, if it says so; or until a quota of a day is full again.
    retry_after: float | None = None
    #: Why all calls of the limiter have to wait, if so: "429", "daily quota" or "overload".
    pause: str | None = None
    #: The resource whose limit refused the call, if the server names it.
    resource: str | None = field(default=None, compare=False)
    #: Whether the server was overloaded: fewer calls at once would have helped.
    overloaded: bool = False
    #: Whether the provider, the key or the account failed, not the call: a pool leaves that member
    #: out, and tries another.
    member_failed: bool = False
    #: Whether the account is exhausted, so that no waiting helps.
    exhausted: bool = False

    @property
    def rate_limited(self) -> bool:
        """Whether the call was refused for rate."""
        return self.pause in ("429", DAILY)


class RefusedReply(Exception):  # noqa: N818 - no error yet: another attempt may follow
    """Carry a reply whose status is an error, and the verdict on it, to the layer that retries."""

    def __init__(self, reply: Any, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.reply = reply
        self.verdict = verdict


def classify(error: BaseException) -> Verdict:
    """Judge an error of OpenAI's or Anthropic's SDK, httpx or the like, by its shape.

    If there is a status, it decides. An error without one (a lost connection, an error event in a
    stream) is recognized by the names of its classes, or by the code that it carries. Any other
    error, an error of asyncbucket itself, and anything that is not an `Exception` are not to be
    retried, nor is what was caused by one.
    """
    if isinstance(error, RefusedReply):
        return error.verdict
    # Not `refusal_in`: the refusal of another call, during whose handling this one failed, is no cause.
    refused = any(isinstance(each, AsyncBucketError) for each in _causes(error, implicit=False))
    if refused or not isinstance(error, Exception):
        return Verdict(retry=False, reason=type(error).__name__)
    status, body, headers = _facts(error)
    if status is not None and status >= FIRST_ERROR:
        return judge_reply(status, body, headers)
    told = _Details(body, headers).codes
    for kind in ("rate_limited", "overloaded", "broken"):
        codes = told & _NAMES[kind]
        if codes:
            pause = "429" if kind == "rate_limited" else None
            overloaded = kind != "broken"
            return Verdict(retry=True, reason=min(codes), pause=pause, overloaded=overloaded)
    names = _class_names(error)
    causes = {type(cause).__name__ for cause in _causes(error)}
    explicit = {type(cause).__name__ for cause in _causes(error, implicit=False)}
    return Verdict(
        retry=bool(names & _NAMES["connection_errors"] and not causes & _NAMES["permanent_errors"]),
        reason=type(error).__name__,
        overloaded=bool(names & _NAMES["timeouts"]),
        member_failed=bool((names | explicit) & _NAMES["unreachable"]),
    )


def never_sent(error: BaseException | None) -> bool:
    """Tell whether an HTTP client's error means that the request was not sent, so costs nothing.

    Over aiohttp, httpx calls even a reply that never came a time-out of connecting; so there,
    aiohttp's own error counts.
    """
    cause = None if error is None else error.__cause__
    if cause is not None and type(cause).__module__.startswith("aiohttp."):
        error = cause
    return bool(_class_names(error) & (_NAMES["unreachable"] | _NAMES["unsent"]))


def was_refused(error: BaseException) -> bool:
    """Tell whether a provider answered with an error, for which none charges."""
    status = _facts(error)[0] if isinstance(error, Exception) else None
    return status is not None and status >= FIRST_ERROR


def judge_reply(status: int, body: object, headers: Mapping[str, Any]) -> Verdict:
    """Judge a reply whose ``status`` is an error, as `classify` does an SDK's error about it.

    Args:
        status: the reply's.
        body: what was in the reply, as JSON, or what an SDK made of it; anything may be in it.
        headers: the reply's.
    """
    details, now = _Details(body, headers), wall_clock()
    codes, wait = details.codes, details.retry_after(now)
    code = next((code for code in sorted(codes) if _CODE.fullmatch(code)), None)
    reason = f"HTTP {status} ({code})" if code else f"HTTP {status}"
    is_server_error, refused = status >= _FIRST_SERVER_ERROR, status == _RATE_LIMITED
    transient = status in _TRANSIENT_STATUSES or is_server_error
    transient |= status == _PAYMENT_REQUIRED and wait is not None
    exhausted = bool(codes & EXHAUSTED) or (refused and details.says(_PER_MONTH))
    member_failed = (
        exhausted
        or (status in _NO_ACCESS and not transient)
        or _NO_DEPLOYMENT in codes
        or (is_server_error and not details.forbids_retry)
    )
    if not transient or exhausted or details.forbids_retry:
        return Verdict(retry=False, reason=reason, member_failed=member_failed, exhausted=exhausted)
    pause = None
    if refused and not codes & _NAMES["no_capacity"]:
        pause = DAILY if details.says(_PER_DAY) else "429"
    elif status == _OVERLOADED or (
        status == _UNAVAILABLE and (wait is not None or "overloaded" in reason)
    ):
        pause = "overload"
    return Verdict(
        retry=True,
        reason=reason,
        retry_after=details.until_next_day(now) if pause == DAILY else wait,
        pause=pause,
        resource=next(iter(codes & _RESOURCES), None) if pause == "429" else None,
        overloaded=status in _OVERLOADED_STATUSES or status == _PAYMENT_REQUIRED,
        member_failed=member_failed,
    )


def _facts(error: Exception) -> tuple[int | None, object, Mapping[str, Any]]:
    """Return the status, body and headers that an error or its response carries."""
    response: Any = getattr(error, "response", None)
    body: object
    if isinstance(response, Mapping):  # botocore's
        meta: Any = response.get("ResponseMetadata") or {}
        statuses, found = [meta.get("HTTPStatusCode")], [meta.get("HTTPHeaders")]
        body = response.get("Error")
    else:
        names, holding = ("status_code", "status", "code"), (error, response)
        statuses = [getattr(holder, name, None) for holder in holding for name in names]
        found = [getattr(holder, "headers", None) for holder in (response, error)]
        body = {**vars(error), "body": getattr(error, "body", None)}
    known = (each for each in statuses if isinstance(each, int) and 100 <= each < 600)  # noqa: PLR2004
    status = next(map(int, known), None)
    return status, body, next((each for each in found if isinstance(each, Mapping)), {})


def _class_names(error: BaseException | None) -> set[str]:
    """Return the names of the class of an error and of those above it."""
    return {cls.__name__ for cls in type(error).__mro__}


def _causes(error: BaseException | None, *, implicit: bool = True) -> Iterator[BaseException]:
    """Yield an error, its cause, and so on; a chain may be circular."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if implicit else None)


class _Details:
    """What the body and the headers of a refusal say; instants are wall-clock time."""

    __slots__ = ("_headers", "_strings")

    def __init__(self, body: object, headers: Mapping[str, Any]) -> None:
        self._strings = [pair for pair in _values(body) if isinstance(pair[1], str)]
        self._headers = {str(name).lower(): value for name, value in headers.items()}

    @property
    def codes(self) -> set[str]:
        """The codes and types, in lower case; Anthropic's outer type is always "error"."""
        return {text.lower() for name, text in self._strings if name in _NAMES["codes"]} - {"error"}

    @property
    def forbids_retry(self) -> bool:
        """Whether the server asks clients not to try again."""
        return bool(self._headers.get("x-should-retry") == "false")

    def says(self, pattern: re.Pattern[str]) -> bool:
        """Tell whether a code or a message matches."""
        told = _NAMES["messages"] | _NAMES["codes"]
        texts = (text for name, text in self._strings if name in told)
        return any(pattern.search(text[:_MAX_MESSAGE]) for text in texts)

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
        date = http_date(found.get("retry-after"))
        if seconds is None and date is not None:
            sent_at = http_date(found.get("date"))
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


def _values(body: object) -> list[tuple[str, Any]]:
    """Return what is in a body, outermost first, each value with the name of its member."""
    found: list[tuple[str, Any]] = [("", body)]
    for name, value in found:
        members: Iterable[tuple[str, Any]] = ()
        if isinstance(value, Mapping):
            members = ((str(key), member) for key, member in value.items())
        elif isinstance(value, list):
            members = ((name, item) for item in value)
        found += islice(members, _MAX_VALUES - len(found))
    return found


def _reset_in(value: object, now: float) -> float | None:
    """Return the seconds until a reset, which is given in seconds (perhaps as "9.5s") or as an instant."""
    number = _number(value.removesuffix("s") if isinstance(value, str) else value)
    if number is None or number < _EPOCH_SECONDS:
        return None if number is None else _clamp(number)
    return _clamp((number / 1000 if number >= _EPOCH_MILLISECONDS else number) - now)


def _number(value: object) -> float | None:
    found = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    return None if found is None else float(found[1])


def http_date(value: object) -> float | None:
    """Return the instant (s since 1970) of a date as headers write it; None if it is none."""
    if isinstance(value, str) and _HTTP_DATE.fullmatch(value):
        with contextlib.suppress(ValueError):  # a 31st of February, a 25th hour
            return parsedate_to_datetime(value).timestamp()
    return None


def _clamp(seconds: float) -> float:
    return min(max(seconds, 0.0), WEEK)
