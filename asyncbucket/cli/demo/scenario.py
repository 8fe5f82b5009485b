"""What a demo runs: how many agents, against which provider, under which limits."""

import math
import os
from dataclasses import dataclass, field
from typing import Final

from asyncbucket.cli import provider
from asyncbucket.limits import Limit

#: The bundled provider's limits hold over windows of this length, unless the demo is too short.
WINDOW: Final = 6.0
#: The fewest windows that the paced run takes; with fewer, only the start would be visible.
WINDOWS: Final = 4
SECONDS: Final = 36.0
RPM: Final = 1_200
#: One call in this many is a batch of embeddings; an agent makes two calls, around its tool.
A_BATCH_IN: Final = 12
CALLS_OF_AN_AGENT: Final = 2
#: What a call takes on average; and the least that a window must hold, or none would ever pass.
TOKENS_OF_A_CALL: Final = 150
TOKENS_AT_LEAST: Final = 250
MODEL: Final = "gpt-4o-mini"
EMBED_MODEL: Final = "text-embedding-3-small"
AGENTS_OF_A_REAL_DEMO: Final = 20
CONCURRENCY: Final = 60
CONCURRENCY_OF_A_REAL_DEMO: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
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


def scenario_of(wish: Wish) -> Scenario:
    """Fill in what was not given.

    Raises:
        ValueError: something needed is missing, or an option fits only the other provider.
    """
    if wish.model or wish.api_base or wish.embed_model:
        return _real(wish)
    if wish.compare:
        raise ValueError("--compare is for a real provider; the bundled one always compares")
    return _bundled(wish)


def _bundled(wish: Wish) -> Scenario:
    rpm, seconds = wish.rpm or RPM, wish.seconds or SECONDS
    tpm = wish.tpm or max(rpm, RPM) * TOKENS_AT_LEAST  # enough for all requests
    window = round(min(WINDOW, seconds / WINDOWS), 3)
    tokens = _in_window(tpm, window)
    if tokens < TOKENS_AT_LEAST:
        raise ValueError(
            f"{tpm:,} tokens a minute are {tokens:,} in the demo's {window:g} s, and a call takes up to "
            f"{TOKENS_AT_LEAST}: give --tpm {math.ceil(TOKENS_AT_LEAST * 60 / window)} or more"
        )
    calls = min(rpm, tpm / TOKENS_OF_A_CALL) * seconds / 60
    batches = round((wish.agents or calls / CALLS_OF_AN_AGENT) / (A_BATCH_IN / CALLS_OF_AN_AGENT))
    agents = wish.agents or max(1, round((calls - batches) / CALLS_OF_AN_AGENT))
    return Scenario(
        agents=agents,
        batches=max(1, batches),
        limits=(
            Limit("requests", _in_window(rpm, window), per=window),
            Limit("tokens", tokens, per=window),
        ),
        concurrency=wish.concurrency or CONCURRENCY,
    )


def _in_window(a_minute: int, window: float) -> int:
    return max(1, round(a_minute * window / 60))


def _real(wish: Wish) -> Scenario:
    if wish.seconds is not None:
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
        for resource, amount in (("requests", wish.rpm), ("tokens", wish.tpm))
        if amount is not None
    ]
    if not limits:
        raise ValueError(
            "give the limits of your key with --rpm and --tpm, e.g. --rpm 500 --tpm 200000"
        )
    if wish.api_base is not None:
        provider.check(wish.api_base)
    agents = wish.agents or AGENTS_OF_A_REAL_DEMO
    batches = max(1, agents // (A_BATCH_IN // CALLS_OF_AN_AGENT)) if wish.embed_model else 0
    return Scenario(
        agents=agents,
        batches=batches,
        limits=tuple(limits),
        concurrency=wish.concurrency or CONCURRENCY_OF_A_REAL_DEMO,
        model=wish.model or MODEL,
        embed_model=wish.embed_model,
        api_base=wish.api_base or provider.OPENAI,
        api_key=key,
        compare=wish.compare,
    )
