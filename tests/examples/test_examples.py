"""Each example runs as a stranger would run it, and shows what it promises."""

import asyncio
import importlib.util
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import nbformat
import pytest
from nbclient import NotebookClient
from openai import AsyncOpenAI

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider, VirtualTime
from tests.conftest import python

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
Captured: TypeAlias = pytest.CaptureFixture[str]

pytestmark = [
    pytest.mark.real_clock,  # processes of their own, and a real server: a stranger's clock
    pytest.mark.timeout(300),
]


def run(name: str, *, cwd: Path) -> str:
    done = python(str(EXAMPLES / name), cwd=cwd, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # neither a warning nor a log line
    return done.stdout


def run_here(name: str, capfd: Captured) -> str:
    """Run an example in this process, which has loaded its libraries: seconds of a new one."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed, errors = capfd.readouterr()
    assert errors == ""
    return printed


def test_every_agent_answers_and_no_call_is_refused(capfd: Captured) -> None:
    printed = run_here("agents_with_tools.py", capfd)
    assert "32 agents answered with 64 calls, 0 refused (429)" in printed
    assert re.search(r"^openai: \d+ calls waited for requests$", printed, re.MULTILINE)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_batch_pays_again_only_for_calls_in_flight(tmp_path: Path) -> None:
    printed = run("batch_with_resume.py", cwd=tmp_path)
    restored, called = map(int, re.findall(r"(\d+) from the checkpoint, (\d+) asked", printed)[-1])
    assert restored + called == 300
    assert restored >= 100
    (again,) = re.findall(r"(\d+) were in flight at the kill\n0 refused \(429\)", printed)
    assert int(again) <= 20


def test_openai_sdk_calls_are_paced_without_a_429(capfd: Captured) -> None:
    printed = run_here("plain_openai_sdk.py", capfd)
    assert "a stream: 'You said: Tell me a story.'" in printed
    assert "80 vectors in one call\n82 calls, 0 refused (429)" in printed
    assert "concurrency 0/32, 0 waiting" in printed


def test_no_call_is_lost_with_a_key_whose_provider_dies(tmp_path: Path) -> None:
    printed = run("several_keys.py", cwd=tmp_path)

    assert printed.count("log: pool 'gpt-4o-mini' leaves out 'key-500': Connect") == 1
    assert re.search(r"^'key-500': left out for [\d.]+ s more \(Connect", printed, re.MULTILINE)
    assert "250 answers to 250 calls in " in printed
    assert "0 refused (429)" in printed


def test_questions_wait_less_than_the_ingestion_beside_them(capfd: Captured) -> None:
    printed = run_here("rag_ingestion.py", capfd)
    behind = [int(number) for number in re.findall(r"; (\d+) batches in line behind", printed)]
    assert len(behind) == 5
    assert behind[0] > 10  # the more is left, the sooner the ingestion uses it
    assert ", 0 refused (429)" in printed
    waited = dict(re.findall(r"openai/(\w+): \d+ calls, ([\d.]+) s in line", printed))
    assert float(waited["questions"]) < float(waited["ingestion"]) / 3


def test_four_processes_share_limits_through_a_file(tmp_path: Path) -> None:
    printed = run("shared_store.py", cwd=tmp_path)
    assert re.findall(r"(\d+) of 40 answered", printed) == ["40"] * 4
    assert "160 calls in all, 0 refused (429)" in printed
    (most,) = re.findall(r"at most (\d+) at once, where 16 may be", printed)
    assert int(most) <= 16
    assert list(tmp_path.iterdir()) == []


def test_flooding_tenant_gets_429_while_others_are_served(capfd: Captured) -> None:
    printed = run_here("multi_tenant_fastapi.py", capfd)
    found = re.findall(r"^(\w+): (\d+) times (\d+)$", printed, re.MULTILINE)
    heard = {(tenant, int(status)): int(count) for tenant, count, status in found}
    assert heard["bob", 429] > heard["bob", 200]
    assert heard["acme", 200] > 3 * heard["bob", 200]
    assert heard["eve", 200] > 0
    assert ("acme", 429) not in heard
    assert ", 0 refused (429)" in printed


# --- the notebook runs in a real kernel, whose event loop is already running ---


NOTEBOOK = EXAMPLES / "notebook.ipynb"


@pytest.fixture(name="client")
def opened(tmp_path: Path) -> Iterator[Any]:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    resources = {"metadata": {"path": str(tmp_path)}}
    client: Any = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources)
    with client.setup_kernel():
        yield client


def printed(cell: Any) -> str:
    assert {output.output_type for output in cell.outputs} <= {"stream"}
    assert all(output.get("name") != "stderr" for output in cell.outputs)
    return "".join(output.get("text", "") for output in cell.outputs)


def limits_in(cells: dict[int, Any]) -> list[list[str]]:
    return [re.findall(r"[\d,]+ \w+ per [\d,]+ s", printed(cell)) for cell in cells.values()]


def test_notebook_runs_as_saved_and_a_cell_may_run_twice(client: Any) -> None:
    cells = {n: cell for n, cell in enumerate(client.nb.cells) if cell.cell_type == "code"}
    saved, last = limits_in(cells), max(cells)
    for number, cell in cells.items():
        if number < last:  # the last one stops the provider
            client.execute_cell(cell, number)
    assert limits_in(cells) == saved
    (many,) = (n for n, cell in cells.items() if "asyncio.gather" in cell.source)
    again = client.execute_cell(cells[many], many)
    client.execute_cell(cells[last], last)
    assert "You said: Is 39 prime? | 0 refused (429)" in printed(again)
    assert any(printed(cell).startswith("openai: ") for cell in cells.values())


# --- What the multi-tenant service answers, on virtual time ---


EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_tenant_fastapi.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec: Any = importlib.util.spec_from_file_location("multi_tenant_fastapi", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("limits", "key", "text", "heard", "later"),
    [
        # Twenty wait, one a second; others are told so, and those whose patience ends find none ahead.
        (("600 RPM", 100), "key-2", "Why?", {200: 11, 429: 19}, {"21": 4, "1": 15}),
        (("60 RPM burst 2", 3), "key-1", "Why?", {200: 5, 503: 3}, {"4": 3}),
        (("1k TPM", 3), "key-1", "Why? " * 1_000, {413: 1}, {}),
        (("1k TPM", 3), "nobody's", "Why?", {401: 1}, {}),
    ],
    ids=["over the tenant's limit", "full", "too long", "unknown key"],
)
async def test_service_says_whose_limit_refuses_a_question(
    example: Any,
    virtual_time: VirtualTime,
    limits: tuple[str, int],
    key: str,
    text: str,
    heard: dict[int, int],
    later: dict[str, int],
) -> None:
    provider = RateLimitedProvider(rpm=600, latency=1.0, clock=virtual_time.clock)
    limiter = Limiter(limits[0], max_queue=limits[1], clock=virtual_time.clock)
    model = httpx.AsyncClient(transport=provider.mock_transport())
    service = example.service(limiter, AsyncOpenAI(api_key="any", http_client=model))
    transport = httpx.ASGITransport(service)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
        asked: Any = {"json": {"text": text}, "headers": {"authorization": key}}
        asks = (http.post("/ask", **asked) for _ in range(sum(heard.values())))
        replies = await asyncio.gather(*asks)
    assert Counter(reply.status_code for reply in replies) == heard
    again = (reply.headers.get("retry-after") for reply in replies)
    assert Counter(filter(None, again)) == later
