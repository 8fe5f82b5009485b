"""Agents that share a long prompt use what their provider allows, whatever its prompt cache does."""

import pytest

from tests.feedback.warm import PENDING, ROWS, failures
from tests.feedback.worlds import play

pytest.importorskip("stamina", reason="transports retry by it")


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in ROWS if name not in PENDING])
def test_cached_prompts_cost_what_the_provider_will_charge(name: str) -> None:
    row = ROWS[name]
    assert failures(row, play(row.world, row.load, latency=row.latency, **row.options)) == []
