import pytest

from asyncbucket.testing.provider import Failure, Options
from asyncbucket.testing.provider.enforcer import Enforcer, RateRefusal
from asyncbucket.testing.virtual_time import VirtualClock

CHAT = "chat/completions"


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def test_refusal_names_the_limit_with_the_longest_wait(clock: VirtualClock) -> None:
    gate = Enforcer(Options(rpm=2, tpm=100, clock=clock))
    gate.enter(CHAT, 50)
    gate.enter(CHAT, 50)
    assert gate.enter(CHAT, 100) == RateRefusal("tokens", 100, 100, 100, 60_000_000_000)
    assert gate.enter(CHAT, 10) == RateRefusal("requests", 2, 2, 1, 30_000_000_000)
    assert gate.enter(CHAT, 101) == RateRefusal("tokens", 100, 100, 101, None)  # no time helps
    seen = gate.statistics()
    assert seen.refused_429 == {"tokens": 2, "requests": 1}
    assert seen.tokens == 100  # a refused call is charged by no limit


def test_failed_call_is_charged_but_scripted_429_is_not(clock: VirtualClock) -> None:
    gate = Enforcer(Options(tpm=100, clock=clock))
    gate.fail_next(1, Failure(500))
    gate.fail_next(2, Failure(429, retry_after=2.5))
    assert isinstance(gate.enter(CHAT, 101), RateRefusal)  # this uses up no failure
    assert gate.enter(CHAT, 10) == Failure(500)
    gate.leave()
    assert gate.enter(CHAT, 10) == Failure(429, retry_after=2.5)
    gate.fail_next(0, Failure())  # forgets the rest
    assert gate.enter(CHAT, 10) is None
    seen = gate.statistics()
    assert (seen.tokens, seen.errors) == (20, 1)
    assert seen.refused_429 == {"tokens": 1, "scripted": 1}


def test_slot_of_a_call_is_free_again_when_it_has_left(clock: VirtualClock) -> None:
    gate = Enforcer(Options(concurrency=1, clock=clock))
    assert gate.enter(CHAT, 1) is None
    assert gate.enter(CHAT, 1) == RateRefusal("concurrency", 1, 1, 1, None)
    gate.leave()
    assert gate.enter(CHAT, 1) is None
    assert gate.statistics().peak_in_flight == 1
    with pytest.raises(ValueError, match="count must be a whole number of at least 0, not -1"):
        gate.fail_next(-1, Failure())
