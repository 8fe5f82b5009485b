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
    """Short and long forms, prefixes, separators, windows and bursts are understood."""
    assert Limit.parse(text) == limit


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "RPM", "500", "-5 RPM", "5 XPM", "0 RPM", "0.5 RPM", "1.0001k RPM", "5 RPM burst",
        "5 RPM burst 6", "5 RPM burst 0", "nan RPM", "inf RPM", "1e3 RPM", "500 RPM\n500 TPM",
        "5/0s", "5/fortnight", "\u0665 RPM", "5 concurrency/s", "5 class names/s", "\u00b2/s", "5/401d",
        "2,5k TPM", "1,00 RPM", "1,,000 RPM", "1000,000 RPM", "1,000, RPM", "5 RPM burst 2,5",
        "5/\u017f", "9" * 5000 + " RPM", "1/" + "9" * 5000 + "s", "5 RPM burst " + "9" * 5000,
    ],
)  # fmt: skip
def test_unreadable_limit_is_refused(text: str) -> None:
    """What cannot be read is refused at once."""
    with pytest.raises(LimitSyntaxError):
        Limit.parse(text)


@pytest.mark.parametrize(
    "limit", ["1 request/s", "1 call/s", "1r/s", Limit("request", 1, per=1), "1 token/s"]
)
def test_limit_of_one_request_or_token_binds_calls(limit: str | Limit) -> None:
    """The singular means the same limit, not a resource that no call ever names."""
    limiter = Limiter(limit)
    limiter.acquire_nowait(tokens=1)
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait(tokens=1)


@given(st.text(alphabet="0123456789.,_kKmMrRtTiIpPsSdD/ burstequ-²", max_size=20))
def test_any_text_is_parsed_or_refused_with_limit_syntax_error(text: str) -> None:
    """`parse` gives a limit or raises a LimitSyntaxError, and nothing else."""
    try:
        limit = Limit.parse(text)
    except LimitSyntaxError:
        return
    assert limit.amount >= 1
    assert limit.per > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5 requests/30d", "5 requests per 2,592,000 s"),
        ("5 requests/1234567s", "5 requests per 1,234,567 s"),
        ("5 RPM", "5 requests per 60 s"),
    ],
)
def test_long_window_is_shown_without_exponent(text: str, said: str) -> None:
    """A month is not shown as 2.592e+06, and the text shown can be parsed again."""
    assert str(Limit.parse(text)) == said
    assert Limit.parse(said) == Limit.parse(text)


def test_limit_syntax_error_shows_how_limits_are_written() -> None:
    """It shows the text that was given, and examples to copy."""
    with pytest.raises(LimitSyntaxError) as error:
        Limit.parse("five per minute")
    assert str(error.value) == (
        '\'five per minute\' is not a limit; write e.g. "500 RPM", "200k TPM", "10/s", '
        '"100 requests/minute", "3 images/10s", with "burst 20" at the end if wanted'
    )
    with pytest.raises(LimitSyntaxError, match=r"^'0.5 RPM' is not a whole number of units; write"):
        Limit.parse("0.5 RPM")
    with pytest.raises(LimitSyntaxError, match="must be a string or a Limit, not 500; write"):
        Limiter(500)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("amount", [0, -1, 1.5, float("nan"), float("inf"), True, "5", None])
def test_amount_that_is_not_positive_whole_number_is_refused(amount: float) -> None:
    """Anything else is refused, and the error shows the value."""
    with pytest.raises(LimitSyntaxError) as error:
        Limit("tokens", amount)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert str(error.value) == (
        f"limit of tokens must be a whole number of at least 1, not {amount!r}"
    )
    if isinstance(amount, (int, float, str)):  # None means no keyword, and no burst
        with pytest.raises(LimitSyntaxError, match="rpm must be a whole number of at least 1"):
            Limiter(rpm=amount)
        with pytest.raises(LimitSyntaxError, match="burst must be a whole number of at least 1"):
            Limit("tokens", 10, burst=amount)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("amount", [10**19, 1e308, 10**400], ids=["1e19", "1e308", "1e400"])
def test_amount_above_1e18_is_refused(amount: float) -> None:
    limiter = Limiter("60 RPM")
    for refuse in (Limiter, limiter.child("a").reconfigure, limiter.reconfigure):
        with pytest.raises(LimitSyntaxError, match=r"rpm must be at most 1e\+18; leave it out"):
            refuse(rpm=amount)
    assert limiter.limits == (Limit("requests", 60),)


@pytest.mark.parametrize(
    "per", [0, -1, 1e-4, float("nan"), float("inf"), True, "minute", None, 1e9]
)
def test_window_outside_1_ms_to_400_days_is_refused(per: float) -> None:
    """Anything else is refused, and the error shows the value."""
    with pytest.raises(LimitSyntaxError) as error:
        Limit("tokens", 5, per=per)
    assert str(error.value) == (
        f"a window must last from 0.001 to 34,560,000 seconds (400 days), not {per!r}"
    )


def test_burst_above_limit_is_refused() -> None:
    with pytest.raises(LimitSyntaxError) as error:
        Limit("requests", 500, burst=1000)
    assert str(error.value) == (
        "a burst of 1,000 is above the limit of 500 requests per 60 s: "
        "lower the burst or raise the limit"
    )
    with pytest.raises(LimitSyntaxError, match=r"above the limit of 1 input token per 60 s:"):
        Limit("input_tokens", 1, burst=2)


@pytest.mark.parametrize("resource", ["", "two words", "1st", 5, None])
def test_resource_that_is_not_a_name_is_refused(resource: str) -> None:
    with pytest.raises(LimitSyntaxError, match="a resource must be a name such as requests, not"):
        Limit(resource, 5)


def test_limit_on_concurrency_is_refused() -> None:
    with pytest.raises(LimitSyntaxError, match=r"no window: pass concurrency=\.\.\."):
        Limit("concurrency", 5)


def test_default_burst_is_a_tenth_for_requests_and_none_for_tokens() -> None:
    """Windows of an hour or more are not paced unless ``burst`` says so."""
    assert Limit("requests", 500).burst == 50
    assert Limit("requests", 5).burst == 1
    assert Limit("requests", 500, per=3_599).burst == 50
    assert Limit("requests", 500, per=3_600).burst is None
    assert Limit("requests", 500, per=3_600, burst=7).burst == 7
    assert Limit("tokens", 500).burst is None
    assert Limit("requests", 500.0, burst=20.0).burst == 20  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def test_limit_of_a_day_may_be_used_up_in_an_hour(virtual_time: VirtualTime) -> None:
    """README's own: it is the 500 a minute that paces."""
    limiter = Limiter("500 RPM", "200k TPM", "10k RPD", clock=virtual_time.clock)
    for _ in range(2_000):
        (await limiter.acquire(tokens=100)).release()
    assert virtual_time.now <= 4 * 60 * 515 / 512


@pytest.mark.parametrize(
    ("limit", "likely"),
    [
        ("500 requets/min", "requests"),
        ("200k tok/min", "tokens"),
        (Limit.parse("5 images/s"), None),
        ("500 reqests/min", "requests"),
        ("40k input_tokns/min", "input_tokens"),
        ("5 documents/s", None),
    ],
)
def test_limit_of_misspelled_resource_is_refused_with_likely_one(
    limit: str | Limit, likely: str | None
) -> None:
    """No call would ever pay for it; names that are not close to a known one are other resources."""
    if likely is None:
        assert Limiter(limit).limits
    else:
        with pytest.raises(LimitSyntaxError, match=f"did you mean {likely}\\?$"):
            Limiter(limit)


def call_many_times(limiter: Limiter) -> None:
    """Ask in both ways."""
    for _ in range(300):
        limiter.acquire_sync().release()
        limiter.acquire().close()


@pytest.mark.filterwarnings("error")
def test_limit_that_nothing_pays_is_warned_of_once(virtual_time: VirtualTime) -> None:
    limiter = Limiter("1M RPM burst 1M", "5 documents/s", name="key", clock=virtual_time.clock)
    with pytest.warns(RuntimeWarning) as told:
        call_many_times(limiter)
    (warning,) = told
    assert (
        "calls have passed limiter 'key', and none cost anything of its limit of 5 documents per 1 s"
        in (str(warning.message))
    )
    assert warning.filename == __file__


@pytest.mark.filterwarnings("error")
def test_limit_that_some_call_paid_is_not_warned_of(virtual_time: VirtualTime) -> None:
    """However long ago that was."""
    limiter = Limiter("1M RPM burst 1M", "5 documents/s", clock=virtual_time.clock)
    limiter.acquire_nowait(Cost(documents=1)).release()
    virtual_time.advance(10)
    assert limiter.statistics().limits[1].used == 0
    call_many_times(limiter)


def test_limit_knows_its_window_keyword_label_and_text() -> None:
    """These are for arithmetic, as an argument, for metrics and for people."""
    limit = Limit("input_tokens", 40_000)
    assert (limit.window, limit.keyword) == (60_000_000_000, "itpm")
    assert str(limit) == "40,000 input tokens per 60 s"
    assert limit.label == "itpm"
    assert Limit("images", 3, per=0.5).keyword is None
    assert Limit("images", 3, per=0.5).label == "images/0.5s"
    assert Limit("images", 3, per=86_400).label == "images/86400s"
    assert Limit("images", 3, per=0.5).window == Fraction("0.5") * 1_000_000_000


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


def test_unknown_keywords_and_duplicate_windows_are_refused() -> None:
    """A typo's error lists the known keywords; two limits of one window contradict each other."""
    mistyped: Any = {"rpmm": 5}
    with pytest.raises(LimitSyntaxError) as error:
        Limiter(**mistyped)
    assert str(error.value) == (
        "rpmm= is not a limit; known: rps, rpm, rph, rpd, tpm, tpd, itpm, otpm, concurrency"
    )
    with pytest.raises(LimitSyntaxError) as error:
        Limiter("500 RPM", rpm=600)
    assert str(error.value) == (
        "two limits for one window: 500 requests per 60 s and 600 requests per 60 s; keep one"
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), True, "5"])
def test_concurrency_and_max_queue_must_be_whole_numbers(value: int) -> None:
    with pytest.raises(ValueError) as error:
        Limiter(concurrency=value)
    assert str(error.value) == (
        f'concurrency must be a whole number of at least 1, "auto" or a pair of such numbers, '
        f"not {value!r}"
    )
    if value != 0:
        with pytest.raises(ValueError, match="max_queue must be a whole number of at least 0"):
            Limiter(max_queue=value)
