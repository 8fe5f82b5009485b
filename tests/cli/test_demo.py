"""The demo: what it runs, how its figures come about, and the demo itself.

The last part has real agents and real HTTP on loopback, on the machine's clock: it measures waits
and a wall time, and the provider runs in another process, so virtual time won't do.
"""

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from asyncbucket import Limit
from asyncbucket.cli.app import app
from asyncbucket.cli.demo import CALLS_PER_AGENT, TOKENS_PER_CALL, Run, bundled, real
from asyncbucket.testing import Arrival, RateLimitedProvider
from asyncbucket.testing.pytest_plugin import ProviderFactory

COMMAND = [sys.executable, "-m", "asyncbucket", "demo"]
KEY = {"OPENAI_API_KEY": "sk-very-secret"}
START = 5_000_000_000
TEN_A_SECOND = Limit("requests", 10, per=1)


def typed(*arguments: str, status: int = 2, key: str = "sk-very-secret") -> str:
    """Type a command that fails, and return its error."""
    result = CliRunner(env={"OPENAI_API_KEY": key}).invoke(app, ["demo", *arguments])
    assert result.exit_code == status, result.output
    return result.stderr


# What is run.


@pytest.mark.parametrize("seconds", [2.0, 36.0])
@pytest.mark.parametrize("limits", [{"rpm": 600}, {"rpm": 3_000}, {"tpm": 60_000}])
def test_paced_run_lasts_the_requested_seconds(limits: dict[str, int], seconds: float) -> None:
    scenario = bundled(seconds=seconds, **limits)
    calls = scenario.agents * CALLS_PER_AGENT + scenario.batches
    a_second = limits.get("rpm", 60_000 / TOKENS_PER_CALL) / 60

    assert calls / a_second == pytest.approx(seconds, rel=0.05, abs=0.1)
    # More than pass at once; otherwise nothing would happen without asyncbucket.
    assert scenario.agents + scenario.batches > 1.5 * min(a_second, 20) * scenario.window


def test_limits_per_minute_are_scaled_to_windows_of_6_s() -> None:
    scenario = bundled(60)

    assert (scenario.agents, scenario.batches) == (60, 10)
    assert [f"{limit}" for limit in scenario.limits] == [
        "120 requests per 6 s",
        "30,000 tokens per 6 s",
    ]


def test_token_limit_too_low_for_any_call_is_refused_with_one_that_works() -> None:
    error = typed("--tpm", "10", "--quick")

    assert "10 tokens a minute are 1 in the demo's 1.5 s, " in error
    assert error.endswith("give --tpm 10000 or more\n")
    bundled(tpm=10_000, seconds=6.0)


@pytest.mark.parametrize(
    ("arguments", "key", "error"),
    [
        ("--model m", "k", "give the limits of your key with --rpm and --tpm, e.g. --rpm 500"),
        ("--model m --rpm 5 --quick", "k", "--seconds and --quick are for the bundled"),
        ("--model m --rpm 5", "", "OPENAI_API_KEY is not set: a real provider needs a key"),
        (
            "--api-base localhost:8000 --rpm 5",
            "k",
            "--api-base must begin with http:// or https://",
        ),
        ("--api-base ftp://example.org --rpm 5", "k", "--api-base must begin with http:// or http"),
    ],
)
def test_option_that_does_not_fit_is_refused(arguments: str, key: str, error: str) -> None:
    assert typed(*arguments.split(), key=key).startswith(f"error: {error}")


def test_real_provider_shows_neither_key_nor_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    base = "http://me:pass-word@example.org/v1"

    scenario = real(1, rpm=1, tpm=None, api_base=base, concurrency=3)

    assert [limit.per for limit in scenario.limits] == [60]
    assert "sk-test" not in repr(scenario)
    assert scenario.headline == (
        "1 LlamaIndex agent with a tool, all at once;\n"
        "http://example.org/v1 allows 1 request per 60 s\n"
    )


# The figures.


def run_of(*instants: float, seconds: float, tokens: int = 0) -> Run:
    """Return a run in which requests were admitted at these seconds after its start."""
    admitted = [Arrival(START + round(at * 1e9), "", tokens, admitted=True) for at in instants]
    end = START + round(seconds * 1e9)
    return Run(scenario=bundled(), started_ns=START, ended_ns=end, arrivals=admitted)


@pytest.mark.parametrize(
    ("instants", "seconds", "share"),
    [
        ([number / 10 for number in range(30)], 3.0, 1.0),
        # Twenty in the first second and none in the next use half of the limit, not all of it.
        ([number / 20 for number in range(20)], 2.0, 0.5),
        # The last half window has room for five, so two more calls make 12 of 15.
        ([*(number / 10 for number in range(10)), 1.1, 1.2], 1.5, 0.8),
        ([], 0.0, 0.0),
    ],
)
def test_share_used_counts_each_window_up_to_its_limit(
    instants: list[float], seconds: float, share: float
) -> None:
    run = run_of(*instants, seconds=seconds, tokens=30)

    assert run.share(TEN_A_SECOND) == pytest.approx(share)
    assert run.share(Limit("tokens", 300, per=1)) == pytest.approx(share)


def test_wait_percentiles_include_calls_that_passed_at_once() -> None:
    run = run_of(seconds=1.0)
    run.waits = [*[(0.0, None)] * 8, (2.0, "tokens"), (1.0, "requests")]

    assert [run.wait(quantile) for quantile in (0.5, 0.9, 0.95)] == [0.0, 1.0, 2.0]
    assert run.bound_by() == {"tokens": 1, "requests": 1}
    assert run_of(seconds=1.0).wait(0.5) is None


# The demo itself.


def demo(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the demo with its output in a pipe."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | environment,
    )


def demo_at(provider: RateLimitedProvider, *arguments: str) -> Result:
    """Run the demo here, against a given provider, with a key in the environment."""
    command = ["demo", "--api-base", provider.base_url, *arguments]
    return CliRunner(env=KEY).invoke(app, command)


@pytest.mark.real_clock
def test_demo_has_429s_and_failures_only_without_asyncbucket() -> None:
    figures: dict[str, Any] = {}
    calm: dict[str, Any] = {}
    stormy = False
    # A busy machine may be too slow for a storm, or deliver calls late.
    for _ in range(3):
        result = demo("--seconds", "4", "--json")
        assert (result.returncode, result.stderr) == (0, "")
        figures = json.loads(result.stdout)
        storm = figures["runs"][0]
        stormy = storm["refused"] > storm["failed"] > 0
        calm = figures["runs"][1]
        if stormy and not calm["refused"] and calm["shares"]["requests"] > 0.5:
            break

    assert stormy
    assert (calm["refused"], calm["failed"]) == (0, 0)
    assert calm["agents_finished"] == figures["agents"]
    assert calm["requests"] == calm["answered"] == 2 * figures["agents"] + figures["batches"]
    assert 0.5 < calm["shares"]["requests"] <= 1
    assert 0 < calm["waits"]["p50"] <= calm["waits"]["p95"] < calm["seconds"]


@pytest.mark.real_clock
def test_demo_output_in_a_pipe_is_plain_text() -> None:
    result = demo("--seconds", "2", TERM="xterm-256color")

    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert re.search(r"^ 429s +[1-9][\d,]* +0 *$", result.stdout, re.MULTILINE)
    # How many fail in the storm depends on the machine: a slow one asks for less.
    assert re.search(r"^ failed +[\d,]+ +0 *$", result.stdout, re.MULTILINE)
    for name in ("without asyncbucket", "with asyncbucket"):
        assert f"\n{name}, 0 s: 0 of " in result.stdout  # progress from the start


@pytest.mark.real_clock
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_ends_demo_with_the_table_so_far_and_status_130() -> None:
    with subprocess.Popen(
        [*COMMAND, "--seconds", "20"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        # Wait for the first line of progress with answers: agents are running.
        seen = next(
            line for line in process.stdout if re.search(r"[1-9][\d,]* calls answered", line)
        )
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)

    assert "429s" in seen
    assert (process.returncode, errors) == (130, "")
    assert "(so far)" in output
    assert re.search(r"^ agents finished +\d+ of \d+ *$", output, re.MULTILINE)


@pytest.mark.real_clock
def test_real_provider_is_paced_and_its_key_stays_secret(
    rate_limited_provider: ProviderFactory,
) -> None:
    """It is one run, with a model unknown to LlamaIndex and a key from the environment."""
    provider = rate_limited_provider()

    result = demo_at(provider, "--model", "llama-3-8b", "--rpm", "9000", "--agents", "6")

    assert result.exit_code == 0, result.output
    assert "6 of 6" in result.output
    assert "without asyncbucket" not in result.output
    assert "sk-very-secret" not in result.output
    assert provider.statistics().endpoints == {"chat/completions": 12}


@pytest.mark.real_clock
def test_refused_key_ends_the_demo_at_once(rate_limited_provider: ProviderFactory) -> None:
    provider = rate_limited_provider(always=401)

    result = demo_at(provider, "--rpm", "60", "--agents", "20")

    assert result.exit_code == 1
    assert "error: AuthenticationError: Error code: 401" in result.stderr
    assert "sk-very-secret" not in result.output
    assert provider.statistics().requests < 20


@pytest.mark.real_clock
@pytest.mark.parametrize(
    ("status", "code", "shown"),
    [
        (429, "insufficient_quota", "RateLimitError (insufficient_quota)"),
        (400, "no\x1b[2J", "BadRequestError (no [2J)"),  # it cannot control the terminal
    ],
)
def test_failed_calls_are_counted_by_kind(
    status: int, code: str, shown: str, rate_limited_provider: ProviderFactory
) -> None:
    provider = rate_limited_provider()
    provider.fail_next(100, status=status, code=code)

    result = demo_at(provider, "--rpm", "9000", "--agents", "3")

    assert result.exit_code == 1
    assert f"with asyncbucket, 3 failed: {shown}" in result.output
    assert provider.statistics().requests == 3
