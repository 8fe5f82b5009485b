"""Limits as people write them, and what is no limit."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Cost, Limit, Limiter, LimitSyntaxError, WouldBlock
from asyncbucket.core.limits import KEYWORDS
from asyncbucket.testing import VirtualTime


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("500 RPM", Limit("requests", 500)),
        ("500rpm", Limit("requests", 500)),
        (" 5 RPS ", Limit("requests", 5, per=1)),
        ("100 RPH", Limit("requests", 100, per=3600)),
        ("14,400 RPD", Limit("requests", 14_400, per=86_400)),
        ("200k TPM", Limit("tokens", 200_000)),
        ("1.5M TPM", Limit("tokens", 1_500_000)),
        ("2b TPD", Limit("tokens", 2_000_000_000, per=86_400)),
        ("40k ITPM", Limit("input_tokens", 40_000)),
        ("8k otpm", Limit("output_tokens", 8_000)),
        ("10/s", Limit("requests", 10, per=1)),
        ("10 / sec", Limit("requests", 10, per=1)),
        ("10 per minute", Limit("requests", 10)),
        ("100 requests/minute", Limit("requests", 100)),
        ("100 requests per hour", Limit("requests", 100, per=3600)),
        ("1 request/s", Limit("requests", 1, per=1)),
        ("10 req/s", Limit("requests", 10, per=1)),
        ("1 token per second", Limit("tokens", 1, per=1)),
        ("3 images/10s", Limit("images", 3, per=10)),
        ("15 requests per 1.5 s", Limit("requests", 15, per=1.5)),
        ("3 images / 2 days", Limit("images", 3, per=2 * 86_400)),
        ("1_000 tokens/min burst 1_00", Limit("tokens", 1000, burst=100)),
        ("500 RPM burst 20", Limit("requests", 500, burst=20)),
        ("200k TPM burst 20k", Limit("tokens", 200_000, burst=20_000)),
        ("100 Requests/Minute", Limit("requests", 100)),
        ("3 IMAGES PER 10 S", Limit("images", 3, per=10)),
        ("5 RPM Burst 2", Limit("requests", 5, burst=2)),
        ("1,000,000.5k TPM", Limit("tokens", 1_000_000_500)),
    ],
)
def test_limit_is_parsed_as_people_write_it(text: str, limit: Limit) -> None:
    assert Limit.parse(text) == limit


@pytest.mark.parametrize("text", ["5 requests/30d", "5 requests/1234567s", "5 RPM"])
def test_text_of_limit_has_no_exponent_and_can_be_parsed_again(text: str) -> None:
    limit = Limit.parse(text)
    assert str(limit) == f"5 requests per {limit.per:,.0f} s"
    assert Limit.parse(str(limit)) == limit


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "RPM", "500", "-5 RPM", "5 XPM", "0 RPM", "0.5 RPM", "1.0001k RPM", "5 RPM burst",
        "5 RPM burst 6", "5 RPM burst 0", "nan RPM", "inf RPM", "1e3 RPM", "500 RPM\n500 TPM",
        "5/0s", "5/.5s", "5/1.5 month", "5/fortnight", "\u0665 RPM", "5 concurrency/s", "5 class names/s", "\u00b2/s", "5/401d",
        "2,5k TPM", "1,00 RPM", "1,,000 RPM", "1000,000 RPM", "1,000, RPM", "5 RPM burst 2,5",
        "5/\u017f", "9" * 5000 + " RPM", "1/" + "9" * 5000 + "s", "5 RPM burst " + "9" * 5000,
    ],
)  # fmt: skip
def test_unreadable_limit_is_refused(text: str) -> None:
    with pytest.raises(LimitSyntaxError):
        Limit.parse(text)


@given(st.text(alphabet="0123456789.,_kKmMrRtTiIpPsSdD/ burstequ-²", max_size=20))
def test_any_text_is_parsed_or_refused_with_limit_syntax_error(text: str) -> None:
    try:
        limit = Limit.parse(text)
    except LimitSyntaxError:
        return
    assert limit.amount >= 1
    assert limit.per > 0


def limit(*, resource: Any = "tokens", amount: Any = 10, **terms: Any) -> Limit:
    return Limit(resource, amount, **terms)


NUMBERS = [0, -1, 1.5, float("nan"), float("inf"), True, "5"]
WINDOWS = [0, -1, 1e-4, float("nan"), float("inf"), True, "minute", None, 1e9]
WINDOW = "a window must last from 0.001 to 34,560,000 seconds (400 days), not {}"
KNOWN = "is not a limit; known: rps, rpm, rph, rpd, tpm, tpd, itpm, otpm, concurrency"


@pytest.mark.parametrize(
    ("call", "name", "values", "says"),
    [
        (limit, "amount", [*NUMBERS, None], "limit of tokens must be a whole number of at least 1"),
        (limit, "burst", NUMBERS, "burst must be a whole number of at least 1, not {}"),
        (Limiter, "rpm", NUMBERS, "rpm must be a whole number of at least 1, not {}"),
        (Limiter, "rpm", [10**19, 1e308, 10**400], "rpm must be at most 1e+18; leave it out"),
        (Limiter("6 RPM").reconfigure, "rpm", [1e308], "rpm must be at most 1e+18; leave it out"),
        (limit, "per", WINDOWS, WINDOW),
        (limit, "resource", ["", "two words", "1st", 5, None], "must be a name such as requests"),
        (limit, "resource", ["concurrency"], "no window: pass concurrency=..."),
        (limit, "burst", [11], "a burst of 11 is above the limit of 10 tokens per 60 s: lower the"),
        (Limiter, "rpmm", [5], "rpmm= " + KNOWN),
        (Limiter().child, "rpmm", [5], ""),
    ],
)
def test_invalid_number_is_refused(call: Any, name: str, values: list[Any], says: str) -> None:
    for value in values:
        with pytest.raises((LimitSyntaxError, TypeError)) as error:
            call(**{name: value})
        assert says.replace("{}", repr(value)) in str(error.value)


def test_limit_syntax_error_shows_how_limits_are_written() -> None:
    with pytest.raises(LimitSyntaxError) as error:
        Limit.parse("five per minute")
    assert str(error.value) == (
        '\'five per minute\' is not a limit; write e.g. "500 RPM", "200k TPM", "10/s", '
        '"100 requests/minute", "3 images/10s", "25 USD/day", with "burst 20" at the end if wanted'
    )
    with pytest.raises(LimitSyntaxError, match=r"^'0.5 RPM' is not a whole number of units; write"):
        Limit.parse("0.5 RPM")
    with pytest.raises(LimitSyntaxError, match="must be a string or a Limit, not 500; write"):
        Limiter(500)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(LimitSyntaxError) as error:
        Limiter("500 RPM", rpm=600)
    assert str(error.value) == (
        "two limits for one window: 500 requests per 60 s and 600 requests per 60 s; keep one"
    )


def test_limit_knows_its_window_keyword_label_and_default_burst() -> None:
    """Windows of an hour or more are not paced unless ``burst`` says so."""
    tokens = Limit("input_tokens", 40_000)
    assert (tokens.window, tokens.keyword, tokens.label) == (60_000_000_000, "itpm", "itpm")
    assert str(tokens) == "40,000 input tokens per 60 s"
    images = Limit("images", 3, per=0.5)
    assert (images.keyword, images.label) == (None, "images/0.5s")
    assert images.window == Fraction("0.5") * 1_000_000_000
    assert Limit("images", 3, per=86_400).label == "images/86400s"
    assert [Limit("requests", amount).burst for amount in (500, 5)] == [50, 1]
    assert [Limit("requests", 500, per=per).burst for per in (3_599, 3_600)] == [50, None]
    assert Limit("requests", 500, per=3_600, burst=7).burst == 7
    assert Limit("tokens", 500).burst is None
    assert Limit("requests", 500.0, burst=20.0).burst == 20


@pytest.mark.parametrize(
    ("text", "limit", "units", "shown"),
    [
        ("25 USD/day", Limit("usd", 25, per="day"), 25_000_000, "25 USD per 86,400 s"),
        ("0.50 usd/hour", Limit("usd", 0.5, per=3_600), 500_000, "0.50 USD per 3,600 s"),
        (
            "1,000 dollars per 7 days",
            Limit("usd", 1e3, per=604_800),
            10**9,
            "1,000 USD per 604,800 s",
        ),
        ("0.000345 USD/min", Limit("usd", 0.000345), 345, "0.000345 USD per 60 s"),
        ("2 USD/h burst 0.25", Limit("usd", 2, 3_600, 0.25), 2_000_000, "2 USD per 3,600 s"),
    ],
)
def test_money_is_a_limit_like_any_other(text: str, limit: Limit, units: int, shown: str) -> None:
    parsed = Limit.parse(text)
    assert (parsed, parsed.units, str(parsed)) == (limit, units, shown)
    assert replace(parsed, amount=parsed.amount * 2).units == 2 * units
    assert parsed.burst_units in {None, 250_000}
    assert Limiter(parsed).limits == (limit,)


@pytest.mark.parametrize("amount", [0, -1, 1e-7, math.nan, 1e13, "5", None])
def test_amount_that_is_no_money_is_refused(amount: Any) -> None:
    with pytest.raises(
        LimitSyntaxError, match=r"limit of usd must be from 0.000001 to 1e12 dollars"
    ):
        Limit("usd", amount)


def test_keywords_mean_same_as_limit_strings() -> None:
    for keyword in KEYWORDS:
        keywords: dict[str, Any] = {keyword: 7}
        assert Limiter(**keywords).limits == Limiter(f"7 {keyword.upper()}").limits
    assert Limiter(rpm=None).limits == ()
    assert Limiter(Limit("tokens", 5), "6 RPM", rpd=7.0).limits == (
        Limit("tokens", 5),
        Limit("requests", 6),
        Limit("requests", 7, per=86_400),
    )


@pytest.mark.parametrize(
    "limit", ["1 request/s", "1 call/s", "1r/s", Limit("request", 1, per=1), "1 token/s"]
)
def test_limit_of_one_request_or_token_binds_calls(limit: str | Limit) -> None:
    limiter = Limiter(limit)
    limiter.acquire_nowait(tokens=1)
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait(tokens=1)


@pytest.mark.parametrize(
    ("limit", "likely"),
    [
        ("500 requets/min", "requests"),
        ("200k tok/min", "tokens"),
        ("500 reqests/min", "requests"),
        ("40k input_tokns/min", "input_tokens"),
    ],
)
def test_limit_of_misspelled_resource_is_refused_with_likely_one(limit: str, likely: str) -> None:
    with pytest.raises(LimitSyntaxError, match=f"did you mean {likely}\\?$"):
        Limiter(limit)


@pytest.mark.filterwarnings("error")
def test_limit_that_nothing_pays_is_warned_of_once(time: VirtualTime) -> None:

    def call_many_times(limiter: Limiter) -> None:
        for _ in range(300):
            limiter.acquire_sync().release()
            limiter.acquire().close()

    limiter, paid = (
        Limiter("1M RPM burst 1M", "5 documents/s", name="key", clock=time.clock) for _ in range(2)
    )
    with pytest.warns(RuntimeWarning) as told:
        call_many_times(limiter)
    (warning,) = told
    assert (
        "calls have passed limiter 'key', and none cost anything of its limit of 5 documents per 1 s"
        in (str(warning.message))
    )
    assert warning.filename == __file__
    paid.acquire_nowait(Cost(documents=1)).release()
    time.advance(10)
    call_many_times(paid)
