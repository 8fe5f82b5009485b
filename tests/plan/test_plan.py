"""What a plan says, and how it is worded."""

import json
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Cost, CostExceedsLimit, Limiter, LimitSyntaxError, Pool, Price
from asyncbucket.plan import Plan, Poisson, plan, result
from asyncbucket.plan.bill import dollars
from asyncbucket.plan.result import change, duration_in_words, percent


def changed_durations(plan: Plan, resource: str) -> tuple[float | None, float | None]:
    (limit,) = (each for each in plan.limits if each.resource == resource)
    return limit.if_doubled, limit.if_removed


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
    doubled, _ = changed_durations(plan(limit, calls=700), "requests")
    assert doubled == plan(twice, calls=700).duration


def test_limit_that_no_call_waits_for_does_not_bind() -> None:
    planned = plan(calls=5, rpm=500, latency=2.5)
    assert planned.bound_by is None
    assert planned.duration == 2.5
    assert planned.waits.max == 0
    assert changed_durations(planned, "requests") == (2.5, 2.5)


def test_plan_begins_as_the_limit_has_just_reset() -> None:
    """Whatever day it is, and whenever and where others reset."""
    daily = "10 RPD resets 09:30 America/Los_Angeles"
    planned = plan(daily, "80 tokens/week resets 00:00 UTC", calls=35, tokens=2, latency=1.5)

    assert planned.duration == 3 * 86_400 + 1.5
    assert planned.bound_by == "requests"
    monthly = plan("10 requests/month resets 00:00 UTC", calls=11)
    assert monthly.duration == 31 * 86_400


def test_same_seed_gives_the_same_plan() -> None:
    def one(seed: int) -> Plan:
        return plan(
            calls=300,
            tokens=[100, 400, 2_500],
            latency=[0.5, 1.0, 4.0],
            arrivals=Poisson(20.0),
            tpm=100_000,
            concurrency=5,
            seed=seed,
        )

    assert one(1) == one(1)
    assert one(1) != one(2)


def test_calls_that_can_never_pass_are_counted() -> None:
    planned = plan(tokens=[500, 50_000, 700], tpm=30_000, latency=1.0)
    assert (planned.calls, planned.refused) == (2, 1)
    assert "never passed: 1 call: cost of 50,000 tokens exceeds the limit of 30,000 tokens" in str(
        planned
    )


def test_plan_in_which_no_call_can_pass_is_an_error() -> None:
    with pytest.raises(
        CostExceedsLimit,
        match="no call can ever pass: cost of 800 tokens exceeds the limit of 500 tokens per 60 s",
    ):
        plan(calls=3, tokens=800, tpm=500)


def test_plan_of_many_calls_omits_what_if_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "_MAX_WHAT_IF_CALLS", 10)
    for calls, what_if, answered in ((11, None, False), (11, True, True), (10, None, True)):
        planned = plan(calls=calls, rpm=5, what_if=what_if)
        assert [each is not None for each in changed_durations(planned, "requests")] == [
            answered,
            answered,
        ]
    assert changed_durations(plan(calls=10, rpm=5, what_if=False), "requests") == (None, None)


def test_poisson_arrivals_come_at_their_rate() -> None:
    planned = plan(calls=1_000, arrivals=Poisson(5.0), rpm=6_000)
    assert planned.duration == pytest.approx(200, rel=0.1)
    assert planned.bound_by is None


def test_share_used_of_each_request_limit_follows_its_own_window() -> None:
    planned = plan("100 RPD burst 100", calls=150, rpm=600)
    day, minute = sorted(planned.limits, key=lambda each: each.limit)
    assert day.limit == "100 requests per 86,400 s"
    assert day.used == pytest.approx(150 / 200)
    assert minute.used < 0.01
    assert planned.duration > 86_400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "how many calls"),
        ({"calls": 1.5}, r"calls must be a whole number of at least 1, not 1\.5"),
        ({"calls": 10_000_001}, "10,000,001 calls are more than the 10,000,000 that a plan runs"),
        ({"calls": 5, "tpm": 100}, "a limit counts tokens, but nothing says how many a call has"),
        (
            {"calls": 5, "rpm": 9, "pool": Pool(Limiter(rpm=5))},
            "a pool has the limits of its members",
        ),
        ({"calls": 5, "concurrency": 2}, "what concurrency=2 allows depends on how long"),
        ({"calls": 5, "concurrency": "auto"}, "concurrency must be a whole number .* not 'auto'"),
        ({"calls": 5, "latency": 1e300}, "a plan covers 292 years at most"),
        ({"calls": 5, "arrivals": Poisson(1e-12)}, "a plan covers 292 years at most"),
        ({"calls": 5, "latency": -1}, "latency: expected a finite number from 0 on, not -1"),
        ({"calls": 5, "tokens": True}, "tokens: expected a number, not True"),
        ({"calls": 5, "tokens": b"800"}, "tokens: expected a number, not bytes"),
        ({"tokens": []}, "tokens has no samples"),
        ({"tokens": [1, -2]}, "tokens, sample 2: expected a finite number from 0 on, not -2"),
        ({"calls": 5, "arrivals": 8.0}, r"Poisson\(8\.0\), for so many calls a second, not 8\.0"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        plan(**arguments)


BODY = {"model": "m", "messages": [{"role": "user", "content": "x" * 40}]}
PRICES = {"m": Price(input=1, output=4)}


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ({"input_tokens": 900, "output_tokens": 25}, "this job costs 10.00 USD"),
        (1_000, "this job costs 25.00 USD, 10.00 to 40.00"),  # all input, or all output
        (BODY | {"max_tokens": 500}, "this job costs 10.34 USD, 0.10 to 20.10"),
        (BODY, "this job costs 10.34 USD, at least 0.10: nothing limits the replies"),
        (
            [Cost(input_tokens=n, output_tokens=0) for n in (800, 1_000, 1_200)],
            "this job costs 10.00 USD, 7.74 to 12.26",
        ),
        ({"input_tokens": 1, "output_tokens": 0}, "this job costs 0.01 USD"),
    ],
)
def test_plan_says_what_calls_cost(tokens: Any, says: str) -> None:
    planned = plan(calls=10_000, tokens=tokens, rpm=60_000, model="m", prices=PRICES)
    assert str(planned.usd) == says
    assert str(planned).splitlines()[1] == says
    assert planned.as_dict()["usd"]["likely"] == planned.usd.likely if planned.usd else False


def test_small_sums_are_written_out() -> None:
    assert [dollars(usd) for usd in (0.000_01, 0.001_52, 1_234.5)] == [
        "0.00001",
        "0.0015",
        "1,234.50",
    ]


def test_plan_reserves_what_the_provider_reserves_for_an_unlimited_reply() -> None:
    assert plan(calls=1, tokens=BODY, tpm=100_000, profile="bedrock").tokens == 64_010


def test_plan_knows_dollars_only_of_models_that_it_knows() -> None:
    assert plan(calls=10, tokens=5, rpm=10).usd is None
    assert plan(calls=10, tokens=BODY, rpm=10).usd is None
    assert plan(calls=10, tokens=BODY, rpm=10, prices=PRICES).usd is not None
    assert plan(calls=10, latency=1, rpm=10, model="m", prices=PRICES).usd is None
    with pytest.raises(ValueError, match="no price is known for the model 'm'"):
        plan(calls=10, tokens=5, rpm=10, model="m")
    with pytest.raises(ValueError, match="counts dollars, but nothing says what a call costs"):
        plan("1 USD/day", calls=10, tokens=5)
    planned = plan(
        "1 USD/hour", calls=4, tokens=Cost(input_tokens=500_000), model="m", prices=PRICES
    )
    assert (planned.bound_by, round(planned.duration, -2)) == ("usd", 3_600)
    assert planned.limits[0].limit == "1 USD per 3,600 s"


def test_unreadable_limit_or_one_on_another_resource_is_refused() -> None:
    with pytest.raises(LimitSyntaxError):
        plan("many", calls=3)
    with pytest.raises(ValueError, match="counts images, and a plan counts requests, tokens"):
        plan("3 images/10s", calls=3)


@pytest.mark.parametrize("rate", [0, float("inf"), True])
def test_arrival_rate_must_be_a_finite_number_above_zero(rate: float) -> None:
    with pytest.raises(ValueError, match="a rate must be a finite number of calls a second"):
        Poisson(rate)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.0123 s"),
        (99.94, "99.9 s"),
        (120, "2 min"),
        (2_379.21, "39 min 39 s"),
        (3_599.6, "1 h"),
        (24_120, "6 h 42 min"),
        (86_399, "24 h"),
        (300_000, "3 d 11 h"),
    ],
)
def test_durations_are_worded_in_two_units_at_most(seconds: float, text: str) -> None:
    assert duration_in_words(seconds) == text


def test_shares_and_changes_are_not_rounded_up() -> None:
    assert [percent(0.9996), percent(1.0)] == ["99.9 %", "100.0 %"]
    assert [change(100.4, 100), change(50, 100), change(None, 100)] == [
        *("the same", "50 s (-50 %)", "-")
    ]


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
        (800, 800),
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


def test_input_limit_binds_on_the_input_tokens_of_a_body() -> None:
    planned = plan(tokens=[CHAT] * 4, itpm=2_000, otpm=10_000)
    assert planned.bound_by == "input_tokens"


def test_samples_are_used_once_each_or_drawn_with_replacement() -> None:
    assert plan(calls=3, tokens=[1, 2, 3]).tokens == 6
    planned = plan(calls=3_000, tokens=[100, 300])
    assert planned.calls == 3_000
    assert planned.tokens == pytest.approx(600_000, rel=0.05)


def test_latency_samples_may_be_lines_of_a_log(tmp_path: Path) -> None:
    path = written(tmp_path, 1.5, {"latency": 2.5}, {"seconds": 0.5, "id": 7})
    assert plan(calls=3, latency=path).duration == 2.5


def test_one_sample_may_be_amounts_and_is_rounded_up() -> None:
    assert plan(calls=2, tokens=10.2).tokens == 22
    assert plan(calls=2, tokens={"input_tokens": 40, "output_tokens": 2}).tokens == 84


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"samples\.jsonl, line 3: not JSON: Expecting property name"),
        ("[" * 100_000, r"samples\.jsonl, line 3: its brackets are nested deeper"),
        ("\udc85", r"samples\.jsonl, line 3: not UTF-8 text at byte 0"),
        ('{"cost": 3}', r"tokens: .*samples\.jsonl, line 3: an object with cost gives no tokens"),
        ("{}", "an object with nothing gives no tokens"),
        ("null", "line 3: expected a number, not None"),
        ("NaN", "line 3: expected a finite number from 0 on, not nan"),
        ('{"tokens": "many"}', "line 3: expected a number, not str"),
    ],
)
def test_bad_sample_is_refused_with_its_line_number_empty_ones_counted(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(f"5\n\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        plan(tokens=path)


def test_latency_object_without_a_known_name_lists_them() -> None:
    with pytest.raises(ValueError, match="an object without latency, seconds, duration"):
        plan(latency=[{"time": 3}])


def test_missing_file_of_samples_raises_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plan(tokens=tmp_path / "none.jsonl")
