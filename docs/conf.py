"""How Sphinx builds these pages: `make docs`."""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "asyncbucket"
author = "asyncbucket contributors"
copyright = "2026, asyncbucket contributors"
release = metadata.version("asyncbucket")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = "asyncbucket"
html_copy_source = False
html_extra_path = ["llms.txt"]

# Addresses in examples, where nobody answers.
linkcheck_ignore = [
    r"https?://(127\.0\.0\.1|localhost|provider|gpu)\b",
    r"https://api\.openai\.com/",
]


def begin_with_a_comment(
    _app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]
) -> None:
    """Have Napoleon leave an attribute's text alone: what stands before a colon it takes for a type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: "Sphinx") -> None:
    """Come before Napoleon."""
    app.connect("autodoc-process-docstring", begin_with_a_comment, priority=1)
