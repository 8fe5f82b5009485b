"""The scenario that follows from the options."""

import pytest

from asyncbucket.cli.demo.report import headline
from asyncbucket.cli.demo.scenario import CALLS_PER_AGENT, TOKENS_PER_CALL, DemoOptions, scenario_of


@pytest.mark.parametrize("seconds", [2.0, 6.0, 36.0, 120.0])
@pytest.mark.parametrize("rpm", [600, 1_200, 3_000])
def test_paced_run_lasts_the_requested_seconds(rpm: int, seconds: float) -> None:
    """There are as many calls as the limit lets pass in that time."""
    scenario = scenario_of(DemoOptions(rpm=rpm, seconds=seconds))
    calls = scenario.agents * CALLS_PER_AGENT + scenario.batches

    assert calls / (rpm / 60) == pytest.approx(seconds, rel=0.05)


def test_paced_run_lasts_the_requested_seconds_when_tokens_bind() -> None:
    """60,000 tokens a minute are 400 calls a minute, whatever requests would allow."""
    scenario = scenario_of(DemoOptions(tpm=60_000, seconds=36.0))
    calls = scenario.agents * CALLS_PER_AGENT + scenario.batches

    assert calls / (60_000 / TOKENS_PER_CALL / 60) == pytest.approx(36, rel=0.05)


def test_token_limit_too_low_for_any_call_is_refused() -> None:
    """The run would end in failures only, after minutes; the suggested limit works."""
    with pytest.raises(
        ValueError, match=r"10 tokens a minute are 1 in the demo's 1\.5 s, .* --tpm 10000 or more$"
    ):
        scenario_of(DemoOptions(tpm=10, seconds=6.0))

    scenario_of(DemoOptions(tpm=10_000, seconds=6.0))


@pytest.mark.parametrize("seconds", [2.0, 6.0, 36.0])
def test_agents_and_batches_exceed_the_request_limit(seconds: float) -> None:
    """Otherwise nothing would happen without asyncbucket."""
    scenario = scenario_of(DemoOptions(seconds=seconds))
    amount = scenario.amount("requests")

    assert amount is not None
    assert scenario.agents + scenario.batches > 1.5 * amount


def test_limits_per_minute_are_scaled_to_windows_of_6_s() -> None:
    """1,200 a minute are 120 in 6 s."""
    scenario = scenario_of(DemoOptions())

    assert [str(limit) for limit in scenario.limits] == [
        "120 requests per 6 s",
        "30,000 tokens per 6 s",
    ]


def test_scenario_has_the_requested_number_of_agents() -> None:
    """Their share of embedding batches is added."""
    scenario = scenario_of(DemoOptions(agents=60))

    assert (scenario.agents, scenario.batches) == (60, 10)


def test_real_provider_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read only from the environment, so that it gets into no shell history."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set: a real provider needs a key"):
        scenario_of(DemoOptions(model="gpt-4o-mini", rpm=500))


def test_real_provider_needs_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the user knows them."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")

    with pytest.raises(ValueError, match="--rpm 500 --tpm 200000"):
        scenario_of(DemoOptions(model="gpt-4o-mini"))


def test_real_provider_gets_60_s_windows_and_no_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Limits hold over 60 s, and there are embeddings or a comparison only if asked for."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")

    scenario = scenario_of(DemoOptions(model="gpt-4o-mini", rpm=500, tpm=200_000))

    assert [limit.per for limit in scenario.limits] == [60, 60]
    assert (scenario.agents, scenario.batches, scenario.compare) == (20, 0, False)
    assert "sk-test" not in repr(scenario)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DemoOptions(compare=True), "--compare is for a real provider"),
        (
            DemoOptions(model="gpt-4o-mini", rpm=5, seconds=6.0),
            "--seconds and --quick are for the bundled",
        ),
    ],
)
def test_option_for_the_other_kind_of_provider_is_refused(
    options: DemoOptions, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not ignored."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")

    with pytest.raises(ValueError, match=message):
        scenario_of(options)


@pytest.mark.parametrize("api_base", ["localhost:8000", "http://", "ftp://example.org"])
def test_invalid_api_base_is_refused(api_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every agent would fail after all its attempts."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")

    with pytest.raises(ValueError, match="--api-base must begin with http:// or https:// and a"):
        scenario_of(DemoOptions(rpm=500, api_base=api_base))


def test_headline_hides_the_password_and_uses_the_singular_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of a kind is singular."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    base = "http://me:pass-word@example.org/v1"

    said = headline(scenario_of(DemoOptions(rpm=1, agents=1, api_base=base, embed_model="e")))

    assert said == (
        "1 LlamaIndex agent with a tool and 1 batch of embeddings, all at once,\n"
        "against http://example.org/v1: 1 request every 60 s\n"
    )
