"""The reference is complete: it has every public name, and every method of a limiter."""

import importlib
import inspect
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest

import asyncbucket

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference.md").read_text("utf-8")
#: Names behind ``asyncbucket.``; the first is the package itself.
MODULES = (
    *("", "batch", "engine.events", "http", "llama_index", "plan", "retry", "stores", "telemetry"),
    "testing",
)


def test_reference_shows_what_base_classes_without_an_entry_have() -> None:
    """Such as `wrap`, `transport` and `amap` of a limiter, and `retry_after` of errors."""
    limiter = PAGE.split(".. autoclass:: asyncbucket.Limiter\n")[1].split("\n\n")[0]
    assert ":inherited-members:" in limiter
    for error in ("WouldBlock", "AcquireTimeout", "QueueFull"):
        assert f":: asyncbucket.{error}\n   :members: retry_after, bound_by\n" in PAGE
        assert error in PAGE.split(":exclude-members: Limiter, ")[1].split("\n")[0]


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
    by_itself = {each.rpartition(".")[2] for each in re.findall(r"auto\w+:: (\S+)", PAGE)}
    missing = set(module.__all__) - by_itself - set(asyncbucket.__all__)
    assert [each for each in missing if not _comes_with_a_module(module, each)] == []


def _comes_with_a_module(module: ModuleType, name: str) -> bool:
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return any(
            f".. automodule:: {shown}\n   :members:" in PAGE
            for shown in (module.__name__, value.__module__)
        )
    return f"\n{name} = " in inspect.getsource(module)
