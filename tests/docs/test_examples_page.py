"""The page of examples shows each of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_page_of_examples_lists_exactly_the_examples() -> None:
    """A new example must be added to the page."""
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    files = {
        file.name for file in (ROOT / "examples").iterdir() if file.suffix in {".py", ".ipynb"}
    }

    assert set(re.findall(r"^\| \[([\w.]+)\]", page, re.MULTILINE)) == files
    assert set(re.findall(r"\.\./examples/([\w.]+)", page)) == files
