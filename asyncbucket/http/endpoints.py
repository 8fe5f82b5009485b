"""Where the members of a pool are: each request is rewritten for the member that took it.

A client is made for one member, say, and its requests begin with that member's ``base_url``. What
follows that is joined to the ``base_url`` of the member that was chosen. Whatever in the request may
be a credential is dropped, whichever member it was for, and the chosen member's own is set. So no
member sees another one's. The client keeps its own request: its logs and errors name the address
that it asked, and no key of a member.

A request that begins with no member's ``base_url`` is refused; it may be a redirect to somewhere
else.

`read_pool` reads a pool and its endpoints from a TOML file. Beside the tables of the members, the
file may set the pool's ``name``, ``prefer``, ``patience``, ``max_queue`` and ``timeout``. A member's
table holds what `Limiter.from_toml` takes, and its endpoint::

    prefer = "first"

    [member.openai]
    limits = ["500 RPM", "200k TPM"]
    base_url = "https://api.openai.com/v1"
    key_env = "OPENAI_API_KEY"

    [member.azure]
    rpm = 300
    base_url = "https://east.openai.azure.com/openai/v1"
    key_env = "AZURE_KEY"
    header = "api-key"
    models = { "gpt-4o" = "gpt-4o-eu" }

``key_env`` names the environment variable that holds the key. It is sent as ``Authorization:
Bearer``, or bare in the header that ``header`` names. No key is ever in the file.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NotRequired, Required, TypeAlias, TypedDict
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from asyncbucket.engine.limiter import Limiter
from asyncbucket.engine.limits import KEYWORDS
from asyncbucket.pools import Pool
from asyncbucket.settings import from_table, key_in_env, read_toml, with_error_source

if TYPE_CHECKING:
    from asyncbucket.limiter import Limiter as PublicLimiter
    from asyncbucket.limiter import Pool as PublicPool

#: Headers that identify an account.
_CREDENTIALS: Final = (
    "api-key",
    "authorization",
    "cookie",
    "ocp-apim-subscription-key",
    "openai-organization",
    "openai-project",
    "x-amz-security-token",
    "x-api-key",
    "x-goog-api-key",
)
#: Google's way to send a key in the address.
_KEY_PARAMS: Final = frozenset({"key"})
_IN_HEADER: Final = re.compile("[ -~]*")
_PORTS: Final = {"http": 80, "https": 443}
_EXAMPLE: Final = '{member: {"base_url": "https://x", "headers": {"Authorization": "Bearer ..."}}}'
#: What a file may say of the pool, and of a member's endpoint.
_POOL: Final = ("name", "prefer", "patience", "max_queue", "timeout")
_ENDPOINT: Final = ("base_url", "key_env", "header", "models")
_AUTHORIZATION: Final = "Authorization"
_BEARER: Final = "Bearer "


class Endpoint(TypedDict):
    """Say where a member of a pool is, and with which credentials."""

    #: What its requests begin with, as an SDK takes it: ``"https://api.openai.com/v1"``. A query in
    #: it is sent with each request, such as ``"?api-version=2024-10-21"``; it may hold a key.
    base_url: Required[str]
    #: What each request is sent with: ``{"Authorization": "Bearer ..."}``, ``{"api-key": ...}``.
    headers: NotRequired[Mapping[str, str]]
    #: What this member calls a model, by the name in the request: ``{"gpt-4o": "my-deployment"}``.
    models: NotRequired[Mapping[str, str]]


Endpoints: TypeAlias = Mapping[Any, Endpoint]


class _Site:
    """One member's endpoint, taken apart."""

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        unknown = sorted(set(endpoint) - Endpoint.__annotations__.keys())
        if unknown or "base_url" not in endpoint:
            what = f"has an unknown entry {unknown[0]!r}" if unknown else 'needs a "base_url"'
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
        self.params = dict(parse_qsl(url.query, keep_blank_values=True))
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
        TypeError: ``pool`` is not a pool.
        ValueError: a member has no endpoint, another limiter has one, or one cannot be understood.
    """

    def __init__(self, pool: Limiter, endpoints: Endpoints) -> None:
        if not isinstance(pool, Pool):
            raise TypeError(f"endpoints are for a pool, and {pool!r} is not one: leave them out")
        given = set(endpoints) if isinstance(endpoints, Mapping) else set[Limiter]()
        if given != set(pool.members):
            missing = ", ".join(repr(each.name) for each in pool.members if each not in given)
            what = f"lack {missing}" if missing else "name a limiter that is no member"
            raise ValueError(
                f"the endpoints of pool {pool.name!r} {what}: give one for each member, {_EXAMPLE}"
            )
        self._sites = {member: _Site(member.name, endpoints[member]) for member in pool.members}
        sites = self._sites.values()
        names = {"host", *_CREDENTIALS}.union(*(each.headers for each in sites))
        self._dropped = {name.lower().encode() for name in names}
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

    def rewritten(self, request: Any, body: Mapping[str, Any], member: Limiter) -> Any:
        """Return ``request`` for ``member``, with its address, credentials and name of the model.

        ``body`` is the JSON object that is sent; empty if it is none, or is streamed.
        """
        owner = self.owner(request.url)
        assert owner is not None
        site = self._sites[member]
        path = site.path + _path_of(request.url)[len(self._sites[owner].path) :]
        params = parse_qsl(request.url.query.decode(), keep_blank_values=True)
        params = [pair for pair in params if pair[0] not in self._dropped_params]
        params += site.params.items()
        query = f"?{urlencode(params)}" if params else ""
        kept = [pair for pair in request.headers.raw if pair[0].lower() not in self._dropped]
        headers: list[tuple[Any, Any]] = [(b"Host", site.netloc), *kept, *site.headers.items()]
        sent: dict[str, Any] = {"stream": request.stream}
        model = body.get("model")
        if isinstance(model, str) and model in site.models:
            content = json.dumps({**body, "model": site.models[model]}, ensure_ascii=False)
            sent = {"content": content.encode()}
            headers = [pair for pair in headers if pair[0].lower() != b"content-length"]
        url = f"{site.scheme}://{site.netloc}{path}{query}"
        cls: Any = type(request)  # which adds the length of a new body
        return cls(request.method, url, headers=headers, extensions=request.extensions, **sent)


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


def _path_of(url: Any) -> str:
    """Return the path of an address as it is sent, which keeps its escapes."""
    return str(url.raw_path.decode().partition("?")[0])


def _texts(name: str, what: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return a mapping of texts, whose values an error must not show."""
    if not isinstance(given, Mapping) or not all(
        isinstance(text, str) for text in (*given, *given.values())
    ):
        raise TypeError(f"{what} of the endpoint of {name!r} must map names to texts")
    return dict(given)


def read_pool(
    path: str | PathLike[str], *, store: str | None = None
) -> "tuple[PublicPool, Endpoints]":
    """Return the pool that a TOML file describes, and where its members are.

    >>> pool, endpoints = read_pool("pool.toml")
    >>> http = pool.http_client(endpoints)

    Args:
        path: the file; see `asyncbucket.http.endpoints`.
        store: where the limits of members are kept that name no store of their own; except those
            whose ``concurrency`` is found by itself, which no store keeps.

    Raises:
        LimitSyntaxError: something in the file cannot be understood, or a key is missing in the
            environment; a ValueError. The message names the table, and shows no key.
        OSError: the file cannot be read.
    """
    from asyncbucket.limiter import Pool  # what is read from a file has all its doors

    file = Path(path)
    document = read_toml(file)
    tables = document.pop("member", None)

    def make() -> "tuple[PublicPool, Endpoints]":
        for name in document:
            if name not in _POOL:
                known = ", ".join(_POOL)
                raise ValueError(f"{name!r} is not known; known: {known}, and [member.NAME]")
        if not isinstance(tables, Mapping) or not tables:
            raise ValueError("it has no members: write a table [member.NAME] for each")
        endpoints = dict(_read_member(name, tables[name], store) for name in tables)
        pool = Pool(*endpoints, **document)
        Sites(pool, endpoints)  # which refuses what is wrong
        return pool, endpoints

    return with_error_source(str(file), make)


def keys_of(endpoint: Endpoint) -> list[str]:
    """Return the keys in an endpoint: what nobody may see."""
    return [text.removeprefix(_BEARER) for text in endpoint.get("headers", {}).values()]


def _read_member(name: str, table: Any, store: str | None) -> "tuple[PublicLimiter, Endpoint]":
    where = f"[member.{name}]"
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is not a table")  # noqa: TRY004 - of the file, as the others
    endpoint = with_error_source(where, lambda: _read_endpoint(table))
    entries = {key: value for key, value in table.items() if key not in _ENDPOINT}
    limiter = from_table(partial(_limiter, store), {"name": name, **entries}, where=where)
    return limiter, endpoint


def _limiter(default_store: str | None, *limits: Any, **terms: Any) -> "PublicLimiter":
    """Make a member; the default store is for limits, and keeps no slots that are found by itself."""
    is_limited = bool(limits or terms.keys() & {*KEYWORDS})
    if is_limited and isinstance(terms.get("concurrency"), int | None):
        terms.setdefault("store", default_store)
    from asyncbucket.limiter import Limiter

    return Limiter(*limits, **terms)


def _read_endpoint(table: Mapping[str, Any]) -> Endpoint:
    params = dict(parse_qsl(urlsplit(str(table.get("base_url"))).query))
    if (table.keys() | params.keys()) & {"api-key", "api_key", "headers", "key", "sig", "token"}:
        raise ValueError(
            "keys stay out of the file: export the key in an environment variable, and name that by "
            "key_env"
        )
    given: Any = {name: table[name] for name in ("base_url", "models") if name in table}
    endpoint: Endpoint = given
    if "key_env" in table:
        key = key_in_env(table["key_env"])
        header = table.get("header", _AUTHORIZATION)
        endpoint["headers"] = {header: _BEARER + key if header == _AUTHORIZATION else key}
    elif "header" in table:
        raise ValueError("header is the one that the key is sent in: give key_env, too")
    return endpoint
