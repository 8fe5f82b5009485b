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
from typer.testing import CliRunner

from asyncbucket.cli.app import app
from asyncbucket.cli.demo import CALLS_PER_AGENT, TOKENS_PER_CALL, Run, scenario_of
from asyncbucket.testing import Arrival

COMMAND = [sys.executable, "-m", "asyncbucket", "demo"]
START = 5_000_000_000


@pytest.mark.parametrize("seconds", [2.0, 36.0])
@pytest.mark.parametrize("limits", [{"rpm": 600}, {"rpm": 3_000}, {"tpm": 60_000}])
def test_paced_run_lasts_the_requested_seconds(limits: dict[str, int], seconds: float) -> None:
    scenario = scenario_of(seconds=seconds, **limits)
    calls = scenario.agents * CALLS_PER_AGENT + scenario.batches
    a_second = limits.get("rpm", 60_000 / TOKENS_PER_CALL) / 60

    assert calls / a_second == pytest.approx(seconds, rel=0.05, abs=0.1)
    # More than pass at once; otherwise nothing would happen without asyncbucket.
    window = scenario.requests.per
    assert scenario.agents + scenario.batches > 1.5 * min(a_second, 10) * window


def test_limits_per_minute_are_scaled_to_windows_of_6_s() -> None:
    assert scenario_of(60).headline == (
        "60 LlamaIndex agents with a tool, 10 batches of embeddings, all at once;\n"
        "a bundled provider allows 60 requests per 6 s, 15,000 tokens per 6 s\n"
    )


def test_token_limit_too_low_for_any_call_is_refused_with_one_that_works() -> None:
    result = CliRunner().invoke(app, ["demo", "--tpm", "10", "--seconds", "6"])

    assert result.exit_code == 2
    assert "error: 10 tokens a minute are 1 in the demo's 1.5 s, " in result.stderr
    assert result.stderr.endswith("give --tpm 10000 or more\n")
    scenario_of(tpm=10_000, seconds=6.0)


@pytest.mark.parametrize(
    ("instants", "seconds", "share"),
    [
        ([number / 10 for number in range(180)], 18.0, 1.0),
        # Twice as many in the first window and none in the next use half of the limit.
        ([number / 20 for number in range(120)], 12.0, 0.5),
        # The last half window has room for thirty, so twelve more calls make 72 of 90.
        ([*(number / 10 for number in range(60)), *[6.1] * 12], 9.0, 0.8),
        ([], 0.0, 0.0),
    ],
)
def test_share_used_counts_each_window_up_to_its_limit(
    instants: list[float], seconds: float, share: float
) -> None:
    admitted = [Arrival(START + round(at * 1e9), "", 30, admitted=True) for at in instants]
    end = START + round(seconds * 1e9)
    run = Run(scenario=scenario_of(), started_ns=START, ended_ns=end, arrivals=admitted)

    assert run.share() == pytest.approx(share)


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


@pytest.mark.real_clock
def test_demo_has_429s_and_failures_only_without_asyncbucket() -> None:
    storm: dict[str, Any] = {}
    calm: dict[str, Any] = {}
    # A busy machine may be too slow for a storm, or deliver calls late.
    for _ in range(3):
        result = demo("--seconds", "4", "--json")
        assert (result.returncode, result.stderr) == (0, "")
        storm, calm = json.loads(result.stdout)
        is_stormy = storm["refused"] > storm["failed"] > 0
        if is_stormy and not calm["refused"] and calm["share"] > 0.5:
            break

    scenario = scenario_of(seconds=4)
    assert storm["refused"] > storm["failed"] > 0
    assert (calm["refused"], calm["failed"]) == (0, 0)
    assert calm["agents_finished"] == scenario.agents
    assert calm["requests"] == calm["answered"] == 2 * scenario.agents + scenario.batches
    assert 0.5 < calm["share"] <= 1
    assert 0 < calm["mean_wait"] < calm["seconds"]


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
        assert f"\n{name}: admitted over time; ____ is the limit" in result.stdout


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
        next(line for line in process.stdout if re.search(r"[1-9][\d,]* calls answered", line))
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (130, "")
    assert re.search(r"^ agents finished +\d+ of \d+ *$", output, re.MULTILINE)
