"""What a demo runs: how many agents, against which provider, under which limits."""

import math
import os
from dataclasses import dataclass, field
from typing import Final

from asyncbucket.cli import provider
from asyncbucket.core.limits import Limit

#: The bundled provider's limits hold over windows of this length, unless the demo is too short.
WINDOW: Final = 6.0
#: The fewest windows that the paced run takes; with fewer, only the start would be visible.
MIN_WINDOWS: Final = 4
SECONDS: Final = 36.0
RPM: Final = 1_200
#: One call in this many is a batch of embeddings; an agent makes two calls, around its tool.
CALLS_PER_BATCH: Final = 12
CALLS_PER_AGENT: Final = 2
#: What a call takes on average; and the least that a window must hold, or none would ever pass.
TOKENS_PER_CALL: Final = 150
MIN_WINDOW_TOKENS: Final = 250
MODEL: Final = "gpt-4o-mini"
EMBED_MODEL: Final = "text-embedding-3-small"
REAL_AGENTS: Final = 20
CONCURRENCY: Final = 60
REAL_CONCURRENCY: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """The options as given; None for those that were not."""

    agents: int | None = None
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    model: str | None = None
    api_base: str | None = None
    embed_model: str | None = None
    compare: bool = False
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is run.

    Attributes:
        agents: how many run at once.
        batches: how many batches of embeddings run beside them.
        limits: what the provider allows; asyncbucket is told the same.
        concurrency: the most calls in flight, with asyncbucket.
        model: the chat model.
        embed_model: the embedding model, or None for no embeddings.
        api_base: a real provider's URL, or None for the bundled one.
        api_key: the key; never shown.
        compare: whether to run without asyncbucket as well.
    """

    agents: int
    batches: int
    limits: tuple[Limit, ...]
    concurrency: int
    model: str = MODEL
    embed_model: str | None = EMBED_MODEL
    api_base: str | None = None
    api_key: str = field(default="bundled", repr=False)
    compare: bool = True

    def amount(self, resource: str) -> int | None:
        """Return the limit of a resource, if there is one."""
        return next((limit.amount for limit in self.limits if limit.resource == resource), None)

    @property
    def window(self) -> float:
        """The seconds over which the limits hold, the same for all of them."""
        return self.limits[0].per

    @property
    def jobs(self) -> int:
        """Agents and batches together."""
        return self.agents + self.batches


def scenario_of(options: DemoOptions) -> Scenario:
    """Fill in what was not given.

    Raises:
        ValueError: something needed is missing, or an option fits only the other provider.
    """
    if options.model or options.api_base or options.embed_model:
        return _real(options)
    if options.compare:
        raise ValueError("--compare is for a real provider; the bundled one always compares")
    return _bundled(options)


def _bundled(options: DemoOptions) -> Scenario:
    rpm, seconds = options.rpm or RPM, options.seconds or SECONDS
    tpm = options.tpm or max(rpm, RPM) * MIN_WINDOW_TOKENS  # enough for all requests
    window = round(min(WINDOW, seconds / MIN_WINDOWS), 3)
    tokens = _per_window(tpm, window)
    if tokens < MIN_WINDOW_TOKENS:
        raise ValueError(
            f"{tpm:,} tokens a minute are {tokens:,} in the demo's {window:g} s, and a call takes up to "
            f"{MIN_WINDOW_TOKENS}: give --tpm {math.ceil(MIN_WINDOW_TOKENS * 60 / window)} or more"
        )
    calls = min(rpm, tpm / TOKENS_PER_CALL) * seconds / 60
    batches = round(
        (options.agents or calls / CALLS_PER_AGENT) / (CALLS_PER_BATCH / CALLS_PER_AGENT)
    )
    agents = options.agents or max(1, round((calls - batches) / CALLS_PER_AGENT))
    return Scenario(
        agents=agents,
        batches=max(1, batches),
        limits=(
            Limit("requests", _per_window(rpm, window), per=window),
            Limit("tokens", tokens, per=window),
        ),
        concurrency=options.concurrency or CONCURRENCY,
    )


def _per_window(per_minute: int, window: float) -> int:
    return max(1, round(per_minute * window / 60))


def _real(options: DemoOptions) -> Scenario:
    if options.seconds is not None:
        raise ValueError(
            "--seconds and --quick are for the bundled provider; use --agents to say how many "
            "agents ask a real one"
        )
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise ValueError(
            "OPENAI_API_KEY is not set: a real provider needs a key (for a local server any word "
            "will do); `asyncbucket demo` alone runs against the bundled provider and needs none"
        )
    limits = [
        Limit(resource, amount, per=60)
        for resource, amount in (("requests", options.rpm), ("tokens", options.tpm))
        if amount is not None
    ]
    if not limits:
        raise ValueError(
            "give the limits of your key with --rpm and --tpm, e.g. --rpm 500 --tpm 200000"
        )
    if options.api_base is not None:
        provider.check_url(options.api_base)
    agents = options.agents or REAL_AGENTS
    batches = max(1, agents // (CALLS_PER_BATCH // CALLS_PER_AGENT)) if options.embed_model else 0
    return Scenario(
        agents=agents,
        batches=batches,
        limits=tuple(limits),
        concurrency=options.concurrency or REAL_CONCURRENCY,
        model=options.model or MODEL,
        embed_model=options.embed_model,
        api_base=options.api_base or provider.OPENAI,
        api_key=key,
        compare=options.compare,
    )
