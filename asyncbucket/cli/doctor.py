"""`asyncbucket doctor`: what is installed and configured here, what is wrong, and the remedy."""

import asyncio
import json
import os
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Final, Literal, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from asyncbucket import Limit, Limiter, StoreError
from asyncbucket.cli import FAILED, options
from asyncbucket.core.settings import from_env, from_toml, limiters_in_toml
from asyncbucket.core.wording import one_line
from asyncbucket.frameworks import FRAMEWORKS
from asyncbucket.stores import Batch, LimitConfig, open_store, without_password

#: Columns of what stands before each finding.
_INDENT: Final = 6
_STYLES: Final = {"good": ("ok", "green"), "note": ("note", "yellow"), "bad": ("BAD", "red")}
#: Each SDK: its package, which is its module too, and the first major version that uses httpx2.
_SDKS: Final = {"openai": 3, "anthropic": 1}
_FAMILIES: Final = ("httpx", "httpx2")
#: The packages of asyncbucket's extras that have a range of versions worth checking.
_CHECKED: Final = frozenset({"llama-index-core", "stamina", "redis", "prometheus-client"})
_PREFIX: Final = "ASYNCBUCKET_"
#: The limiter that is made in a store for this check; nobody else uses it.
_NAME: Final = "asyncbucket-doctor"
_TRIPS: Final = 20
#: Round trips longer than this (s) delay every admission that has to wait for one.
_SLOW: Final = 0.02
#: Seconds that the check of a store may take.
_PATIENCE: Final = 10.0


class Finding(NamedTuple):
    """Say what was found about something and, unless it is good, what to do about it."""

    about: str
    state: Literal["good", "note", "bad"]
    found: str
    remedy: str | None = None


def doctor(
    *,
    store: Annotated[str | None, options.text("A store to look at.", metavar="URL")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check what is installed and set up here, and say what to fix.

    The status is 1 if something is wrong. In a store it makes a limiter of its own, which expires.

    Examples:
        asyncbucket doctor
        asyncbucket doctor --store redis://127.0.0.1:6379/0
    """
    findings = [*machine(), *http_clients(), *frameworks(), *versions(), *settings()]
    findings += [] if store is None else shared_store(store)
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        _show(Console(highlight=False), findings)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(FAILED)


def _show(console: Console, findings: Sequence[Finding]) -> None:
    # A pipe gets whole lines.
    width = max(20, console.width - _INDENT) if console.is_terminal else sys.maxsize
    for about, state, found, remedy in findings:
        sign, style = _STYLES[state]
        text = Text(f"{sign:{_INDENT}}", style)
        indent = "\n" + " " * _INDENT
        text.append(indent.join(textwrap.wrap(f"{about}: {one_line(found)}", width)), "default")
        if remedy is not None:
            text.append(indent + indent.join(textwrap.wrap(f"-> {remedy}", width)))
        console.print(text, soft_wrap=True)
    states = [finding.state for finding in findings]
    wrong, notes, ok = (states.count(state) for state in ("bad", "note", "good"))
    console.print(f"\n{wrong} wrong, {notes} to note, {ok} ok")


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> Iterator[Finding]:
    """Report the package and the interpreter."""
    number = version_of("asyncbucket") or "(not installed)"
    python = f"{sys.implementation.name} {'.'.join(map(str, sys.version_info[:3]))}"
    yield Finding("asyncbucket", "good", f"{number} on {python}")


def http_clients() -> Iterator[Finding]:
    """Report the HTTP libraries, which of them each SDK uses, and who retries by itself."""
    found = [f"{family} {number}" for family in _FAMILIES if (number := version_of(family))]
    if found:
        yield Finding("HTTP", "good", ", ".join(found))
    else:
        nothing = "no client is installed, so limiter.transport() has nothing to pace"
        yield Finding("HTTP", "note", nothing, "pip install httpx")
    retrying: list[str] = []
    for package, first_httpx2_major in _SDKS.items():
        number = version_of(package)
        if number is not None:
            retrying.append(f"{package}'s clients")
            family = _FAMILIES[int(number.partition(".")[0]) >= first_httpx2_major]
            if version_of(family) is not None:
                yield Finding(package, "good", f"{number}, uses {family}")
                continue
            missing = f"{number} uses {family}, which is not installed"
            yield Finding(package, "bad", missing, f"pip install --upgrade {package}")
    if version_of("llama-index-llms-openai") is not None:
        retrying.append("LlamaIndex's OpenAI")
    if retrying:
        yield Finding(
            "retries",
            "note",
            f"{', '.join(retrying)} retry by themselves, and layers of retries multiply",
            "limiter.wrap(...) and pace(...) leave one layer; give other clients on a limiter "
            "max_retries=0",
        )


def frameworks() -> Iterator[Finding]:
    """Report the agent frameworks, what paces each, and which of them as it is nothing paces."""
    for framework in FRAMEWORKS:
        number = version_of(framework.package)
        if number is None:
            continue
        if framework.unpaced is None:
            yield Finding(framework.name, "good", f"{number}, paced by {framework.how}")
        else:
            found = f"{number} is not paced as it is: {framework.unpaced}"
            yield Finding(framework.name, "note", found, framework.how)


def versions() -> Iterator[Finding]:
    """Compare versions with those that asyncbucket is tested with."""
    try:
        from packaging.requirements import Requirement

        wanted = requires("asyncbucket") or []
    except (ModuleNotFoundError, PackageNotFoundError):  # without packaging, or in a source tree
        return
    for requirement in {each.name: each for each in map(Requirement, reversed(wanted))}.values():
        package, number = requirement.name, version_of(requirement.name)
        if package not in _CHECKED or number is None:
            continue
        if requirement.specifier.contains(number, prereleases=True):
            yield Finding(package, "good", number)
        else:
            found = f"{number} is not in {requirement.specifier}, what asyncbucket is tested with"
            remedy = f'pip install "{package}{requirement.specifier}"'
            yield Finding(package, "bad", found, remedy)


def settings() -> Iterator[Finding]:
    """Report the settings in the environment and in the nearest TOML file, if they can be read."""
    named = sorted(name for name in os.environ if name.startswith(_PREFIX))
    if named:
        remedy = f"correct or unset {', '.join(named)}"
        yield from _limiter("Limiter.from_env()", partial(from_env, Limiter), remedy)
    remedy = 'correct the table, such as [tool.asyncbucket] with rpm = 500 and tpm = "200k"'
    try:
        names = limiters_in_toml()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        yield Finding("settings", "bad", str(error), remedy)
        return
    for name in names:
        call = f"Limiter.from_toml({'' if name is None else f'limiter={name!r}'})"
        yield from _limiter(call, partial(from_toml, Limiter, limiter=name), remedy)


def _limiter(call: str, make: Callable[[], Limiter], remedy: str) -> Iterator[Finding]:
    """Report what ``call`` returns, or why it fails."""
    try:
        with warnings.catch_warnings(record=True, action="always") as caught:
            limiter = make()
    except (ImportError, ValueError) as error:  # also of a store whose extra is missing
        yield Finding("settings", "bad", str(error), remedy)
        return
    limits = ", ".join(map(str, limiter.limits)) or f"concurrency {limiter.concurrency}"
    yield Finding("settings", "good", f"{call}: {limits}")
    for warning in caught:
        remedy = "they may have changed: look there"
        yield Finding("settings", "note", str(warning.message), remedy)


def shared_store(url: str) -> Iterator[Finding]:
    """Check a store: whether a call can be booked in it, how fast it answers, and its settings."""
    shown = without_password(url)
    try:
        seconds, details = asyncio.run(asyncio.wait_for(_measure(url), _PATIENCE))
    except TimeoutError:
        why = f"{shown}: no answer within {_PATIENCE:g} s"
        yield Finding("store", "bad", why, "see whether it runs, or correct the URL")
        return
    except (ImportError, OSError, StoreError, ValueError) as error:  # which name their remedies
        yield Finding("store", "bad", str(error))
        return
    told = ", ".join(f"{name} {value}" for name, value in details.items())
    text = f"{shown} answers in {seconds * 1e3:.2g} ms" + (f" ({told})" if told else "")
    if seconds > _SLOW:
        remedy = "keep the store near its workers: a call that waits waits a round trip more"
        yield Finding("store", "note", text, remedy)
    else:
        yield Finding("store", "good", text)


async def _measure(url: str) -> tuple[float, dict[str, str]]:
    """Return how long a store takes to answer (s), and what it says of itself."""
    store = open_store(url)
    try:
        limits = (Limit("requests", 1_000_000, burst=1_000_000),)
        ledger = await store.open(_NAME, LimitConfig(limits=limits), slot_ttl=5.0)
        trips: list[float] = []
        for _ in range(_TRIPS):
            started = time.perf_counter()
            await ledger.commit(Batch(calls=({"requests": 1},)))
            trips.append(time.perf_counter() - started)
        details = (await ledger.peek()).details
        await ledger.aclose()
        return statistics.median(trips), details
    finally:
        await store.aclose()
