"""What a plan says, and how it is worded."""

import asyncio
import json
import random
from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Cost, CostExceedsLimit, Limiter, Pool, Price
from asyncbucket.plan import Plan, Poisson, drive, plan
from asyncbucket.plan.drive import change, duration_in_words, percent
from asyncbucket.testing import virtual_time


@pytest.mark.parametrize(
    ("binding", "limits"),
    [
        ("requests", {"rpm": 60, "tpm": 200_000, "concurrency": 10}),
        ("tokens", {"rpm": 600, "tpm": 20_000, "concurrency": 10}),
        ("concurrency", {"rpm": 600, "tpm": 2_000_000, "concurrency": 2}),
    ],
)
def test_doubling_helps_only_for_the_limit_that_binds(binding: str, limits: dict[str, Any]) -> None:
    planned = plan(calls=500, tokens=800, latency=2.0, **limits)
    assert planned.bound_by == binding
    for limit in planned.limits:
        assert limit.if_doubled is not None
        assert limit.if_removed is not None
        assert limit.if_removed <= limit.if_doubled <= planned.duration * 1.001
        helps = limit.if_doubled < 0.6 * planned.duration
        assert helps == (limit.resource == binding)


@pytest.mark.parametrize(
    ("limit", "twice"),
    [("5 RPM", "10 RPM"), ("19 RPM", "38 RPM"), ("60 RPM burst 2", "120 RPM burst 4")],
)
def test_if_doubled_equals_a_plan_with_twice_the_limit(limit: str, twice: str) -> None:
    """The default burst doubles, too, though it is rounded down: 1 of 19, and 3 of 38."""
    (changed,) = plan(limit, calls=700).limits
    assert changed.if_doubled == plan(twice, calls=700).duration


def test_plan_begins_as_the_limit_has_just_reset() -> None:
    """Whatever day it is, and whenever and where others reset."""
    daily = "10 RPD resets 09:30 America/Los_Angeles"
    planned = plan(daily, "80 tokens/week resets 00:00 UTC", calls=35, tokens=2, latency=1.5)

    assert planned.duration == 3 * 86_400 + 1.5
    assert planned.bound_by == "requests"
    monthly = plan("10 requests/month resets 00:00 UTC", calls=11)
    assert monthly.duration == 31 * 86_400


def test_same_seed_gives_the_same_plan() -> None:
    given: dict[str, Any] = {"tokens": [100, 400, 2_500], "latency": [0.5, 1.0, 4.0]}
    given |= {"calls": 300, "arrivals": Poisson(20.0), "tpm": 100_000, "concurrency": 5}
    assert plan(**given, seed=1) == plan(**given, seed=1) != plan(**given, seed=2)


def test_calls_that_can_never_pass_are_counted_or_an_error_if_all_are_such() -> None:
    planned = plan(tokens=[500, 50_000, 700], tpm=30_000, latency=1.0)
    assert (planned.calls, planned.refused) == (2, 1)
    why = "cost of 50,000 tokens exceeds the limit of 30,000 tokens"
    assert f"never passed: 1 call: {why}" in str(planned)
    with pytest.raises(CostExceedsLimit, match=f"no call can ever pass: {why} per 60 s"):
        plan(calls=3, tokens=50_000, tpm=30_000)


@pytest.mark.parametrize(("calls", "asks"), [(10, True), (11, False)])
def test_long_plan_omits_others(*, calls: int, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "_MAX_WHAT_IF_CALLS", 10)
    (limit,) = plan(calls=calls, rpm=5).limits
    assert (limit.if_doubled is not None, limit.if_removed is not None) == (asks, asks)


def test_poisson_arrivals_come_at_their_rate() -> None:
    planned = plan(calls=1_000, arrivals=Poisson(5.0), rpm=6_000)
    assert planned.duration == pytest.approx(200, rel=0.1)
    assert planned.bound_by is None
    assert planned.limits[0].if_removed == planned.duration


def test_share_used_of_each_request_limit_follows_its_own_window() -> None:
    planned = plan("100 RPD burst 100", calls=150, rpm=600)
    day, minute = sorted(planned.limits, key=lambda each: each.limit)
    assert day.limit == "100 requests per 86,400 s"
    assert day.used == pytest.approx(150 / 200)
    assert minute.used < 0.01
    assert planned.duration > 86_400


@pytest.mark.parametrize(
    ("limits", "arguments", "message"),
    [
        ([], {}, "how many calls"),
        ([], {"calls": 1.5}, r"calls must be a whole number of at least 1, not 1\.5"),
        (["many"], {"calls": 5}, "'many' is not a limit"),
        (["5 TPM"], {"calls": 5}, "counts tokens, but nothing says how many a call takes"),
        (["3 images/10s"], {"calls": 5}, "counts images, but nothing says how many a call"),
        (["1 USD/day"], {"calls": 5, "tokens": 5}, "counts USD, but nothing says how many"),
        (["9 RPM"], {"calls": 5, "pool": Pool(Limiter(rpm=5))}, "a pool has the limits of its mem"),
        ([], {"calls": 5, "concurrency": 2}, "what concurrency=2 allows depends on how long"),
        ([], {"calls": 5, "concurrency": "auto"}, "concurrency must be a whole number .* 'auto'"),
        (
            [],
            {"calls": 5, "latency": -1},
            "latency: expected a finite number of at least 0, not -1",
        ),
        ([], {"calls": 5, "tokens": True}, "tokens: expected a finite .* of at least 0, not True"),
        ([], {"tokens": []}, "tokens has no samples"),
        ([], {"tokens": [1, -2]}, "tokens, sample 2: expected a finite .* of at least 0, not -2"),
        ([], {"calls": 5, "arrivals": 8.0}, r"Poisson\(8\.0\), for so many calls a second, not 8"),
    ],
)
def test_mistakes_are_refused(limits: list[str], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        plan(*limits, **arguments)


BODY = {"model": "m", "messages": [{"role": "user", "content": "x" * 40}]}
PRICES = {"m": Price(input=1, output=4)}


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ({"input_tokens": 900, "output_tokens": 25}, "this job costs about 10.00 USD"),
        (1_000, "this job costs about 25.00 USD"),  # all input is 10, all output 40
        (BODY | {"max_tokens": 500}, "this job costs about 10.34 USD"),
        (BODY | {"max_tokens": 5}, "this job costs about 0.30 USD"),
        (BODY, "this job costs about 10.34 USD"),
        ({"input_tokens": 1, "output_tokens": 0}, "this job costs about 0.01 USD"),
    ],
)
def test_plan_says_what_calls_cost(tokens: Any, says: str) -> None:
    planned = plan(calls=10_000, tokens=tokens, rpm=60_000, model="m", prices=PRICES)
    assert f"this job costs about {planned.usd:,.2f} USD" == says
    assert str(planned).splitlines()[1] == says


def test_plan_knows_dollars_only_of_models_that_it_knows() -> None:
    assert plan(calls=10, tokens=5, rpm=10).usd is None
    assert plan(calls=10, tokens=BODY, rpm=10).usd is None
    priced = plan(calls=1, tokens=BODY, prices=PRICES)
    assert priced.usd == pytest.approx(0.001, abs=1e-4)
    assert plan(calls=10, tokens=5, rpm=10, prices={"*": PRICES["m"]}).usd is not None
    assert plan(calls=10, latency=1, rpm=10, model="m", prices=PRICES).usd is None
    with pytest.raises(ValueError, match="no price is known for the model 'm'"):
        plan(calls=10, tokens=5, rpm=10, model="m")
    cost = Cost(input_tokens=500_000)
    planned = plan("1 USD/hour", calls=4, tokens=cost, model="m", prices=PRICES)
    assert (planned.bound_by, round(planned.duration, -2)) == ("usd", 3_600)
    assert planned.limits[0].limit == "1 USD per 3,600 s"


def test_durations_shares_and_changes_are_in_two_units_and_not_rounded_up() -> None:
    seconds = (0.0123, 99.94, 120, 2_379.21, 3_599.6, 24_120, 86_399, 300_000)
    assert ", ".join(map(duration_in_words, seconds)) == (
        "0.0123 s, 99.9 s, 2 min, 39 min 39 s, 1 h, 6 h 42 min, 24 h, 3 d 11 h"
    )
    assert (percent(0.9996), percent(1.0)) == ("99.9 %", "100.0 %")
    assert change(100.4, 100) == "the same"
    assert (change(50, 100), change(None, 100)) == ("50 s (-50 %)", "-")


# --- what a call costs and how long it takes can be given in many ways ---

CHAT = {"model": "m", "messages": [{"role": "user", "content": "w" * 4_000}], "max_tokens": 300}
BATCH = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
EMBEDDING = {"model": "text-embedding-3-small", "input": ["w" * 40, "w" * 40]}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    return path


@pytest.mark.parametrize(
    ("sample", "tokens"),
    [
        ("w" * 400, 100),
        (Cost(tokens=70), 70),
        ({"tokens": 55}, 55),
        ({"input_tokens": 40, "output_tokens": 2}, 42),
        (CHAT, 1_000),
        (BATCH, 1_000),
        ({"prompt": "w" * 400}, 100),
        (EMBEDDING, 20),
        ({"model": "m", "input": "w" * 400, "max_output_tokens": 300}, 300),
    ],
)
def test_token_sample_of_any_form_is_charged(tmp_path: Path, sample: Any, tokens: int) -> None:
    assert plan(tokens=[sample]).tokens == tokens
    if not isinstance(sample, Cost):
        assert plan(tokens=written(tmp_path, sample)).tokens == tokens
        assert plan(tokens=str(written(tmp_path, sample))).tokens == tokens


def test_request_body_is_charged_by_the_given_profile() -> None:
    assert plan(tokens=[CHAT], profile="azure").tokens == 1_300
    batch = {"url": "/v1/embeddings", "body": EMBEDDING | {"model": "bge-m3"}}
    assert [plan(tokens=[each], profile="azure").tokens for each in (EMBEDDING, batch)] == [20, 20]
    assert plan(calls=1, tokens=BODY, tpm=100_000, profile="bedrock").tokens == 64_010


def test_input_limit_binds_on_the_input_tokens_of_a_body() -> None:
    planned = plan(tokens=[CHAT] * 4, itpm=2_000, otpm=10_000)
    assert planned.bound_by == "input_tokens"


def test_samples_are_used_once_each_or_drawn_with_replacement() -> None:
    assert plan(tokens=[1, 2, 3]).tokens == 6
    assert plan(latency=[1, 2, 3], tokens=2).tokens == 6
    assert plan(calls=3_000, tokens=[100, 300]).tokens == pytest.approx(600_000, rel=0.05)
    assert plan(calls=2, tokens=10.2).tokens == 22
    assert plan(calls=2, tokens={"input_tokens": 40, "output_tokens": 2}).tokens == 84


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"samples\.jsonl, line 3: not JSON: Expecting property name"),
        ("\udc85", r"samples\.jsonl, line 3: not UTF-8 text at byte 0"),
        ('{"cost": 3}', r"tokens: .*samples\.jsonl, line 3: an object with cost gives no tokens"),
        ("{}", "an object with nothing gives no tokens"),
        ("NaN", "line 3: expected a finite number of at least 0, not nan"),
        ('{"tokens": "many"}', "line 3: expected a finite number of at least 0, not str"),
    ],
)
def test_bad_sample_is_refused_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(f"5\n\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        plan(tokens=path)


# --- a plan agrees with a limiter ---


#: A timer of the event loop may be late by this much (s), because its instants are floats.
LATE = 1e-6


def assert_same(planned: Plan, make: Callable[..., Limiter], calls: Iterable[Any]) -> None:
    """Run calls that come at an instant, cost tokens and take seconds; compare with their plan."""
    waits: list[float] = []
    with virtual_time() as time:
        limiter = make(clock=time.clock)

        async def call(arrival: float, tokens: int, latency: float) -> None:
            await asyncio.sleep(arrival)
            async with limiter.acquire(tokens=tokens) as lease:
                waits.append(lease.waited)
                await asyncio.sleep(latency)

        async def main() -> None:
            await asyncio.gather(*(call(*each) for each in calls))

        time.run(main())
        duration = time.now
    waits.sort()
    count = len(waits)
    assert planned.calls == count
    found = (planned.duration, planned.waits.p50, planned.waits.p95, planned.waits.max)
    rank50, rank95 = (-(-count * rank // 100) - 1 for rank in (50, 95))
    expected = (duration, waits[rank50], waits[rank95], waits[-1])
    assert found == pytest.approx(expected, abs=LATE * count)


@pytest.mark.parametrize("seed", range(32))
def test_plan_of_a_random_history_agrees_with_a_limiter(seed: int) -> None:
    """Whatever limits there are, whenever calls come, and if some cannot pass."""
    chance = random.Random(seed)
    calls, tpm = chance.randint(20, 250), chance.choice([4, 10, 40])
    limits = [
        f"{chance.choice([10, 30, 60, 300])} RPM{chance.choice(['', ' burst 1', ' burst 10'])}",
        f"{tpm}k TPM{chance.choice(['', ' burst 1k', ' burst 4k'])}",
    ]
    chosen = chance.sample(limits, k=chance.choice([1, 2, 2]))
    slots = chance.randint(1, 12)
    tokens = [chance.randint(50, 4_500) for _ in range(calls)]
    latency = [chance.uniform(0.01, chance.choice([1, 5, 30])) for _ in range(calls)]
    arrivals = Poisson(calls / chance.choice([1, 60, 600]))
    given: dict[str, Any] = {"tokens": tokens, "latency": latency, "arrivals": arrivals}
    planned = plan(*chosen, concurrency=slots, seed=seed, **given)
    largest = 1_000 * tpm if limits[1] in chosen else 5_000
    instants = [instant * 1e-9 for instant in arrivals.instants(calls, seed)]
    history = zip(instants, tokens, latency, strict=True)
    passing = [each for each in history if each[1] <= largest]
    assert_same(planned, partial(Limiter, *chosen, concurrency=slots), passing)
    assert planned.tokens == sum(each[1] for each in passing)
    assert planned.refused == calls - len(passing)


@pytest.mark.parametrize("seed", range(6))
def test_plan_of_a_pool_agrees_with_the_pool(seed: int) -> None:
    chance = random.Random(seed)
    tokens = [chance.randint(50, 1_500) for _ in range(150)]
    latency = [chance.uniform(0.01, 5) for _ in tokens]
    members: list[tuple[str, str, int]] = []
    for _ in range(3):
        requests = f"{chance.choice([30, 60, 300])} RPM burst {chance.randint(1, 10)}"
        members.append((requests, f"{chance.choice([2, 10, 40])}k TPM", chance.randint(1, 6)))

    def pool(**clock: Any) -> Pool:
        each = (
            Limiter(*limits, concurrency=slots, name=name, **clock)
            for name, (*limits, slots) in zip("abc", members, strict=True)
        )
        return Pool(*each, prefer="first")

    planned = plan(pool=pool(), tokens=tokens, latency=latency)
    assert_same(planned, pool, zip(repeat(0), tokens, latency, strict=False))
    assert [limit.limit.partition(":")[0] for limit in planned.limits] == [*"aaabbbccc"]
