"""Providers that count in their own ways: no call is lost, few are refused, and no time is wasted."""

import pytest

from tests.feedback.grid import ROWS, both, failures

pytest.importorskip("stamina", reason="transports retry by it")


@pytest.mark.parametrize("latency", [0.8, pytest.param(5.0, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", ROWS)
def test_load_is_nearly_as_fast_as_if_the_meter_were_known(name: str, latency: float) -> None:
    assert failures(ROWS[name], *both(ROWS[name], 0, latency)) == []
