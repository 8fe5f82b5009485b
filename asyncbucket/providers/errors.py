"""What a failed call means: whether another attempt may succeed, and when.

Errors are judged by their shape, so no SDK needs to be imported: those of OpenAI, Anthropic, httpx
and httpx2 are alike, and others are close enough. What they carry comes from outside; a `Verdict`
contains only a status, a code of a few letters and a clamped number of it. What the body of a
refusal says is in `asyncbucket.providers.details`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import time as wall_clock
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.levels import undo
from asyncbucket.core.pool import PoolLease
from asyncbucket.providers.details import Details

if TYPE_CHECKING:
    from asyncbucket.core.lease import Lease

#: The lowest HTTP status that is an error.
FIRST_ERROR: Final = 400
RATE_LIMITED: Final = 429
_FIRST_SERVER_ERROR: Final = 500
_UNAVAILABLE: Final = 503
_OVERLOADED: Final = 529
#: Payment required: by OpenRouter also if calls in flight may cost more than is left; then it says
#: how long to wait (openrouter.ai/docs/api_reference/limits, read in November 2026).
_PAYMENT_REQUIRED: Final = 402
#: Request time-out, too many requests, unavailable, gateway time-out; Groq's for flex capacity,
#: Anthropic's and Google's.
_OVERLOADED_STATUSES: Final = frozenset({408, RATE_LIMITED, 498, 503, 504, 529})
_TRANSIENT_STATUSES: Final = frozenset({408, 409, RATE_LIMITED, 498})

#: A 429 that will not pass by waiting: OpenAI's help, "Troubleshooting API usage and spend limits",
#: and platform.claude.com/docs/en/api/rate-limits, both read in November 2026.
EXHAUSTED: Final = frozenset(
    {
        "billing_hard_limit_reached",
        "billing_not_active",
        "credit_balance_exhausted",
        "enforced_spend_limit_reached",
        "insufficient_quota",
        "organization_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "project_spend_limit_exceeded",
    }
)
#: A 429 for want of capacity, which concerns only calls of the same service tier: of OpenAI's flex
#: (developers.openai.com/api/docs/guides/flex-processing, read in November 2026), and of Mistral.
_NO_CAPACITY: Final = frozenset({"resource_unavailable", "service_tier_capacity_exceeded"})
#: A bad key, an empty balance, a key without the right.
_NO_ACCESS: Final = frozenset({401, 402, 403})
#: A 404 of Azure's that is about the deployment, which a member of a pool has in its address.
_NO_DEPLOYMENT: Final = "deploymentnotfound"
#: Error events in a stream whose status was 200: OpenAI's `code` and `type`, Anthropic's `type`,
#: and Bedrock's `Code`.
_TRANSIENT_CODES: Final = frozenset(
    {
        "api_error",
        "overloaded_error",
        "rate_limit_error",
        "rate_limit_exceeded",
        "server_error",
        "throttlingexception",
        "timeout_error",
    }
)
_OVERLOADED_CODES: Final = frozenset({"overloaded_error", "timeout_error"})
_RATE_LIMIT_CODES: Final = ("rate_limit", "throttling")
#: Python's own (and asyncio's), the SDKs', httpx's and httpx2's, aiohttp's, requests'. Time-outs
#: while connecting are not among them: they say nothing about calls.
_TIMEOUTS: Final = frozenset(
    {"APITimeoutError", "ReadTimeout", "ServerTimeoutError", "TimeoutError"}
)
#: Python's own, OpenAI's, Anthropic's, httpx's and httpx2's, aiohttp's, requests', botocore's.
_CONNECTION_ERRORS: Final = frozenset(
    {
        "APIConnectionError",
        "ClientConnectionError",
        "ConnectionClosedError",
        "ConnectionError",
        "Timeout",
        "TimeoutError",
        "TransportError",
    }
)
#: Causes that the next attempt would meet again: a wrong URL, header or certificate.
_PERMANENT_ERRORS: Final = frozenset(
    {"LocalProtocolError", "SSLCertVerificationError", "UnsupportedProtocol"}
)
#: Of httpx and httpx2, of aiohttp, and of a limiter beneath: the request was never sent.
_NEVER_SENT: Final = frozenset(
    {
        "AsyncBucketError",
        "ClientConnectorError",
        "ConnectError",
        "ConnectTimeout",
        "ConnectionTimeoutError",
        "PoolTimeout",
        "UnsupportedProtocol",
    }
)
#: Of httpx and httpx2, of aiohttp, of botocore, and Python's own: the provider was not reached.
_UNREACHABLE: Final = frozenset(
    {
        "ClientConnectorError",
        "ConnectError",
        "ConnectTimeout",
        "ConnectTimeoutError",
        "ConnectionRefusedError",
        "ConnectionTimeoutError",
        "EndpointConnectionError",
    }
)
_CODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Say what an error means for the call that met it."""

    #: Whether another attempt may succeed.
    retry: bool
    #: What happened, in a few words; nothing in it is from outside except a status and a code.
    reason: str
    #: Seconds that the server asks to wait, if it says so.
    retry_after: float | None = None
    #: Whether it was refused for rate, which concerns all calls of the limiter.
    rate_limited: bool = False
    #: Whether a quota of a day is used up; ``retry_after`` then is the time until it is full again.
    daily: bool = False
    #: Whether the server was overloaded: fewer calls at once would have helped.
    overloaded: bool = False
    #: Whether the provider, the key or the account failed, not the call: a pool leaves that member
    #: out, and tries another.
    member_failed: bool = False
    #: Whether the account is exhausted, so that no waiting helps.
    exhausted: bool = False
    #: Whether the provider says that it is overloaded, which concerns all calls of the limiter.
    provider_overloaded: bool = False

    @property
    def pause(self) -> str | None:
        """Why all calls of the limiter have to wait, if so."""
        if self.rate_limited:
            return "daily quota" if self.daily else "429"
        return "overload" if self.provider_overloaded else None


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
    retried. (SDKs report a refusal by a limiter beneath them as a lost connection.)
    """
    if isinstance(error, RefusedReply):
        return error.verdict
    # Not `refusal_in`: the refusal of another call, during whose handling this one failed, is no cause.
    refused = any(isinstance(each, AsyncBucketError) for each in _causes(error, implicit=False))
    if refused or not isinstance(error, Exception):
        return Verdict(retry=False, reason=type(error).__name__)
    status, details = _facts(error)
    if status is not None and status >= FIRST_ERROR:
        return judge_reply(status, details)
    codes = details.codes & _TRANSIENT_CODES
    if codes:
        reason = min(codes)
        rate_limited = reason.startswith(_RATE_LIMIT_CODES)
        return Verdict(
            retry=True,
            reason=reason,
            rate_limited=rate_limited,
            overloaded=rate_limited or reason in _OVERLOADED_CODES,
        )
    names = _class_names(error)
    causes = {type(cause).__name__ for cause in _causes(error)}
    explicit = {type(cause).__name__ for cause in _causes(error, implicit=False)}
    return Verdict(
        retry=bool(names & _CONNECTION_ERRORS and not causes & _PERMANENT_ERRORS),
        reason=type(error).__name__,
        overloaded=bool(names & _TIMEOUTS),
        member_failed=bool((names | explicit) & _UNREACHABLE),
    )


def never_sent(error: BaseException | None) -> bool:
    """Tell whether an HTTP client's error means that the request was not sent, so costs nothing.

    Over aiohttp, httpx calls even a reply that never came a time-out of connecting; so there,
    aiohttp's own error counts.
    """
    cause = None if error is None else error.__cause__
    if cause is not None and type(cause).__module__.startswith("aiohttp."):
        error = cause
    return not _class_names(error).isdisjoint(_NEVER_SENT)


def end_failed(lease: "Lease", error: BaseException, *, unsent: bool) -> None:
    """End a call's lease after ``error``: nothing is charged for what is known to be ``unsent``."""
    if unsent:
        undo(lease)
    end_refused(lease, classify(error))


def answered(lease: "Lease") -> None:
    """Note that a call succeeds, whose reply may take long: the member of a pool works."""
    if isinstance(lease, PoolLease):
        lease.member_works()


def end_refused(lease: "Lease", verdict: Verdict) -> None:
    """End a call's lease as the verdict on its failure says; in a pool, its member may be left out."""
    if verdict.member_failed and isinstance(lease, PoolLease):
        lease.member_failed(verdict.reason)
    elif verdict.overloaded:
        lease.overloaded()
    else:
        lease.failed()


def was_refused(error: BaseException) -> bool:
    """Tell whether a provider answered with an error, for which none charges."""
    status = _facts(error)[0] if isinstance(error, Exception) else None
    return status is not None and status >= FIRST_ERROR


def judge_reply(status: int, details: Details) -> Verdict:
    """Judge a reply whose ``status`` is an error, as `classify` does an SDK's error about it."""
    codes, now = details.codes, wall_clock()
    code = next((code for code in sorted(codes) if _CODE.fullmatch(code)), None)
    reason = f"HTTP {status} ({code})" if code else f"HTTP {status}"
    wait = details.retry_after(now)
    transient = status in _TRANSIENT_STATUSES or status >= _FIRST_SERVER_ERROR
    transient |= status == _PAYMENT_REQUIRED and wait is not None
    refused = status == RATE_LIMITED
    exhausted = bool(codes & EXHAUSTED) or (refused and details.is_monthly)
    member_failed = (
        exhausted
        or (status in _NO_ACCESS and not transient)
        or _NO_DEPLOYMENT in codes
        or (status >= _FIRST_SERVER_ERROR and not details.forbids_retry)
    )
    if not transient or exhausted or details.forbids_retry:
        return Verdict(retry=False, reason=reason, member_failed=member_failed, exhausted=exhausted)
    rate_limited = refused and not codes & _NO_CAPACITY
    daily = rate_limited and details.is_daily
    says_so = wait is not None or "overloaded" in reason
    return Verdict(
        retry=True,
        reason=reason,
        retry_after=details.until_next_day(now) if daily else wait,
        rate_limited=rate_limited,
        daily=daily,
        overloaded=status in _OVERLOADED_STATUSES or status == _PAYMENT_REQUIRED,
        member_failed=member_failed,
        provider_overloaded=status == _OVERLOADED or (status == _UNAVAILABLE and says_so),
    )


def _facts(error: Exception) -> tuple[int | None, Details]:
    """Return the status that an error or its response carries, and what else they say."""
    response: Any = getattr(error, "response", None)
    body: object
    if isinstance(response, Mapping):  # botocore's
        meta = _mapping(response.get("ResponseMetadata"))
        statuses, found = [meta.get("HTTPStatusCode")], [meta.get("HTTPHeaders")]
        body = response.get("Error")
    else:
        names, holding = ("status_code", "status", "code"), (error, response)
        statuses = [getattr(holder, name, None) for holder in holding for name in names]
        found = [getattr(holder, "headers", None) for holder in (response, error)]
        body = {**vars(error), "body": getattr(error, "body", None)}
    status = next((int(value) for value in statuses if _is_status(value)), None)
    return status, Details(body, next((each for each in found if isinstance(each, Mapping)), {}))


def _is_status(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 100 <= value < 600  # noqa: PLR2004 - HTTP's range


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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
