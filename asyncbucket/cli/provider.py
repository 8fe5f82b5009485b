"""A provider as given on the command line: where it is, and a key that is never shown."""

from typing import Final
from urllib.parse import urlsplit, urlunsplit

OPENAI: Final = "https://api.openai.com/v1"
#: Anything shorter is no secret: a word such as "none", for a local server that wants some key.
_SHORTEST_KEY: Final = 8


def shown_url(url: str) -> str:
    """Return ``url`` in a form that may be shown: without a password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def check_url(url: str) -> None:
    """Refuse what is not the URL of a server.

    Raises:
        ValueError: the message shows an example.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"--api-base must begin with http:// or https:// and a host, not {shown_url(url)!r}"
        )
    _ = parts.port  # raises a ValueError if it is none


def without_key(text: str, key: str | None) -> str:
    """Return ``text`` without ``key``, which a provider's error may quote."""
    return text if key is None or len(key) < _SHORTEST_KEY else text.replace(key, "***")
