"""How Sphinx builds these pages: `make docs`."""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "asyncbucket"
author = "asyncbucket contributors"
copyright = "2026, asyncbucket contributors"
release = metadata.version("asyncbucket")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# A name in backticks in a docstring leads to its entry, if it has one.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = "asyncbucket"
html_copy_source = False
html_extra_path = ["llms.txt"]

# Long lines are wrapped, not cut.
html_static_path = ["_static"]
html_css_files = ["wrap.css"]

# Without a network, names are looked up in the copy, which has only those that the reference uses.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", (None, "inventories/python.inv")),
}
intersphinx_timeout = 5

# The button leaves out prompts and what a command prints.
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

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


def find_short_name(app: "Sphinx", env: Any, node: Any, shown: Any) -> Any:
    """Link a public name such as `Limiter.wrap` wherever it stands in a docstring."""
    if node["refdomain"] != "py" or node["reftype"] not in ("obj", "class"):
        return None
    name = f"asyncbucket.{node['reftarget'].removesuffix('()')}"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, shown)


def setup(app: "Sphinx") -> None:
    """Come before Napoleon."""
    app.connect("autodoc-process-docstring", begin_with_a_comment, priority=1)
    app.connect("missing-reference", find_short_name)
