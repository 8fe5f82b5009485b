import sys
from collections.abc import Callable
from datetime import UTC, datetime

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncbucket.providers import headers

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()

READERS: list[Callable[[object], float | None]] = [
    headers.number,
    headers.duration,
    lambda value: headers.rfc3339(value, now=NOW),
    lambda value: headers.http_date(value, now=NOW),
    lambda value: headers.reset(value, now=NOW),
    lambda value: headers.retry_after({"retry-after": value}, now=NOW),
    lambda value: headers.retry_after({"retry-after-ms": value}, now=NOW),
    lambda value: headers.retry_after({"retry-after": "9", "date": value}, now=NOW),
]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("59", 59.0),
        ("1.5", 1.5),
        (" 7\t", 7.0),
        ("1s", 1.0),
        ("120ms", 0.12),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("1500us", 0.0015),
        ("-3s", 0.0),
        ("2026-01-31T12:00:10Z", 10.0),
        ("2026-01-31t12:00:10.250z", 10.25),
        ("2026-01-31T14:00:10+02:00", 10.0),
        ("2026-01-31T11:59:00Z", 0.0),
        ("Sat, 31 Jan 2026 12:01:00 GMT", 60.0),
        ("Saturday, 31-Jan-26 12:01:00 GMT", 60.0),
        ("Sat Jan 31 12:01:00 2026", 60.0),
        ("Sat, 31 Jan 2026 11:00:00 GMT", 0.0),
    ],
)
def test_reset_reads_every_time_format(value: str, seconds: float) -> None:
    assert headers.reset(value, now=NOW) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(
    "value",
    [
        *("nan", "-inf", "Infinity", "1e3", "0x10", "1_0", "+1", "-1", ".5", "1."),
        *("1s$$2s", "1.2.3s", "1mm", "1d", "1y", "s", "--1s"),
        *("", "1µs", "1s ago", "1 s"),
        *("²", "٣", "\uff11", "1\n", "1\x00", "1, 1", "1;2", "1 2"),
        *("2026-13-01T00:00:00Z", "2026-01-31T25:00:00Z", "2026-01-31", "2026-01-31T12:00:10"),
        "2026-01-31T12:00:10+99:99",
        *("Sat, 99 Jan 2026 12:00:00 GMT", "Sat, 31 Jan 2026 12:00:00 PST", "Sat, 31 Foo 2026"),
        *("Tue, 31 Feb 2026 12:00:00 GMT", "Sat Jan 31 99:01:00 2026", "tomorrow"),
        *("1" * 65, " " * 64 + "1"),
    ],
)
def test_reset_ignores_malformed_value(value: str) -> None:
    assert headers.reset(value, now=NOW) is None


def test_readers_clamp_waits_between_zero_and_a_week() -> None:
    assert headers.number("9" * 64) == headers.WEEK
    assert headers.duration("9" * 60 + "h") == headers.WEEK
    assert headers.duration("-" + "9" * 60 + "h") == 0.0
    assert headers.rfc3339("9999-12-31T23:59:59Z", now=NOW) == headers.WEEK
    assert headers.http_date("Fri, 31 Dec 9999 23:59:59 GMT", now=NOW) == headers.WEEK


def test_instants_are_relative_to_server_clock() -> None:
    """A date is compared with the reply's own `date`; without one, with this machine's clock."""
    date = {"retry-after": "Sat, 31 Jan 2026 12:00:30 GMT"}

    assert headers.retry_after(date, now=NOW) == 30.0
    skewed = {**date, "date": "Sat, 31 Jan 2026 12:00:20 GMT"}
    assert headers.retry_after(skewed, now=NOW + 3600) == 10.0
    skewed["anthropic-ratelimit-requests-reset"] = "2026-01-31T12:00:40Z"
    assert headers.full_reset_after(skewed, now=NOW - 3600) == 20.0


def test_header_names_are_case_insensitive() -> None:
    assert headers.retry_after({"Retry-After-MS": "1500"}, now=NOW) == 1.5
    assert headers.retry_after(httpx.Headers({"Retry-After": "3"}), now=NOW) == 3.0
    assert headers.forbids_retry(httpx.Headers({"X-Should-Retry": "false"}))
    assert not headers.forbids_retry({"x-should-retry": "true"})
    assert not headers.forbids_retry({})


def test_missing_durationpy_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "durationpy", None)

    assert headers.reset("5", now=NOW) == 5.0
    assert headers.full_reset_after({"x-ratelimit-reset": "5s"}, now=NOW) is None
    with pytest.raises(ImportError, match=r'pip install "asyncbucket\[http\]"'):
        _ = headers.duration("5s")


HOSTILE = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="0123456789.hmsunµ-+_eE TZ:,GMTJanFri\x00²٣", max_size=70),
    st.from_regex(headers._GO_DURATION, fullmatch=True),
    st.from_regex(headers._RFC_3339, fullmatch=True),
    st.from_regex(headers._HTTP_DATE, fullmatch=True),
    st.from_regex(headers._NUMBER, fullmatch=True),
    st.binary(max_size=8),
    st.floats(),
    st.none(),
)


@given(HOSTILE)
@example("0001-01-01T00:00:00+23:59")
@example("9999-12-31T23:59:59.999999999-23:59")
@example("Fri, 31 Dec 0001 00:00:00 GMT")
@example("Mon, 01 Jan 0000 00:00:00 GMT")
def test_readers_never_raise_or_leave_range_on_hostile_value(value: object) -> None:
    for reader in READERS:
        seconds = reader(value)
        assert seconds is None or 0.0 <= seconds <= headers.WEEK
