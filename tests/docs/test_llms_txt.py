"""llms.txt, the docs on one page for language models, is complete and has no wrong links."""

import re
from pathlib import Path

from asyncbucket.cli.app import app

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "llms.txt").read_text("utf-8")


def test_llms_txt_lists_exactly_the_pages_of_the_docs() -> None:
    """A page that is added or renamed must be changed here, too."""
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
