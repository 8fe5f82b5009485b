"""`asyncbucket doctor`: what is installed here, how a store answers, what is wrong, and the remedy."""

import asyncio
import platform
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Final, Literal, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from asyncbucket import Limit, StoreError
from asyncbucket.cli import FAILED, options
from asyncbucket.engine.wording import one_line
from asyncbucket.stores import Batch, LimitConfig, open_store, without_password

#: What stands before each line but the first of a finding.
_INDENT: Final = " " * 6
_STYLES: Final = {"good": ("ok", "green"), "note": ("note", "yellow"), "bad": ("BAD", "red")}
#: Packages whose clients retry by themselves, and all whose versions matter.
_RETRYING: Final = ("openai", "anthropic", "llama-index-llms-openai")
_PACKAGES: Final = (
    *(*_RETRYING, "llama-index-core", "httpx", "httpx2"),
    *("stamina", "redis", "prometheus-client", "opentelemetry-api"),
)
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
    *, store: Annotated[str | None, options.text("A store to look at.", metavar="URL")] = None
) -> None:
    """Say what is installed, how a store answers, and what to fix.

    The status is 1 if something is wrong. In a store it makes a limiter of its own, which expires.

    Examples:
        asyncbucket doctor
        asyncbucket doctor --store redis://127.0.0.1:6379/0
    """
    findings = [*packages()]
    findings += [] if store is None else [shared_store(store)]
    _show(Console(highlight=False), findings)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(FAILED)


def _show(console: Console, findings: Sequence[Finding]) -> None:
    # A pipe gets whole lines.
    width = console.width if console.is_terminal else sys.maxsize
    for about, state, found, remedy in findings:
        sign, style = _STYLES[state]
        lines = [f"{sign:{len(_INDENT)}}{about}: {one_line(found)}"]
        if remedy is not None:
            lines.append(f"{_INDENT}-> {remedy}")
        wrapped = [textwrap.fill(line, width, subsequent_indent=_INDENT) for line in lines]
        text = Text("\n".join(wrapped))
        text.stylize(style, 0, len(sign))
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


def packages() -> Iterator[Finding]:
    """Report the package, the interpreter, the libraries beside it, and who retries by itself."""
    number = version_of("asyncbucket") or "(not installed)"
    python = f"{sys.implementation.name} {platform.python_version()}"
    yield Finding("asyncbucket", "good", f"{number} on {python}")
    found = {name: here for name in _PACKAGES if (here := version_of(name))}
    yield Finding("packages", "good", ", ".join(map(" ".join, found.items())))
    if retrying := ", ".join(name for name in _RETRYING if name in found):
        multiply = f"clients of {retrying} retry by themselves, and layers of retries multiply"
        remedy = "limiter.wrap(...) and pace(...) leave one layer; give other clients max_retries=0"
        yield Finding("retries", "note", multiply, remedy)


def shared_store(url: str) -> Finding:
    """Check whether a call can be booked in a store, and how fast it answers."""
    shown = without_password(url)
    try:
        seconds = asyncio.run(asyncio.wait_for(_measure(url), _PATIENCE))
    except (ImportError, OSError, StoreError, ValueError) as error:
        late = f"{shown}: no answer within {_PATIENCE:g} s; see whether it runs"
        return Finding("store", "bad", str(error) or late)  # the others name their remedies
    text = f"{shown} answers in {seconds * 1e3:.2g} ms"
    if seconds > _SLOW:
        remedy = "keep the store near its workers: a call that waits waits a round trip more"
        return Finding("store", "note", text, remedy)
    return Finding("store", "good", text)


async def _measure(url: str) -> float:
    """Return how long a store takes to answer (s)."""
    store = open_store(url)
    try:
        limits = (Limit("requests", 1_000_000, burst=1_000_000),)
        ledger = await store.open(_NAME, LimitConfig(limits=limits), slot_ttl=5.0)
        started = time.perf_counter()
        for _ in range(_TRIPS):
            await ledger.commit(Batch(calls=({"requests": 1},)))
        seconds = (time.perf_counter() - started) / _TRIPS
        await ledger.aclose()
        return seconds
    finally:
        await store.aclose()
