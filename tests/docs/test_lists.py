"""Lists leave nothing out: the first page's programs, and llms.txt, the docs on one page for language models."""

import importlib
import inspect
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest

import asyncbucket
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
    kinds = {".py", ".ipynb"}
    files = {file.name for file in (ROOT / "examples").iterdir() if file.suffix in kinds}
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


# --- the reference is complete: it has every public name, and every method of a limiter ---


REFERENCE = (DOCS / "reference.md").read_text("utf-8")
#: Names behind ``asyncbucket.``; the first is the package itself.
MODULES = (
    *("", "batch", "engine.events", "http", "llama_index", "plan", "retry", "stores", "telemetry"),
    "testing",
)


def test_reference_shows_what_base_classes_without_an_entry_have() -> None:
    """Such as `wrap`, `transport` and `amap` of a limiter, and `retry_after` of errors."""
    limiter = REFERENCE.split(".. autoclass:: asyncbucket.Limiter\n")[1].split("\n\n")[0]
    assert ":inherited-members:" in limiter
    for error in ("WouldBlock", "AcquireTimeout", "QueueFull"):
        assert f":: asyncbucket.{error}\n   :members: retry_after, bound_by\n" in REFERENCE
        assert error in REFERENCE.split(":exclude-members: Limiter, ")[1].split("\n")[0]


def test_text_before_a_colon_in_attribute_docs_is_not_read_as_a_type() -> None:
    """Napoleon would read it as a type, and show the second half of the sentence first."""
    napoleon = pytest.importorskip("sphinx.ext.napoleon")
    lines = ["What binds: a resource."]
    hook = runpy.run_path(str(DOCS / "conf.py"))["begin_with_a_comment"]
    hook(None, "attribute", "bound_by", None, None, lines)
    shown = napoleon.GoogleDocstring(lines, what="attribute", name="bound_by").lines()
    assert shown == ["..", "", "What binds: a resource."]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    """It comes with a module, or by itself if it is data from another module."""
    module = importlib.import_module(f"asyncbucket.{name}".removesuffix("."))
    by_itself = {each.rpartition(".")[2] for each in re.findall(r"auto\w+:: (\S+)", REFERENCE)}
    missing = set(module.__all__) - by_itself - set(asyncbucket.__all__)
    assert [each for each in missing if not _comes_with_a_module(module, each)] == []


def _comes_with_a_module(module: ModuleType, name: str) -> bool:
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return any(
            f".. automodule:: {shown}\n   :members:" in REFERENCE
            for shown in (module.__name__, value.__module__)
        )
    return f"\n{name} = " in inspect.getsource(module)
