"""A run of the demo's load that is ended from outside."""

import asyncio
import signal
from typing import Any

import pytest
from rich.console import Console

from asyncbucket.cli import as_ctrl_c
from asyncbucket.cli.demo import half, load
from asyncbucket.cli.demo.gauge import LimiterGauge
from asyncbucket.cli.demo.scenario import DemoOptions, scenario_of
from asyncbucket.cli.demo.screen import screen_for
from asyncbucket.cli.demo.tally import Tally
from asyncbucket.testing import ProviderProcess


class Dropped:
    """An object that is collected just when the program is told to end."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_during_a_finalizer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a finalizer raises is lost, but the run still ends."""

    async def hang(*_: Any, **__: Any) -> None:
        Dropped()
        await asyncio.wait_for(asyncio.Event().wait(), 5)

    monkeypatch.setattr(load, "run", hang)
    scenario, tally = scenario_of(DemoOptions()), Tally(None)
    screen = screen_for(Console(), scenario, silent=True)
    before = signal.signal(signal.SIGTERM, as_ctrl_c)
    try:
        half._run(scenario, tally, screen, LimiterGauge(None), api_base="")
    finally:
        signal.signal(signal.SIGTERM, before)

    assert tally.interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_provider_starts_ends_the_demo(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the provider's first line would be taken for its last, which is an error."""
    called: list[str] = []

    def start(_: ProviderProcess) -> None:
        signal.raise_signal(number)
        called.append("started")

    def stop(_: ProviderProcess) -> None:
        called.append("stopped")

    monkeypatch.setattr(ProviderProcess, "start", start)
    monkeypatch.setattr(ProviderProcess, "stop", stop)
    before = signal.signal(signal.SIGTERM, as_ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt), half._bundled(scenario_of(DemoOptions())):
            called.append("used")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == ["started", "stopped"]
