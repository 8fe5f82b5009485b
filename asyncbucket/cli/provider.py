"""A provider as it is typed: where it is, and a key that is shown to nobody."""

from typing import Final
from urllib.parse import urlsplit, urlunsplit

OPENAI: Final = "https://api.openai.com/v1"
#: What is shorter is no secret: a word such as "none", for a local server that wants some key.
_SECRET: Final = 8


def place(url: str) -> str:
    """Return ``url`` as it may be shown: without a password that it may hold."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def check(url: str) -> None:
    """Refuse what is not a URL of a server.

    Raises:
        ValueError: the message says what one looks like.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"--api-base must begin with http:// or https:// and a host, not {place(url)!r}"
        )
    _ = parts.port  # raises a ValueError if it is none


def secret_free(text: str, key: str | None) -> str:
    """Return ``text`` without ``key``, which a provider's complaint may quote."""
    return text if key is None or len(key) < _SECRET else text.replace(key, "***")
