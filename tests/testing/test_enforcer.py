"""Which calls the bundled provider lets in, and what its options may be."""

import time
from typing import Any

import pytest

from asyncbucket.testing.counting import Counting
from asyncbucket.testing.enforcer import CallError, Enforcer, Failure, Options
from asyncbucket.testing.virtual_time import VirtualClock

SECOND = 1_000_000_000
CHAT = "chat/completions"
NEVER = "It is larger than the limit and can never pass."


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
        (Options, {"policy": {"magic": Counting()}}, "policy must be one of requests, .* 'magic'"),
        (Options, {"accidents": 2}, "accidents must be from 0 to 1, not 2"),
        (Counting, {"by": "magic"}, "by must be bucket, log or calendar, not 'magic'"),
        (Counting, {"size": 0}, "size must be a whole number of at least 1, not 0"),
        (Counting, {"others": 40}, "others must be a fraction from 0 to 1, not 40"),
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
def test_invalid_option_is_refused(kind: Any, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**options)
