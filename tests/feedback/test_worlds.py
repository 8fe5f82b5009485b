"""Providers that count in their own ways: no call is lost, few are refused, and no time is wasted."""

import pytest

from tests.feedback import grid, warm

pytest.importorskip("stamina", reason="transports retry by it")

#: The coverage of one row is measured: it meets what no smaller test does.
MEASURED = "told ten times too much, no headers"


@pytest.mark.parametrize("latency", [0.8, 5.0])
@pytest.mark.parametrize(
    "name",
    [pytest.param(row, marks=[] if row == MEASURED else pytest.mark.heavy) for row in grid.ROWS],
)
def test_load_is_nearly_as_fast_as_if_the_meter_were_known(name: str, latency: float) -> None:
    assert grid.failures(grid.ROWS[name], latency) == []


@pytest.mark.heavy
@pytest.mark.parametrize("name", warm.ROWS)
def test_cached_prompts_cost_what_the_provider_will_charge(name: str) -> None:
    """Agents that share a long prompt use what their provider allows, whatever its cache does."""
    assert warm.failures(warm.ROWS[name]) == []
