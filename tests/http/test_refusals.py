"""A refusal pauses everyone once, for as long as it says; none if waiting does not help."""

import logging
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, Limiter, WouldBlock
from asyncbucket.providers import errors
from asyncbucket.providers.refusals import Refusals
from asyncbucket.testing import VirtualClock


@pytest.fixture
def limiter(clock: VirtualClock) -> Limiter:
    return Limiter("500 RPM", clock=clock, name="shared")


def error(code: str | None = None, kind: str | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "type": kind}}


@pytest.mark.parametrize(
    ("status", "headers", "body", "paused"),
    [
        (429, {"retry-after": "7"}, error("rate_limit_exceeded"), 7),
        (429, {"retry-after-ms": "250"}, {}, 0.25),
        (429, {}, error("rate_limit_exceeded", "requests"), 1),
        (429, {"retry-after": "86400"}, {}, 120),
        (529, {}, error(kind="overloaded_error"), 1),
        (503, {"retry-after": "3"}, {}, 3),
        (503, {}, error("overloaded"), 1),
        (503, {}, {}, 0),
        (500, {"retry-after": "3"}, {}, 0),
        (429, {"retry-after": "7"}, error("insufficient_quota"), 0),
        (429, {"retry-after": "7", "x-should-retry": "false"}, {}, 0),
        (429, {}, {"error": {"code": "resource_unavailable"}}, 0),
        (429, {}, {"type": "service_tier_capacity_exceeded", "code": "3505"}, 0),
        (429, {}, {"message": "limited to 1000 API calls / month"}, 0),
        (429, {"x-ratelimit-reset": "2.5"}, {"error": {"type": "dynamic_request_limited"}}, 2.5),
        (429, {"retry-after": "1", "retry-after-ms": "0"}, {}, 1),
        (402, {"retry-after": "3"}, {}, 0),
        (400, {}, {}, 0),
    ],
)
def test_only_rate_and_overload_refusals_pause_limiter(
    limiter: Limiter, status: int, headers: dict[str, str], body: dict[str, Any], paused: float
) -> None:
    Refusals(limiter).judge(status, headers, body)
    assert limiter.statistics().paused == pytest.approx(paused)
    assert limiter.statistics().upstream_429 == (status == 429 and paused > 0)


#: 16:00 on a winter's day in California.
NOW = 1_796_083_200.0
HOUR = 3_600


def google(*quotas: str, delay: str = "18s") -> dict[str, Any]:
    """Return a refusal as Gemini's API words it."""
    failure = {"@type": "QuotaFailure", "violations": [{"quotaId": quota} for quota in quotas]}
    details = [failure, {"@type": "RetryInfo", "retryDelay": delay}]
    return {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": details}}


def message(text: str) -> dict[str, Any]:
    return {"error": {"message": text, "type": "requests"}}


FREE = {"metadata": {"limit_source": "openrouter_free_tier_daily"}, "code": 429}


@pytest.mark.parametrize(
    ("headers", "body", "hours"),
    [
        ({}, google("GenerateRequestsPerMinutePerProject", "GenerateRequestsPerDayPerProject"), 8),
        ({"x-ratelimit-reset": str(round(NOW + 5 * HOUR) * 1_000)}, {"error": FREE}, 5),
        ({"x-ratelimit-reset": str(round(NOW + 5 * HOUR))}, {"error": FREE}, 5),
        ({"retry-after": "7200"}, message("on requests per day (RPD): Limit 200, Used 200."), 2),
        ({"x-ratelimit-reset-requests-day": "10800.5"}, message("Requests per day limit"), 3),
        ({}, {"message": "Too many tokens per day, please wait before trying again."}, 1),
    ],
)
def test_used_up_quota_of_a_day_stops_calls_until_it_resets(
    clock: VirtualClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    headers: dict[str, str],
    body: dict[str, Any],
    hours: float,
) -> None:
    """Nobody tries again every two minutes; those who wait learn for how long."""
    monkeypatch.setattr(errors, "wall_clock", lambda: NOW)
    limiter = Limiter("500 RPM", clock=clock, name="shared")
    Refusals(limiter).judge(429, headers, body)

    assert limiter.statistics().paused == pytest.approx(hours * HOUR, abs=1)
    assert limiter.statistics().upstream_429 == 1
    left = f"{hours * HOUR:,}"
    assert str(limiter.explain()).startswith(
        f"a call would wait {left} s: the limiter is paused (daily quota)"
    )
    with pytest.raises(WouldBlock, match=rf"paused for {left} s more \(daily quota\)"):
        limiter.acquire_nowait()
    assert caplog.messages == [
        f"limiter 'shared' pauses for {left} s: the provider's quota for the day is used up"
    ]


async def test_call_with_a_deadline_fails_at_once_on_a_used_up_quota(limiter: Limiter) -> None:
    Refusals(limiter).judge(429, {"retry-after": "7200"}, message("tokens per day (TPD)"))

    with pytest.raises(AcquireTimeout, match=r"the limiter is paused for 7,200 s more"):
        await limiter.acquire(timeout=60)
    assert limiter.now() == 0


def test_quota_of_a_minute_follows_the_wait_in_the_body(limiter: Limiter) -> None:
    Refusals(limiter).judge(429, {}, google("GenerateRequestsPerMinutePerProject"))

    assert limiter.statistics().paused == 18


@pytest.mark.parametrize(
    ("headers", "at_once", "in_all"),
    [({}, 0.05, 1), ({"retry-after": "60"}, 60, 60), ({"retry-after": "90"}, 0.05, 90)],
)
@pytest.mark.parametrize("code", ["rate_limit_exceeded", "insufficient_quota"])
def test_pause_awaits_the_body_if_the_account_may_be_exhausted(
    limiter: Limiter, headers: dict[str, str], at_once: float, in_all: float, code: str
) -> None:
    refusals = Refusals(limiter)
    _, needs_body = refusals.judge(429, headers, None)
    assert needs_body is (at_once != in_all)
    assert limiter.statistics().paused == pytest.approx(at_once)
    if needs_body:
        refusals.judge(429, headers, error(code))
    exhausted = needs_body and code == "insufficient_quota"
    assert limiter.statistics().paused == pytest.approx(at_once if exhausted else in_all)


def test_one_wave_of_refusals_causes_one_pause(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals(limiter)
    for _ in range(20):
        refusals.judge(429, {}, {})
    assert limiter.statistics().paused == 1
    clock.advance(0.5)
    refusals.judge(429, {}, {})
    assert limiter.statistics().paused == 0.5
    refusals.judge(429, {"retry-after": "4"}, {})
    assert limiter.statistics().paused == 4


def test_pause_doubles_with_each_wave_until_success(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals(limiter)
    pauses = []
    for _ in range(9):
        refusals.judge(429, {}, {})
        pauses.append(limiter.statistics().paused)
        refusals.succeeded()  # of a call from before the pause, so it ends no series
        clock.advance(pauses[-1])
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 64, 120, 120])
    refusals.succeeded()
    refusals.judge(429, {}, {})
    assert limiter.statistics().paused == 1


def test_first_wave_with_adaptive_concurrency_causes_no_pause(clock: VirtualClock) -> None:
    limiter = Limiter(concurrency="auto", clock=clock)
    refusals = Refusals(limiter)
    clock.advance(1)
    refusals.judge(429, {}, {}, sent_at=0.8)
    refusals.judge(429, {}, {}, sent_at=0.9)
    assert limiter.statistics().paused == 0
    assert limiter.statistics().upstream_429 == 2
    clock.advance(1)
    refusals.judge(429, {}, {}, sent_at=1.9)
    assert limiter.statistics().paused == 2
    clock.advance(2)
    refusals.succeeded(sent_at=4)
    refusals.judge(429, {}, {}, sent_at=4)
    assert limiter.statistics().paused == 0
    least = Limiter(concurrency=(4, 20), clock=clock)
    Refusals(least).judge(429, {}, {})
    assert least.statistics().paused == 1  # it has no slot to give up


def test_late_reply_neither_ends_nor_starts_a_wave(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals(limiter)
    refusals.judge(429, {}, {}, sent_at=0)
    clock.advance(5)
    refusals.judge(429, {}, {}, sent_at=0)
    assert limiter.statistics().paused == 0
    refusals.succeeded(sent_at=0)
    refusals.judge(429, {}, {}, sent_at=4)
    assert limiter.statistics().paused == 2


def test_refusal_warning_is_logged_at_most_once_a_minute(
    limiter: Limiter, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = Refusals(limiter)
    with caplog.at_level(logging.WARNING):
        for _ in range(11):
            refusals.judge(429, {"retry-after": "7"}, {})
            clock.advance(7)
    first, second = (record.message for record in caplog.records)
    assert first == second
    assert first == (
        "limiter 'shared' pauses for 7 s: the provider refused a call (429); its limits may be "
        "lower than yours, or others use the same key"
    )


def test_empty_account_is_logged_once(limiter: Limiter, caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals(limiter)
    for _ in range(3):
        refusals.judge(429, {}, error("insufficient_quota"))
    (record,) = caplog.records
    assert record.message == (
        "the provider refuses calls of limiter 'shared' for good (HTTP 429 (insufficient_quota)): "
        "no waiting helps; look at the account's plan and balance"
    )
