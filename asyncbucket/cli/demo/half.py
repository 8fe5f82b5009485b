"""One run of the load, from its provider's start to its figures, even if Ctrl-C ends it."""

import asyncio
import contextlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from asyncbucket.cli import interrupts_blocked
from asyncbucket.cli.demo import load
from asyncbucket.cli.demo.gauge import Gauge, LimiterGauge, ProviderGauge
from asyncbucket.cli.demo.outcome import Outcome, name_of, outcome_of
from asyncbucket.cli.demo.scenario import Scenario
from asyncbucket.cli.demo.screen import Screen
from asyncbucket.cli.demo.tally import Tally
from asyncbucket.cli.demo.traffic import Arrival
from asyncbucket.core.limiter import Limiter
from asyncbucket.testing import ProviderProcess

_REFRESH: Final = 0.2
#: The range of seconds that the bundled provider takes for a reply.
_LATENCY: Final = (0.2, 0.6)
_REPLY_TOKENS: Final = 40


def run_half(scenario: Scenario, screen: Screen, *, paced: bool) -> Outcome:
    """Run the agents once and return the outcome.

    Raises:
        load.Fatal: the provider refuses in a way that any call would meet.
    """
    tally = Tally(Limiter(*scenario.limits, concurrency=scenario.concurrency) if paced else None)
    if scenario.api_base is not None:
        _run(scenario, tally, screen, LimiterGauge(tally.limiter), api_base=scenario.api_base)
        return outcome_of(scenario, tally, tally.traffic.arrivals, tokens_known=False)
    with _bundled(scenario) as provider:
        gauge = ProviderGauge(provider, scenario)
        _run(scenario, tally, screen, gauge, api_base=provider.base_url)
        arrivals = [Arrival(seen.time_ns, seen.tokens, seen.admitted) for seen in provider.arrivals]
    return outcome_of(scenario, tally, arrivals, tokens_known=True)


def _run(scenario: Scenario, tally: Tally, screen: Screen, gauge: Gauge, *, api_base: str) -> None:
    screen.begin(name_of(paced=tally.limiter is not None))
    try:
        asyncio.run(_drive(scenario, tally, screen, gauge, api_base))
    except KeyboardInterrupt:  # the second one, or one before or after the loop
        tally.interrupted = True
    finally:
        screen.end()


async def _drive(
    scenario: Scenario, tally: Tally, screen: Screen, gauge: Gauge, api_base: str
) -> None:
    asyncio.get_running_loop().set_exception_handler(_ignore)
    ticker = asyncio.create_task(_tick(tally, screen, gauge))
    try:
        await load.run(scenario, tally, api_base=api_base)
    except asyncio.CancelledError:  # how asyncio passes on a Ctrl-C
        tally.interrupted = True
    finally:
        ticker.cancel()


def _ignore(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Keep off the screen what LlamaIndex's workflows leave behind when they are cancelled."""
    del loop, context


async def _tick(tally: Tally, screen: Screen, gauge: Gauge) -> None:
    while True:
        with contextlib.suppress(RuntimeError):  # the provider was too busy to answer
            screen.show(tally, await gauge.read())
        await asyncio.sleep(_REFRESH)


@contextmanager
def _bundled(scenario: Scenario) -> Generator[ProviderProcess]:
    provider = ProviderProcess(
        rpm=scenario.amount("requests"),
        tpm=scenario.amount("tokens"),
        minute=scenario.window,
        charge="usage",
        latency=_LATENCY,
        reply_tokens=_REPLY_TOKENS,
    )
    try:
        with interrupts_blocked():
            provider.start()
        yield provider
    finally:
        provider.stop()
