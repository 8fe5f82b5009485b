"""What a provider is told and what it tells: options, scripted failures, arrivals, statistics.

How real providers count and answer is a table, `rules.toml`, and no code for any of them. They judge
asyncbucket, so they share nothing with its own profiles. Each names the page that it follows.
"""

import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

from asyncbucket.core.wording import is_number, read_count

NANOSECONDS = 1_000_000_000
_LAST_PORT = 65_535

PolicyName: TypeAlias = Literal[
    "token_bucket", "sliding_window", "fixed_window", "one_second_slices", "ten_second_slices"
]
POLICY_NAMES: Final[tuple[PolicyName, ...]] = get_args(PolicyName)
#: Into how many slices a policy divides a minute.
SLICES: Final[Mapping[str, int]] = {"one_second_slices": 60, "ten_second_slices": 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What one provider does.

    Attributes:
        source: The page that says so.
        reserves: What a call is charged in tokens at admission: the larger of prompt and max_tokens,
            their sum, the prompt alone, or, as only a fake model can know, what the reply will use.
        unlimited_output: What a call without max_tokens is charged for its output.
        settles: Whether the charge is corrected once the reply is done.
        output_counts: How many tokens an output token counts as then.
        counted_in: How a resource is counted, if not as the option `policy` says.
        slices: How many of its headers' limits make up a minute, for each resource.
        headers: The headers about a limit, by its resource; `parts` are which there are.
        reset: How a reset is written: as Go's duration, as a date, or in seconds.
        waits: The headers in which a refusal says how long to wait.
        error: The name of an error's body.
        refusal: The name of the body of a refusal for rate, if that is another.
        refusal_headers: More headers of a refusal.
    """

    source: str
    reserves: Literal["larger", "sum", "prompt", "usage"] = "sum"
    unlimited_output: int = 16
    settles: bool = True
    output_counts: int = 1
    counted_in: Mapping[str, PolicyName] = field(default_factory=dict[str, PolicyName])
    slices: Mapping[str, int] = field(default_factory=dict[str, int])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    parts: tuple[str, ...] = ("limit", "remaining")
    reset: Literal["go", "date", "seconds"] = "seconds"
    waits: tuple[str, ...] = ()
    error: str = "openai"
    refusal: str = ""
    refusal_headers: Mapping[str, str] = field(default_factory=dict[str, str])


RULES: Final[Mapping[str, Rules]] = {
    name: Rules(**rules)
    for name, rules in tomllib.loads(
        files("asyncbucket.testing.provider").joinpath("rules.toml").read_text("utf-8")
    ).items()
}


Latency: TypeAlias = float | tuple[float, float] | Callable[[], float]
"""Seconds a reply takes: fixed, uniform between two, or from a function for each call."""

ChargeRule: TypeAlias = Literal["openai", "usage"]


@dataclass(kw_only=True, eq=False, repr=False)
class Options:
    """How the provider behaves.

    Attributes:
        rpm: Requests a minute; no limit by default.
        tpm: Tokens a minute; no limit by default.
        itpm: Input tokens a minute; no limit by default.
        otpm: Output tokens a minute, counted as they are produced; no limit by default.
        rpd: Requests in 1,440 minutes; no limit by default.
        profile: Whose rules hold, such as bedrock. By default OpenAI's, with Anthropic's headers and
            errors at its endpoint.
        policy: How the limits are counted: token_bucket, sliding_window, fixed_window,
            one_second_slices or ten_second_slices.
        charge: What a call costs in tokens up front: openai (what the profile says, by default the
            larger of the prompt and max_tokens) or usage (what the reply will use).
        concurrency: The most calls in flight; no limit by default.
        latency: Seconds a reply takes, a number or a range; a stream spreads them over its chunks.
        always: A status with which to answer every call.
        reply_tokens: The least length of a text reply, in tokens.
        minute: Seconds a minute lasts. A short one makes tests on a real clock short.
        port: Port on 127.0.0.1; 0 takes a free one.
        clock: The clock of the limits, in integer nanoseconds.

    Raises:
        ValueError: An option is out of its range.
        TypeError: There is no such option, or the clock returns no integers.
    """

    rpm: int | None = None
    tpm: int | None = None
    itpm: int | None = None
    otpm: int | None = None
    rpd: int | None = None
    profile: str | None = None
    policy: PolicyName = "token_bucket"
    charge: ChargeRule = "openai"
    concurrency: int | None = None
    latency: Latency = 0.0
    always: int | None = None
    reply_tokens: int = 0
    minute: float = 60.0
    port: int = 0
    clock: Callable[[], int] = time.monotonic_ns

    def __post_init__(self) -> None:
        for name in ("rpm", "tpm", "itpm", "otpm", "rpd", "concurrency"):
            if getattr(self, name) is not None:
                read_count(getattr(self, name), name, least=1)
        read_count(self.reply_tokens, "reply_tokens")
        if read_count(self.port, "port") > _LAST_PORT:
            raise ValueError(f"port must be at most {_LAST_PORT}, not {self.port}")
        names = {
            "policy": POLICY_NAMES,
            "charge": get_args(ChargeRule),
            "profile": tuple(RULES),
        }
        for name, known in names.items():
            if getattr(self, name) not in known and (name, self.profile) != ("profile", None):
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}"
                )
        if not _is_within(self.minute, 60 / NANOSECONDS):
            raise ValueError(f"minute must be a positive number of seconds, not {self.minute!r}")
        if not callable(self.clock) or not isinstance(self.clock(), int):
            raise TypeError(
                f"clock must return integer nanoseconds, as time.monotonic_ns does, not {self.clock!r}"
            )
        if self.always is not None:
            Failure(self.always)
        _check_latency(self.latency)

    def given(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        values = {each.name: getattr(self, each.name) for each in fields(Options)}
        return {name: value for name, value in values.items() if value != getattr(Options, name)}


@dataclass(frozen=True, slots=True)
class Failure:
    """A scripted failure.

    Attributes:
        status: HTTP status; 429 refuses without charging, any other is admitted, charged and
            then fails, like a call that breaks down inside a provider.
        code: The error's `code`; by default the provider's for that status. With
            `"insufficient_quota"` a 429 says that the account is empty.
        retry_after: Seconds, for `retry-after` and `retry-after-ms`; by default none is sent.
        after_chunks: Break a stream off after this many chunks, instead of answering with `status`.
    """

    status: int = 500
    code: str | None = None
    retry_after: float | None = None
    after_chunks: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.status, int) or self.status // 100 not in (4, 5):
            raise ValueError(f"status must be 400 to 599, not {self.status!r}")
        if self.retry_after is not None and not _is_within(self.retry_after, 0):
            raise ValueError(f"retry_after must be finite and >= 0 s, not {self.retry_after!r}")
        if self.after_chunks is not None:
            read_count(self.after_chunks, "after_chunks")


class Arrival(NamedTuple):
    """One call, as the provider saw it.

    `(arrival.time_ns, arrival.tokens)` of the admitted ones is a trace for `assert_never_over`.
    """

    time_ns: int
    """When it was decided, on the provider's clock (`time.monotonic_ns()` unless set)."""
    endpoint: str
    """The end of the path, such as "chat/completions"."""
    tokens: int
    """What it was or would have been charged."""
    admitted: bool


@dataclass(frozen=True, slots=True)
class ProviderStatistics:
    """A snapshot of what the provider saw since it started.

    Attributes:
        requests: Calls at metered endpoints that could be read, admitted and refused ones.
        admitted: Calls that were charged, including those that then failed.
        refused_429: Refused calls by what refused them: "requests", "tokens", "input_tokens",
            "output_tokens", "daily_requests", "concurrency", "scripted".
        errors: Admitted calls that were made to fail.
        invalid: Calls answered with 400, 401 or 404; they are charged nothing.
        tokens: Tokens charged, as corrected once a reply was done.
        in_flight: Calls that are being answered now.
        peak_in_flight: The most at once.
        disconnected: Calls whose client went away before the end of the reply.
        endpoints: Requests of each endpoint.
    """

    requests: int = 0
    admitted: int = 0
    refused_429: Mapping[str, int] = field(default_factory=dict[str, int])
    errors: int = 0
    invalid: int = 0
    tokens: int = 0
    in_flight: int = 0
    peak_in_flight: int = 0
    disconnected: int = 0
    endpoints: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def refused(self) -> int:
        """All calls answered with 429."""
        return sum(self.refused_429.values())


def _check_latency(latency: Latency) -> None:
    if callable(latency):
        return
    bounds = latency if isinstance(latency, tuple) else (latency, latency)
    are_seconds = len(bounds) == 2 and all(_is_within(bound, 0) for bound in bounds)  # noqa: PLR2004 - a pair
    if not are_seconds or bounds[0] > bounds[1]:
        raise ValueError(f"latency must be seconds >= 0 or (low, high), not {latency!r}")


def _is_within(value: object, least: float, most: float = sys.float_info.max) -> bool:
    return is_number(value) and least <= value <= most
