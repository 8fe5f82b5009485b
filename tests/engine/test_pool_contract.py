"""What holds for a `Limiter` holds for a `Pool`: the same tests, with pools of one member."""

import importlib
from typing import Any

import pytest

from asyncbucket import Limiter, Pool

NAMES = ("cancellation", "children", "deadlines", "lease", "limiter", "reconfigure", "refused")
MODULES = [importlib.import_module(f"tests.engine.test_{name}") for name in NAMES]
#: Those about words that are others for a pool, and those that take long.
LEFT_OUT = {
    "test_call_behind_cousin_is_bound_by_same_resource",
    "test_cancelling_at_any_line_leaks_nothing",
    "test_call_that_would_be_late_is_refused_at_once",
    "test_calls_of_child_count_in_statistics_of_every_level_above",
    "test_each_call_times_out_at_its_own_deadline",
    "test_newly_set_slots_count_calls_in_flight",
    "test_newly_set_slots_count_calls_just_admitted",
    "test_pace_wraps_model",
    "test_task_that_holds_the_only_slot_is_refused_another",
    "test_repr_of_limiter_shows_name_limits_slots_and_waiting_calls",
}


class PoolOfOne(Pool):
    """A pool that can be changed like its only member."""

    def reconfigure(self, *limits: Any, **terms: Any) -> None:
        if self.parent is None:
            self.members[0].reconfigure(*limits, **terms)
        else:
            super().reconfigure(*limits, **terms)

    def learn(self, limit: Any) -> None:
        if self.parent is None:
            self.members[0].learn(limit)
        else:
            super().learn(limit)


def pool_of_one(
    *limits: Any,
    name: str = "default",
    max_queue: int | None = None,
    timeout: float | None = None,
    store: object = None,
    **terms: Any,
) -> Limiter:
    """Return what stands in for `Limiter`."""
    if store is not None:
        return Limiter(
            *limits, name=name, max_queue=max_queue, timeout=timeout, store=store, **terms
        )
    member = Limiter(*limits, name=name, **terms)
    return PoolOfOne(member, name=name, max_queue=max_queue, timeout=timeout)


@pytest.fixture(autouse=True)
def limiters_are_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each limiter of these tests a pool."""
    for module in MODULES:
        monkeypatch.setattr(module, "Limiter", pool_of_one)


for _module in MODULES:
    for _name, _test in list(vars(_module).items()):
        _marks = {mark.name for mark in getattr(_test, "pytestmark", ())}
        if _name.startswith("test_") and not (
            _name in LEFT_OUT or _marks & {"heavy", "real_clock"}
        ):
            globals()[_name] = _test
