"""How Sphinx builds these pages: `make docs`."""

from importlib import metadata

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
