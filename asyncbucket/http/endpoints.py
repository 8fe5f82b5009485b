"""Where the members of a pool are: each request is rewritten for the member that took it.

A client is made for one member, say, and its requests begin with that member's ``base_url``. What
follows that is joined to the ``base_url`` of the member that was chosen. Whatever in the request may
be a credential is dropped, whichever member it was for, and the chosen member's own is set. So no
member sees another one's. The client keeps its own request: its logs and errors name the address
that it asked, and no key of a member.

A request that begins with no member's ``base_url`` may be a redirect to somewhere else, which the
client follows. It goes out without credentials, and counts nowhere.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NotRequired, Required, TypeAlias, TypedDict
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from asyncbucket.core.limiter import Limiter
from asyncbucket.core.pool import Pool
from asyncbucket.http.bodies import content_of
from asyncbucket.providers.request import read_json

#: Headers that identify an account.
_CREDENTIALS: Final = frozenset(
    {
        "api-key",
        "authorization",
        "cookie",
        "openai-organization",
        "openai-project",
        "x-api-key",
        "x-goog-api-key",
    }
)
#: Google's way to send a key in the address.
_KEY_PARAMS: Final = frozenset({"key"})
_IN_HEADER: Final = re.compile("[ -~]*")
_PORTS: Final = {"http": 80, "https": 443}
_EXAMPLE: Final = (
    '{limiter: {"base_url": "https://...", "headers": {"Authorization": "Bearer ..."}}}'
)


class Endpoint(TypedDict):
    """Say where a member of a pool is, and with which credentials."""

    #: What its requests begin with, as an SDK takes it: ``"https://api.openai.com/v1"``. A query in it
    #: is sent with each request.
    base_url: Required[str]
    #: What each request is sent with: ``{"Authorization": "Bearer ..."}``, ``{"api-key": ...}``.
    headers: NotRequired[Mapping[str, str]]
    #: The same for the query: ``{"api-version": "2024-10-21"}``.
    params: NotRequired[Mapping[str, str]]
    #: What this member calls a model, by the name in the request: ``{"gpt-4o": "my-deployment"}``.
    models: NotRequired[Mapping[str, str]]


Endpoints: TypeAlias = Mapping[Limiter, Endpoint]


class _Site:
    """One member's endpoint, taken apart."""

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        unknown = sorted(set(endpoint) - Endpoint.__annotations__.keys())
        if unknown or "base_url" not in endpoint:
            what = f"knows no {unknown[0]!r}" if unknown else 'needs a "base_url"'
            raise ValueError(f"the endpoint of {name!r} {what}: write it as {_EXAMPLE}")
        url = _split(name, endpoint["base_url"])
        self.scheme, self.host = url.scheme, url.hostname or ""
        self.port = url.port or _PORTS[url.scheme]
        self.path = url.path.rstrip("/")
        self.netloc = url.netloc
        self.headers = _texts(name, "headers", endpoint.get("headers", {}))
        if not all(map(_IN_HEADER.fullmatch, (*self.headers, *self.headers.values()))):
            raise ValueError(  # here, because a client's error would show the key
                f"headers of the endpoint of {name!r} hold a line break, or what is not ASCII: strip the "
                f"key"
            )
        params = _texts(name, "params", endpoint.get("params", {}))
        self.params = {**dict(parse_qsl(url.query, keep_blank_values=True)), **params}
        self.models = _texts(name, "models", endpoint.get("models", {}))

    def owns(self, url: Any) -> bool:
        """Tell whether an address begins with this base URL."""
        path = _path_of(url)
        return (
            (url.scheme, url.raw_host.decode()) == (self.scheme, self.host)
            and (url.port or _PORTS.get(url.scheme)) == self.port
            and (path == self.path or path.startswith(f"{self.path}/"))
        )


class Sites:
    """Rewrite requests for the members of ``pool``.

    Raises:
        TypeError: ``endpoints`` are not a mapping, ``pool`` is not a pool, or it is one without
            endpoints.
        ValueError: a member has no endpoint, another limiter has one, or one cannot be understood.
    """

    def __init__(self, pool: Limiter, endpoints: Endpoints) -> None:
        if not isinstance(pool, Pool):
            raise TypeError(f"endpoints are for a pool, and {pool!r} is not one: leave them out")
        if not isinstance(endpoints, Mapping):
            raise TypeError(f"a pool must know where its members are: {_EXAMPLE} for each of them")
        if set(endpoints) != set(pool.members):
            missing = ", ".join(repr(each.name) for each in pool.members if each not in endpoints)
            what = f"lack {missing}" if missing else "name a limiter that is no member"
            raise ValueError(
                f"the endpoints of pool {pool.name!r} {what}: give one for each member"
            )
        self._sites = {member: _Site(member.name, endpoints[member]) for member in pool.members}
        sites = self._sites.values()
        self._dropped = _CREDENTIALS.union(*(map(str.lower, each.headers) for each in sites))
        self._dropped_params = _KEY_PARAMS.union(*(each.params for each in sites))

    @property
    def base_url(self) -> str:
        """An address that a client may have: the first member's."""
        first = next(iter(self._sites.values()))
        return f"{first.scheme}://{first.netloc}{first.path}"

    @property
    def hosts(self) -> dict[Limiter, str]:
        """The host of each member."""
        return {member: site.host for member, site in self._sites.items()}

    def owner(self, url: Any) -> Limiter | None:
        """Return the member whose base URL ``url`` begins with: the longest, if there are several."""
        owners = [member for member, site in self._sites.items() if site.owns(url)]
        return max(owners, key=lambda member: len(self._sites[member].path), default=None)

    def rewritten(self, request: Any, member: Limiter) -> Any:
        """Return ``request`` for ``member``, with its address, credentials and name of the model."""
        owner = self.owner(request.url)
        assert owner is not None
        site = self._sites[member]
        path = site.path + _path_of(request.url)[len(self._sites[owner].path) :]
        params = [*self._kept_params(request.url), *site.params.items()]
        query = f"?{urlencode(params)}" if params else ""
        kept = [pair for pair in self._kept_headers(request) if pair[0].lower() != b"host"]
        headers: list[tuple[Any, Any]] = [(b"Host", site.netloc), *kept, *site.headers.items()]
        body: dict[str, Any] = {"stream": request.stream}
        named = read_json(content_of(request)) if site.models else {}
        model = named.get("model")
        if isinstance(model, str) and model in site.models:
            content = json.dumps({**named, "model": site.models[model]}, ensure_ascii=False)
            body = {"content": content.encode()}
            headers = [pair for pair in headers if pair[0].lower() != b"content-length"]
        url = f"{site.scheme}://{site.netloc}{path}{query}"
        return _request_like(request, url, headers, **body)

    def stripped(self, request: Any) -> Any:
        """Return ``request`` without anything that may be a credential."""
        url, params = request.url, self._kept_params(request.url)
        bare = url.copy_with(query=urlencode(params).encode() if params else None)
        return _request_like(request, bare, self._kept_headers(request), stream=request.stream)

    def _kept_headers(self, request: Any) -> list[tuple[bytes, bytes]]:
        pairs: Iterable[tuple[bytes, bytes]] = request.headers.raw
        return [pair for pair in pairs if pair[0].decode("latin-1").lower() not in self._dropped]

    def _kept_params(self, url: Any) -> list[tuple[str, str]]:
        pairs = parse_qsl(url.query.decode(), keep_blank_values=True)
        return [pair for pair in pairs if pair[0] not in self._dropped_params]


def _split(name: str, base_url: str) -> SplitResult:
    """Take a base URL apart; the error names no part of it, for there may be a key in it."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        url = urlsplit(base_url)
        _ = url.port  # raises if it is none
        if url.scheme in _PORTS and url.hostname and url.username is None:
            return url
    raise ValueError(
        f'the base_url of {name!r} must be like "https://api.openai.com/v1"; credentials go into headers'
    )


def _request_like(request: Any, url: Any, headers: list[Any], **body: Any) -> Any:
    """Return a request of the same kind; the library adds the length of a new body."""
    cls: Any = type(request)
    return cls(request.method, url, headers=headers, extensions=request.extensions, **body)


def _path_of(url: Any) -> str:
    """Return the path of an address as it is sent, which keeps its escapes."""
    path: str = url.raw_path.decode().partition("?")[0]
    return path


def _texts(name: str, what: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return a mapping of texts, whose values an error must not show."""
    if not isinstance(given, Mapping) or not all(
        isinstance(text, str) for text in (*given, *given.values())
    ):
        raise TypeError(f"{what} of the endpoint of {name!r} must map names to texts")
    return dict(given)
