"""Hundreds of random histories, judged by an oracle of their own: see `tests.core.fuzz`."""

import pytest

from tests.core.fuzz import play


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.heavy) for first in range(25, 200, 25))]
)
def test_random_histories_break_no_promise(first: int) -> None:
    for seed in range(first, first + 25):
        play(seed)
