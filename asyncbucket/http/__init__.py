"""Any SDK on httpx or httpx2, paced: every HTTP attempt waits its turn, and headers are heard.

The doors are `Limiter.transport`, `Limiter.transport_sync` and `Limiter.http_client`. Here is what a
provider of your own is described by, `Profile`, and the profiles that there are; see `profiles`.
"""

from asyncbucket.http.profiles import (
    ANTHROPIC,
    AZURE,
    GENERIC,
    GROQ,
    OPENAI,
    Call,
    Profile,
    ProviderProfile,
    Told,
)
from asyncbucket.http.usage import Usage

__all__ = [
    "ANTHROPIC",
    "AZURE",
    "GENERIC",
    "GROQ",
    "OPENAI",
    "Call",
    "Profile",
    "ProviderProfile",
    "Told",
    "Usage",
]
