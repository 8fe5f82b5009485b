"""The notebook runs in a real kernel, whose event loop is already running."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"

pytestmark = [
    pytest.mark.real_clock,  # a kernel is a process of its own
    pytest.mark.timeout(300),
]


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
