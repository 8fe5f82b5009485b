import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Limit
from asyncbucket.testing.assertions import assert_never_over, assert_within_bucket
from asyncbucket.testing.provider.enforcer import Policy
from asyncbucket.testing.provider.options import POLICY_NAMES, SLICES, PolicyName

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


def play(policy: Policy, limit: int, history: list[tuple[int, int]]) -> list[tuple[int, int]]:
    now = 0
    trace: list[tuple[int, int]] = []
    for step, amount in history:
        now += step
        if policy.wait(amount, limit, now) == 0:
            policy.charge(amount, limit, now)
            trace.append((now, amount))
    return trace


def sums(trace: list[tuple[int, int]], span: int) -> list[int]:
    windows = {now // span for now, _ in trace}
    return [sum(amount for now, amount in trace if now // span == each) for each in windows]


@given(policies, limits, histories)
def test_policy_admits_no_more_than_its_limit(
    name: PolicyName, limit: int, history: list[tuple[int, int]]
) -> None:
    slices = SLICES.get(name, 1)
    share = -(-limit // slices)
    if name in SLICES:
        history = [(step, min(amount, share)) for step, amount in history]
    trace = play(Policy(name, MINUTE), limit, history)
    if name == "token_bucket":
        # The rate is exact only if scaled: amounts times 60, and 60 s become 1 s.
        scaled = [(now, 60 * amount) for now, amount in trace]
        assert_within_bucket(scaled, rate=limit, burst=60 * limit)
    elif name == "fixed_window":
        assert all(total <= limit for total in sums(trace, MINUTE))
    else:
        assert_never_over(trace, Limit("units", limit, per=60))
    if name in SLICES:
        assert all(total <= share for total in sums(trace, MINUTE // slices))


def test_fixed_window_admits_twice_the_limit_across_its_edge() -> None:
    trace = play(Policy("fixed_window", MINUTE), 10, [(MINUTE - 1, 10), (0, 1), (1, 10), (0, 1)])
    assert trace == [(MINUTE - 1, 10), (MINUTE, 10)]


def test_call_larger_than_slice_uses_up_following_slices() -> None:
    policy = Policy("one_second_slices", MINUTE)
    assert policy.wait(25, 600, 0) == 0
    policy.charge(25, 600, 0)
    assert policy.wait(1, 600, 0) == 2 * SECOND
    assert policy.wait(25, 600, SECOND // 2) == 3 * SECOND - SECOND // 2
    assert policy.wait(6, 600, 2 * SECOND) == SECOND
    assert policy.wait(5, 600, 2 * SECOND) == 0


@given(policies, limits, histories, st.integers(min_value=0, max_value=200))
def test_promised_wait_is_exact(
    name: PolicyName, limit: int, history: list[tuple[int, int]], amount: int
) -> None:
    policy = Policy(name, MINUTE)
    play(policy, limit, history)
    now = sum(step for step, _ in history)
    wait = policy.wait(amount, limit, now)
    if wait is None:
        assert amount > limit
        assert policy.wait(amount, limit, now + 10 * MINUTE) is None
    elif wait:
        assert policy.wait(amount, limit, now + wait - 1) == 1
        assert policy.wait(amount, limit, now + wait) == 0


@given(policies, limits, histories)
def test_remaining_amount_passes_now_and_everything_is_back_at_reset(
    name: PolicyName, limit: int, history: list[tuple[int, int]]
) -> None:
    policy, fresh = Policy(name, MINUTE), Policy(name, MINUTE)
    play(policy, limit, history)
    now = sum(step for step, _ in history)
    remaining = policy.remaining(limit, now)
    later = now + policy.reset(limit, now)
    assert policy.wait(remaining, limit, now) == 0 or remaining == 0
    assert name in SLICES or policy.wait(remaining + 1, limit, now) != 0
    assert policy.remaining(limit, later) == fresh.remaining(limit, later)
    assert policy.reset(limit, later) == 0


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_use_counts_against_another_limit(name: PolicyName) -> None:
    policy = Policy(name, MINUTE)
    policy.charge(30, 3600, 0)
    assert policy.wait(1, 1800, 0) == (SECOND if name == "one_second_slices" else 0)
    assert policy.wait(3600, 3600, 0) != 0
    assert policy.wait(2, 1, 0) is None


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_negative_charge_comes_back(name: PolicyName) -> None:
    """Providers correct what they reserved; what comes back is what was charged last."""
    policy, less = Policy(name, MINUTE), Policy(name, MINUTE)
    for each, amounts in ((policy, (6, 3, -5)), (less, (4,))):
        for amount in amounts:
            each.charge(amount, 600, 0)

    assert policy.remaining(600, 0) == less.remaining(600, 0)
    policy.charge(-1_000, 600, 0)
    assert policy.remaining(600, 0) == Policy(name, MINUTE).remaining(600, 0)
