"""Tests that need an SDK are left out if it is missing, as on a Python with the core alone."""

from importlib.util import find_spec

collect_ignore: list[str] = (
    []
    if find_spec("openai") and find_spec("anthropic")
    else ["test_provider.py", "test_replies.py"]
)
