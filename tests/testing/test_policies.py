import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Limit
from asyncbucket.testing.assertions import assert_never_over, assert_within_bucket
from asyncbucket.testing.provider.policies import (
    POLICY_NAMES,
    OneSecondSlicesPolicy,
    Policy,
    PolicyName,
    make_policy,
)

SECOND = 1_000_000_000
MINUTE = 60 * SECOND

limits = st.integers(min_value=1, max_value=200)
# Steps in nanoseconds, many of them 0 or near whole seconds and minutes.
steps = st.one_of(
    st.just(0),
    st.sampled_from([1, SECOND - 1, SECOND, SECOND + 1, MINUTE - 1, MINUTE, MINUTE + 1]),
    st.integers(min_value=0, max_value=2 * MINUTE),
)
histories = st.lists(st.tuples(steps, st.integers(min_value=0, max_value=250)), max_size=60)
policies = st.sampled_from(POLICY_NAMES)


def play(
    policy: Policy, history: list[tuple[int, int]], *, start: int = 0
) -> list[tuple[int, int]]:
    """Try to admit each amount of a history; return the trace of admissions."""
    now = start
    trace: list[tuple[int, int]] = []
    for step, amount in history:
        now += step
        if policy.wait(amount, now) == 0:
            policy.charge(amount, now)
            trace.append((now, amount))
    return trace


@given(limits, histories)
def test_sliding_window_is_never_over_in_any_minute(
    limit: int, history: list[tuple[int, int]]
) -> None:
    policy = make_policy("sliding_window", limit, minute=MINUTE, now=0)

    assert_never_over(play(policy, history), Limit("units", limit, per=60))


@given(limits, histories)
def test_token_bucket_admits_at_most_limit_plus_refill(
    limit: int, history: list[tuple[int, int]]
) -> None:
    policy = make_policy("token_bucket", limit, minute=MINUTE, now=0)

    trace = play(policy, history)

    # The rate is exact only if scaled: amounts times 60, and 60 s become 1 s.
    assert_within_bucket(
        [(now, 60 * amount) for now, amount in trace], rate=limit, burst=60 * limit
    )


@given(limits, histories)
def test_fixed_window_is_never_over_in_any_clock_minute(
    limit: int, history: list[tuple[int, int]]
) -> None:
    policy = make_policy("fixed_window", limit, minute=MINUTE, now=0)

    sums: dict[int, int] = {}
    for now, amount in play(policy, history):
        sums[now // MINUTE] = sums.get(now // MINUTE, 0) + amount

    assert all(total <= limit for total in sums.values())


def test_fixed_window_admits_twice_the_limit_across_its_edge() -> None:
    """This is its peculiarity: the limit passes before the edge, and again right after it."""
    policy = make_policy("fixed_window", 10, minute=MINUTE, now=0)

    trace = play(policy, [(MINUTE - 1, 10), (0, 1), (1, 10), (0, 1)])

    assert trace == [(MINUTE - 1, 10), (MINUTE, 10)]


@given(limits, histories)
def test_one_second_slices_hold_a_sixtieth_each(limit: int, history: list[tuple[int, int]]) -> None:
    policy = OneSecondSlicesPolicy(limit, minute=MINUTE, now=0)
    share = -(-limit // 60)
    assert policy.share == share

    trace = play(policy, [(step, min(amount, share)) for step, amount in history])

    sums: dict[int, int] = {}
    for now, amount in trace:
        sums[now // SECOND] = sums.get(now // SECOND, 0) + amount
    assert all(total <= share for total in sums.values())
    assert_never_over(trace, Limit("units", limit, per=60))


def test_call_larger_than_slice_uses_up_following_slices() -> None:
    policy = make_policy("one_second_slices", 600, minute=MINUTE, now=0)
    assert policy.wait(25, 0) == 0
    policy.charge(25, 0)

    assert policy.wait(1, 0) == 2 * SECOND
    assert policy.wait(6, 2 * SECOND) == SECOND
    assert policy.wait(5, 2 * SECOND) == 0
    assert policy.wait(25, SECOND // 2) == 3 * SECOND - SECOND // 2


@given(policies, limits, histories, st.integers(min_value=0, max_value=200))
def test_promised_wait_is_exact(
    name: PolicyName, limit: int, history: list[tuple[int, int]], amount: int
) -> None:
    policy = make_policy(name, limit, minute=MINUTE, now=0)
    play(policy, history)
    now = sum(step for step, _ in history)

    wait = policy.wait(amount, now)

    if wait is None:
        assert amount > limit
        assert policy.wait(amount, now + 10 * MINUTE) is None
    elif wait:
        assert policy.wait(amount, now + wait - 1) == 1
        assert policy.wait(amount, now + wait) == 0


@given(policies, limits, histories)
def test_remaining_amount_passes_now_and_everything_is_back_at_reset(
    name: PolicyName, limit: int, history: list[tuple[int, int]]
) -> None:
    policy = make_policy(name, limit, minute=MINUTE, now=0)
    fresh = make_policy(name, limit, minute=MINUTE, now=0)
    play(policy, history)
    now = sum(step for step, _ in history)

    remaining = policy.remaining(now)
    later = now + policy.reset(now)

    assert policy.wait(remaining, now) == 0 or remaining == 0
    assert name == "one_second_slices" or policy.wait(remaining + 1, now) != 0

    assert policy.remaining(later) == fresh.remaining(later)
    assert policy.reset(later) == 0


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_resized_policy_still_counts_earlier_use(name: PolicyName) -> None:
    policy = make_policy(name, 60 * 60, minute=MINUTE, now=0)
    policy.charge(30, 0)

    policy.resize(30 * 60, 0)

    assert policy.limit == 1800
    assert policy.wait(1, 0) == (SECOND if name == "one_second_slices" else 0)
    policy.resize(1, 0)
    assert policy.wait(2, 0) is None
    policy.resize(60 * 60, 0)
    assert policy.wait(60 * 60, 0) != 0
