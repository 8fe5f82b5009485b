"""The surroundings: the interpreter, its event loop and clock, and the settings."""

import asyncio
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from asyncbucket import Limiter
from asyncbucket.cli.doctor.findings import Finding, bad, good, note
from asyncbucket.cli.doctor.installed import version_of
from asyncbucket.core.settings import from_env, from_toml, limiters_in_toml

_PREFIX: Final = "ASYNCBUCKET_"
_REMEDY: Final = "correct the table; docs/plan.md shows one"
#: A clock coarser than this (s) admits calls in visible steps.
_COARSE: Final = 0.002


def interpreter() -> Iterator[Finding]:
    """Report the interpreter."""
    number = version_of("asyncbucket") or "(not installed)"
    gil_enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    threads = "" if gil_enabled else ", free-threaded"
    python = ".".join(map(str, sys.version_info[:3]))
    yield good(
        "asyncbucket", f"asyncbucket {number} on {sys.implementation.name} {python}{threads}"
    )


def event_loop(make_loop: Callable[[], Any] = asyncio.new_event_loop) -> Iterator[Finding]:
    """Report which event loop ``asyncio.run`` takes."""
    loop = make_loop()
    loop_name = f"{type(loop).__module__.partition('.')[0]}.{type(loop).__name__}"
    loop.close()
    uvloop_unused = importlib.util.find_spec("uvloop") is not None and not loop_name.startswith(
        "uvloop"
    )
    yield good(
        "event loop", loop_name + (" (uvloop is installed, and not used)" if uvloop_unused else "")
    )


def clock(resolution: float | None = None) -> Iterator[Finding]:
    """Report the clock's resolution."""
    if resolution is None:
        resolution = time.get_clock_info("monotonic").resolution
    if resolution > _COARSE:
        yield note(
            "clock",
            f"time.monotonic() moves in steps of {resolution * 1e3:g} ms: calls pass in such steps",
            "nothing to do: no limit is exceeded by it",
        )
    else:
        yield good("clock", f"time.monotonic() resolves {resolution * 1e9:g} ns")


def environment() -> Iterator[Finding]:
    """Report the settings in the environment, if they can be read."""
    named = sorted(name for name in os.environ if name.startswith(_PREFIX))
    if not named:
        return
    remedy = f"correct or unset {', '.join(named)}"
    yield from _settings("Limiter.from_env()", lambda: from_env(Limiter), remedy)


def project() -> Iterator[Finding]:
    """Report the settings in each table of the nearest TOML file, if they can be read."""
    try:
        names = limiters_in_toml()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        yield bad("settings", str(error), _REMEDY)
        return
    for name in names:
        call = f"Limiter.from_toml({'' if name is None else f'limiter={name!r}'})"
        yield from _settings(call, partial(from_toml, Limiter, limiter=name), _REMEDY)


def _settings(call: str, make: Callable[[], Limiter], remedy: str) -> Iterator[Finding]:
    """Report what ``call`` returns, or why it fails."""
    try:
        with warnings.catch_warnings(record=True, action="always") as caught:
            limiter = make()
    except (ImportError, ValueError) as error:  # also of a store whose extra is missing
        yield bad("settings", str(error), remedy)
        return
    yield good("settings", f"{call}: {_limits_text(limiter)}")
    for warning in caught:
        yield note("settings", str(warning.message), "they may have changed: look there")


def _limits_text(limiter: Limiter) -> str:
    return ", ".join(map(str, limiter.limits)) or f"concurrency {limiter.concurrency}"
