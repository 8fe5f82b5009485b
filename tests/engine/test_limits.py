"""Limits and costs as people write them, and what is none."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Cost, Limit, Limiter, LimitSyntaxError, TokenBucket, plan
from asyncbucket.engine.limits import KEYWORDS
from asyncbucket.engine.wording import usd_written
from asyncbucket.testing import VirtualTime
from tests.engine.conftest import used


@pytest.mark.parametrize(
    ("text", "limit"),
    [
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
        ("10 per minute", Limit("requests", 10)),
        ("100 requests per hour", Limit("requests", 100, per=3600)),
        ("1 request/s", Limit("requests", 1, per=1)),
        ("1r/s", Limit("requests", 1, per=1)),
        ("1 call/s", Limit("request", 1, per=1)),
        ("10 req/s", Limit("requests", 10, per=1)),
        ("1 token per second", Limit("tokens", 1, per=1)),
        ("3 images/10s", Limit("images", 3, per=10)),
        ("15 requests per 1.5 s", Limit("requests", 15, per=1.5)),
        ("3 images / 2 days", Limit("images", 3, per=2 * 86_400)),
        ("1_000 tokens/min burst 1_00", Limit("tokens", 1000, burst=100)),
        ("200k TPM burst 20k", Limit("tokens", 200_000, burst=20_000)),
        ("3 IMAGES PER 10 S", Limit("images", 3, per=10)),
        ("1,000,000.5k TPM", Limit("tokens", 1_000_000_500)),
    ],
)
def test_limit_is_parsed_as_people_write_it(text: str, limit: Limit) -> None:
    assert Limit.parse(text) == limit


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "RPM", "500", "-5 RPM", "5 XPM", "0 RPM", "0.5 RPM", "1.0001k RPM", "5 RPM burst",
        "5 RPM burst 6", "5 RPM burst 0", "nan RPM", "inf RPM", "1e3 RPM", "500 RPM\n500 TPM",
        "5/0s", "5/.5s", "5/1.5 month", "5/fortnight", "\u0665 RPM", "5 concurrency/s", "5 class names/s", "\u00b2/s", "5/401d", "5/10ms",
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
MONEY = "limit of usd must be from 0.000001 to 1e12 dollars, not {}"
KNOWN = "=: limits by keyword are rps, rpm, rph, rpd, tpm, tpd, itpm, otpm; else write"


@pytest.mark.parametrize(
    ("call", "name", "values", "says"),
    [
        (limit, "amount", [*NUMBERS, None], "limit of tokens must be a whole number of at least 1"),
        (partial(Limit, "usd"), "amount", [0, -1, 1e-7, math.nan, 1e13, "5", None], MONEY),
        (limit, "burst", NUMBERS, "burst must be a whole number of at least 1, not {}"),
        (Limiter, "rpm", NUMBERS, "rpm must be a whole number of at least 1, not {}"),
        (Limiter, "rpm", [10**19, 1e308, 10**400], "rpm must be at most 1e+18; leave it out"),
        (Limiter("6 RPM").reconfigure, "rpm", [1e308], "rpm must be at most 1e+18; leave it out"),
        (limit, "per", WINDOWS, WINDOW),
        (limit, "resource", ["", "two words", "1st", 5, None], "must be a name such as requests"),
        (limit, "resource", ["concurrency"], "no window: pass concurrency=..."),
        (limit, "burst", [11], "a burst of 11 is above the limit of 10 tokens per 60 s: lower the"),
        (Limiter, "calls", [5], "unknown argument calls" + KNOWN),
        (Limiter, "rpmm", [5], "unknown argument rpmm=: did you mean rpm=?"),
        (Limiter, "concurency", [5], "concurency=: did you mean concurrency=?"),
        (Limiter, "learn", [False], "is for transport(), http_client() or wrap()"),
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
    long = Limit.parse("5 requests/30d")
    assert str(long) == "5 requests per 2,592,000 s"
    assert Limit.parse(str(long)) == long
    images = Limit("images", 3, per=0.5)
    assert (images.keyword, images.label) == (None, "images/0.5s")
    assert images.window == 500_000_000
    assert Limit("images", 3, per=86_400).label == "images/86400s"
    assert [Limit("requests", amount).burst for amount in (500, 5)] == [50, 1]
    assert [Limit("requests", 500, per=per).burst for per in (3_599, 3_600)] == [50, None]
    assert Limit("requests", 500, per=3_600, burst=7).burst == 7
    assert Limit("tokens", 500).burst is None
    assert Limit("requests", 500.0, burst=20.0).burst == 20


@pytest.mark.parametrize(
    ("text", "limit", "units", "shown"),
    [
        ("1k dollars/h", Limit("usd", 1e3, per=3_600), 10**9, "1,000 USD per 3,600 s"),
        ("25 USD/day", Limit("usd", 25, per="day"), 25_000_000, "25 USD per 86,400 s"),
        ("0.50 usd/hour", Limit("usd", 0.5, per=3_600), 500_000, "0.50 USD per 3,600 s"),
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


def test_keywords_mean_same_as_limit_strings() -> None:
    for keyword in KEYWORDS:
        keywords: dict[str, Any] = {keyword: 7}
        assert Limiter(**keywords).limits == Limiter(f"7 {keyword.upper()}").limits
    both = Limiter(Limit("tokens", 5), "6 RPM", rpd=7.0, rpm=None).limits
    assert both == (Limit("tokens", 5), Limit("requests", 6), Limit("requests", 7, per=86_400))


MISSPELLED = {
    "requests": "requets reqst rpm",
    "usd": "usds",
    "tokens": "tok tokn",
    "input_tokens": "input_tokns",
}


@pytest.mark.parametrize(("likely", "misspelled"), MISSPELLED.items())
def test_misspelled_resource_is_refused_with_likely_one(likely: str, misspelled: str) -> None:
    for written in misspelled.split():
        with pytest.raises(LimitSyntaxError, match=f"did you mean {likely}\\?$"):
            Limiter(f"500 {written}/min")
    with pytest.raises(LimitSyntaxError, match="money is counted in USD, not EUR"):
        Limiter("25 EUR/day")


@pytest.mark.filterwarnings("error")
def test_limit_that_nothing_pays_is_warned_of_once(time: VirtualTime) -> None:

    def call_many_times(limiter: Limiter) -> None:
        for _ in range(300):
            limiter.acquire_sync().release()
            limiter.acquire()

    limits = "1M RPM burst 1M", "5 documents/s"
    limiter, paid = (Limiter(*limits, name="key", clock=time.clock) for _ in range(2))
    with pytest.warns(RuntimeWarning) as told:
        call_many_times(limiter)
    (warning,) = told
    assert (
        "100 calls of limiter 'key' have ended, and none counted towards its limit of 5 documents per "
        "1 s: give the amount with each call, as in acquire(documents=...)" in str(warning.message)
    )
    assert warning.filename == __file__
    paid.acquire_nowait(Cost(documents=1)).release()
    time.advance(10)
    call_many_times(paid)


async def test_unpriced_calls_are_warned_of_sooner_but_not_while_open(time: VirtualTime) -> None:
    limiter = Limiter("5 USD/day", name="key", clock=time.clock)
    for _ in range(9):
        (await limiter.acquire()).release()
    open_calls = [await limiter.acquire() for _ in range(20)]  # they may be settled yet
    open_calls.pop().release()
    with pytest.warns(RuntimeWarning, match=r"^10 calls .* of 5 USD per .*acquire\(usd=\.\.\.\)$"):
        (await limiter.acquire()).release()
    (await limiter.acquire()).release()
    settled = Limiter("5 USD/day", clock=time.clock)
    for lease in [await settled.acquire() for _ in range(20)]:
        lease.settle(usd=0.01)
        lease.release()
    (await settled.acquire()).release()


# --- costs, and what counts as a number wherever one is given ---


def test_cost_maps_resources_to_whole_amounts() -> None:
    """One request is the default, fractions are rounded up, and only zeros are left out."""
    cost = Cost(tokens=10.1, images=3)
    assert isinstance(cost, Mapping)
    tokens = {"tokens": 11, "input_tokens": 11, "output_tokens": 11}
    assert dict(cost) == {"requests": 1, **tokens, "images": 3}
    assert (cost["tokens"], len(cost)) == (11, 5)
    assert cost == Cost(tokens=11, images=3)
    assert repr(Cost(images=0)) == "Cost(requests=1)"
    parts = {"requests": 1, "input_tokens": 900, "output_tokens": 300}
    assert Cost(**parts) == {**parts, "tokens": 1_200}
    assert Cost(input_tokens=5) == {"requests": 1, "input_tokens": 5, "tokens": 5}
    for part in {"input_tokens": 900}, {"output_tokens": 300}:
        assert Cost(tokens=1_200, **part) == {**parts, "tokens": 1_200}


async def test_numpy_numbers_are_accepted_everywhere(time: VirtualTime) -> None:
    """Small ones, too, whose sums would overflow."""
    numpy = pytest.importorskip("numpy")
    n, real, clock = numpy.int8, numpy.float32, time.clock
    bounds = {"concurrency": n(3), "max_queue": n(5), "timeout": n(40)}
    limiter = Limiter(rpm=n(60), tpm=n(100), **bounds, clock=clock)
    child = limiter.child("child", weight=n(2), concurrency=(n(1), n(4)))
    async with child.acquire(tokens=n(50), timeout=real(30), priority=n(2)) as lease:
        lease.settle(tokens=real(2.5))
    assert used(limiter) == [1, 3]
    limiter.pause(n(30))
    await limiter.acquire(timeout=n(30), deadline=n(30), tokens=n(5))
    assert time.now == 30
    limit = Limit("tokens", n(10), per=real(60), burst=n(3))
    told = json.dumps([limit.amount, limit.per, limit.burst, limiter.concurrency])
    assert told == "[10, 60.0, 3, 3]"
    bucket = TokenBucket(n(1), n(2), clock=clock)
    for _ in range(4):
        await bucket.acquire(n(1))
    assert time.now == 32
    with pytest.raises(TypeError, match="tokens must be a number, not bool"):
        Cost(tokens=numpy.bool_(True))
    planned = plan(rpm=100, calls=n(3), concurrency=n(3), latency=n(3))
    assert planned == plan(rpm=100, calls=3, concurrency=3, latency=3)


@pytest.mark.parametrize(
    ("dollars", "text"), [(25, "25"), (1_000.1, "1,000.10"), (0.00001, "0.00001"), (-0.5, "-0.50")]
)
def test_dollars_are_written_out(dollars: float, text: str) -> None:
    assert usd_written(dollars) == text


def test_limit_of_100_000_spaces_is_read_at_once_and_dollars_without_end_are_refused() -> None:
    spaces = " " * 100_000
    assert Limit.parse(f"500{spaces}RPM{spaces}burst{spaces}20") == Limit("requests", 500, burst=20)
    with pytest.raises(LimitSyntaxError):
        Limit.parse(f"500{spaces}of{spaces}what")
    with pytest.raises(ValueError, match="usd must be finite"):
        Cost(usd=1e308)
