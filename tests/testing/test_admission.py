import pytest

from asyncbucket.testing.provider import Arrival, Failure, Settings
from asyncbucket.testing.provider.admission import Admission, Refusal
from asyncbucket.testing.virtual_time import VirtualClock

CHAT = "chat/completions"


@pytest.fixture
def clock() -> VirtualClock:
    """A clock at 0."""
    return VirtualClock()


def test_call_is_charged_by_all_limits_or_by_none(clock: VirtualClock) -> None:
    """A call refused for its tokens takes no request, either."""
    door = Admission(Settings(rpm=2, tpm=100, clock=clock))

    assert door.enter(CHAT, 80) is None
    assert isinstance(door.enter(CHAT, 30), Refusal)
    assert door.enter(CHAT, 20) is None

    assert [remaining for _, _, remaining, _ in door.budget()] == [0, 0]
    assert door.statistics().tokens == 100


def test_refusal_names_the_limit_with_the_longest_wait(clock: VirtualClock) -> None:
    """Requests come back in 30 s, tokens in 60 s: the error names the later one and its numbers."""
    door = Admission(Settings(rpm=2, tpm=100, clock=clock))
    door.enter(CHAT, 50)
    door.enter(CHAT, 50)

    assert door.enter(CHAT, 100) == Refusal("tokens", 100, 100, 100, 60_000_000_000)
    assert door.enter(CHAT, 10) == Refusal("requests", 2, 2, 1, 30_000_000_000)
    assert door.statistics().refused_429 == {"tokens": 1, "requests": 1}


def test_call_larger_than_limit_is_promised_no_retry_time(clock: VirtualClock) -> None:
    """No waiting would help, so no time is promised."""
    door = Admission(Settings(tpm=100, rpm=1, clock=clock))
    door.enter(CHAT, 1)

    assert door.enter(CHAT, 101) == Refusal("tokens", 100, 1, 101, None)


def test_slot_is_held_until_its_call_leaves(clock: VirtualClock) -> None:
    """With two calls in flight, a third is refused until one leaves."""
    door = Admission(Settings(concurrency=2, clock=clock))
    door.enter(CHAT, 1)
    door.enter(CHAT, 1)

    assert door.enter(CHAT, 1) == Refusal("concurrency", 2, 2, 1, None)
    door.leave()
    assert door.enter(CHAT, 1) is None

    seen = door.statistics()
    assert (seen.in_flight, seen.peak_in_flight, seen.refused) == (2, 2, 1)


def test_failed_call_is_charged_but_scripted_429_is_not(clock: VirtualClock) -> None:
    """A 500 fails after admission; a scripted 429 is not admitted."""
    door = Admission(Settings(tpm=100, clock=clock))
    door.fail_next(1, Failure(500))
    door.fail_next(2, Failure(429, retry_after=2.5))

    assert door.enter(CHAT, 10) == Failure(500)
    door.leave()
    assert door.enter(CHAT, 10) == Failure(429, retry_after=2.5)
    assert door.enter(CHAT, 10) == Failure(429, retry_after=2.5)
    assert door.enter(CHAT, 10) is None

    seen = door.statistics()
    assert (seen.tokens, seen.errors, seen.refused_429) == (20, 1, {"scripted": 2})


def test_refused_call_does_not_use_up_a_scripted_failure(clock: VirtualClock) -> None:
    """A scripted 500 is kept for the next call that is admitted."""
    door = Admission(Settings(tpm=100, clock=clock))
    door.fail_next(1, Failure(500))

    assert isinstance(door.enter(CHAT, 101), Refusal)
    assert door.enter(CHAT, 1) == Failure(500)


def test_fail_next_zero_removes_scripted_failures(clock: VirtualClock) -> None:
    """`fail_next(0)` removes all scripted failures."""
    door = Admission(Settings(clock=clock))
    door.fail_next(5, Failure(500))
    door.fail_next(0, Failure())

    assert door.enter(CHAT, 1) is None
    with pytest.raises(ValueError, match="count must be a whole number of at least 0, not -1"):
        door.fail_next(-1, Failure())


def test_always_option_fails_calls_until_reconfigured(clock: VirtualClock) -> None:
    """`always=429` refuses everything, until it is changed at run time."""
    door = Admission(Settings(always=429, clock=clock))

    assert door.enter(CHAT, 1) == Failure(429)
    door.reconfigure(always=None)
    assert door.enter(CHAT, 1) is None


def test_error_rate_is_reproducible_from_seed(clock: VirtualClock) -> None:
    """15 % of calls fail, and the same ones in every run with a seed."""

    def failures(seed: int) -> list[bool]:
        door = Admission(Settings(error_rate=0.15, seed=seed, clock=clock))
        return [door.enter(CHAT, 1) is not None for _ in range(2000)]

    assert failures(1) == failures(1) != failures(2)
    assert 240 < sum(failures(1)) < 360


def test_arrivals_keep_only_the_latest_calls_with_their_times(clock: VirtualClock) -> None:
    """The latest ones are kept, oldest first, with their cost and whether they were admitted."""
    door = Admission(Settings(rpm=2, history=2, clock=clock))
    for seconds in (0, 1, 1):
        clock.advance(seconds)
        door.enter(CHAT, 7)

    assert door.arrivals() == [
        Arrival(1_000_000_000, CHAT, 7, admitted=True),
        Arrival(2_000_000_000, CHAT, 7, admitted=False),
    ]


def test_request_id_repeated_after_admission_counts_as_duplicate(clock: VirtualClock) -> None:
    """It counts only if it was admitted before, so a retry of a refused call does not."""
    door = Admission(Settings(rpm=2, clock=clock))
    door.fail_next(1, Failure(429))
    for _ in range(3):
        door.enter(CHAT, 1, request_id="a")

    assert door.statistics().duplicates == 1


def test_limits_can_change_while_provider_runs(clock: VirtualClock) -> None:
    """Limits can be removed, added and changed; options fixed at the start are refused."""
    door = Admission(Settings(rpm=1, clock=clock))
    door.enter(CHAT, 1)
    assert isinstance(door.enter(CHAT, 1), Refusal)

    door.reconfigure(rpm=None, tpm=10)
    assert door.enter(CHAT, 10) is None
    assert isinstance(door.enter(CHAT, 1), Refusal)

    with pytest.raises(ValueError, match=r"^minute, policy can't change while the provider runs$"):
        door.reconfigure(policy="fixed_window", minute=1.0)


def test_budget_gives_remaining_amount_and_time_until_full(clock: VirtualClock) -> None:
    """These are the numbers of the x-ratelimit headers."""
    door = Admission(Settings(rpm=60, tpm=600, clock=clock))
    door.enter(CHAT, 100)

    assert door.budget() == [
        ("requests", 60, 59, 1_000_000_000),
        ("tokens", 600, 500, 10_000_000_000),
    ]
