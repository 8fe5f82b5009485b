"""A pool in a TOML file: the limits of its members, where they are, and who has their keys.

Beside the tables of the members, the file may set the pool's ``name``, ``prefer``, ``patience``,
``max_queue`` and ``timeout``. A member's table holds what `Limiter.from_toml` takes, and its endpoint::

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

import re
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import KEYWORDS
from asyncbucket.core.pool import Pool
from asyncbucket.core.settings import from_table, key_in_env, read_toml, with_error_source
from asyncbucket.http.endpoints import Endpoint, Endpoints, Sites

#: What the file may say of the pool, of a member, and of its endpoint.
_POOL: Final = ("name", "prefer", "patience", "max_queue", "timeout")
_ENDPOINT: Final = ("base_url", "key_env", "header", "models")
_AUTHORIZATION: Final = "Authorization"
_BEARER: Final = "Bearer "
#: The names of what may be a key.
_SECRET: Final = re.compile("auth|headers|key|secret|sig|token$", re.IGNORECASE)
_KEYS_STAY_OUT: Final = (
    "keys stay out of the file: export the key in an environment variable, and name that by key_env"
)


def read_pool(path: str | PathLike[str], *, store: str | None = None) -> tuple[Pool, Endpoints]:
    """Return the pool that a TOML file describes, and where its members are.

    >>> pool, endpoints = read_pool("pool.toml")
    >>> http = pool.http_client(endpoints)

    Args:
        path: the file; see `asyncbucket.http.pool_file`.
        store: where the limits of members are kept that name no store of their own; except those
            whose ``concurrency`` is found by itself, which no store keeps.

    Raises:
        LimitSyntaxError: something in the file cannot be understood, or a key is missing in the
            environment; a ValueError. The message names the table, and shows no key.
        OSError: the file cannot be read.
    """
    file = Path(path)
    document = read_toml(file)
    tables = document.pop("member", None)

    def make() -> tuple[Pool, Endpoints]:
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


def _read_member(name: str, table: Any, store: str | None) -> tuple[Limiter, Endpoint]:
    where = f"[member.{name}]"
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is not a table")  # noqa: TRY004 - of the file, as the others
    endpoint = with_error_source(where, lambda: _read_endpoint(table))
    entries = {key: value for key, value in table.items() if key not in _ENDPOINT}
    limiter = from_table(partial(_limiter, store), {"name": name, **entries}, where=where)
    return limiter, endpoint


def _limiter(default_store: str | None, *limits: Any, **terms: Any) -> Limiter:
    """Make a member; the default store is for limits, and keeps no slots that are found by itself."""
    is_limited = bool(limits or terms.keys() & {*KEYWORDS})
    if is_limited and isinstance(terms.get("concurrency"), int | None):
        terms.setdefault("store", default_store)
    return Limiter(*limits, **terms)


def _read_endpoint(table: Mapping[str, Any]) -> Endpoint:
    params = parse_qsl(urlsplit(str(table.get("base_url"))).query, keep_blank_values=True)
    names = [name for name in table if name not in _ENDPOINT]
    if any(map(_SECRET.search, [*names, *(name for name, _ in params)])):
        raise ValueError(_KEYS_STAY_OUT)
    given: Any = {name: table[name] for name in ("base_url", "models") if name in table}
    endpoint: Endpoint = given
    if "key_env" in table:
        key = key_in_env(table["key_env"])
        header = table.get("header", _AUTHORIZATION)
        endpoint["headers"] = {header: _BEARER + key if header == _AUTHORIZATION else key}
    elif "header" in table:
        raise ValueError("header is the one that the key is sent in: give key_env, too")
    return endpoint
