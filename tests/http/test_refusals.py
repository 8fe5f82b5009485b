"""A refusal pauses everyone once, for as long as it says; none if waiting does not help."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, Limiter, WouldBlock
from asyncbucket.levels import meet_provider
from asyncbucket.providers import errors
from asyncbucket.providers.errors import WEEK, judge_reply
from asyncbucket.providers.learn import Refusals
from asyncbucket.testing import VirtualClock
from tests.http.conftest import data

#: Midnight at Greenwich, 16:00 on a winter's day in California.
NOW = 1_796_083_200.0


@pytest.fixture(autouse=True, scope="module")
def wall_clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "wall_clock", lambda: NOW)
        yield


def waits(value: object, **others: object) -> float | None:
    return judge_reply(500, None, {"Retry-After": value} | others).retry_after


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1.5", 1.5),
        (" 7\t", 7.0),
        ("9" * 64, WEEK),
        ("Tue, 01 Dec 2026 00:01:00 GMT", 60.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", WEEK),
        *((odd, None) for odd in ("nan", "-inf", "1e3", "0x10", "1_0", "+1", "-1", "1.", "1s")),
        *((odd, None) for odd in ("", "²", "٣", "\uff11", "1\n", "1\x00", "1, 1", "1" * 65, 5)),
        *((odd, None) for odd in ("Tue, 99 Dec 2026 00:00:00 GMT", "Tue, 31 Feb 2026 12:00:00 GMT")),
        *((odd, None) for odd in ("Tue, 01 Foo 2026 00:00:00 GMT", "Tue, 01 Dec 2026 99:00:00 GMT")),
        *((odd, None) for odd in ("Tue, 01 Dec 2026 00:01:00 PST", "tomorrow", None)),
        *((none, None) for none in ("0", "Mon, 30 Nov 2026 11:00:00 GMT")),
        *((none, None) for none in ("Fri, 31 Dec 0001 00:00:00 GMT", "Mon, 01 Jan 0000 00:00:00 GMT")),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_of_seconds_or_a_date(value: object, seconds: float | None) -> None:
    assert waits(value) == seconds


def test_time_in_milliseconds_comes_first_and_dates_are_by_the_servers_clock() -> None:
    assert waits("9", **{"retry-after-ms": "1500"}) == 1.5
    assert waits("9", **{"retry-after-ms": "soon"}) == 9.0
    until = "Tue, 01 Dec 2026 00:00:30 GMT"
    assert (waits(until), waits(until, date="Tue, 01 Dec 2026 00:00:20 GMT")) == (30.0, 10.0)


def test_a_huge_body_is_not_searched_to_its_end() -> None:
    numbers = iter(range(1_000_000))

    class Huge(list[int]):
        def __iter__(self) -> Iterator[int]:
            return numbers

    judge_reply(429, Huge(), {})
    assert next(numbers) <= 1_000


@pytest.fixture
def limiter(clock: VirtualClock) -> Limiter:
    return Limiter("500 RPM", clock=clock, name="shared")


def take_in(
    refusals: Refusals,
    status: int = 429,
    body: object = None,
    headers: Any = None,
    *,
    sent_at: float | None = None,
) -> None:
    refusals.take_in(judge_reply(status, body, headers or {}), sent_at=sent_at)


def have_three_accidents(refusals: Refusals) -> None:
    for _ in range(3):
        take_in(refusals, sent_at=0)


@pytest.mark.parametrize("refusal", data("refusals")["refusal"])
def test_only_rate_and_overload_refusals_pause(limiter: Limiter, refusal: dict[str, Any]) -> None:
    """Three refusals of eight replies that name no time may be accidents, and pause nobody."""
    status, paused = refusal["status"], refusal["paused"]
    have_three_accidents(Refusals.of(limiter))
    assert limiter.statistics().paused == 0
    body = json.loads(refusal.get("body", "{}"))
    take_in(Refusals.of(limiter), status, body, refusal.get("headers"))
    assert limiter.statistics().paused == pytest.approx(paused)
    assert limiter.statistics().upstream_429 == 3 + (status == 429 and paused > 0)


@pytest.mark.parametrize("refusal", data("refusals")["daily"])
async def test_used_up_quota_of_a_day_stops_calls_until_it_resets(
    limiter: Limiter, caplog: pytest.LogCaptureFixture, refusal: dict[str, Any]
) -> None:
    """Those who wait learn for how long."""
    take_in(Refusals.of(limiter), 429, json.loads(refusal["body"]), refusal.get("headers"))

    assert limiter.statistics().paused == pytest.approx(refusal["paused"])
    assert limiter.statistics().upstream_429 == 1
    left = f"{refusal['paused']:,.0f}"
    assert f"would wait {left} s: the limiter is paused (daily quota)" in str(limiter.explain())
    with pytest.raises(WouldBlock, match=rf"paused for {left} s more \(daily quota\)"):
        limiter.acquire_nowait()
    with pytest.raises(AcquireTimeout, match=f"the limiter is paused for {left} s more"):
        await limiter.acquire(timeout=60)
    assert caplog.messages[0].endswith(
        f" pauses for {left} s: the provider's quota for the day is used up"
    )


def test_one_wave_of_refusals_causes_one_pause(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals.of(limiter)
    effects = [refusals.take_in(judge_reply(429, None, {})) for _ in range(20)]
    assert effects == [*["accident"] * 3, "first", *["later"] * 16]  # three may be accidents
    assert limiter.statistics().paused == 1
    clock.advance(0.5)
    take_in(refusals)
    assert limiter.statistics().paused == 0.5
    take_in(refusals, headers={"retry-after": "4"})
    assert limiter.statistics().paused == 4
    assert Refusals.of(limiter) is refusals  # whoever hears of it


def test_accidents_while_headers_show_room_pause_only_if_they_are_many(limiter: Limiter) -> None:
    refusals, refusal = Refusals.of(limiter), judge_reply(429, None, {})
    in_flight = [12, 11, 10, 9, 8, 8]
    effects = [refusals.take_in(refusal, in_flight=each) for each in in_flight]
    assert effects == ["accident"] * 4 + ["first", "later"]
    assert limiter.statistics().paused == 1


@pytest.mark.parametrize(
    ("between", "learns", "counts"), [(5, True, 6), (6, True, None), (5, False, None)]
)
def test_a_sixth_of_many_replies_that_are_refused_are_no_accidents_if_limits_learn(
    limiter: Limiter, *, between: int, learns: bool, counts: int | None
) -> None:
    """A limit a little lower than ours refuses no more; where no limit can be lowered, it takes a third."""
    if learns:
        meet_provider(limiter)
    refusals, effects = Refusals.of(limiter), list[str]()
    for _ in range(8):
        effects.append(refusals.take_in(judge_reply(429, None, {})))
        for _ in range(between):
            refusals.succeeded()
    assert effects == ["accident"] * 8 if counts is None else effects.index("first") == counts - 1


def test_success_between_two_waves_ends_their_series(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals.of(limiter)
    have_three_accidents(refusals)
    take_in(refusals, sent_at=0)
    clock.advance(1)
    for paused in (2, 2, 2):  # the reply to a call that was sent before it comes in each pause
        sent_at = clock() * 1e-9
        clock.advance(0.5)
        take_in(refusals, sent_at=sent_at)
        assert limiter.statistics().paused == paused
        refusals.succeeded(sent_at)
        clock.advance(paused)


def test_pause_doubles_with_each_wave_until_success(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals.of(limiter)
    have_three_accidents(refusals)
    pauses = []
    for _ in range(9):
        take_in(refusals)
        pauses.append(limiter.statistics().paused)
        refusals.succeeded()  # of a call from before the pause, so it ends no series
        clock.advance(pauses[-1])
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 64, 120, 120])
    refusals.succeeded()
    have_three_accidents(refusals)
    take_in(refusals)
    assert limiter.statistics().paused == 1
    for _ in range(7):
        refusals.succeeded()
    clock.advance(1)
    take_in(refusals)
    assert limiter.statistics().paused == 0


def test_first_wave_with_adaptive_concurrency_causes_no_pause(clock: VirtualClock) -> None:
    limiter = Limiter(concurrency="auto", clock=clock)
    refusals = Refusals.of(limiter)
    clock.advance(1)
    for sent_at in (0.6, 0.7, 0.8, 0.9):
        take_in(refusals, sent_at=sent_at)
    assert limiter.statistics().paused == 0
    assert limiter.statistics().upstream_429 == 4
    clock.advance(1)
    take_in(refusals, sent_at=1.9)
    assert limiter.statistics().paused == 2
    least = Limiter(concurrency=(4, 20), clock=clock)
    have_three_accidents(Refusals.of(least))
    take_in(Refusals.of(least))
    assert least.statistics().paused == 1  # it has no slot to give up


def test_late_reply_neither_ends_nor_starts_a_wave(limiter: Limiter, clock: VirtualClock) -> None:
    refusals = Refusals.of(limiter)
    have_three_accidents(refusals)
    take_in(refusals, sent_at=0)
    clock.advance(5)
    take_in(refusals, sent_at=0)
    assert limiter.statistics().paused == 0
    refusals.succeeded(sent_at=0)
    take_in(refusals, sent_at=4)
    assert limiter.statistics().paused == 2


def test_shadow_logs_no_pause(clock: VirtualClock, caplog: pytest.LogCaptureFixture) -> None:
    limiter = Limiter("1 RPS", clock=clock, shadow=True)
    take_in(Refusals.of(limiter), headers={"retry-after": "7"})
    assert (limiter.statistics().upstream_429, caplog.messages) == (1, [])


def test_pause_is_logged_at_most_once_a_minute_and_an_empty_account_once(
    limiter: Limiter, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = Refusals.of(limiter)
    caplog.set_level(logging.DEBUG, "asyncbucket")
    for _ in range(11):
        take_in(refusals, headers={"retry-after": "7"})
        take_in(refusals, body={"code": "insufficient_quota"})
        clock.advance(7)
    paused = (
        "limiter 'shared' pauses for 7 s: the provider refused a call (429); its limits may be "
        "lower than yours, or others use the same key"
    )
    empty = (
        "the provider permanently refuses calls of limiter 'shared' (HTTP 429 (insufficient_quota)): "
        "waiting does not help; check the account's plan and balance"
    )
    assert caplog.messages == [paused, empty, paused]
