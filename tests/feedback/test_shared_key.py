"""A saturated key, of which others may take a part: nearly all is used, and hardly a call refused."""

from dataclasses import replace
from typing import Any, Final

import pytest

from asyncbucket.testing.provider import Counting
from tests.feedback.worlds import Load, World, play

#: Callers that ask again and again.
CROWD: Final = Load(agents=100, calls=10_000)
MINUTE: Final = 60_000_000_000


def alone(used: float = 0.95, told: int = 600, *, refused: float = 0, **counting: Any) -> Any:
    return pytest.param(counting, 600, told, refused, used, id=f"{told} {counting}")


def shared(refused: float, used: float, rpm: int = 600, others: float = 0.4, **how: Any) -> Any:
    counting = {**how, "others": others}
    return pytest.param(counting, rpm, rpm, refused, used, id=f"{rpm} {counting}")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("counting", "rpm", "told", "refused", "used"),
    [
        *(alone(by=by) for by in ("bucket", "log", "calendar")),
        # That a minute's worth does not fit into a second is learned from a refusal or two.
        alone(by="log", slices=60, hidden=True, refused=0.002),
        *(alone(0.95 / 2, told=300, by=by) for by in ("bucket", "log")),
        # What never comes back, because a bucket is full, is not taken for others'.
        *(alone(size=size) for size in (20, 101, 300)),
        # The ten of a second, with which we begin, fill it to the brim: calls that the network
        # brings closer together overflow it, once.
        alone(size=10, refused=1 / 1_200),
        *(shared(0.005, 0.94, by=by) for by in ("bucket", "log", "calendar")),
        *(shared(0.005, 0.91, others=0.6, by=by) for by in ("log", "calendar")),
        # In slices of ten, four calls of others that come by chance don't always fit: if we took all
        # that they leave, 18 % would be refused.
        shared(0.06, 0.7, by="log", slices=60, hidden=True),
        shared(0.03, 0.84, rpm=6_000, by="log", slices=60, hidden=True),
    ],
)
def test_key_is_well_used_and_hardly_a_call_is_refused(
    counting: dict[str, Any], rpm: int, told: int, refused: float, used: float
) -> None:
    provider = {"rpm": rpm, "policy": Counting(**counting)}
    seconds = 75.0 if rpm == 6_000 else 180.0 if "others" in counting else 120.0
    load = replace(CROWD, seconds=seconds)
    seen = play(World(provider=provider, told=(f"{told} RPM",)), load)
    arrivals = seen.provider.arrivals
    began = arrivals[0].time_ns
    later = sum(each.admitted and each.time_ns - began >= MINUTE for each in arrivals)
    others = counting.get("others", 0.0) * (1 - seen.others)
    assert (seen.refused <= refused * len(arrivals), seen.lost) == (True, 0)
    assert later / (rpm * (load.seconds / 60 - 1)) + others > used
