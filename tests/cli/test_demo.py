"""The demo: what it runs, and the demo itself.

The last part has real agents and real HTTP on loopback, on the machine's clock: it measures waits
and a wall time, and virtual time does not reach a server.
"""

import re

import pytest
from rich.console import Console

from asyncbucket import Limiter
from asyncbucket.cli import demo
from asyncbucket.cli.demo import CALLS_PER_AGENT, Trial, scenario_of
from tests.conftest import python


@pytest.mark.parametrize("seconds", [2.0, 36.0])
def test_paced_run_lasts_the_requested_seconds(seconds: float) -> None:
    scenario = scenario_of(seconds, rpm=3_000)
    calls = scenario.agents * CALLS_PER_AGENT + scenario.batches
    assert calls / 3_000 * 60 == pytest.approx(seconds, rel=0.05, abs=0.1)
    # More than pass at once; otherwise nothing would happen without asyncbucket.
    assert scenario.agents + scenario.batches > 1.5 * scenario.requests.amount


def test_scenario_says_what_runs_under_which_limits() -> None:
    assert str(scenario_of()) == (
        "110 LlamaIndex agents with a tool, 20 batches of embeddings, all at once;\n"
        "a bundled provider allows 60 requests per 6 s, 15,000 tokens per 6 s\n"
    )


def test_table_shows_both_runs_and_what_failed() -> None:
    scenario, console = scenario_of(2.0), Console(width=90)
    storm, calm = Trial(scenario=scenario), Trial(scenario=scenario, limiter=Limiter())
    storm.provider.enforcer._refused["requests"] = 60
    calm.started_ns, calm.ended_ns = 1, 1_900_000_001
    storm.failures["RateLimitError"] = 7
    with console.capture() as captured:
        demo._show(console, [storm, calm])
    printed = captured.get()
    assert re.search(r"^ 429s +60 +0 *$", printed, re.MULTILINE)
    assert "without asyncbucket, 7 failed: RateLimitError" in printed
    assert str(calm.panel()).startswith(f"with asyncbucket, 1.9 s: 0 of {scenario.agents} agents, ")
    assert "\x1b" not in printed


@pytest.mark.real_clock
@pytest.mark.timeout(300)
def test_demo_has_429s_only_without_asyncbucket() -> None:
    table: dict[str, list[str]] = {}
    # A busy machine may be too slow for a storm, or deliver calls late.
    for _ in range(3):
        done = python("-m", "asyncbucket", "demo", "--seconds", "3")
        assert (done.returncode, done.stderr) == (0, "")
        rows = (re.split(r"  +", line.strip()) for line in done.stdout.splitlines())
        table = {name: figures for name, *figures in rows if len(figures) == 2}
        if table["429s"][0] != "0" and table["429s"][1] == "0":
            break
    scenario = scenario_of(3.0)
    storm, calm = ({name: each[run] for name, each in table.items()} for run in (0, 1))
    assert int(storm["429s"]) > int(storm["failed"])
    assert (calm["429s"], calm["failed"]) == ("0", "0")
    assert calm["agents finished"] == f"{scenario.agents} of {scenario.agents}"
    calls = f"{2 * scenario.agents + scenario.batches}"
    assert calm["calls"] == calm["HTTP requests, retries included"] == calls
    assert " s for requests" in calm["mean wait"]  # and for tokens, on a busy machine
