"""Providers that count in their own ways: no call is lost, few are refused, and no time is wasted."""

import pytest

from tests.feedback.grid import ROWS, both, failures

pytest.importorskip("stamina", reason="transports retry by it")

#: The coverage of one row is measured: it meets what no smaller test does.
MEASURED = "told ten times too much, no headers"


@pytest.mark.parametrize("latency", [0.8, 5.0])
@pytest.mark.parametrize(
    "name",
    [pytest.param(row, marks=[] if row == MEASURED else pytest.mark.heavy) for row in ROWS],
)
def test_load_is_nearly_as_fast_as_if_the_meter_were_known(name: str, latency: float) -> None:
    assert failures(ROWS[name], *both(ROWS[name], 0, latency)) == []
