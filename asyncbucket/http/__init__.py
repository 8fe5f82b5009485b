"""Any SDK on httpx or httpx2, paced: every HTTP attempt waits its turn, and headers are read.

The entry points are `Limiter.transport`, `Limiter.transport_sync` and `Limiter.http_client`. This
module has the profiles of known providers, `Profile`, which describes a provider of your own, and
`read_pool`, which reads a pool from a file.
"""

from asyncbucket.http.endpoints import Endpoint, read_pool
from asyncbucket.providers.profiles import (
    ANTHROPIC,
    AZURE,
    GENERIC,
    GROQ,
    OPENAI,
    Call,
    Profile,
    Told,
)
from asyncbucket.providers.request import RequestSize
from asyncbucket.providers.usage import Usage

__all__ = [
    "ANTHROPIC",
    "AZURE",
    "GENERIC",
    "GROQ",
    "OPENAI",
    "Call",
    "Endpoint",
    "Profile",
    "RequestSize",
    "Told",
    "Usage",
    "read_pool",
]
