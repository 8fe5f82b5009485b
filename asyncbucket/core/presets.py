"""What providers publish about their limits, by provider, tier and model; dated, with its source.

Providers change these figures without notice, and an account may have others: the limits page of
your own account is authoritative. A preset is a starting point for transports and wrapped models:
what a provider says in its headers lowers what is available, and never raises it.

The figures are in ``presets.toml``, each with the provider's own page, or a dated copy of it, and
the day on which it was read. Only figures that could be found are there.
"""

import difflib
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from typing import Final

from asyncbucket.core.limits import Limit

__all__ = ["Preset", "PresetWarning", "preset", "preset_names"]

#: A preset this many days old causes a warning.
_OLD: Final = 180


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
            "asyncbucket.presets.preset_names() names all"
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


@cache
def _presets() -> dict[str, Preset]:
    published = tomllib.loads(files("asyncbucket.core").joinpath("presets.toml").read_text("utf-8"))
    return {
        name: Preset(name, tuple(map(Limit.parse, limits)), table["source"], table["dated"])
        for provider, models in published.items()
        for model, table in models.items()
        for tier, limits in table["tiers"].items()
        for name in (f"{provider}/{tier}/{model}",)
    }
