"""The demo itself, with real agents and real HTTP on loopback, on the machine's clock.

It measures waits and a wall time, and the provider runs in another process: virtual time won't do.
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

from asyncbucket.cli.app import app
from asyncbucket.testing import RateLimitedProvider
from asyncbucket.testing.pytest_plugin import ProviderFactory

pytestmark = pytest.mark.real_clock

COMMAND = [sys.executable, "-m", "asyncbucket", "demo"]
ESCAPE = "\x1b"


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
    return CliRunner(env={"OPENAI_API_KEY": "sk-very-secret"}).invoke(app, command)


def test_demo_has_429s_and_failures_only_without_asyncbucket() -> None:
    """Without it there are 429s and failed calls; with it there are none, and no retries."""
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
    assert (calm["refused"], calm["failed"], calm["interrupted"]) == (0, 0, False)
    assert calm["agents_finished"] == figures["agents"]
    assert calm["requests"] == calm["calls"] == 2 * figures["agents"] + figures["batches"]
    assert len(calm["admitted_at"]) == calm["requests"]
    assert 0.5 < calm["shares"]["requests"] <= 1
    assert 0 < calm["waits"]["p50"] <= calm["waits"]["p95"] < calm["seconds"]


def test_demo_output_in_a_pipe_is_plain_text_within_90_columns() -> None:
    """There are no escape codes, no logs, and nothing wider than 90 columns."""
    result = demo("--seconds", "2", TERM="xterm-256color")

    assert (result.returncode, result.stderr) == (0, "")
    assert ESCAPE not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 90
    assert re.search(r"^ 429s +[1-9][\d,]* +0 *$", result.stdout, re.MULTILINE)
    # How many fail in the storm depends on the machine: a slow one asks for less.
    assert re.search(r"^ failed +[\d,]+ +0 *$", result.stdout, re.MULTILINE)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_ends_demo_with_the_table_so_far_and_status_130() -> None:
    """Ctrl-C while agents run gives a table and status 130, without a traceback."""
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


def test_real_provider_is_paced_and_its_key_stays_secret(
    rate_limited_provider: ProviderFactory,
) -> None:
    """It is one run, with a model unknown to LlamaIndex and a key from the environment."""
    provider = rate_limited_provider()
    models = ["--model", "llama-3-8b", "--embed-model", "bge"]

    result = demo_at(provider, *models, "--rpm", "9000", "--agents", "6")

    assert result.exit_code == 0, result.output
    assert "6 of 6" in result.output
    assert "without asyncbucket" not in result.output
    assert "sk-very-secret" not in result.output
    assert provider.statistics().endpoints == {"chat/completions": 12, "embeddings": 1}


def test_more_than_10000_agents_are_refused() -> None:
    """The error comes at once, and names the maximum."""
    result = CliRunner().invoke(app, ["demo", "--agents", "1000000"])

    assert result.exit_code == 2
    assert "'--agents'" in result.output
    assert "from 1 to 10,000" in result.output


def test_refused_key_ends_the_demo_at_once(rate_limited_provider: ProviderFactory) -> None:
    """No agent could succeed, so the others are not tried, and the provider's reason is shown."""
    provider = rate_limited_provider(always=401)

    result = demo_at(provider, "--rpm", "60", "--agents", "20")

    assert result.exit_code == 1
    assert "error: AuthenticationError: Error code: 401" in result.stderr
    assert "sk-very-secret" not in result.output
    assert provider.statistics().requests < 20


def test_control_characters_of_a_provider_do_not_reach_the_terminal(
    rate_limited_provider: ProviderFactory,
) -> None:
    """An error code comes from outside, so control characters are removed."""
    provider = rate_limited_provider()
    provider.fail_next(100, status=400, code="no\x1b[2J")

    result = demo_at(provider, "--rpm", "9000", "--agents", "3")

    assert "with asyncbucket, 3 failed: BadRequestError (no [2J)" in result.output


def test_failed_calls_are_counted_by_kind(rate_limited_provider: ProviderFactory) -> None:
    """With an exhausted account each first call fails without a retry, and the status is 1."""
    provider = rate_limited_provider()
    provider.fail_next(100, status=429, code="insufficient_quota")

    result = demo_at(provider, "--rpm", "9000", "--agents", "3")

    assert result.exit_code == 1
    assert "with asyncbucket, 3 failed: RateLimitError (insufficient_quota)" in result.output
    assert provider.statistics().requests == 3
