"""What is known of providers: how they charge a call, and which headers report which limit.

This is the one place for such facts; each has its source and the date when it was read. A profile
is found by the host that a request goes to, or given by name, or written by the user::

    class Pictures(Profile):
        def cost(self, call: Call) -> Cost | None:
            return Cost(images=call.body.get("n", 1))


    mine = Pictures(name="mine", settles=frozenset(), tells=(Told("images", 60, "x-left"),))
    httpx.AsyncClient(transport=limiter.transport(profile=mine))

Providers count in two ways. Some charge a call at admission, by what it asks for, and leave it at
that: the lease is charged alike and not corrected by the usage (except for limits of input or
output tokens, which are then the user's own). Others count what was really used: the lease is
settled by the usage.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from asyncbucket.core.cost import Cost
from asyncbucket.providers.request import RequestSize, request_size
from asyncbucket.providers.usage import Usage

_MINUTE: Final = 60
#: What the user may limit besides the tokens that are counted at admission.
_INPUT_AND_OUTPUT: Final = frozenset({"input_tokens", "output_tokens"})
_DAY: Final = 86_400


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, as a profile sees it."""

    method: str
    host: str
    path: str
    #: The JSON object that is sent; empty if it is none, or is streamed. No repr shows the prompt.
    body: Mapping[str, Any] = field(repr=False)
    #: Tokens that the reply probably stays under, judged by the latest replies.
    foreseen: int = 0


@dataclass(frozen=True, slots=True)
class Told:
    """Name the headers that report one limit; ``per`` is its window in seconds."""

    resource: str
    per: float
    remaining: str
    limit: str | None = None
    #: By how many units ``remaining`` may be rounded down.
    rounding: int = 0


#: The default of ``max_tokens`` for completions in OpenAI's API reference, and the number that its
#: rate limits assume (cookbook, "How to handle rate limits"; read in 2025).
_DEFAULT_OUTPUT: Final = 16


def _openai(asked: RequestSize, foreseen: int) -> tuple[int, int, int]:
    """Charge the larger of the estimate by characters and ``max_tokens``.

    "Your rate limit is calculated as the maximum of max_tokens and the estimated number of tokens
    based on the character count of your request": platform.openai.com/docs/guides/rate-limits,
    read in 2025.
    """
    given = asked.by_characters
    return given, asked.output(foreseen), max(given, asked.output(_DEFAULT_OUTPUT))


def _azure(asked: RequestSize, foreseen: int) -> tuple[int, int, int]:
    """Charge prompt, ``max_tokens`` and ``best_of``, all estimated at admission.

    learn.microsoft.com/azure/ai-services/openai/how-to/quota, "Understanding rate limits", read in
    2025.
    """
    given = asked.by_characters
    return given, asked.output(foreseen), given + asked.output(_DEFAULT_OUTPUT)


def _anthropic(asked: RequestSize, foreseen: int) -> tuple[int, int, int]:
    """Charge the prompt, and the output that is expected.

    Output counts as it is produced, whatever ``max_tokens`` says; input counts without what is
    read from the prompt cache: docs.anthropic.com/en/api/rate-limits, read in 2025.
    """
    given = asked.by_size
    received = 0
    if asked.writes:
        received = foreseen if asked.max_output is None else min(asked.max_output, foreseen)
    return given, received, given + received


def _prompt_and_output(asked: RequestSize, foreseen: int) -> tuple[int, int, int]:
    """Charge the prompt, and the longest reply that is allowed, or else expected."""
    given = asked.by_size
    received = asked.output(foreseen)
    return given, received, given + received


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Say what a provider's calls cost and what its headers mean; override what is different."""

    name: str
    #: Hosts, or domains with all their subdomains, by which it is found.
    hosts: tuple[str, ...] = ()
    #: The limits that its headers report.
    tells: tuple[Told, ...] = ()
    #: Returns the tokens charged at admission: input, output, and both as the provider counts them.
    charge: Callable[[RequestSize, int], tuple[int, int, int]] = _prompt_and_output
    #: The resources that the usage corrects; if none is limited, replies are not searched.
    settles: frozenset[str] = frozenset({"tokens", "input_tokens", "output_tokens"})
    #: Whether its limits count the part of the input that came from its cache.
    counts_cached: bool = True

    def cost(self, call: Call) -> Cost | None:
        """Return what ``call`` is charged at admission; None lets it pass unpaced.

        That is one request, and tokens if a model reads or writes.
        """
        asked = RequestSize()
        if call.method == "POST":  # a GET lists
            asked = request_size(call.path, call.body)
        given, received, both = self.charge(asked, call.foreseen)
        return Cost(tokens=both, input_tokens=given, output_tokens=received)

    def settled(self, call: Call, usage: Usage) -> Mapping[str, int]:  # noqa: ARG002 - others may use it
        """Return how much of those resources a POST really used, once the usage is known."""
        usage = self.counted(usage)
        used = {
            "tokens": usage.total,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
        }
        return {name: amount for name, amount in used.items() if name in self.settles}

    def counted(self, usage: Usage) -> Usage:
        """Return the part of ``usage`` that its limits count."""
        return usage if self.counts_cached else usage.without_cached()


def _ratelimit_headers(resource: str, name: str, *, per: float = _MINUTE) -> Told:
    return Told(
        resource, per, remaining=f"x-ratelimit-remaining-{name}", limit=f"x-ratelimit-limit-{name}"
    )


def _anthropic_headers(resource: str, *, rounding: int = 0) -> Told:
    stem = f"anthropic-ratelimit-{resource.replace('_', '-')}"
    return Told(
        resource, _MINUTE, remaining=f"{stem}-remaining", limit=f"{stem}-limit", rounding=rounding
    )


#: platform.openai.com/docs/guides/rate-limits, "Rate limits in headers", read in 2025. For models
#: with few requests a day the headers report the day instead; `asyncbucket.providers.learn` tells by the
#: limit.
_OPENAI_TELLS: Final = (
    _ratelimit_headers("requests", "requests"),
    _ratelimit_headers("tokens", "tokens"),
    _ratelimit_headers("tokens", "project-tokens"),
)

#: The larger of prompt and ``max_tokens`` is charged at admission, and not corrected.
OPENAI: Final = Profile(
    name="openai",
    hosts=("api.openai.com",),
    tells=_OPENAI_TELLS,
    charge=_openai,
    settles=_INPUT_AND_OUTPUT,
)

#: The same headers. Counters are per minute; requests are also checked over 1 or 10 s.
AZURE: Final = Profile(
    name="azure",
    hosts=("openai.azure.com", "cognitiveservices.azure.com", "services.ai.azure.com"),
    tells=_OPENAI_TELLS,
    charge=_azure,
    settles=_INPUT_AND_OUTPUT,
)

#: docs.anthropic.com/en/api/rate-limits, "Response headers", read in 2025: tokens are rounded to
#: the nearest thousand. ``-tokens-`` is left out, because it reports whichever limit is nearest.
ANTHROPIC: Final = Profile(
    name="anthropic",
    hosts=("api.anthropic.com",),
    tells=(
        _anthropic_headers("requests"),
        _anthropic_headers("input_tokens", rounding=1_000),
        _anthropic_headers("output_tokens", rounding=1_000),
    ),
    charge=_anthropic,
)

#: console.groq.com/docs/rate-limits, "Rate limit headers", read in 2025: requests are per day,
#: tokens per minute. What came from its cache is taken off again once the reply is there: its
#: console, "Prompt caching", read in 2026.
GROQ: Final = Profile(
    name="groq",
    hosts=("api.groq.com",),
    tells=(
        _ratelimit_headers("requests", "requests", per=_DAY),
        _ratelimit_headers("tokens", "tokens"),
    ),
    counts_cached=False,
)

#: Servers and gateways that speak OpenAI's protocol: vLLM, LiteLLM and many more.
GENERIC: Final = Profile(name="generic", tells=_OPENAI_TELLS)

_BY_NAME: Final = {each.name: each for each in (OPENAI, AZURE, ANTHROPIC, GROQ, GENERIC)}


def profile_named(name: str) -> Profile:
    """Return the profile called ``name``.

    Raises:
        ValueError: there is no such profile; the message lists those that exist.
    """
    if name not in _BY_NAME:
        known = ", ".join(_BY_NAME)
        raise ValueError(f"no profile is called {name!r}; known: {known}; or pass one of your own")
    return _BY_NAME[name]


@functools.lru_cache(maxsize=256)
def profile_of(host: str) -> Profile:
    """Return the profile of the provider at ``host``."""
    host = host.lower().rstrip(".")
    for profile in _BY_NAME.values():
        if any(host == domain or host.endswith(f".{domain}") for domain in profile.hosts):
            return profile
    return GENERIC
