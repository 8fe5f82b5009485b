"""How the bundled provider counts, and which calls get in."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Limit
from asyncbucket.testing.assertions import assert_never_over, assert_within_bucket
from asyncbucket.testing.enforcer import (
    POLICY_NAMES,
    SLICES,
    CallError,
    Enforcer,
    Failure,
    Options,
    Policy,
    PolicyName,
)
from asyncbucket.testing.virtual_time import VirtualClock

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
CHAT = "chat/completions"
NEVER = "It is larger than the limit and can never pass."

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
def test_promised_wait_remainder_and_reset_are_exact(
    name: PolicyName, limit: int, history: list[tuple[int, int]], amount: int
) -> None:
    policy, fresh = Policy(name, MINUTE), Policy(name, MINUTE)
    play(policy, limit, history)
    now = sum(step for step, _ in history)
    remaining, later = policy.remaining(limit, now), now + policy.reset(limit, now)
    assert policy.wait(remaining, limit, now) == 0 or remaining == 0
    assert name in SLICES or policy.wait(remaining + 1, limit, now) != 0
    wait = policy.wait(amount, limit, now)
    if wait is None:
        assert amount > limit
    elif wait:
        assert policy.wait(amount, limit, now + wait - 1) == 1
        assert policy.wait(amount, limit, now + wait) == 0
    later = max(later, now + (wait or 0))
    assert policy.remaining(limit, later) == fresh.remaining(limit, later)
    assert policy.reset(limit, later) == 0


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_use_counts_against_another_limit_and_corrections_come_back(name: PolicyName) -> None:
    """What comes back is what was charged last."""
    policy, less = Policy(name, MINUTE), Policy(name, MINUTE)
    policy.charge(30, 3600, 0)
    assert policy.wait(1, 1800, 0) == (SECOND if name == "one_second_slices" else 0)
    assert policy.wait(3600, 3600, 0) != 0
    policy.charge(-26, 3600, 0)
    less.charge(4, 3600, 0)
    assert policy.remaining(3600, 0) == less.remaining(3600, 0)
    policy.charge(-1_000, 3600, 0)
    assert policy.remaining(3600, 0) == Policy(name, MINUTE).remaining(3600, 0)


def enter(gate: Enforcer, tokens: int) -> Any:
    """Return how an admitted call fails, if it does, or why a call is refused."""
    try:
        return gate.enter(CHAT, "m", {"tokens": tokens})
    except CallError as refusal:
        return refusal


def test_refusal_names_the_limit_with_the_longest_wait() -> None:
    gate = Enforcer(Options(rpm=2, tpm=100, concurrency=3, clock=VirtualClock()))
    assert [enter(gate, 50) for _ in range(2)] == [None, None]
    ends = [enter(gate, tokens) for tokens in (100, 10, 101)]
    gate.options.rpm, gate.options.concurrency = None, 2
    ends.append(enter(gate, 0))
    assert [end.message.partition(" on ")[2] for end in ends] == [
        "tokens per min (TPM): Limit 100, Used 100, Requested 100. Please try again in 1m0s.",
        "requests per min (RPM): Limit 2, Used 2, Requested 1. Please try again in 30s.",
        f"tokens per min (TPM): Limit 100, Used 100, Requested 101. {NEVER}",
        "concurrent requests: Limit 2, Used 2, Requested 1. Please try again when one of them is done.",
    ]
    seen = gate.statistics()
    assert seen.refused_429 == {"tokens": 2, "requests": 1, "concurrency": 1}
    assert (seen.tokens, seen.peak_in_flight) == (100, 2)  # no limit charges for a refused call
    gate.leave({})
    assert enter(gate, 0) is None


def test_failed_call_is_charged_but_scripted_429_is_not() -> None:
    gate = Enforcer(Options(tpm=100, always=503, clock=VirtualClock()))
    gate.fail_next(1, Failure(500))
    gate.fail_next(2, Failure(429, retry_after=2.5))
    assert isinstance(enter(gate, 101), CallError)  # this uses up no failure
    assert enter(gate, 10) == Failure(500)
    gate.leave({})
    refusal = enter(gate, 10)
    assert (refusal.status, refusal.wait) == (429, 2.5 * SECOND)
    gate.fail_next(0, Failure())  # forgets the rest
    with pytest.raises(ValueError, match="count must be a whole number of at least 0, not -1"):
        gate.fail_next(-1, Failure())
    assert enter(gate, 10) == Failure(503)
    seen = gate.statistics()
    assert (seen.tokens, seen.errors) == (20, 2)
    assert seen.refused_429 == {"tokens": 1, "scripted": 1}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Options, {"rpm": "9k"}, "rpm must be a whole number of at least 1, not '9k'"),
        (Options, {"reply_tokens": None}, "reply_tokens must be a whole number of at least 0"),
        (Options, {"policy": "magic"}, "policy must be one of token_bucket, .* not 'magic'"),
        (Options, {"profile": "magic"}, "profile must be one of openai, .* not 'magic'"),
        (Options, {"minute": 0}, "minute must be a positive number of seconds, not 0"),
        (Options, {"latency": (2, 1)}, r"latency must be seconds .* not \(2, 1\)"),
        (Options, {"latency": float("nan")}, "latency must be seconds .* not nan"),
        (Options, {"always": 200}, "status must be 400 to 599, not 200"),
        (Options, {"clock": time.monotonic}, "clock must return integer nanoseconds"),
        (Failure, {"retry_after": -1}, "retry_after must be finite and >= 0 s, not -1"),
        (Failure, {"after_chunks": -1}, "after_chunks must be a whole number of at least 0"),
    ],
)
def test_invalid_option_is_refused_at_once(kind: Any, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**options)
