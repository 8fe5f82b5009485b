"""A refusal pauses everyone once, for as long as it says; none if waiting does not help."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncbucket import AcquireTimeout, Limiter, WouldBlock
from asyncbucket.providers import errors
from asyncbucket.providers.details import WEEK, Details
from asyncbucket.providers.errors import judge_reply
from asyncbucket.providers.refusals import Refusals
from asyncbucket.testing import VirtualClock

TODAY = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()


def waits(value: object, **others: object) -> float | None:
    return Details(None, {"Retry-After": value} | others).retry_after(TODAY)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1.5", 1.5),
        (" 7\t", 7.0),
        ("9" * 64, WEEK),
        ("Sat, 31 Jan 2026 12:01:00 GMT", 60.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", WEEK),
        *((odd, None) for odd in ("nan", "-inf", "Infinity", "1e3", "0x10", "1_0", "+1", "-1", "1.")),
        *((odd, None) for odd in ("", "s", "1s", "²", "٣", "\uff11", "1\n", "1\x00", "1, 1", "1 2")),
        *((odd, None) for odd in ("Sat, 99 Jan 2026 12:00:00 GMT", "Tue, 31 Feb 2026 12:00:00 GMT")),
        *((odd, None) for odd in ("Sat, 31 Foo 2026 12:00:00 GMT", "Sat, 31 Jan 2026 99:00:00 GMT")),
        *((odd, None) for odd in ("Sat, 31 Jan 2026 12:00:00 PST", "tomorrow", "1" * 65, None, 5)),
        *((none, None) for none in ("0", "Sat, 31 Jan 2026 11:00:00 GMT")),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_of_seconds_or_a_date(value: object, seconds: float | None) -> None:
    assert waits(value) == seconds


def test_time_in_milliseconds_comes_first_and_dates_are_by_the_servers_clock() -> None:
    assert waits("9", **{"retry-after-ms": "1500"}) == 1.5
    assert waits("9", **{"retry-after-ms": "soon"}) == 9.0
    until = "Sat, 31 Jan 2026 12:00:30 GMT"
    assert (waits(until), waits(until, date="Sat, 31 Jan 2026 12:00:20 GMT")) == (30.0, 10.0)


@settings(deadline=None, max_examples=50)
@given(
    st.text(max_size=70)
    | st.text(alphabet="0123456789.+-_eE :,GMTJanFri\x00²٣", max_size=70)
    | st.binary(max_size=8)
)
@example("Fri, 31 Dec 0001 00:00:00 GMT")
@example("Mon, 01 Jan 0000 00:00:00 GMT")
def test_wait_never_raises_or_leaves_range_on_hostile_value(value: object) -> None:
    for seconds in (waits(value), waits("9", date=value), waits("1", **{"retry-after-ms": value})):
        assert seconds is None or 0.0 < seconds <= WEEK


@pytest.fixture
def limiter(clock: VirtualClock) -> Limiter:
    return Limiter("500 RPM", clock=clock, name="shared")


def take_in(
    refusals: Refusals,
    status: int,
    headers: dict[str, str] | None = None,
    body: object = None,
    **options: Any,
) -> None:
    refusals.take_in(judge_reply(status, Details(body, headers or {})), **options)


def error(code: str | None = None, kind: str | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "type": kind}}


def test_a_huge_body_is_not_searched_to_its_end() -> None:
    numbers = iter(range(1_000_000))

    class Huge(list[int]):
        def __iter__(self) -> Iterator[int]:
            return numbers

    assert not Details(Huge()).codes
    assert next(numbers) <= 1_000


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
    take_in(Refusals.of(limiter), status, headers, body)
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
    take_in(Refusals.of(limiter), 429, headers, body)

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
    take_in(Refusals.of(limiter), 429, {"retry-after": "7200"}, message("tokens per day (TPD)"))

    with pytest.raises(AcquireTimeout, match=r"the limiter is paused for 7,200 s more"):
        await limiter.acquire(timeout=60)
    assert limiter.now() == 0


def test_quota_of_a_minute_follows_the_wait_in_the_body(limiter: Limiter) -> None:
    take_in(Refusals.of(limiter), 429, {}, google("GenerateRequestsPerMinutePerProject"))

    assert limiter.statistics().paused == 18


def test_one_wave_of_refusals_causes_one_pause(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals.of(limiter)
    for _ in range(20):
        take_in(refusals, 429)
    assert limiter.statistics().paused == 1
    clock.advance(0.5)
    take_in(refusals, 429)
    assert limiter.statistics().paused == 0.5
    take_in(refusals, 429, {"retry-after": "4"})
    assert limiter.statistics().paused == 4
    assert Refusals.of(limiter) is refusals  # whoever hears of it


def test_pause_doubles_with_each_wave_until_success(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals.of(limiter)
    pauses = []
    for _ in range(9):
        take_in(refusals, 429)
        pauses.append(limiter.statistics().paused)
        refusals.succeeded()  # of a call from before the pause, so it ends no series
        clock.advance(pauses[-1])
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 64, 120, 120])
    refusals.succeeded()
    take_in(refusals, 429)
    assert limiter.statistics().paused == 1


def test_first_wave_with_adaptive_concurrency_causes_no_pause(clock: VirtualClock) -> None:
    limiter = Limiter(concurrency="auto", clock=clock)
    refusals = Refusals.of(limiter)
    clock.advance(1)
    take_in(refusals, 429, sent_at=0.8)
    take_in(refusals, 429, sent_at=0.9)
    assert limiter.statistics().paused == 0
    assert limiter.statistics().upstream_429 == 2
    clock.advance(1)
    take_in(refusals, 429, sent_at=1.9)
    assert limiter.statistics().paused == 2
    clock.advance(2)
    refusals.succeeded(sent_at=4)
    take_in(refusals, 429, sent_at=4)
    assert limiter.statistics().paused == 0
    least = Limiter(concurrency=(4, 20), clock=clock)
    take_in(Refusals.of(least), 429)
    assert least.statistics().paused == 1  # it has no slot to give up


def test_late_reply_neither_ends_nor_starts_a_wave(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals.of(limiter)
    take_in(refusals, 429, sent_at=0)
    clock.advance(5)
    take_in(refusals, 429, sent_at=0)
    assert limiter.statistics().paused == 0
    refusals.succeeded(sent_at=0)
    take_in(refusals, 429, sent_at=4)
    assert limiter.statistics().paused == 2


def test_refusal_warning_is_logged_at_most_once_a_minute(
    limiter: Limiter, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = Refusals.of(limiter)
    with caplog.at_level(logging.WARNING):
        for _ in range(11):
            take_in(refusals, 429, {"retry-after": "7"})
            clock.advance(7)
    first, second = (record.message for record in caplog.records)
    assert first == second
    assert first == (
        "limiter 'shared' pauses for 7 s: the provider refused a call (429); its limits may be "
        "lower than yours, or others use the same key"
    )


def test_empty_account_is_logged_once(limiter: Limiter, caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals.of(limiter)
    for _ in range(3):
        take_in(refusals, 429, {}, error("insufficient_quota"))
    (record,) = caplog.records
    assert record.message == (
        "the provider permanently refuses calls of limiter 'shared' (HTTP 429 (insufficient_quota)): "
        "waiting does not help; check the account's plan and balance"
    )
