"""Hundreds of random histories, judged by an oracle of their own: see `tests.engine.fuzz`."""

import pytest

from tests.engine.fuzz import play

#: Two of eight batches suffice to cover all lines.
FEW = {0, 125}
BATCHES = [pytest.param(n, marks=[] if n in FEW else pytest.mark.heavy) for n in range(0, 200, 25)]


@pytest.mark.parametrize("first", BATCHES)
def test_random_histories_break_no_promise(first: int) -> None:
    for seed in range(first, first + 25):
        play(seed)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [22817947333, 22817947671, 22817949805])
def test_calls_of_an_agent_stay_in_order_though_some_are_paid_back_or_it_ends(seed: int) -> None:
    play(seed)
