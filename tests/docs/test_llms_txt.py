"""llms.txt, the docs on one page for language models, is complete and has no wrong links."""

import re
from pathlib import Path

from asyncbucket.cli.app import app

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "llms.txt").read_text("utf-8")


def test_it_lists_every_page_and_no_other() -> None:
    """A page that is added or renamed must be changed here, too."""
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}

    assert set(re.findall(r"\]\(([\w-]+)\.html\)", TEXT)) == pages


def test_it_names_every_command() -> None:
    """This keeps models from inventing one."""
    (line,) = re.findall(r"^Commands: `asyncbucket ([^`]+)`", TEXT, re.MULTILINE)
    commands = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback is not None
    }

    assert set(line.split(" | ")) == commands
