"""What is known of providers: how they charge a call, and which headers report which limit.

The facts are in ``profiles.toml``, one entry for each provider, with its source and the date when it
was read. (`asyncbucket.providers.errors` has the codes of their refusals.) A profile is found by
the host that a request goes to, or given by name, or written by the user::

    class Pictures(Profile):
        def cost(self, call: Call) -> Cost | None:
            return Cost(images=call.body.get("n", 1))


    mine = Pictures(name="mine", settles=frozenset(), tells=(Told("images", 60, "x-left"),))
    httpx.AsyncClient(transport=limiter.transport(profile=mine))

Providers count in two ways. Some charge a call at admission, by what it asks for, and leave it at
that: the lease is charged alike and not corrected by the usage (except for limits of input or
output tokens, which are then the user's own). Others count what was really used, perhaps after they
reserved more: the lease is settled by the usage. Where a provider does not say what it reserves,
the longest reply that is allowed is reserved, which is the safe side.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final

from asyncbucket.engine.cost import Cost
from asyncbucket.levels import excess_of
from asyncbucket.providers import facts
from asyncbucket.providers.request import RequestSize, request_size
from asyncbucket.providers.usage import Usage

_MINUTE: Final = 60
#: Where the name of a model is in a path: Azure's, Google's and Bedrock's.
_IN_PATH: Final = re.compile(r"/(?:deployments|models?)/([^/:]+)")


@dataclass(frozen=True)
class Call:
    """One HTTP request, as a profile sees it."""

    method: str
    host: str
    path: str
    #: The JSON object that is sent; empty if it is none, or is streamed. No repr shows the prompt.
    body: Mapping[str, Any] = field(repr=False)
    #: Tokens that the reply probably stays under, judged by the latest replies.
    foreseen: int = 0
    #: By how much less than usual is reserved for a reply that the call does not limit, so that the
    #: limits can admit it; ``foreseen`` is cut already.
    excess: int = 0

    @functools.cached_property
    def asked(self) -> RequestSize:
        """What the body sends and asks for; nothing unless it is a POST: a GET lists."""
        return request_size(self.path, self.body) if self.method == "POST" else RequestSize()

    @property
    def model(self) -> object:
        """The model that it names, in its body or else in its path; None if it names none."""
        found = None if "model" in self.body else _IN_PATH.search(self.path)
        return self.body.get("model") if found is None else found[1]


@dataclass(frozen=True, slots=True)
class Told:
    """Name the headers that report one limit; ``per`` is its window in seconds."""

    resource: str
    per: float
    remaining: str | None = None
    limit: str | None = None
    #: The header with the time until all is back: seconds, a duration such as ``6m0s``, or a date.
    reset: str | None = None
    #: By how many units ``remaining`` may be rounded down.
    rounding: int = 0
    #: The header with the window that a reply's ``limit`` is for, in seconds, if that varies. A
    #: reply without it does not say what its ``limit`` means.
    period: str | None = None
    #: How many times the number in ``limit`` make up a window.
    times: int = 1
    #: In how many slices the window is counted; a learned limit then spends no more than a slice's
    #: share at once.
    slices: int = 1


#: The default of ``max_tokens`` for completions in OpenAI's API reference, and the number that its
#: rate limits assume (cookbook, "How to handle rate limits"; read in 2025).
_DEFAULT_OUTPUT: Final = 16


def _larger(asked: RequestSize, foreseen: int) -> tuple[int, int, int]:
    """Charge the larger of the estimate by characters and ``max_tokens``.

    "Your rate limit is calculated as the maximum of max_tokens and the estimated number of tokens
    based on the character count of your request": platform.openai.com/docs/guides/rate-limits,
    read in 2025.
    """
    given = asked.by_characters
    return given, asked.output(foreseen), max(given, asked.output(_DEFAULT_OUTPUT))


def _both(asked: RequestSize, foreseen: int) -> tuple[int, int, int]:
    """Charge prompt, ``max_tokens`` and ``best_of``, all estimated at admission.

    learn.microsoft.com/azure/ai-services/openai/how-to/quota, "Understanding rate limits", read in
    2025.
    """
    given = asked.by_characters
    return given, asked.output(foreseen), given + asked.output(_DEFAULT_OUTPUT)


def _expected(asked: RequestSize, foreseen: int) -> tuple[int, int, int]:
    """Charge the prompt, and the output that is expected: ``max_tokens`` reserves nothing."""
    given, received = asked.by_size, asked.expected(foreseen)
    return given, received, given + received


def _prompt_and_output(asked: RequestSize, foreseen: int) -> tuple[int, int, int]:
    """Charge the prompt, and the longest reply that is allowed, or else expected."""
    given = asked.by_size
    received = asked.output(foreseen)
    return given, received, given + received


def _prompt(asked: RequestSize, foreseen: int) -> tuple[int, int, int]:
    """Charge the prompt alone."""
    return asked.by_size, asked.output(foreseen), asked.by_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Say what a provider's calls cost and what its headers mean; override what is different."""

    name: str
    #: Hosts, or domains with all their subdomains, by which it is found; or patterns with ``*``.
    hosts: tuple[str, ...] = ()
    #: The limits that its headers report.
    tells: tuple[Told, ...] = ()
    #: Returns the tokens charged at admission: input, output, and both as the provider counts them.
    charge: Callable[[RequestSize, int], tuple[int, int, int]] = _prompt_and_output
    #: The resources that the usage corrects; if none is limited, replies are not searched.
    settles: frozenset[str] = frozenset({"tokens", "input_tokens", "output_tokens"})
    #: Whether its limits count the part of the input that came from its cache.
    counts_cached: bool = True
    #: Whether it charges a call, until the reply, for what it will read from its cache. None if nobody
    #: knows: then it is taken to do so, unless requests ask it to cache as they ask Anthropic, and it
    #: counts what it reads beside the input.
    reserves_cached: bool | None = None
    #: The tokens that it reserves for a reply whose length the call does not limit; 0 if nobody
    #: knows, so what is foreseen is reserved.
    unlimited_output: int = 0
    #: How many tokens an output token settles as, by the model: the first pattern that matches the
    #: model's name, in the body or in the path; 1 by default.
    output_counts: tuple[tuple[str, int], ...] = ()

    @property
    def caches_unasked(self) -> bool:
        """Whether it caches prompts by itself, and never counts what it reads."""
        return self.reserves_cached is False and not self.counts_cached

    def cost(self, call: Call) -> Cost | None:
        """Return what ``call`` is charged at admission; None lets it pass unpaced.

        That is one request, and tokens if a model reads or writes.
        """
        asked = call.asked
        unlimited = max(call.foreseen, self.unlimited_output - call.excess)
        given, received, both = self.charge(asked, unlimited)
        times = self._output_counts(call)
        if times > 1:  # more may be settled than was reserved
            both = max(both, given + times * asked.expected(call.foreseen))
        return Cost(tokens=both, input_tokens=given, output_tokens=received)

    def settled(self, call: Call, usage: Usage) -> Mapping[str, int]:
        """Return how much of those resources a POST really used, once the usage is known."""
        usage = self.counted(usage)
        more = self._output_counts(call) - 1
        used = {
            "tokens": usage.total + more * usage.output_tokens,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
        }
        return {name: amount for name, amount in used.items() if name in self.settles}

    def _output_counts(self, call: Call) -> int:
        """Return how many tokens an output token settles as."""
        if not self.output_counts:
            return 1
        model = f"{call.body.get('model', '')} {call.path}"
        return next((n for pattern, n in self.output_counts if fnmatchcase(model, pattern)), 1)

    def counted(self, usage: Usage) -> Usage:
        """Return the part of ``usage`` that its limits count."""
        return usage if self.counts_cached else usage.without_cached()


def charge(
    call: Call, profile: Profile, by_way: Iterable[Iterable[tuple[str, int]]]
) -> tuple[Call, Cost | None]:
    """Return ``call`` as it is charged, and its cost: None if it needs no admission.

    A mere forecast must not make a call impossible, so it is cut to what the limits of at least one
    way, given as the units of each resource, can ever admit.
    """
    cost = profile.cost(call)
    excess = 0 if cost is None else excess_of(cost, by_way)
    if excess:
        call = replace(call, foreseen=max(0, call.foreseen - excess), excess=excess)
        cost = profile.cost(call)
    return call, cost


#: How a call is charged at admission, by the names in ``profiles.toml``.
_CHARGES: Final[Mapping[str, Callable[[RequestSize, int], tuple[int, int, int]]]] = {
    "larger": _larger,
    "both": _both,
    "expected": _expected,
    "prompt": _prompt,
}


def _read_profile(name: str, known: dict[str, Any]) -> Profile:
    """Return a provider's profile from its entry in ``profiles.toml``."""
    known["hosts"] = tuple(known.get("hosts", ()))
    known["tells"] = tuple(map(_read_told, known.get("tells", ())))
    known["output_counts"] = tuple(map(tuple, known.get("output_counts", ())))
    if "charge" in known:
        known["charge"] = _CHARGES[known["charge"]]
    if "settles" in known:
        known["settles"] = frozenset(known["settles"])
    return Profile(name=name, **known)


def _read_told(known: dict[str, Any]) -> Told:
    stem = known.pop("headers", None)
    if stem is not None:
        known |= {part: stem.format(part) for part in ("remaining", "limit", "reset")}
    return Told(per=known.pop("per", _MINUTE), **known)


_BY_NAME: Final = {
    name: _read_profile(name, known) for name, known in facts("profiles.toml").items()
}

#: The larger of prompt and ``max_tokens`` is charged at admission, and not corrected.
OPENAI: Final = _BY_NAME["openai"]
#: Prompt and ``max_tokens`` are charged at admission, and not corrected.
AZURE: Final = _BY_NAME["azure"]
#: Prompt and the output that is expected are charged, and corrected by the usage.
ANTHROPIC: Final = _BY_NAME["anthropic"]
#: Prompt and ``max_tokens`` are charged, and corrected by the usage without what came from the cache.
GROQ: Final = _BY_NAME["groq"]
#: Servers and gateways that speak OpenAI's protocol: vLLM, LiteLLM and many more.
GENERIC: Final = _BY_NAME["generic"]


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
        if any(fnmatchcase(f".{host}", f"*.{pattern}") for pattern in profile.hosts):
            return profile
    return GENERIC
