"""The page of messages has a row for each error, warning and log line of the library."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
#: What rows quote; a stretch of anything else is between the parts of one.
QUOTED: Final = [
    re.compile(".*".join(map(re.escape, re.split(" ?… ?", quote))))
    for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    for quote in re.findall("`([^`]+)`", row)
]
ERRORS: Final = {
    *("AcquireTimeout", "BudgetExceeded", "CostExceedsLimit", "DeadlockError", "QueueFull"),
    *("StoreError", "UnknownPrice", "WouldBlock"),
}


def text_of(node: ast.expr) -> str:
    """Return a literal text; with a stretch of dots for each part that is not known here."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[rsd]|%[.]\d+f", "...", text)
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) for part in parts)
        case _:
            return "..."


def messages() -> Iterator[str]:
    for file in sorted((ROOT / "asyncbucket").rglob("*.py")):
        if "cli" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args and is_said(node.func):
                text = text_of(node.args[0])
                if re.search("[a-z]{3} [a-z]{2}", text):
                    yield text


def is_said(function: ast.expr) -> bool:
    match function:
        case ast.Name(id=name) if name in ERRORS:
            return True
        case ast.Attribute(value=ast.Name(id="_log"), attr="warning" | "error"):
            return True
        case ast.Attribute(value=ast.Name(id="warnings"), attr="warn"):
            return True
        case _:
            return False


@pytest.mark.parametrize("message", sorted(set(messages())))
def test_page_has_a_row_for_the_message(message: str) -> None:
    assert any(quote.search(message) for quote in QUOTED)


def test_rows_quote_words_that_are_said() -> None:
    source = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", file.read_text("utf-8"))
        for file in (ROOT / "asyncbucket").rglob("*.py")
    )
    parts = {part for quote in QUOTED for part in quote.pattern.split(".*")}
    assert [part for part in parts if re.sub(r"\\(.)", r"\1", part) not in source] == []
