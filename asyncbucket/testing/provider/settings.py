"""The provider's settings, in one place: names, types, defaults and checks."""

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypedDict, get_args

from asyncbucket.core.wording import is_number, read_count
from asyncbucket.testing.provider.policies import POLICY_NAMES, SLICES, PolicyName

NANOSECONDS = 1_000_000_000
_LIMITS = ("rpm", "tpm", "concurrency")
_MINIMUMS = {"default_max_tokens": 0, "reply_tokens": 0, "dimensions": 1, "history": 0}
_LAST_PORT = 65_535

Latency: TypeAlias = float | tuple[float, float] | Callable[[], float]
"""Seconds a reply takes: fixed, uniform between two, or from a function for each call."""

ChargeRule: TypeAlias = Literal["openai", "azure", "usage"]
CHARGE_RULES: tuple[ChargeRule, ...] = get_args(ChargeRule)


@dataclass(frozen=True, slots=True)
class Failure:
    """A scripted failure.

    Attributes:
        status: HTTP status; 429 refuses without charging, any other is admitted, charged and
            then fails, like a call that breaks down inside a provider.
        code: The error's `code`; by default OpenAI's for that status. With
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
        if self.retry_after is not None and not _is_in_range(self.retry_after, 0):
            raise ValueError(f"retry_after must be finite and >= 0 s, not {self.retry_after!r}")
        if self.after_chunks is not None:
            read_count(self.after_chunks, "after_chunks")


class Options(TypedDict, total=False):
    """The keywords of `RateLimitedProvider` and `ProviderProcess`; see `Settings`."""

    rpm: int | None
    tpm: int | None
    policy: PolicyName
    charge: ChargeRule
    concurrency: int | None
    latency: Latency
    error_rate: float
    always: int | None
    seed: int
    minute: float
    default_max_tokens: int
    reply_tokens: int
    dimensions: int
    history: int
    port: int
    clock: Callable[[], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the provider behaves.

    Attributes:
        rpm: Requests a minute; None for no limit.
        tpm: Tokens a minute; None for no limit.
        policy: How both are counted, see `policies`.
        charge: What a call costs in tokens at admission, see `charging`.
        concurrency: The most calls in flight; None for no limit.
        latency: Seconds a reply takes; a stream spreads them over its chunks.
        error_rate: Fraction of admitted calls that fail with a 500, drawn at random from `seed`.
        always: Answer every call with this status.
        seed: The seed of latencies and errors.
        minute: Seconds a minute lasts. A short one makes tests on a real clock short.
        default_max_tokens: What a call without `max_tokens` is charged for its output.
        reply_tokens: Length to which text replies are padded.
        dimensions: Length of an embedding if the request doesn't say.
        history: How many arrivals are kept, the latest ones.
        port: Port on 127.0.0.1; 0 takes a free one.
        clock: The policies' clock, in integer nanoseconds.
    """

    rpm: int | None = None
    tpm: int | None = None
    policy: PolicyName = "token_bucket"
    charge: ChargeRule = "openai"
    concurrency: int | None = None
    latency: Latency = 0.0
    error_rate: float = 0.0
    always: int | None = None
    seed: int = 0
    minute: float = 60.0
    default_max_tokens: int = 16
    reply_tokens: int = 0
    dimensions: int = 64
    history: int = 1_000_000
    port: int = 0
    clock: Callable[[], int] = time.monotonic_ns

    def __post_init__(self) -> None:
        self._check_counts()
        for name, known in (("policy", POLICY_NAMES), ("charge", CHARGE_RULES)):
            value: str = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if not _is_in_range(self.error_rate, 0, 1):
            raise ValueError(f"error_rate must be a share from 0 to 1, not {self.error_rate!r}")
        if not _is_in_range(self.minute, SLICES / NANOSECONDS):
            raise ValueError(f"minute must be a positive number of seconds, not {self.minute!r}")
        if not callable(self.clock) or not isinstance(self.clock(), int):
            raise TypeError(
                f"clock must return integer nanoseconds, as time.monotonic_ns does, not {self.clock!r}"
            )
        if self.always is not None:
            Failure(self.always)
        _check_latency(self.latency)

    def _check_counts(self) -> None:
        for name in _LIMITS:
            if getattr(self, name) is not None:
                read_count(getattr(self, name), name, least=1)
        for name, least in _MINIMUMS.items():
            read_count(getattr(self, name), name, least=least)
        if read_count(self.port, "port") > _LAST_PORT:
            raise ValueError(f"port must be at most {_LAST_PORT}, not {self.port}")

    @property
    def minute_ns(self) -> int:
        """The length of a minute in nanoseconds."""
        return round(self.minute * NANOSECONDS)


def settings_of(options: Options, base: Settings | None = None) -> Settings:
    """Return the settings ``base``, by default those that hold for all, with ``options`` in their place.

    Raises:
        TypeError: there is no such option.
    """
    known = Options.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(
                f"{name!r} is not an option of the provider: give one of {', '.join(known)}"
            )
    return replace(base or Settings(), **options)


def draw_latency(latency: Latency, rng: random.Random) -> float:
    """Return the seconds that one reply takes."""
    if callable(latency):
        return latency()
    if isinstance(latency, tuple):
        return rng.uniform(*latency)
    return latency


def _check_latency(latency: Latency) -> None:
    if callable(latency):
        return
    bounds = latency if isinstance(latency, tuple) else (latency, latency)
    are_seconds = len(bounds) == 2 and all(_is_in_range(bound, 0) for bound in bounds)  # noqa: PLR2004 - a pair
    if not are_seconds or bounds[0] > bounds[1]:
        raise ValueError(f"latency must be seconds >= 0 or (low, high), not {latency!r}")


def _is_in_range(value: object, least: float, most: float = sys.float_info.max) -> bool:
    return is_number(value) and least <= value <= most
