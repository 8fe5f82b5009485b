"""How the bundled provider counts, what others take, and what its cache of prompts reads and writes."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Limit
from asyncbucket.testing import RateLimitedProvider, VirtualTime
from asyncbucket.testing.assertions import assert_never_over, assert_within_bucket
from asyncbucket.testing.counting import POLICIES, POLICY_NAMES, Counting, Policy, PolicyName
from asyncbucket.testing.prompt_cache import Cache

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
KEY = {"x-api-key": "any"}

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
def test_policy_admits_no_more_than_its_limit(name: PolicyName, limit: int, history: Any) -> None:
    slices = POLICIES[name].slices
    share = -(-limit // slices)
    if slices > 1:
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
    if slices > 1:
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
    assert POLICIES[name].slices > 1 or policy.wait(remaining + 1, limit, now) != 0
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


def test_bucket_of_a_size_holds_that_and_refills_at_the_limit() -> None:
    policy = Policy(Counting(size=10), MINUTE)
    policy.charge(10, 600, 0)
    assert (policy.remaining(600, 0), policy.reset(600, 0)) == (0, SECOND)
    assert policy.wait(5, 600, 0) == SECOND // 2
    assert policy.wait(11, 600, 0) is None
    lenient = Policy(Counting(size=10, oversize=True), MINUTE)
    assert lenient.wait(25, 600, 0) == 0
    lenient.charge(25, 600, 0)
    assert lenient.wait(1, 600, 0) == 16 * SECOND // 10


def test_hidden_slices_refuse_but_headers_tell_of_the_minute() -> None:
    policy = Policy(Counting(by="log", slices=60, hidden=True), MINUTE)
    policy.charge(10, 600, 0)
    assert (policy.wait(1, 600, 0), policy.remaining(600, 0)) == (SECOND, 590)


def test_others_take_their_part_in_bursts_and_are_refused_like_us() -> None:
    policy = Policy(Counting(by="log", others=0.4, others_at_once=20), MINUTE)
    for second in range(600):
        policy.remaining(600, second * SECOND)
    assert 1_800 < policy.others_sent < 3_000
    assert policy.others_refused == 0
    policy.charge(590, 600, 600 * SECOND)
    policy.remaining(600, 630 * SECOND)
    assert policy.others_refused > 50


def prompt(*texts: str, marked: int | None = 0) -> list[dict[str, Any]]:
    """Return a message of texts of 400 characters each, of which one ends what is to be cached."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text * 400} for text in texts]
    if marked is not None:
        parts[marked]["cache_control"] = {"type": "ephemeral"}
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("stream", [False, True])
async def test_prefix_is_read_from_the_reply_that_writes_it_until_it_expires(
    virtual_time: VirtualTime, *, stream: bool
) -> None:
    clock = virtual_time.clock
    cached: Any = {"itpm": 10_000, "cache": Cache()}
    provider = RateLimitedProvider(**cached, latency=10.0, begins=0.2, clock=clock)
    client = httpx.AsyncClient(transport=provider.mock_transport(), headers=KEY)

    async def ask(second: float, *texts: str) -> tuple[int, int, int]:
        await asyncio.sleep(second)
        body = {"model": "m", "max_tokens": 5, "messages": prompt(*texts), "stream": stream}
        async with client.stream("POST", "http://p/v1/messages", json=body) as reply:
            return usage([line async for line in reply.aiter_lines()])

    asked = [ask(at, "a", "b") for at in (0, 1.9, 2.1)]
    read = await asyncio.gather(*asked, ask(3, "c"), ask(400, "a", "d"))
    cold, warm = (100, 100, 0), (100, 0, 100)
    assert read == [cold, cold, warm, (0, 100, 0), cold]
    seen = provider.statistics()
    assert (seen.cache_writes, seen.cache_reads) == (4, 1)


def usage(lines: list[str]) -> tuple[int, int, int]:
    """Return the input tokens of a reply or of a stream's first event: new, written, read."""
    line = next(line for line in lines if "input_tokens" in line).removeprefix("data: ")
    found = json.loads(line)
    used = (found.get("message") or found)["usage"]
    read, written = used["cache_read_input_tokens"], used["cache_creation_input_tokens"]
    return used["input_tokens"], written, read
