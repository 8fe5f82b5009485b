"""A store: whether it answers, how fast, and what it reports about itself."""

import asyncio
import re
import statistics
import time
from collections.abc import Iterator
from typing import Final

from asyncbucket.cli.doctor.findings import Finding, bad, good, note
from asyncbucket.core.errors import StoreError
from asyncbucket.core.limits import Limit
from asyncbucket.stores import Batch, LimitConfig, Outcome, Store, open_store, without_password

#: The limiter that is made in the store for this check; nobody else uses it.
NAME: Final = "asyncbucket-doctor"
_CONFIG: Final = LimitConfig(
    limits=(Limit("requests", 1_000_000, per=60, burst=1_000_000),), concurrency=9
)
_TRIPS: Final = 20
#: Round trips longer than this (s) delay every admission that has to wait for one.
_SLOW: Final = 0.02
#: Seconds that the whole check may take.
_PATIENCE: Final = 10.0


def store(url: str) -> list[Finding]:
    """Check the store at ``url``: open it, book a call in it several times, and peek."""
    shown = without_password(url)
    try:
        return asyncio.run(asyncio.wait_for(_measure(open_store(url), shown), _PATIENCE))
    except (StoreError, TimeoutError, OSError) as error:
        why = str(error) or f"no answer within {_PATIENCE:g} s"
        is_file = url.startswith("sqlite:")
        first = "make the file one that can be written" if is_file else "start the server"
        text = why if shown in why else f"{shown}: {why}"
        return [bad("store", text, f"{first}, or correct the URL")]
    except (ImportError, ValueError) as error:
        return [bad("store", str(error), "correct the URL, or install what it names")]


async def _measure(opened: Store, shown: str) -> list[Finding]:
    try:
        ledger = await opened.open(NAME, _CONFIG, slot_ttl=5.0)
        try:
            trips: list[float] = []
            for _ in range(_TRIPS):
                started = time.perf_counter()
                receipt = await ledger.commit(Batch(calls=({"requests": 1},)))
                trips.append(time.perf_counter() - started)
                if receipt.bookings[0].outcome is not Outcome.BOOKED:
                    raise StoreError(f"a call was {receipt.bookings[0].outcome.value}, not booked")
            details = (await ledger.peek()).details
            return [
                _latency_finding(shown, statistics.median(trips), details),
                *risky_settings(shown, details),
            ]
        finally:
            await ledger.aclose()
    finally:
        await opened.aclose()


def _latency_finding(shown: str, trip: float, details: dict[str, str]) -> Finding:
    shown_details = ", ".join(f"{name} {value}" for name, value in details.items())
    text = f"{shown} answers in {trip * 1e3:.2g} ms" + (
        f" ({shown_details})" if shown_details else ""
    )
    if trip > _SLOW:
        remedy = "keep the store near its workers: a call that waits waits a round trip more"
        return note("store", text, remedy)
    return good("store", text)


def risky_settings(shown: str, details: dict[str, str]) -> Iterator[Finding]:
    """Find settings with which a server forgets bookings: at a restart, a fail-over or any time."""
    clock = details.get("clock", "in step")
    if clock != "in step":
        yield note(
            "store clock",
            f"the clock of {shown} is {clock}",
            "keep clocks in step (NTP): when a replica whose clock is ahead takes over, up to one "
            "limit more may pass",
        )
    if "snapshots alone" in details.get("persistence", ""):  # or so says one node of a cluster
        yield note(
            "store settings",
            f"{shown} keeps snapshots alone: after a restart, what was booked since the last one may "
            f"pass again",
            'set save "" or appendonly yes',
        )
    if re.search("(allkeys|volatile)-", details.get("memory", "")):  # a limiter's keys expire
        yield note(
            "store settings",
            f"{shown} may evict a limiter, which begins with nothing left then",
            "set maxmemory-policy noeviction",
        )
