"""Which headers go on: everything, except what is between two neighbors, and what is the proxy's."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from starlette.types import Scope

Headers: TypeAlias = list[tuple[bytes, bytes]]

#: The headers that are the proxy's own begin like this; the provider gets none of them.
OWN: Final = b"asyncbucket-"
#: RFC 9110, 7.6.1, with those that older software sends.
_HOP_BY_HOP: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
        *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)
#: Where SDKs put the key: OpenAI's and most others, Anthropic's, Azure's, Google's.
_KEYS: Final = (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key")
_BEARER: Final = b"Bearer "


def end_to_end(headers: Iterable[tuple[bytes, bytes]], *left_out: bytes) -> Headers:
    """Return ``headers`` in their order, without those that concern one connection, and ``left_out``."""
    given = [(name, name.lower(), value) for name, value in headers]
    hop_by_hop = {*_HOP_BY_HOP, *left_out}
    for _, lower, value in given:
        if lower == b"connection":
            hop_by_hop |= {each.strip().lower() for each in value.split(b",")}
        elif lower == b"transfer-encoding":  # which overrides it; both together smuggle requests
            hop_by_hop.add(b"content-length")
    return [(name, value) for name, lower, value in given if lower not in hop_by_hop]


def is_anthropic(scope: "Scope") -> bool:
    """Tell whether a caller speaks Anthropic's protocol."""
    by_header = any(name == b"anthropic-version" for name, _ in scope["headers"])
    return by_header or "/v1/messages" in scope["path"]


def key_in(headers: Headers) -> bytes:
    """Return the caller's key; empty if there is none. ``headers`` are in lower case."""
    found = dict(reversed(headers))
    return next((found[name].removeprefix(_BEARER) for name in _KEYS if name in found), b"")


def with_key(headers: Headers, key: str, *, anthropic: bool) -> Headers:
    """Return ``headers`` with ``key`` wherever the caller's was, or where the provider expects it."""
    names = dict.fromkeys(name for name, _ in headers if name in _KEYS)
    names = names or {b"x-api-key" if anthropic else b"authorization": None}
    keys = [(name, (_BEARER if name == b"authorization" else b"") + key.encode()) for name in names]
    return [(name, value) for name, value in headers if name not in _KEYS] + keys
