"""What the proxy is to do, from a TOML file and from the command line, which overrides it.

The file's table ``[asyncbucket]`` describes the limiter, as for `Limiter.from_toml`; the table
``[proxy]`` has the entries of `ProxyOptions`::

    [asyncbucket]
    rpm = 500
    tpm = "200k"
    concurrency = 32

    [proxy]
    upstream = "https://api.openai.com"
    key_env = "OPENAI_API_KEY"
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from asyncbucket.core.limits import KEYWORDS, Limit, read_limits
from asyncbucket.core.settings import from_toml, key_in_env, read_toml
from asyncbucket.telemetry.stats import DEFAULT_PORT, is_loopback

_HOST: Final = "127.0.0.1"
_LAST_PORT: Final = 65_535
#: What a reload cannot change.
_FIXED: Final = ("listen", "status", "profile")


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(str(self))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def read(cls, text: str) -> "Address":
        """Return what ``HOST:PORT`` or ``PORT`` means; a port alone is on loopback.

        Raises:
            ValueError: it is neither.
        """
        host, _, port = text.rpartition(":")
        if not port.isdecimal() or int(port) > _LAST_PORT:
            raise ValueError(
                f"{text!r} is not an address to listen at, such as 4295, 127.0.0.1:4295 or [::1]:4295"
            )
        return cls(host.strip("[]") or _HOST, int(port))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyOptions:
    """Say where calls come in, where they go, who shares, and what is allowed.

    Attributes:
        upstream: the provider, ``https://HOST``; a path is put before the caller's.
        pool: instead, a file of several providers, with limits and keys; see
            `asyncbucket.http.pool_file`.
        listen: where calls come in, ``HOST:PORT`` or ``PORT``.
        status: where the status pages are.
        profile: the provider's name, if its host does not show it.
        key_env: the environment variable that holds the provider's key; None if callers send it.
        tenants_by_key: whether callers share the limits by their keys.
        limits: those of the limiter.
        terms: its other arguments, such as ``concurrency`` and ``store``.
        key: the provider's key.
    """

    upstream: str | None = None
    pool: str | None = None
    listen: str = f"{_HOST}:{DEFAULT_PORT + 1}"
    status: str = f"{_HOST}:{DEFAULT_PORT}"
    profile: str | None = None
    key_env: str | None = None
    tenants_by_key: bool = False
    limits: tuple[Limit, ...] = ()
    terms: Mapping[str, Any] = field(default_factory=dict[str, Any])
    key: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in _ENTRIES:
            kind, value = bool if name == "tenants_by_key" else str, getattr(self, name)
            if value is not None and not isinstance(value, kind):
                what = "true or false" if kind is bool else "a string"
                raise ValueError(f"{name} must be {what}, not {value!r}")
        if (self.upstream is None) == (self.pool is None):
            raise ValueError(
                "say where calls go: --upstream https://api.openai.com, or else --pool"
            )
        if self.upstream is not None:
            _check_upstream(self.upstream)
        elif said := [*map(str, self.limits), *self.terms, *(["key_env"] if self.key_env else [])]:
            raise ValueError(f"{', '.join(said)} cannot go with a pool: write it into {self.pool}")
        port = Address.read(self.listen).port
        if port == Address.read(self.status).port != 0:
            raise ValueError(f"listen and status are both at port {port}: change one")
        if self.key_env is not None:
            object.__setattr__(self, "key", key_in_env(self.key_env))

    def restarts(self, other: "ProxyOptions") -> list[str]:
        """Return what differs from ``other`` and is in force only after a restart."""
        names = [name for name in _FIXED if getattr(self, name) != getattr(other, name)]
        terms = {*self.terms, *other.terms} - ({"concurrency"} & other.terms.keys())
        names += sorted(each for each in terms if self.terms.get(each) != other.terms.get(each))
        kept = {limit.key for limit in other.limits}
        return names + [str(limit) for limit in self.limits if limit.key not in kept]


#: What a file or the command line may say of these; the rest is the limiter's.
_ENTRIES: Final = tuple(each.name for each in fields(ProxyOptions))[:-3]


def read_options(
    config: Path | None = None, *, limits: Iterable[str | Limit] = (), **given: Any
) -> ProxyOptions:
    """Return the options in a file, overridden by those given; None was not given.

    Args:
        config: a TOML file with the tables ``[asyncbucket]`` and ``[proxy]``, or one of them.
        limits: further limits.
        given: what the tables may hold.

    Raises:
        ValueError: something cannot be read, or there is no upstream; the message says which.
        OSError: the file cannot be read.
    """

    def collect(*found: Limit, **terms: Any) -> tuple[tuple[Limit, ...], dict[str, Any]]:
        keywords = {name: terms.pop(name) for name in KEYWORDS if name in terms}
        return tuple(read_limits([*found, *limits], keywords)), terms

    tables: Mapping[str, Any] = {} if config is None else _tables_in(config)
    given = {name: value for name, value in given.items() if value is not None}
    entries = tables.get("proxy", {}) | {n: given.pop(n) for n in _ENTRIES if n in given}
    if "asyncbucket" in tables:
        read, terms = from_toml(collect, config, **given)
    else:
        read, terms = collect(**given)
    for name in entries:
        if name not in _ENTRIES:
            known = ", ".join(_ENTRIES)
            raise ValueError(f"{config}: [proxy] has no entry {name!r}; known: {known}")
    options = ProxyOptions(**entries, limits=read, terms=terms)
    if options.upstream is not None:
        terms.setdefault("name", urlsplit(options.upstream).hostname)
    return options


def _tables_in(config: Path) -> Mapping[str, Any]:
    tables = read_toml(config)
    if not all(
        name in ("asyncbucket", "proxy") and isinstance(table, dict)
        for name, table in tables.items()
    ):
        raise ValueError(
            f"{config} must have the tables [asyncbucket], for the limits, and [proxy], and nothing "
            f"else; it has {', '.join(tables)}"
        )
    return tables


def _check_upstream(url: str) -> None:
    parts = urlsplit(url)
    is_bare = "@" not in url and not (parts.query or parts.fragment)
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_bare:
        raise ValueError(
            "upstream must be the provider's URL without a key, such as https://api.openai.com"
        )
    _ = parts.port  # raises a ValueError if it is none
