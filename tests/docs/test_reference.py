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
    "",
    "batch",
    "core.events",
    "http",
    "llama_index",
    "plan",
    "retry",
    "stores",
    "telemetry",
    "testing",
)


def test_reference_shows_inherited_members_of_limiter() -> None:
    """`wrap`, `transport` and `amap` are what most people look for, but are in a base class."""
    limiter = PAGE.split(".. autoclass:: asyncbucket.Limiter\n")[1].split("\n\n")[0]
    assert ":inherited-members:" in limiter


@pytest.mark.parametrize("error", ["WouldBlock", "AcquireTimeout", "QueueFull"])
def test_reference_shows_retry_after_and_bound_by_of_errors(error: str) -> None:
    """``retry_after`` and its unit are in a base class without an entry of its own."""
    assert f":: asyncbucket.{error}\n   :members: retry_after, bound_by\n" in PAGE
    assert error in PAGE.split(":exclude-members: Limiter, ")[1].split("\n")[0]


@pytest.mark.parametrize("what", ["attribute", "data", "property"])
def test_text_before_a_colon_in_attribute_docs_is_not_read_as_a_type(what: str) -> None:
    """Napoleon would read it as a type, and show the second half of the sentence first."""
    napoleon = pytest.importorskip("sphinx.ext.napoleon")
    before_napoleon = runpy.run_path(str(DOCS / "conf.py"))["begin_with_a_comment"]
    lines = ["What binds: a resource."]
    before_napoleon(None, what, "bound_by", None, None, lines)
    shown = napoleon.GoogleDocstring(lines, what=what, name="bound_by").lines()
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
