"""How long to wait, according to headers that may say anything."""

from datetime import UTC, datetime

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncbucket.providers.headers import _HTTP_DATE, _NUMBER, WEEK, forbids_retry, retry_after

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()


def waits(value: object, **others: object) -> float | None:
    return retry_after({"retry-after": value} | others, now=NOW)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        (" 7\t", 7.0),
        ("9" * 64, WEEK),
        ("Sat, 31 Jan 2026 12:01:00 GMT", 60.0),
        ("Sat, 31 Jan 2026 11:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", WEEK),
        *((odd, None) for odd in ("nan", "-inf", "Infinity", "1e3", "0x10", "1_0", "+1", "-1", "1.")),
        *((odd, None) for odd in ("", "s", "1s", "²", "٣", "\uff11", "1\n", "1\x00", "1, 1", "1 2")),
        *((odd, None) for odd in ("Sat, 99 Jan 2026 12:00:00 GMT", "Tue, 31 Feb 2026 12:00:00 GMT")),
        *((odd, None) for odd in ("Sat, 31 Foo 2026 12:00:00 GMT", "Sat, 31 Jan 2026 99:00:00 GMT")),
        *((odd, None) for odd in ("Sat, 31 Jan 2026 12:00:00 PST", "tomorrow", "1" * 65, None, 5)),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_of_seconds_or_a_date(value: object, seconds: float | None) -> None:
    assert waits(value) == seconds


def test_retry_after_in_milliseconds_takes_precedence() -> None:
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}, now=NOW) == 1.5
    assert retry_after({"retry-after-ms": "soon", "retry-after": "9"}, now=NOW) == 9.0


def test_date_is_relative_to_server_clock() -> None:
    until = "Sat, 31 Jan 2026 12:00:30 GMT"
    assert waits(until) == 30.0
    assert waits(until, date="Sat, 31 Jan 2026 12:00:20 GMT") == 10.0


def test_header_names_are_case_insensitive() -> None:
    assert retry_after({"Retry-After-MS": "1500"}, now=NOW) == 1.5
    assert retry_after(httpx.Headers({"Retry-After": "3"}), now=NOW) == 3.0
    assert forbids_retry(httpx.Headers({"X-Should-Retry": "false"}))
    assert not forbids_retry({"x-should-retry": "true"})


@settings(deadline=None)
@given(
    st.text(max_size=70)
    | st.text(alphabet="0123456789.+-_eE :,GMTJanFri\x00²٣", max_size=70)
    | st.from_regex(_HTTP_DATE, fullmatch=True)
    | st.from_regex(_NUMBER, fullmatch=True)
    | st.binary(max_size=8)
)
@example("Fri, 31 Dec 0001 00:00:00 GMT")
@example("Mon, 01 Jan 0000 00:00:00 GMT")
def test_wait_never_raises_or_leaves_range_on_hostile_value(value: object) -> None:
    for seconds in (
        waits(value),
        waits("9", date=value),
        retry_after({"retry-after-ms": value}, now=NOW),
    ):
        assert seconds is None or 0.0 <= seconds <= WEEK
