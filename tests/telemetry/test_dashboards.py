"""The dashboard and the alerts in the docs, compared with what is really exposed."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from asyncbucket import Limiter, events, telemetry

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "docs" / "dashboards"
ALERTS = DASHBOARDS / "alerts.yml"
DASHBOARD: dict[str, Any] = json.loads((DASHBOARDS / "asyncbucket.json").read_text("utf-8"))
COST = {"requests": 1, "tokens": 900}
#: Labels that the scraping server adds.
SCRAPED = {"instance", "job"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="PROMTOOL IS MISSING: the alert rules were not tested; apt-get install prometheus",
)


def queries() -> list[str]:
    targets = itertools.chain(*(panel["targets"] for panel in DASHBOARD["panels"]))
    return [
        target["expr"].replace("$limiter", "openai.*").replace("$__rate_interval", "4m")
        for target in targets
    ]


def rules() -> list[str]:
    found = re.findall(r"expr:(.*?)\n {8}(?:for|labels):", ALERTS.read_text("utf-8"), re.DOTALL)
    return [" ".join(text.replace(">-", "").split()) for text in found]


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)  # noqa: S607 - wherever it is
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def exposed(say: Any) -> dict[str, set[str]]:
    registry = CollectorRegistry()
    limiter = Limiter("500 RPM", concurrency=5, name="openai")
    telemetry.prometheus(limiter, registry=registry)
    limiter.acquire_nowait(tokens=900).release()
    limiter.pause(0, reason="429")
    say(limiter, events.Retried, attempt=1, error="HTTP 429", delay=1.0)
    say(limiter, events.AgentFinished, kind="chat", seconds=30.0, ended_well=True)
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


@pytest.mark.parametrize("expression", [*queries(), *rules()])
def test_query_uses_known_metrics_and_labels_and_rates_over_at_least_four_minutes(
    expression: str, exposed: dict[str, set[str]]
) -> None:
    named = re.findall(r"(asyncbucket_\w+)(?:\{([^}]*)\})?", expression)
    assert named
    for metric, selector in named:
        assert metric in exposed
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        assert labels <= exposed[metric] | SCRAPED
    grouped = ",".join(re.findall(r"(?:by|without) \(([^)]*)\)", expression))
    known = set().union(*(exposed[metric] for metric, _ in named))
    assert set(re.findall(r"\w+", grouped)) <= known
    assert all(int(minutes) >= 4 for minutes in re.findall(r"\[(\d+)m\]", expression))


def test_every_metric_is_on_the_dashboard(exposed: dict[str, set[str]]) -> None:
    shown = set(re.findall(r"asyncbucket_\w+", " ".join(queries())))
    suffixes = ("_bucket", "_sum", "_count", "_created")
    families = {name for name in exposed if not name.endswith(suffixes)}
    assert families <= shown
    assert {"asyncbucket_wait_seconds_bucket", "asyncbucket_wait_seconds_sum"} <= shown


def test_all_alert_rules_and_dashboard_queries_are_found() -> None:
    assert len(rules()) == ALERTS.read_text("utf-8").count("- alert:") == 8
    assert len(queries()) == 19


@needs_promtool
def test_promtool_accepts_alert_rules_and_dashboard_queries(tmp_path: Path) -> None:
    file = tmp_path / "dashboard.json"
    recorded = [{"record": f"panel:query:{n}", "expr": each} for n, each in enumerate(queries())]
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recorded}]}), "utf-8")
    promtool("check", "rules", "--lint-fatal", str(ALERTS), str(file))


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", str(Path(__file__).with_name("alerts_test.yml")))
