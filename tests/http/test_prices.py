"""What models cost, and that transports reserve and settle dollars exactly."""

import contextlib
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncbucket import BudgetExceeded, Cost, Limiter, Price, UnknownPrice, budget
from asyncbucket.budgets import _warn_of_no_call
from asyncbucket.http import Call, Profile
from asyncbucket.prices import PriceWarning, price_of, read_prices
from asyncbucket.providers import facts
from asyncbucket.providers.usage import Usage, read_usage
from asyncbucket.waiting import IO
from tests.http.conftest import client_over, either_io

URL = "https://api.openai.com/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x" * 400}]
BODY = {"model": "gpt-4o-mini-2024-07-18", "messages": MESSAGES, "max_tokens": 300}
USED = {"prompt_tokens": 100, "completion_tokens": 7}
REPLY = {"usage": {**USED, "prompt_tokens_details": {"cached_tokens": 40}}}
#: 60 * 0.15 + 40 * 0.075 + 7 * 0.60 micro-dollars, rounded up.
SETTLED = 17
#: 400 bytes, a message and what is added; and 300 tokens of output.
RESERVED = 246
TODAY = date(2026, 11, 29)


def spent(limiter: Limiter) -> int:
    return limiter.statistics().limits[0].used


def client_of(library: Any, limiter: Limiter, reply: Any, **options: Any) -> Any:
    """Return a paced client that always gets ``reply``: a body, a status or an error."""
    seen = list[int]()

    def answer(_: Any) -> Any:
        seen.append(spent(limiter) if limiter.limits else 0)
        if isinstance(reply, Exception):
            raise reply
        is_status = isinstance(reply, int)
        return library.Response(reply) if is_status else library.Response(200, json=reply)

    client = client_over(library, limiter, answer, **options)
    client.seen = seen
    return client


@either_io
async def test_call_reserves_highest_price_and_is_settled_by_usage(library: Any, io: IO) -> None:
    limiter = Limiter("1 USD/day")
    client = client_of(library, limiter, REPLY, io=io)
    with budget(usd=0.001) as capped:
        await io.call(client.post, URL, json=BODY)
    assert (client.seen, spent(limiter)) == ([RESERVED], SETTLED)
    assert round(capped.spent["usd"] * 1e6) == SETTLED


async def test_budget_needs_no_limit_and_is_checked_before_sending(library: Any) -> None:
    client = client_of(library, Limiter(), REPLY)
    with budget(usd=0.000_3) as capped:
        for _ in range(4):
            await client.post(URL, json=BODY)
        with pytest.raises(BudgetExceeded, match=r"0\.000246 USD, but .* only 0\.000232 USD left"):
            await client.post(URL, json=BODY)
    assert (len(client.seen), round(capped.spent["usd"] * 1e6)) == (4, 4 * SETTLED)


@pytest.mark.parametrize("limits", [[], ["1M TPM"]])
@pytest.mark.parametrize(
    "url", [URL, "https://bedrock-runtime.x.amazonaws.com/model/anthropic.claude-4/converse"]
)
async def test_budget_of_tokens_counts_those_used_anywhere(url: str, limits: list[str]) -> None:
    client = client_of(httpx, Limiter(*limits), REPLY)
    with budget(tokens=100_000, output_tokens=90_000) as capped:
        await client.post(url, json={"messages": MESSAGES})
    assert capped.spent == {"tokens": 107, "output_tokens": 7}


@pytest.mark.parametrize(
    ("reply", "used"),
    [
        (429, 0),
        (500, 0),
        (400, 0),
        (httpx.ConnectError("no route"), 0),
        (httpx.ReadTimeout("late"), RESERVED),  # the provider may have gone on
        ({"choices": []}, RESERVED),  # no usage
    ],
)
async def test_only_what_a_provider_may_charge_is_spent(reply: Any, used: int) -> None:
    limiter = Limiter("1 USD/day")
    client = client_of(httpx, limiter, reply)
    with budget(usd=1) as capped, contextlib.suppress(httpx.HTTPError):
        await client.post(URL, json=BODY)
    assert (spent(limiter), round(capped.spent["usd"] * 1e6)) == (used, used)
    assert (limiter.statistics().in_flight, capped.reserved["usd"]) == (0, 0)


async def test_unknown_price_is_an_error_at_the_first_call_that_is_charged() -> None:
    """It is no reason to warn that the budget has seen no call."""
    _warn_of_no_call.cache_clear()
    client = client_of(httpx, Limiter(), REPLY)
    body = {**BODY, "model": "my-model"}
    await client.post(URL, json=body)  # nothing counts dollars
    with budget(usd=1) as capped:
        with pytest.raises(UnknownPrice) as error:
            await client.post(URL, json=body)
        await client.get("https://api.openai.com/v1/models")
        assert (capped.calls, capped.spent["usd"]) == (2, 0)
    assert str(error.value) == (
        "no price is known for the model 'my-model', so its calls can't be counted in dollars: give "
        'Limiter(...) or pace(...) prices={"my-model": asyncbucket.Price(input=..., output=...)}, in '
        'dollars per million tokens; "*" covers all other models'
    )
    client = client_of(httpx, Limiter("1 USD/day"), REPLY)
    with pytest.raises(UnknownPrice, match="a model without a name"):
        await client.post(URL, json={"messages": MESSAGES})
    client = client_of(httpx, Limiter("1 USD/day", prices={"*": Price(input=1, output=1)}), REPLY)
    await client.post(URL, json=body)
    assert spent(client._transport.limiter) == 107


async def test_profile_may_say_dollars_and_paths_may_name_the_model() -> None:
    class Pictures(Profile):
        def cost(self, call: Call) -> Cost | None:
            return Cost(usd=0.04 * call.body["n"])

    limiter = Limiter("1 USD/day", prices={"fast": Price(input=1, output=1)})
    client = client_of(httpx, limiter, {}, profile=Pictures(name="pictures"))
    await client.post("https://pictures.test/v1/images", json={"n": 3, "model": "unheard-of"})
    assert spent(limiter) == 120_000
    client = client_of(httpx, limiter, REPLY)
    url = "https://x.openai.azure.com/openai/deployments/fast/chat/completions"
    await client.post(url, json={"messages": MESSAGES})
    assert spent(limiter) == 120_107


async def test_forecast_of_a_reply_makes_no_call_impossible() -> None:
    limiter = Limiter("0.0001 USD/day")
    client = client_of(httpx, limiter, REPLY)
    body = {name: value for name, value in BODY.items() if name != "max_tokens"}
    await client.post(URL, json=body)
    assert (client.seen, spent(limiter)) == ([100], SETTLED)
    with pytest.raises(ValueError, match=r"cost of 0\.000246 USD exceeds"):
        await client.post(URL, json=BODY)  # its own max_tokens does


def test_only_snapshots_and_prefixes_have_the_price_of_their_model() -> None:
    for model, expected in {
        "gpt-4o-mini-2024-07-18": 0.15,
        "gpt-4o-2024-05-13": 5,  # dearer than its model
        "openai/gpt-4o-mini": 0.15,
        "claude-haiku-4-5@20251001": 1,
        "omni-moderation-latest": 0,
        "models/gemini-2.5-flash": 0.3,
    }.items():
        assert price_of(model, today=TODAY).input == expected
    for other in (None, "", 5, "ft:gpt-4o-mini-2024-07-18:org::id", "gpt-4o-mini-tts"):
        with pytest.raises(UnknownPrice):
            price_of(other, today=TODAY)


def test_given_prices_come_first_and_star_comes_last() -> None:
    names = ("*", "gpt-4o*", "gpt-4o", "gpt-4o-2024-08-06", "sonnet[1m]")
    prices = {name: Price(input=n) for n, name in enumerate(names)}
    models = (*names[2:], "gpt-4o-2024-11-20", "gpt-4o-mini", "gpt-4.1", "unknown")
    assert [price_of(model, prices).input for model in models] == [2, 3, 4, 2, 1, 2, 0]


def test_built_in_prices_are_complete_dated_and_warn_when_old() -> None:
    for provider in facts("prices.toml").values():
        assert provider["source"].startswith("https://")
        assert date(2026, 5, 1) <= provider["dated"] <= date.today()  # noqa: DTZ011
        for model in provider["models"]:
            price = price_of(model, today=provider["dated"])
            assert (price.cached or 0) <= price.input <= (price.written or price.input)
    told = r"the price of 'gpt-4o-mini' was read .* days ago, on 2026"
    with pytest.warns(PriceWarning, match=told):
        price_of("gpt-4o-mini", today=date(2028, 1, 1))


def test_price_counts_cached_written_and_long_input() -> None:
    long = Price(input=4, cached=0.4, output=20)
    price = Price(input=2, cached=0.2, written=2.5, output=10, above=1_000, long=long)
    assert price.of(Usage(100, 10, 110, 40, 20)) == 238 / 1e6  # 40 * 2 + 40 * 0.2 + 20 * 2.5 + 100
    assert price.of(Usage(100, 0, 100, 0, 0, 900)) == 380 / 1e6  # read beside the input
    assert price.of(Usage(1_001, 1, 1_002)) == 4_024 / 1e6
    assert price.at_most(1_000, 10) == 2_600 / 1e6
    assert price.at_most(1_001, 10) == 4_204 / 1e6
    assert Price(input=0.15).of(Usage(1, 0, 1)) == 1 / 1e6  # rounded up


def test_usage_tells_what_was_read_from_the_cache_and_written_to_it() -> None:
    anthropic = {"cache_read_input_tokens": 500, "cache_creation_input_tokens": 200}
    usage = read_usage({"input_tokens": 10, "output_tokens": 1, **anthropic})
    assert usage == Usage(210, 1, 211, 0, 200, 500)
    details = {"cached_tokens": 100, "cache_write_tokens": 50}
    usage = read_usage({"input_tokens": 300, "input_tokens_details": details})
    assert usage == Usage(300, 0, 300, 100, 50)


def test_prices_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('["m"]\ninput = 1\noutput = 2\nabove = 9\nlong = {input = 3}\n')
    expected = {"m": Price(input=1, output=2, above=9, long=Price(input=3))}
    assert read_prices(path) == Limiter(prices=str(path))._prices == expected
    path.write_text("no toml")
    with pytest.raises(ValueError, match="is not valid TOML"):
        Limiter(prices=path)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (5, "prices must map models to prices"),
        ({"m": 5}, "prices, 'm': expected a Price, not int"),
        ({"m": {"input": 1, "in": 2}}, "prices, 'm': a price has no in; it has input, output, cac"),
        ({"m": {"input": -1}}, "input must be dollars for a million tokens, such as 0.15, not -1"),
        ({"m": {"input": 1, "above": 5}}, "above= and long= go together"),
    ],
)
def test_invalid_prices_are_refused_at_once(given: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        Limiter(prices=given)
    assert says in str(error.value)
