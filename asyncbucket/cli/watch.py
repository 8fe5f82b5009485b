"""`asyncbucket watch`: what running limiters do, live, in a terminal."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Final

import httpx
import typer
from rich.console import Console

from asyncbucket.cli import INTERRUPTED, options
from asyncbucket.cli.ui import Bar, Panel, Screen
from asyncbucket.engine.errors import StoreError
from asyncbucket.engine.statistics import ShadowStatistics
from asyncbucket.engine.wording import counted, in_seconds, one_line, written
from asyncbucket.stores import Snapshot, open_store, without_password
from asyncbucket.telemetry.stats import DEFAULT_PORT, row_of

_PATIENCE: Final = 5.0
#: What is shown of counters that are not 0.
_COUNTS: Final = {
    "upstream_429": "refused by the provider (429)",
    "refused": "turned away",
    "cancelled": "gave up",
}
_HOW: Final = "openai/chat: 600 RPM, 200k TPM | concurrency 8 | pause 60 | resume | shadow off\n> "
#: From this part on a limit is nearly used up.
_FULL: Final = 0.9

#: What one reading returns: the JSON of `asyncbucket.telemetry.stats`.
Reader = Callable[[], dict[str, Any]]
Limiters = Sequence[Mapping[str, Any]]


def watch(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The URL of limiter.serve_stats(), or of a store.")
    ] = f"http://127.0.0.1:{DEFAULT_PORT}",
    *,
    interval: Annotated[
        float, typer.Option(min=0.1, max=60, metavar="S", help="Seconds between updates.")
    ] = 1.0,
    once: Annotated[bool, options.flag("Print once, then exit.", "--once")] = False,
    as_json: options.AsJson = False,
    token: Annotated[
        str | None,
        options.text("The token that serve_stats(control=True) printed, to change limits."),
    ] = None,
) -> None:
    """Show what running limiters do, live.

    It shows how full each limit is, what binds, and who waits. A program must call
    limiter.serve_stats() to be watched; the URL of a store shows all programs that share it. It ends
    when the program does, or with Ctrl-C; with a token, Ctrl-C first asks for a change.

    Examples:
        asyncbucket watch
        asyncbucket watch http://127.0.0.1:4294
        asyncbucket watch redis://127.0.0.1:6379/0
        asyncbucket watch http://127.0.0.1:4294 --token TOKEN
    """
    if token is not None:
        _control(url, token, interval)
        return
    read = partial(_fetch, url) if url.startswith("http://") else lambda: asyncio.run(_peek(url))
    readings = _readings(read, None if once else interval)
    if not as_json:
        _show(readings)
    for reading in readings:
        typer.echo(json.dumps(reading))


def _control(url: str, token: str, interval: float) -> None:
    """Show what the limiters do until Ctrl-C; change them as the line says that is typed then."""
    signal.signal(signal.SIGTERM, _leave)  # it asks for no change
    while True:
        typer.echo("Press Ctrl-C to change a limiter, twice to leave.", err=True)
        with suppress(KeyboardInterrupt):
            _show(_readings(partial(_fetch, url), interval))
        headers = {"Authorization": f"Bearer {token}"}
        told = _fetch(url, "POST", content=input(_HOW), headers=headers)
        typer.echo(told.get("error", "Done."), err=True)


def _leave(*_: object) -> None:
    sys.exit(INTERRUPTED)


def _readings(read: Reader, interval: float | None) -> Iterator[dict[str, Any]]:
    """Yield what is read, until nobody answers any more."""
    yield read()
    while interval is not None:
        time.sleep(interval)
        try:
            yield read()
        except ConnectionError as error:
            if not isinstance(error.__cause__, httpx.NetworkError | httpx.RemoteProtocolError):
                raise
            typer.echo("the program that was watched has ended", err=True)
            raise typer.Exit from error


def _show(readings: Iterator[dict[str, Any]]) -> None:
    before: Limiters = []
    last = time.monotonic()
    with Screen(Console(highlight=False), stays=True) as screen:
        for reading in readings:
            now = time.monotonic()
            screen.show(compare(reading["limiters"], before, now - last))
            before, last = reading["limiters"], now


def _fetch(url: str, method: str = "GET", **change: Any) -> dict[str, Any]:
    try:
        with httpx.Client(trust_env=False, timeout=_PATIENCE) as client:
            report: Any = client.request(method, url, **change).json()
        return {"time": report["time"], "limiters": report["limiters"], **report}
    except (httpx.HTTPError, httpx.InvalidURL, KeyError, TypeError, ValueError) as error:
        kind = type(error).__name__  # its message may quote a password
        raise ConnectionError(
            f"nothing serves statistics at {without_password(url)} ({kind}): start the program first; "
            f"it must call limiter.serve_stats()"
        ) from error


async def _peek(url: str) -> dict[str, Any]:
    """Read all limiters of a store."""
    try:
        store = open_store(url)
    except ValueError as error:
        hint = "or give the URL that limiter.serve_stats() returns, such as http://127.0.0.1:4294"
        raise ValueError(f"{error}; {hint}") from None
    try:
        names = await store.names()
        snapshots = [(name, await store.peek(name)) for name in names]
    finally:
        await store.aclose()
    if not names:
        raise StoreError(f"{without_password(url)} holds no limiter now")
    return {"limiters": [_row(name, snapshot) for name, snapshot in snapshots if snapshot]}


def _row(name: str, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "name": name,
        "in_flight": snapshot.slots,
        "concurrency": snapshot.config.concurrency,
        "paused": max(0, snapshot.paused_until - snapshot.now) * 1e-9,
        "ahead": max(0, snapshot.last_start - snapshot.now) * 1e-9,
        "workers": snapshot.workers,
        "limits": list(map(row_of, snapshot.limits)),
    }


def compare(now: Limiters, before: Limiters, seconds: float) -> list[Panel]:
    """Return a panel for each limiter, compared with how it was ``seconds`` ago."""
    admitted = {limiter["name"]: limiter.get("admitted", 0) for limiter in before}
    panels: list[Panel] = []
    for limiter in now:
        name, total = limiter["name"], limiter.get("admitted", 0)
        above = [other for other in now if name.startswith(f"{other['name']}/")]
        rate = max(0, total - admitted.get(name, total)) / seconds if seconds > 0 else 0.0
        bars, facts = tuple(_bars(limiter, above)), tuple(_facts(limiter, rate))
        panels.append(Panel(one_line(name), bars, facts))
    return panels


def _bars(limiter: Mapping[str, Any], above: Limiters) -> Iterator[Bar]:
    """Yield a bar for each limit, and mark the one that binds.

    If several, here and above, count the resource that binds, it is the one with the least left.
    """
    binding = limiter.get("bound_by")
    all_limits = [limit for each in (limiter, *above) for limit in _limits(each)]
    left = [limit["available"] for limit in all_limits if limit["resource"] == binding]
    for limit in _limits(limiter):
        used, amount, resource = limit["used"], limit["amount"], limit["resource"]
        part = min(1.0, max(0.0, used / amount))
        style, note = ("yellow" if part >= _FULL else "green"), ""
        if resource == binding and limit["available"] <= min(left):
            style, note = "red", "binds" if part >= _FULL else "binds, paced"
        label = f"{written(used, resource)} of {one_line(limit['limit'])}"
        yield Bar(label, part, note, style)


def _limits(limiter: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the limits of a limiter, with its slots as the last one."""
    yield from limiter["limits"]
    slots, used = limiter.get("concurrency"), limiter["in_flight"]
    if slots:
        limit = {"limit": f"{slots:,} at once", "resource": "concurrency", "amount": slots}
        yield {**limit, "used": used, "available": slots - used}


def _facts(now: Mapping[str, Any], rate: float) -> Iterator[str]:
    if now["paused"]:
        yield f"paused for {in_seconds(now['paused'])} more"
    if "waiting" in now:
        left = f" (about {now['waiting'] / rate:,.0f} s)" if now["waiting"] and rate else ""
        yield f"{now['waiting']:,} waiting{left}"
    yield from (one_line(limit["belief"]) for limit in now["limits"] if limit.get("belief"))
    if not now.get("concurrency"):
        yield f"{now['in_flight']:,} in flight"
    if now.get("ahead"):
        yield f"starts are booked {now['ahead']:.1f} s ahead"
    if "workers" in now:
        yield counted(now["workers"], "workers")
    if "admitted" in now:
        yield f"{now['admitted']:,} admitted" + (f", {rate:,.1f}/s now" if rate else "")
    shadow = [ShadowStatistics(**now["shadow"])] if now.get("shadow") else []
    yield from (f"in shadow: {told}" for told in shadow)
    for field, words in _COUNTS.items():
        if now.get(field):
            yield f"{now[field]:,} {words}"
    waits = (now.get("waits") or {}).values()
    count = sum(wait["count"] for wait in waits)
    if count:
        mean = sum(wait["seconds"] for wait in waits) / count
        yield f"{count:,} had to wait, {mean:,.1f} s on average"
