"""Draw the dashboard as Grafana would, from what a real Prometheus server has scraped.

Agents run for two minutes against the bundled provider, through a fan-out and a few refusals. A
Prometheus server (Debian's `prometheus`) scrapes them every second; the panels' own queries are put to it
and drawn, once for a light page and once for a dark one::

    .venv/bin/python docs/dashboards/picture.py
"""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import matplotlib as mpl
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.llms.openai import OpenAI
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from prometheus_client import CollectorRegistry, start_http_server

from asyncbucket import AcquireTimeout, Limiter, telemetry
from asyncbucket.testing import RateLimitedProvider

HERE = Path(__file__).parent
DASHBOARD: dict[str, Any] = json.loads((HERE / "asyncbucket.json").read_text("utf-8"))
SECONDS = 120
STEP = 2
THEMES = {
    "light": {"ink": "#24292e", "faint": "#8a8f98", "page": "#f4f5f5", "panel": "#ffffff"},
    "dark": {"ink": "#ccccdc", "faint": "#8e8ea0", "page": "#111217", "panel": "#181b1f"},
}
COLOURS = ("#4c8dd6", "#e0a030", "#4aa564", "#c75146", "#8e6bbf", "#3aa6a6")


# -- what happens ------------------------------------------------------------------------------------


def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


async def ask(llm: OpenAI) -> None:
    """Have an agent do two or three calls."""
    agent: Any = FunctionAgent(tools=[multiply], llm=llm, streaming=False)
    await agent.run(user_msg="What is 6 times 7?")


async def steadily(llm: OpenAI, until: float) -> None:
    """Have one agent after the other."""
    while time.monotonic() < until:
        await ask(llm)
        await asyncio.sleep(0.5)


async def impatiently(limiter: Limiter, until: float) -> None:
    """Ask for what others wait for, and give up soon."""
    while time.monotonic() < until:
        try:
            async with limiter.acquire(tokens=500, timeout=5):
                await asyncio.sleep(0.2)
        except AcquireTimeout:
            await asyncio.sleep(2)


async def live(provider: RateLimitedProvider, limiter: Limiter) -> None:
    """Live through a calm minute, a fan-out and an hour of trouble, in two minutes."""
    model = OpenAI(model="gpt-4o-mini", api_base=provider.base_url, api_key="any", max_tokens=400)
    chat, batch = limiter.child("chat").wrap(model), limiter.child("batch").wrap(model)
    end = time.monotonic() + SECONDS
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(steadily(chat, end))
        await asyncio.sleep(SECONDS * 0.2)
        fan_out = [group.create_task(ask(batch)) for _ in range(90)]
        group.create_task(impatiently(limiter, end - SECONDS * 0.3))
        await asyncio.sleep(SECONDS * 0.4)
        provider.fail_next(4, status=429, retry_after=2)
        await asyncio.sleep(SECONDS * 0.4)
        for task in fan_out:
            task.cancel()


# -- what Prometheus saw of it -----------------------------------------------------------------------


@contextmanager
def prometheus(scraped: int) -> Generator[str]:
    """Run a Prometheus server that scrapes a port every second; give its address."""
    program = shutil.which("prometheus")
    if program is None:
        sys.exit("there is no prometheus here: apt-get install prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    target = f"{{job_name: agents, scrape_interval: 1s, static_configs: [{{targets: ['127.0.0.1:{scraped}']}}]}}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "prometheus.yml")
        config.write_text(f"scrape_configs:\n  - {target}\n", "utf-8")
        options = (f"--config.file={config}", f"--storage.tsdb.path={folder}/data")
        command = [program, *options, f"--web.listen-address={address}", "--log.level=error"]
        with subprocess.Popen(command) as server:
            try:
                yield f"http://{address}"
            finally:
                server.terminate()


def series(
    server: str, query: str, start: float, end: float
) -> dict[str, list[tuple[float, float]]]:
    """Return the answer to a query: by labels, seconds since the start and values."""
    for variable, value in (("$limiter", "[^/]+"), ("$__rate_interval", "10s"), ("[5m]", "[1m]")):
        query = query.replace(variable, value)
    asked = urlencode({"query": query, "start": start, "end": end, "step": STEP})
    answer = httpx.get(f"{server}/api/v1/query_range?{asked}").raise_for_status().json()
    return {
        json.dumps(found["metric"], sort_keys=True): [
            (at - start, float(value)) for at, value in found["values"] if value != "NaN"
        ]
        for found in answer["data"]["result"]
    }


def record() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Run everything, and return what each query of the dashboard shows."""
    registry = CollectorRegistry()
    page, _ = start_http_server(0, "127.0.0.1", registry)
    provider = RateLimitedProvider(
        rpm=600,
        tpm=60_000,
        policy="sliding_window",
        charge="usage",
        latency=0.4,
        reply_tokens=150,
    )
    limiter = Limiter("600 RPM", "60k TPM", concurrency=8, name="openai")
    telemetry.prometheus(limiter, registry=registry)
    with provider, prometheus(page.server_port) as server:
        time.sleep(3)
        start = time.time()
        asyncio.run(live(provider, limiter))
        queries = {target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
        return {query: series(server, query, start, time.time()) for query in queries}


# -- the picture -------------------------------------------------------------------------------------


def number(value: float, unit: str) -> str:
    """Write a value in its unit, as Grafana does."""
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s":
        return f"{value:.1f} s" if value else "0 s"
    return f"{value / 1_000:.3g}k" if value >= 1_000 else f"{value:.3g}"


def named(legend: str, labels: str) -> str:
    """Fill a legend in."""
    for label, value in json.loads(labels).items():
        legend = legend.replace(f"{{{{{label}}}}}", value)
    return legend


def broken(points: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield points, and a break where there are none for a while."""
    last = points[0][0]
    for at, value in points:
        if at - last > 3 * STEP:
            yield at, float("nan")
        yield at, value
        last = at


def draw_stat(
    axes: Axes, panel: dict[str, Any], seen: dict[str, Any], theme: dict[str, str]
) -> None:
    """Draw one number, above how it came about."""
    defaults = panel["fieldConfig"]["defaults"]
    lines = seen[panel["targets"][0]["expr"]].values()
    points = next(iter(lines), [(0.0, 0.0)])
    value = points[-1][1]
    steps = [step for step in defaults["thresholds"]["steps"] if value >= (step["value"] or 0)]
    colour = {"blue": COLOURS[0], "green": COLOURS[2], "yellow": COLOURS[1], "red": COLOURS[3]}[
        steps[-1]["color"]
    ]
    times, values = zip(*points, strict=True)
    axes.fill_between(times, values, color=colour, alpha=0.25, lw=0)
    axes.set_ylim(0, 2.5 * max(1e-9, *(each for _, each in points)))
    axes.set_axis_off()
    axes.text(
        0.5, 0.52, number(round(value, defaults.get("decimals", 1)), defaults["unit"]),
        transform=axes.transAxes, ha="center", va="center", color=colour, fontsize=22, weight="bold",
    )  # fmt: skip
    axes.set_title(panel["title"], loc="left", fontsize=9, color=theme["ink"], weight="bold")


def draw_lines(
    axes: Axes, panel: dict[str, Any], seen: dict[str, Any], theme: dict[str, str]
) -> None:
    """Draw the lines of a panel, or stack them."""
    defaults = panel["fieldConfig"]["defaults"]
    lines = [
        (named(target["legendFormat"], labels), points)
        for target in panel["targets"]
        for labels, points in sorted(seen[target["expr"]].items())
        if points
    ]
    if "stacking" in defaults["custom"]:
        times = sorted({at for _, points in lines for at, _ in points})
        values = [[dict(points).get(at, 0.0) for at in times] for _, points in lines]
        colours = COLOURS[: len(lines)]
        axes.stackplot(times, values, labels=[name for name, _ in lines], colors=colours, alpha=0.7)
    else:
        for index, (name, points) in enumerate(lines):
            style = ("-", "--", ":")[index // len(COLOURS) % 3]
            axes.plot(
                *zip(*broken(points), strict=True),
                style,
                color=COLOURS[index % len(COLOURS)],
                lw=1.4,
                label=name,
            )
    axes.set_ylim(0, defaults.get("max"))
    axes.set_xlim(0, SECONDS)
    axes.set_title(panel["title"], loc="left", fontsize=9, color=theme["ink"], weight="bold")
    axes.yaxis.set_major_formatter(lambda value, _: number(value, defaults["unit"]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} s")
    axes.grid(color=theme["faint"], alpha=0.25, lw=0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=7, colors=theme["faint"], length=0)
    columns = 6 if panel["gridPos"]["w"] > 12 else 3
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.02, -0.1), ncols=columns, fontsize=7, frameon=False,
        labelcolor=theme["ink"], handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip


def draw(seen: dict[str, Any], name: str) -> None:
    """Write the picture for one theme."""
    theme = THEMES[name]
    panels = DASHBOARD["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(12, 0.36 * height), facecolor=theme["page"])
    gap = 0.006
    for panel in panels:
        place = panel["gridPos"]
        left, width = place["x"] / 24, place["w"] / 24
        bottom, tall = 1 - (place["y"] + place["h"]) / height, place["h"] / height
        backdrop = figure.add_axes((left + gap / 2, bottom + gap, width - gap, tall - 2 * gap))
        backdrop.set_facecolor(theme["panel"])
        backdrop.set(xticks=[], yticks=[])
        backdrop.spines[:].set(color=theme["faint"], alpha=0.3, lw=0.5)
        stat = panel["type"] == "stat"
        low, high = (0.06, 0.26) if stat else (0.24, 0.14)
        side = 0.012 if stat else 0.045
        axes = figure.add_axes(
            (left + side, bottom + tall * low, width - side - 0.014, tall * (1 - low - high))
        )
        axes.set_facecolor("none")
        (draw_stat if stat else draw_lines)(axes, panel, seen, theme)
    figure.savefig(HERE / f"dashboard-{name}.svg", metadata={"Date": None})


def main() -> None:
    """Record once, draw twice."""
    seen = record()
    with mpl.rc_context({"svg.hashsalt": "asyncbucket"}):
        for name in THEMES:
            draw(seen, name)


if __name__ == "__main__":
    main()
