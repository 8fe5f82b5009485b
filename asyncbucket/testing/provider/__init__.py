"""A rate-limited provider on loopback, for tests, demos and benchmarks.

It speaks OpenAI's `/v1/chat/completions` and `/v1/responses` (with tools, streams and response formats)
and `/v1/embeddings`, and Anthropic's `/v1/messages`. It refuses what exceeds its limits as they do:
with 429, `retry-after` and headers about what is left. Its answers are a fake model's text, the same
every time.

`RateLimitedProvider` runs in a thread, `ProviderProcess` in a process of its own, and
`python -m asyncbucket.testing.provider --rpm 500` in a terminal. Needs
`pip install "asyncbucket[testing]"`.

From the inside out: `options` says how it behaves, `enforcer` counts and decides, `replies` answers,
`app` joins them, `running` runs it.
"""

from importlib.util import find_spec

if not (find_spec("starlette") and find_spec("uvicorn")):
    raise ImportError(
        'the bundled provider needs starlette and uvicorn: pip install "asyncbucket[testing]"'
    )

from asyncbucket.testing.provider.options import Arrival, Failure, Options, ProviderStatistics
from asyncbucket.testing.provider.running import ProviderProcess, RateLimitedProvider

__all__ = [
    "Arrival",
    "Failure",
    "Options",
    "ProviderProcess",
    "ProviderStatistics",
    "RateLimitedProvider",
]
