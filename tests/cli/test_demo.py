"""The demo: what it runs, and the demo itself.

The last part has real agents and real HTTP on loopback, on the machine's clock: it measures waits
and a wall time, and the provider runs in another process, so virtual time won't do.
"""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from asyncbucket.cli.demo import CALLS_PER_AGENT, scenario_of

COMMAND = [sys.executable, "-m", "asyncbucket", "demo"]


@pytest.mark.parametrize("seconds", [2.0, 36.0])
@pytest.mark.parametrize("rpm", [600, 3_000])
def test_paced_run_lasts_the_requested_seconds(rpm: int, seconds: float) -> None:
    scenario = scenario_of(seconds=seconds, rpm=rpm)
    calls = scenario.agents * CALLS_PER_AGENT + scenario.batches
    assert calls / rpm * 60 == pytest.approx(seconds, rel=0.05, abs=0.1)
    # More than pass at once; otherwise nothing would happen without asyncbucket.
    assert scenario.agents + scenario.batches > 1.5 * scenario.requests.amount


def test_limits_per_minute_are_scaled_to_windows_of_6_s() -> None:
    assert scenario_of(60).headline == (
        "60 LlamaIndex agents with a tool, 10 batches of embeddings, all at once;\n"
        "a bundled provider allows 60 requests per 6 s, 15,000 tokens per 6 s\n"
    )


def demo(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.real_clock
@pytest.mark.timeout(300)
def test_demo_has_429s_only_without_asyncbucket() -> None:
    storm: dict[str, Any] = {}
    calm: dict[str, Any] = {}
    # A busy machine may be too slow for a storm, or deliver calls late.
    for _ in range(3):
        result = demo("--quick", "--json")
        assert (result.returncode, result.stderr) == (0, "")
        storm, calm = json.loads(result.stdout)
        if storm["refused"] and not calm["refused"] and calm["share"] > 0.5:
            break
    scenario = scenario_of(seconds=6.0)
    assert storm["refused"] > storm["failed"]
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
