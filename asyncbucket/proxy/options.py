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

import contextlib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from asyncbucket.core.errors import LimitSyntaxError
from asyncbucket.core.limits import KEYWORDS, Limit, read_limits
from asyncbucket.core.settings import from_toml
from asyncbucket.providers.profiles import profile_named
from asyncbucket.telemetry.stats import DEFAULT_PORT, is_loopback

_HOST: Final = "127.0.0.1"
#: Where `asyncbucket watch` looks.
DEFAULT_STATUS: Final = f"{_HOST}:{DEFAULT_PORT}"
#: ProxyOptions that a reload cannot change.
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
        with contextlib.suppress(ValueError):
            parts = urlsplit(f"//{text if ':' in text else f'{_HOST}:{text}'}")
            if parts.hostname and parts.port is not None and not parts.path:
                return cls(parts.hostname, parts.port)
        raise ValueError(
            f"{text!r} is not an address to listen at, such as 4295, 127.0.0.1:4295 or [::1]:4295"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyOptions:
    """Say where calls come in, where they go, and who shares.

    Attributes:
        upstream: the provider, ``https://HOST``; a path is put before the caller's.
        listen: where calls come in, ``HOST:PORT`` or ``PORT``.
        status: where the status pages are.
        profile: the provider's name, if its host does not show it.
        key_env: the environment variable that holds the provider's key; None if callers send it.
        tenants_by_key: whether callers share the limits by their keys.
        key: the provider's key.
    """

    upstream: str
    listen: str = f"{_HOST}:{DEFAULT_PORT + 1}"
    status: str = DEFAULT_STATUS
    profile: str | None = None
    key_env: str | None = None
    tenants_by_key: bool = False
    key: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            kind = bool if each.name == "tenants_by_key" else str
            value = getattr(self, each.name)
            if value is not None and not isinstance(value, kind):
                what = "true or false" if kind is bool else "a string"
                raise ValueError(f"{each.name} must be {what}, not {value!r}")
        _check_upstream(self.upstream)
        if self.address.port == self.status_address.port != 0:
            raise ValueError(f"listen and status are both at port {self.address.port}: change one")
        if self.profile is not None:
            profile_named(self.profile)
        object.__setattr__(self, "key", None if self.key_env is None else _key_in(self.key_env))

    @property
    def address(self) -> Address:
        """Where calls come in."""
        return Address.read(self.listen)

    @property
    def status_address(self) -> Address:
        """Where the status pages are."""
        return Address.read(self.status)


class ProxySettings(NamedTuple):
    """What a proxy is made of: its own options, and its limiter's limits and arguments."""

    options: ProxyOptions
    limits: tuple[Limit, ...]
    terms: Mapping[str, Any]

    def restarts(self, other: "ProxySettings") -> list[str]:
        """Return what differs from ``other`` and is in force only after a restart."""
        mine, theirs = self.options, other.options
        names = [name for name in _FIXED if getattr(mine, name) != getattr(theirs, name)]
        terms = {*self.terms, *other.terms} - ({"concurrency"} & other.terms.keys())
        names += sorted(each for each in terms if self.terms.get(each) != other.terms.get(each))
        gone = {limit.key for limit in self.limits} - {limit.key for limit in other.limits}
        return names + [str(limit) for limit in self.limits if limit.key in gone]


def read_settings(
    config: Path | None,
    *,
    options: Mapping[str, Any],
    limits: Iterable[str | Limit] = (),
    terms: Mapping[str, Any],
) -> ProxySettings:
    """Return the settings in a file, overridden by those given; None was not given.

    Args:
        config: a TOML file with the tables ``[asyncbucket]`` and ``[proxy]``, or one of them.
        options: of `ProxyOptions`.
        limits: further limits.
        terms: arguments of `Limiter`, such as ``rpm``, ``concurrency`` and ``store``.

    Raises:
        ValueError: something cannot be read, or there is no upstream; the message says which.
        OSError: the file cannot be read.
    """

    def collect(*found: Limit, **given: Any) -> tuple[tuple[Limit, ...], dict[str, Any]]:
        keywords = {name: given.pop(name) for name in KEYWORDS if name in given}
        return tuple(read_limits([*found, *limits], keywords)), given

    tables: Mapping[str, Any] = {} if config is None else _tables_in(config)
    given = {name: value for name, value in terms.items() if value is not None}
    if "asyncbucket" in tables:
        read, arguments = from_toml(collect, config, **given)
    else:
        read, arguments = collect(**given)
    entries = {**tables.get("proxy", {}), **{n: v for n, v in options.items() if v is not None}}
    known = [each.name for each in fields(ProxyOptions) if each.init]
    for name in entries:
        if name not in known:
            raise ValueError(f"{config}: [proxy] has no entry {name!r}; known: {', '.join(known)}")
    if "upstream" not in entries:
        raise ValueError("say where calls go: --upstream https://api.openai.com")
    found = ProxyOptions(**entries)
    arguments.setdefault("name", urlsplit(found.upstream).hostname)
    return ProxySettings(found, read, arguments)


def _tables_in(config: Path) -> Mapping[str, Any]:
    try:
        tables = tomllib.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise LimitSyntaxError(f"{config} is not valid TOML: {error}") from error
    unknown = [name for name in tables if name not in ("asyncbucket", "proxy")]
    if unknown or not all(isinstance(table, dict) for table in tables.values()):
        raise ValueError(
            f"{config} must have the tables [asyncbucket], for the limits, and [proxy], "
            f"and nothing else, not {', '.join(unknown) or 'entries'}"
        )
    return tables


def _check_upstream(url: str) -> None:
    """Refuse what is no provider's URL; a key in it would show in errors.

    Raises:
        ValueError: the message shows what is wrong, without a password.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "upstream holds a name, a password or a query: give https://HOST alone, and the key by "
            "key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"upstream must be https://HOST or http://HOST, not {url!r}")
    _ = parts.port  # raises a ValueError if it is none


def _key_in(variable: str) -> str:
    """Return the provider's key.

    Raises:
        ValueError: the variable is empty, or its value is no key.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(f"{variable} holds characters that no key has: export the key alone in it")
    if not key:
        raise ValueError(f"{variable} is not set: export the provider's key in it")
    return key
