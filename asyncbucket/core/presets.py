"""What providers publish about their limits, by provider, tier and model; dated, with its source.

Providers change these figures without notice, and an account may have others: the limits page of
your own account is authoritative. A preset is a starting point for transports and wrapped models:
what a provider says in its headers lowers what is available, and never raises it.

The figures were read on the dates below, on the providers' own pages or in dated copies of them.
Only figures that could be found are here.
"""

import difflib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Final

from asyncbucket.core.limits import Limit

#: A preset this many days old causes a warning.
_OLD: Final = 180
_HOUR: Final = 3_600


class PresetWarning(UserWarning):
    """Say that a preset's figures are old."""


@dataclass(frozen=True, slots=True)
class Preset:
    """The limits that a provider publishes for a tier and a model; iterating yields the limits.

    >>> limiter = Limiter(*preset("openai/tier-1/gpt-4o-mini"), concurrency=20)
    """

    name: str
    limits: tuple[Limit, ...]
    #: The provider's page.
    source: str
    #: When it was read.
    dated: date

    def __iter__(self) -> Iterator[Limit]:
        return iter(self.limits)


@dataclass(frozen=True, slots=True)
class _Page:
    """A page of a provider, and when it was read."""

    source: str
    dated: date


_OPENAI: Final = "https://developers.openai.com/api/docs/models"
_GPT_4O_MINI: Final = _Page(f"{_OPENAI}/gpt-4o-mini", date(2026, 9, 1))
_GPT_41_MINI: Final = _Page(f"{_OPENAI}/gpt-4.1-mini", date(2026, 9, 1))
_GPT_5_MINI: Final = _Page(f"{_OPENAI}/gpt-5-mini", date(2026, 9, 1))
_GPT_54_MINI: Final = _Page(f"{_OPENAI}/gpt-5.4-mini", date(2026, 9, 1))
_EMBEDDING: Final = _Page(f"{_OPENAI}/text-embedding-3-small", date(2026, 10, 5))
_ANTHROPIC: Final = "https://platform.claude.com/docs/en/api/rate-limits"
_CLAUDE: Final = _Page(_ANTHROPIC, date(2026, 8, 11))
_CLAUDE_START: Final = _Page(_ANTHROPIC, date(2026, 8, 24))
_GROQ: Final = _Page("https://console.groq.com/docs/rate-limits", date(2026, 8, 14))
_CEREBRAS: Final = _Page(
    "https://inference-docs.cerebras.ai/support/rate-limits", date(2026, 7, 18)
)
_OPENROUTER: Final = _Page("https://openrouter.ai/docs/api-reference/limits", date(2026, 10, 17))

_MINI: Final = {
    "tier-1": ("500 RPM", "10k RPD", "200k TPM"),
    "tier-2": ("5k RPM", "2M TPM"),
    "tier-3": ("5k RPM", "4M TPM"),
    "tier-4": ("10k RPM", "10M TPM"),
    "tier-5": ("30k RPM", "150M TPM"),
}
_FIVE_MINI: Final = {
    "tier-1": ("500 RPM", "500k TPM"),
    "tier-2": ("5k RPM", "2M TPM"),
    "tier-3": ("5k RPM", "4M TPM"),
    "tier-4": ("10k RPM", "10M TPM"),
    "tier-5": ("30k RPM", "180M TPM"),
}
_EMBEDDINGS: Final = {
    "free": ("100 RPM", "2k RPD", "40k TPM"),
    "tier-1": ("3k RPM", "1M TPM"),
    "tier-2": ("5k RPM", "1M TPM"),
    "tier-3": ("5k RPM", "5M TPM"),
    "tier-4": ("10k RPM", "5M TPM"),
    "tier-5": ("10k RPM", "10M TPM"),
}
_SONNET_AND_HAIKU: Final = {
    "start": ("1k RPM", "2M ITPM", "400k OTPM"),
    "build": ("5k RPM", "5M ITPM", "1M OTPM"),
    "scale": ("10k RPM", "10M ITPM", "2M OTPM"),
}
_GROQ_DEVELOPER: Final = ("1k RPM", "500k RPD", "250k TPM")

#: Provider and model, the page, and the limits of each tier.
_TABLE: Final[tuple[tuple[str, str, _Page, Mapping[str, tuple[str, ...]]], ...]] = (
    ("openai", "gpt-4o-mini", _GPT_4O_MINI, _MINI),
    ("openai", "gpt-4.1-mini", _GPT_41_MINI, _MINI),
    ("openai", "gpt-5-mini", _GPT_5_MINI, _FIVE_MINI),
    ("openai", "gpt-5.4-mini", _GPT_54_MINI, _FIVE_MINI),
    ("openai", "text-embedding-3-small", _EMBEDDING, _EMBEDDINGS),
    ("anthropic", "claude-sonnet-5", _CLAUDE, _SONNET_AND_HAIKU),
    ("anthropic", "claude-haiku-4.5", _CLAUDE, _SONNET_AND_HAIKU),
    ("anthropic", "claude-opus-5", _CLAUDE_START, {"start": _SONNET_AND_HAIKU["start"]}),
    (
        "anthropic",
        "claude-fable-5",
        _CLAUDE_START,
        {"start": ("1k RPM", "500k ITPM", "100k OTPM")},
    ),
    (
        "groq",
        "llama-3.1-8b-instant",
        _GROQ,
        {"free": ("30 RPM", "14.4k RPD", "6k TPM", "500k TPD"), "developer": _GROQ_DEVELOPER},
    ),
    (
        "groq",
        "llama-3.3-70b-versatile",
        _GROQ,
        {
            "free": ("30 RPM", "1k RPD", "12k TPM", "100k TPD"),
            "developer": ("1k RPM", "500k RPD", "300k TPM"),
        },
    ),
    (
        "groq",
        "gpt-oss-120b",
        _GROQ,
        {"free": ("30 RPM", "1k RPD", "8k TPM", "200k TPD"), "developer": _GROQ_DEVELOPER},
    ),
    (
        "groq",
        "gpt-oss-20b",
        _GROQ,
        {"free": ("30 RPM", "1k RPD", "8k TPM", "200k TPD"), "developer": _GROQ_DEVELOPER},
    ),
    (
        "cerebras",
        "gpt-oss-120b",
        _CEREBRAS,
        {
            "free": ("5 RPM", "30k TPM", "1M TPH", "1M TPD"),
            "developer": ("1k RPM", "1M TPM"),
        },
    ),
    (
        "openrouter",
        "any",
        _OPENROUTER,
        {"free": ("20 RPM", "50 RPD"), "free-with-credits": ("20 RPM", "1k RPD")},
    ),
)


def preset(name: str, *, today: date | None = None) -> Preset:
    """Return the published limits called ``"provider/tier/model"``; see `preset_names`.

    >>> limiter = Limiter(*preset("openai/tier-1/gpt-4o-mini"), concurrency=20)

    Args:
        name: such as ``"anthropic/start/claude-sonnet-5"``.
        today: the day on which to judge the age; by default today.

    Raises:
        ValueError: there is no such preset; the message suggests similar names.

    Warns:
        PresetWarning: the figures are over half a year old.
    """
    found = _presets().get(name)
    if found is None:
        names = preset_names()
        similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:3]
        raise ValueError(
            f"no preset is called {name!r}; try e.g. {', '.join(similar)}; "
            "asyncbucket.core.presets.preset_names() names all"
        )
    age = ((date.today() if today is None else today) - found.dated).days  # noqa: DTZ011 - a day more or less
    if age > _OLD:
        warnings.warn(
            f"the limits of {name!r} were read {age} days ago, on {found.dated}: compare them with "
            f"{found.source}",
            PresetWarning,
            stacklevel=2,
        )
    return found


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, in order of provider, model and tier."""
    return tuple(_presets())


def _presets() -> dict[str, Preset]:
    return {
        name: Preset(name, tuple(map(_limit, limits)), page.source, page.dated)
        for provider, model, page, tiers in _TABLE
        for tier, limits in tiers.items()
        for name in (f"{provider}/{tier}/{model}",)
    }


def _limit(text: str) -> Limit:
    """Return a limit; limits over hours or days may be used all at once, as providers allow."""
    limit = Limit.parse(text)
    return replace(limit, burst=limit.amount) if limit.per >= _HOUR else limit
