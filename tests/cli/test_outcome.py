"""The figures of a run, worked out from what the provider saw."""

import pytest

from asyncbucket import Limit, Limiter
from asyncbucket.cli.demo.outcome import outcome_of, share_used
from asyncbucket.cli.demo.scenario import DemoOptions, scenario_of
from asyncbucket.cli.demo.tally import Tally
from asyncbucket.cli.demo.traffic import Arrival

START = 5_000_000_000


def at(*times: float, tokens: int = 0) -> list[Arrival]:
    """Return admitted requests at times (s) after the start."""
    return [Arrival(START + round(time * 1e9), tokens, admitted=True) for time in times]


TEN_A_SECOND = Limit("requests", 10, per=1)


def test_share_used_is_one_when_all_of_a_limit_is_used() -> None:
    """Ten calls in each of three seconds use all of it."""
    arrivals = at(*(number / 10 for number in range(30)))

    assert share_used(TEN_A_SECOND, arrivals, start_ns=START, seconds=3.0) == 1.0


def test_burst_at_the_start_does_not_make_up_for_idle_time() -> None:
    """Twenty in the first second and none in the next use half of the limit, not all of it."""
    arrivals = at(*(number / 20 for number in range(20)))

    assert share_used(TEN_A_SECOND, arrivals, start_ns=START, seconds=2.0) == 0.5


def test_partial_last_window_counts_for_its_length() -> None:
    """The last half window has room for five, so two more calls make 12 of 15."""
    arrivals = at(*(number / 10 for number in range(10)), 1.1, 1.2)

    assert share_used(TEN_A_SECOND, arrivals, start_ns=START, seconds=1.5) == pytest.approx(0.8)


def test_share_of_a_token_limit_counts_charged_tokens() -> None:
    """Two requests of 30 tokens are 60 of 100."""
    limit = Limit("tokens", 100, per=1)

    share = share_used(limit, at(0.1, 0.2, tokens=30), start_ns=START, seconds=1.0)

    assert share == pytest.approx(0.6)


def test_share_used_is_zero_when_nothing_ran() -> None:
    """There is no division by a time of zero."""
    assert share_used(TEN_A_SECOND, [], start_ns=0, seconds=0.0) == 0.0


async def test_wait_percentiles_include_calls_that_passed_at_once() -> None:
    """If eight pass at once and two wait, the median is 0, and the 95th percentile the longest."""
    tally = Tally(Limiter(rpm=600), started_ns=START, ended_ns=START + 1)
    assert tally.limiter is not None
    for _ in range(10):
        tally.limiter.acquire_nowait().release()
    tally.waits += [(2.0, "tokens"), (1.0, "requests")]

    outcome = outcome_of(scenario_of(DemoOptions()), tally, [], tokens_known=True)

    assert (outcome.wait(0.5), outcome.wait(0.9), outcome.wait(0.95)) == (0.0, 1.0, 2.0)
    assert outcome.bound_by == {"tokens": 1, "requests": 1}


def test_waits_are_unknown_without_asyncbucket() -> None:
    """A client's back-off is not an admission."""
    outcome = outcome_of(scenario_of(DemoOptions()), Tally(), [], tokens_known=True)

    assert outcome.wait(0.5) is None


def test_calls_count_answers_and_failures_but_no_retries() -> None:
    """A refused request that is tried again is not another call."""
    tally = Tally(started_ns=START, ended_ns=START + 1)
    tally.traffic.requests, tally.traffic.refused, tally.traffic.answered = 100, 60, 40
    tally.failures["RateLimitError"] = 5

    outcome = outcome_of(scenario_of(DemoOptions()), tally, at(0.0), tokens_known=False)

    assert (outcome.calls, outcome.failed, outcome.requests, outcome.refused) == (45, 5, 100, 60)
    assert outcome.binding is not None
    assert outcome.binding[0] == "requests"
