"""Any SDK on httpx or httpx2, paced: every HTTP attempt waits its turn, and headers are read.

The entry points are `Limiter.transport`, `Limiter.transport_sync` and `Limiter.http_client`. This
module has the profiles of known providers, and `Profile`, which describes a provider of your own.
"""

from asyncbucket.http.endpoints import Endpoint
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
    "Told",
    "Usage",
]
