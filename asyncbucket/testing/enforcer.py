"""What the bundled provider is told, and which calls get in.

A call is admitted by all limits or charged by none, in one step at one instant. A refused call costs
nothing; an admitted one is charged even if it fails. All public methods of the enforcer may be called
from any thread.

How real providers count and answer is a table, `rules.toml`, and no code for any of them. Each names
the page that it follows.
"""

import math
import random
import threading
import time
import tomllib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

from asyncbucket.engine.wording import is_number, read_count
from asyncbucket.testing.counting import POLICIES, Counting, Policy, PolicyName, ceil
from asyncbucket.testing.prompt_cache import Cache, PromptCache

NANOSECONDS: Final = 1_000_000_000
MILLISECOND: Final = 1_000_000
TOO_MANY_REQUESTS: Final = 429

#: What is limited, by which option, and how a refusal calls it.
LIMITS: Final[Mapping[str, tuple[str, str]]] = {
    "requests": ("rpm", "requests per min (RPM)"),
    "tokens": ("tpm", "tokens per min (TPM)"),
    "input_tokens": ("itpm", "input tokens per min (ITPM)"),
    "output_tokens": ("otpm", "output tokens per min (OTPM)"),
    "daily_requests": ("rpd", "requests per day (RPD)"),
    "concurrency": ("concurrency", "concurrent requests"),
}
_MINUTES_OF_A_DAY: Final = 1_440
_ARRIVALS_KEPT: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What one provider does.

    Attributes:
        source: The page that says so.
        reserves: What a call is charged in tokens at admission: the larger of prompt and max_tokens,
            their sum, the prompt alone, or, as only a fake model can know, what the reply will use.
        unlimited_output: What a call without max_tokens is charged for its output.
        settles: Whether the charge is corrected once the reply is done.
        counts_cached: Whether what is read from the prompt cache is charged, too.
        output_counts: How many tokens an output token counts as then.
        counted_in: How a resource is counted, if not as the option `policy` says.
        slices: How many of its headers' limits make up a minute, for each resource.
        headers: The headers about a limit, by its resource; `parts` are which there are.
        reset: How a reset is written: as Go's duration, as a date, or in seconds.
        rounding: To what the headers round the tokens that remain.
        waits: The headers in which a refusal says how long to wait.
        error: The name of an error's body.
        refusal: The name of the body of a refusal for rate, if that is another.
        refusal_headers: More headers of a refusal.
    """

    source: str = ""
    reserves: Literal["larger", "sum", "prompt", "usage"] = "sum"
    unlimited_output: int = 16
    settles: bool = True
    counts_cached: bool = True
    output_counts: int = 1
    counted_in: Mapping[str, PolicyName] = field(default_factory=dict[str, PolicyName])
    slices: Mapping[str, int] = field(default_factory=dict[str, int])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    parts: tuple[str, ...] = ("limit", "remaining")
    reset: Literal["go", "date", "seconds"] = "seconds"
    rounding: int = 1
    waits: tuple[str, ...] = ()
    error: str = "openai"
    refusal: str = ""
    refusal_headers: Mapping[str, str] = field(default_factory=dict[str, str])


RULES: Final[Mapping[str, Rules]] = {
    name: Rules(**rules)
    for name, rules in tomllib.loads(
        files("asyncbucket.testing").joinpath("rules.toml").read_text("utf-8")
    ).items()
}


ChargeRule: TypeAlias = Literal["openai", "usage"]


@dataclass(kw_only=True, eq=False, repr=False)
class Options:
    """How the provider behaves.

    Limits and most others may be set later, too, while it runs; what was used stays used. Profile,
    policy, cache and minute may not.

    Attributes:
        rpm: Requests a minute; no limit by default.
        tpm: Tokens a minute; no limit by default.
        itpm: Input tokens a minute; no limit by default.
        otpm: Output tokens a minute, counted as they are produced; no limit by default.
        rpd: Requests in 1,440 minutes; no limit by default.
        profile: The provider to imitate, such as bedrock (in Python also `Rules` of your own). By
            default OpenAI, with Anthropic's headers and errors at its endpoint.
        policy: How limits are counted: token_bucket (the default), sliding_window, fixed_window,
            one_second_slices or ten_second_slices (in Python also a `Counting`, or one of these for
            each resource).
        charge: What a call costs in tokens when it arrives: openai (what the profile says, by default
            the larger of the prompt and max_tokens) or usage (what the reply will use).
        concurrency: The most calls in flight; no limit by default.
        latency: Seconds that a reply takes, 0.2, or a range, 0.1,0.3; a stream spreads them over its
            chunks.
        begins: After which part of its latency a reply begins, from 0 to 1.
        accidents: The fraction of calls, from 0 to 1, that get a 429 that names no wait, whatever is left.
        cache: A cache of prompts; none by default.
        always: A status with which to answer every call.
        reply_tokens: The least length of a text reply, in tokens.
        minute: Seconds that a minute of the limits lasts; a short one makes tests short.
        port: Port on 127.0.0.1; 0 takes a free one.
        clock: The clock of the limits, in integer nanoseconds.

    Raises:
        ValueError: An option is out of its range.
        TypeError: There is no such option, or the clock returns no integers.
        AttributeError: An option that may not be set later is.
    """

    rpm: int | None = None
    tpm: int | None = None
    itpm: int | None = None
    otpm: int | None = None
    rpd: int | None = None
    profile: str | Rules | None = None
    policy: PolicyName | Counting | Mapping[str, PolicyName | Counting] = "token_bucket"
    charge: ChargeRule = "openai"
    concurrency: int | None = None
    latency: float | tuple[float, float] = 0.0
    begins: float = 0.1
    accidents: float = 0.0
    cache: Cache | None = None
    always: int | None = None
    reply_tokens: int = 0
    minute: float = 60.0
    port: int = 0
    clock: Callable[[], int] = time.monotonic_ns

    def __post_init__(self) -> None:
        for name, _ in LIMITS.values():
            if getattr(self, name) is not None:
                read_count(getattr(self, name), name, least=1)
        read_count(self.reply_tokens, "reply_tokens")
        profile = None if isinstance(self.profile, Rules) else self.profile
        _check_name("charge", self.charge, get_args(ChargeRule))
        _check_name("profile", profile, (None, *RULES))
        for name in ("begins", "accidents"):
            if not _are_seconds(getattr(self, name)) or getattr(self, name) > 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)!r}")
        self.countings()
        if not _are_seconds(self.minute) or not self.minute:
            raise ValueError(f"minute must be a positive number of seconds, not {self.minute!r}")
        if not callable(self.clock) or not isinstance(self.clock(), int):
            raise TypeError(f"clock must return integer nanoseconds, not {self.clock!r}")
        if self.always is not None:
            Failure(self.always)
        latencies = self.latencies()
        if [*map(_are_seconds, latencies)] != [True, True] or latencies[0] > latencies[1]:
            raise ValueError(f"latency must be seconds >= 0 or (low, high), not {self.latency!r}")

    def rules(self) -> Rules | None:
        """Return whose rules hold, if not each endpoint's."""
        return RULES[self.profile] if isinstance(self.profile, str) else self.profile

    def countings(self) -> Mapping[str, Counting]:
        """Return how each limit is counted, but for those of the day and of concurrency."""
        named, rules = self.policy, self.rules()
        known = [name for name in LIMITS if name not in ("daily_requests", "concurrency")]
        each = dict(named) if isinstance(named, Mapping) else dict.fromkeys(known, named)
        each = {
            **dict.fromkeys(known, "token_bucket"),
            **each,
            **(rules.counted_in if rules else {}),
        }
        for name, counting in each.items():
            _check_name("policy", name, known)
            _check_name(
                "policy", "token_bucket" if isinstance(counting, Counting) else counting, POLICIES
            )
        return {name: POLICIES[how] if isinstance(how, str) else how for name, how in each.items()}

    def latencies(self) -> tuple[float, float]:
        """Return the shortest and the longest latency."""
        return self.latency if isinstance(self.latency, tuple) else (self.latency, self.latency)


@dataclass(frozen=True, slots=True)
class Failure:
    """A scripted failure; `RateLimitedProvider.fail_next` explains its members."""

    status: int = 500
    code: str | None = None
    retry_after: float | None = None
    after_chunks: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.status, int) or self.status // 100 not in (4, 5):
            raise ValueError(f"status must be 400 to 599, not {self.status!r}")
        if self.retry_after is not None and not _are_seconds(self.retry_after):
            raise ValueError(f"retry_after must be finite and >= 0 s, not {self.retry_after!r}")
        if self.after_chunks is not None:
            read_count(self.after_chunks, "after_chunks")

    def error(self) -> "CallError":
        """Return what the call is answered with."""
        message = f"The provider was told to answer with {self.status}."
        kind = self.code if self.code == "insufficient_quota" else None
        wait = None if self.retry_after is None else round(self.retry_after * NANOSECONDS)
        return CallError(self.status, message, kind, self.code, wait)


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
            "output_tokens", "daily_requests", "concurrency", "scripted", "accident".
        errors: Admitted calls that were made to fail.
        tokens: Tokens charged, as corrected once a reply was done.
        in_flight: Calls that are being answered now.
        peak_in_flight: The most at once.
        disconnected: Calls whose client went away before the end of the reply.
        cache_writes: Calls that wrote to the prompt cache.
        cache_reads: Calls that read from it.
        others_sent: Calls of others.
        others_refused: Those that were refused.
        endpoints: Requests of each endpoint.
    """

    requests: int = 0
    admitted: int = 0
    refused_429: Mapping[str, int] = field(default_factory=dict[str, int])
    errors: int = 0
    tokens: int = 0
    in_flight: int = 0
    peak_in_flight: int = 0
    disconnected: int = 0
    cache_writes: int = 0
    cache_reads: int = 0
    others_sent: int = 0
    others_refused: int = 0
    endpoints: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def refused(self) -> int:
        """All calls answered with 429."""
        return sum(self.refused_429.values())


def _check_name(option: str, value: object, known: Collection[str | None]) -> None:
    if value not in known:
        some = ", ".join(filter(None, known))
        raise ValueError(f"{option} must be one of {some}, not {value!r}")


def _are_seconds(value: object) -> bool:
    return is_number(value) and 0 <= value < math.inf


@dataclass(eq=False)
class CallError(Exception):
    """What a call is answered with in place of a reply.

    Attributes:
        status: The HTTP status.
        message: For people.
        kind: OpenAI's type; by default that of the status.
        code: OpenAI's code; by default that of the status.
        wait: Nanoseconds until the call would pass, if that is told.
        refused: The resource that refuses it for rate.
    """

    status: int
    message: str
    kind: str | None = None
    code: str | None = None
    wait: int | None = None
    refused: str = ""

    @property
    def seconds(self) -> int:
        """Whole seconds until the call would pass."""
        return ceil(self.wait or 0, NANOSECONDS)


class Enforcer:
    """Decide about calls, and keep a record of them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        #: Whose rules hold, if not each endpoint's.
        self.rules = options.rules()
        self.cache = None if options.cache is None else PromptCache(options.cache)
        self._lock = threading.Lock()
        minute = round(options.minute * NANOSECONDS)
        self._policies = {name: Policy(how, minute) for name, how in options.countings().items()}
        self._policies["daily_requests"] = Policy("fixed_window", minute * _MINUTES_OF_A_DAY)
        self._scripted: deque[Failure] = deque()
        self._accidents = random.Random(1)  # noqa: S311 - repeatable, not secret
        self._latencies = random.Random(0)  # noqa: S311 - repeatable, not secret
        self._arrivals: deque[Arrival] = deque(maxlen=_ARRIVALS_KEPT)
        self._refused: Counter[str] = Counter()
        self._endpoints: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def enter(self, endpoint: str, model: str, costs: Mapping[str, int]) -> Failure | None:
        """Admit a call, which must `leave`, and return how it then fails, if it does.

        Args:
            endpoint: The end of its path.
            model: Which model it is for.
            costs: What it costs besides being a request, in tokens at least.

        Raises:
            CallError: It is refused: for rate, or by a failure with status 429.
        """
        costs = {"requests": 1, "daily_requests": 1, **costs}
        with self._lock:
            now = self.options.clock()
            failure = Failure(self.options.always) if self.options.always else None
            if self._scripted:
                failure = self._scripted[0]
            told = failure.error() if failure and failure.status == TOO_MANY_REQUESTS else None
            refusal = told or self._refusal(costs, model, now) or self._accident()
            if self._scripted and refusal is told:  # one that is refused for rate uses up none
                self._scripted.popleft()
            self._endpoints[endpoint] += 1
            self._arrivals.append(Arrival(now, endpoint, costs["tokens"], refusal is None))
            if refusal is not None:
                self._refused[refusal.refused or "scripted"] += 1
                raise refusal
            self._charge(costs, now)
            counts = self._counts
            counts["admitted"] += 1
            counts["errors"] += failure is not None
            counts["in_flight"] += 1
            counts["peak_in_flight"] = max(counts["peak_in_flight"], counts["in_flight"])
            return failure

    def leave(self, corrections: Mapping[str, int] | None) -> None:
        """Give the slot of an admitted call back, and correct its charge by these differences.

        None says that its client went away before the end.
        """
        with self._lock:
            self._counts["in_flight"] -= 1
            self._counts["disconnected"] += corrections is None
            self._charge(corrections or {}, self.options.clock())

    def count(self, *names: str) -> None:
        """Count what else happens to a call, by a name of `ProviderStatistics`."""
        with self._lock:
            self._counts.update(names)

    def draw_latency(self) -> float:
        """Return the seconds that the next reply takes."""
        return self._latencies.uniform(*self.options.latencies())

    def budget(self) -> list[tuple[str, int, int, int]]:
        """Return for each limit its name, amount, what remains, and nanoseconds until it is full."""
        with self._lock:
            now = self.options.clock()
            return [
                (name, limit, policy.remaining(limit, now), policy.reset(limit, now))
                for name, limit, policy in self._limits()
            ]

    def statistics(self) -> ProviderStatistics:
        """Take a consistent snapshot."""
        with self._lock:
            return ProviderStatistics(
                requests=sum(self._endpoints.values()),
                refused_429=dict(self._refused),
                endpoints=dict(self._endpoints),
                others_sent=sum(each.others_sent for each in self._policies.values()),
                others_refused=sum(each.others_refused for each in self._policies.values()),
                **self._counts,
            )

    def arrivals(self) -> list[Arrival]:
        """Copy the latest arrivals, oldest first."""
        with self._lock:
            return list(self._arrivals)

    def fail_next(self, count: int, failure: Failure) -> None:
        """Let the next `count` calls fail, after those scripted before; 0 forgets all of them."""
        read_count(count, "count")
        with self._lock:
            if count:
                self._scripted.extend([failure] * count)
            else:
                self._scripted.clear()

    def _limits(self) -> Iterator[tuple[str, int, Policy]]:
        for name, policy in self._policies.items():
            limit: int | None = getattr(self.options, LIMITS[name][0])
            if limit is not None:
                yield name, limit, policy

    def _refusal(self, costs: Mapping[str, int], model: str, now: int) -> CallError | None:
        """Return which limit refuses a call: the one for which it would wait longest."""
        slots, in_flight = self.options.concurrency, self._counts["in_flight"]
        if slots is not None and in_flight >= slots:
            return _refused(model, "concurrency", slots, in_flight, 1, None)
        refusals: list[CallError] = []
        for name, limit, policy in self._limits():
            amount = costs.get(name, 0)
            wait = policy.wait(amount, limit, now)
            if wait != 0:
                used = limit - policy.remaining(limit, now)
                refusals.append(_refused(model, name, limit, used, amount, wait))
        return max(refusals, key=lambda each: (each.wait is None, each.wait or 0), default=None)

    def _accident(self) -> CallError | None:
        """Return a refusal for no reason, once in a while."""
        if not self.options.accidents or self._accidents.random() >= self.options.accidents:
            return None
        message = (
            "Provider returned error: upstream is temporarily rate-limited. Please retry shortly."
        )
        return CallError(TOO_MANY_REQUESTS, message, refused="accident")

    def _charge(self, costs: Mapping[str, int], now: int) -> None:
        for name, limit, policy in self._limits():
            policy.charge(costs.get(name, 0), limit, now)
        self._counts["tokens"] += costs.get("tokens", 0)


def _refused(
    model: str, name: str, limit: int, used: int, amount: int, wait: int | None
) -> CallError:
    """Return a 429 for rate, in OpenAI's words."""
    advice = "It is larger than the limit and can never pass."
    if wait is not None:
        advice = f"Please try again in {go_duration(wait)}."
    elif name == "concurrency":
        advice = "Please try again when one of them is done."
    message = (
        f"Rate limit reached for {model} on {LIMITS[name][1]}: Limit {limit}, Used {used}, "
        f"Requested {amount}. {advice}"
    )
    kind = "tokens" if name == "tokens" else "requests"
    return CallError(TOO_MANY_REQUESTS, message, kind, wait=wait, refused=name)


def go_duration(nanoseconds: int) -> str:
    """Return a duration in Go's format, in whole milliseconds rounded up: 120ms, 8.64s, 6m0s."""
    minutes, milliseconds = divmod(ceil(nanoseconds, MILLISECOND), 60_000)
    if minutes:
        return f"{minutes}m{milliseconds / 1000:g}s"
    return f"{milliseconds}ms" if 0 < milliseconds < 1000 else f"{milliseconds / 1000:g}s"  # noqa: PLR2004 - a second
