"""What every test may rely on."""

import os
import signal
import sys
from collections.abc import Generator

import pytest

# Set before anything that reads them is imported: no test reaches beyond this machine, and none
# depends on the key, the proxy or the terminal of the person who runs it.
OUTSIDE = (
    "ALL_PROXY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "OPENAI_API_BASE",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
)
for name in OUTSIDE:
    for spelling in (name, name.lower()):
        _ = os.environ.pop(spelling, None)
os.environ["NO_PROXY"] = "*"
os.environ["COLUMNS"] = "80"

# What runs in the background may ignore Ctrl-C, and so would the programs that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Measure no coverage in a test that is marked `heavy`: a tracer would triple its time."""
    tracer = sys.gettrace()
    if item.get_closest_marker("heavy") is None or tracer is None:
        return (yield)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
