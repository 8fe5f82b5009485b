"""A rate-limited OpenAI-compatible provider on loopback, for tests, demos and benchmarks.

It speaks `/v1/chat/completions` (tools, streams, response formats), `/v1/responses`,
`/v1/completions`, `/v1/embeddings` and `/v1/models`, and it refuses what exceeds its limits like
OpenAI: with 429, `x-ratelimit-*`, `retry-after` and `retry-after-ms`. Its answers are a fake
model's text, the same every time.

`RateLimitedProvider` runs in a thread, `ProviderProcess` in a process of its own, and
`python -m asyncbucket.testing.provider --rpm 500` in a terminal. Needs
`pip install "asyncbucket[testing]"`.

From the inside out: `policies` count, `admission` decides, `prompt` reads a request, `charging`
says what it costs, `model` answers it, `wire`, `responses` and `headers` encode that, `exchange` is
HTTP, `app` joins them, `server` runs it.
"""

from importlib.util import find_spec

if not (find_spec("starlette") and find_spec("uvicorn")):
    raise ImportError(
        'the bundled provider needs starlette and uvicorn: pip install "asyncbucket[testing]"'
    )

from asyncbucket.testing.provider.process import ProviderProcess
from asyncbucket.testing.provider.settings import Failure, Options, Settings
from asyncbucket.testing.provider.statistics import Arrival, ProviderStatistics
from asyncbucket.testing.provider.thread import RateLimitedProvider

__all__ = [
    "Arrival",
    "Failure",
    "Options",
    "ProviderProcess",
    "ProviderStatistics",
    "RateLimitedProvider",
    "Settings",
]
