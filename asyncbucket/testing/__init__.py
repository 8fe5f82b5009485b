"""A kit for test suites of paced code, asyncbucket's own among them.

- `virtual_time`: an event loop on which an hour passes in milliseconds.
- `RateLimitedProvider`: a provider on loopback that speaks as OpenAI and Anthropic do, and enforces
  its limits (needs `pip install "asyncbucket[testing]"`). Behind it: `provider` runs it, `endpoints`
  answers, `enforcer` counts and decides, `replies` has its words.
- `assert_never_over`: an exact check that a trace of admissions kept a limit.

The provider is loaded when one of its names is first used, so virtual time needs no web framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from asyncbucket.testing.assertions import BusiestWindow, assert_never_over, assert_within_bucket

# Not lazily: the function has its module's name, and importing the module later would hide it.
from asyncbucket.testing.virtual_time import (
    DeadlockError,
    VirtualClock,
    VirtualTime,
    VirtualTimeLoop,
    virtual_time,
)

if TYPE_CHECKING:
    from asyncbucket.testing.provider import Arrival, ProviderStatistics, RateLimitedProvider

__all__ = [
    "Arrival",
    "BusiestWindow",
    "DeadlockError",
    "ProviderStatistics",
    "RateLimitedProvider",
    "VirtualClock",
    "VirtualTime",
    "VirtualTimeLoop",
    "assert_never_over",
    "assert_within_bucket",
    "virtual_time",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.provider"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
