"""What needs an SDK is left out if that is missing, as on a Python with the core alone."""

from importlib.util import find_spec

SDKS = find_spec("openai") and find_spec("anthropic")
collect_ignore: list[str] = [] if SDKS else ["test_replies.py"]
