"""Lists leave nothing out: the first page's programs, and llms.txt, the docs on one page for language models."""

import re
from pathlib import Path

from asyncbucket.cli.app import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXT = (DOCS / "llms.txt").read_text("utf-8")
#: What type checkers say of them is asked in tests/packaging/test_types.py.
PROGRAMS = re.findall(
    r"^```python\n(.*?)^```", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
)


def test_first_page_has_nine_programs_of_at_most_fifteen_lines() -> None:
    lengths = [len(list(filter(None, program.splitlines()))) for program in PROGRAMS]
    assert len(lengths) >= 9
    assert max(lengths) <= 15


def test_first_page_lists_exactly_the_examples() -> None:
    page = (DOCS / "index.md").read_text("utf-8")
    files = {
        file.name for file in (ROOT / "examples").iterdir() if file.suffix in {".py", ".ipynb"}
    }
    assert set(re.findall(r"^\| \{download\}`([\w.]+) ", page, re.MULTILINE)) == files
    assert set(re.findall(r"\.\./examples/([\w.]+)", page)) == files


def test_llms_txt_lists_exactly_the_pages_of_the_docs() -> None:
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert set(re.findall(r"\]\(([\w-]+)\.html\)", TEXT)) == pages


def test_llms_txt_names_exactly_the_commands() -> None:
    """This keeps models from inventing one."""
    (line,) = re.findall(r"^Commands: `asyncbucket ([^`]+)`", TEXT, re.MULTILINE)
    commands = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback is not None
    }
    assert set(line.split(" | ")) == commands
