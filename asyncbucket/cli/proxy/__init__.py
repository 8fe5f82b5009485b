"""`asyncbucket proxy`: one limit for programs in any language, by changing their base URL.

It is `Limiter.transport` with a server in front. So costs, learning, retries and pauses are those of
`asyncbucket.http`; here is only what a server adds. `callers` reads on which terms a call waits, and
says no in the provider's format; `app` passes calls on, until a signal ends it. Here is what it is
to do: from the command line, and from a TOML file that the command line overrides. The file's table
``[asyncbucket]`` describes the limiter, as for `Limiter.from_toml`; the table ``[proxy]`` has the
other options::

    [asyncbucket]
    rpm = 500
    tpm = "200k"
    concurrency = 32

    [proxy]
    upstream = "https://api.openai.com"
    key_env = "OPENAI_API_KEY"
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import typer

from asyncbucket.cli import options
from asyncbucket.engine.limits import KEYWORDS, Limit, read_limits
from asyncbucket.settings import from_table, key_in_env, read_toml
from asyncbucket.telemetry.stats import DEFAULT_PORT, is_loopback

_HOST: Final = "127.0.0.1"
_LAST_PORT: Final = 65_535
#: What may be in the file's table ``[proxy]``.
_ENTRIES: Final = (
    *("upstream", "pool", "listen", "status", "profile", "key_env", "retries", "cache"),
    *("learn", "tenants_by_key", "trust_priority"),
)
#: What an entry must be that is not a string.
_FLAG: Final = (bool, "true or false")
_KINDS: Final = {
    "learn": _FLAG,
    "tenants_by_key": _FLAG,
    "trust_priority": _FLAG,
    "retries": (int, "a whole number"),
}


@dataclass(kw_only=True)
class ProxyOptions:
    """Hold the options as they are typed, completed from the file, and what they mean.

    Attributes:
        limits: those of the limiter.
        terms: its other arguments, such as ``concurrency`` and ``store``.
        addresses: host and port of where calls come in, and of the status pages.
        key: the provider's key; None if callers send it.
    """

    # Where calls come in, and where they go.
    upstream: Annotated[
        str | None, options.text("The provider, e.g. https://api.openai.com.", metavar="URL")
    ] = None
    pool: options.PoolFile = None
    listen: Annotated[
        str | None,
        options.text("The address to listen on; default: 127.0.0.1:4295.", metavar="ADDRESS"),
    ] = None
    profile: Annotated[
        str | None, options.name("The provider's name, if the URL does not show it.")
    ] = None
    key_env: Annotated[
        str | None,
        options.name("The environment variable with the provider's key; callers then need none."),
    ] = None
    # What is allowed.
    rpm: options.Rpm = None
    tpm: options.Tpm = None
    also: options.Also = None
    concurrency: Annotated[Any, options.count("The most calls in flight.", or_auto=True)] = None
    max_queue: Annotated[
        int | None, options.count("The most calls that may wait; default: no limit.")
    ] = None
    retries: Annotated[
        int | None, options.count("Retries of a failed call; default: 4.", least=0)
    ] = None
    cache: Annotated[
        str | None,
        options.name("lead: one call writes a new prompt prefix to the cache, others wait for it."),
    ] = None
    learn: Annotated[
        bool | None,
        options.flag("Learn from the provider's headers; default: yes.", "--learn/--no-learn"),
    ] = None
    store: Annotated[
        str | None, options.text("Keep the limits in a file or a server.", metavar="URL")
    ] = None
    shadow: Annotated[
        bool | None,
        options.flag("Let all calls pass, and report which would have waited.", "--shadow"),
    ] = None
    # Who shares, and who looks.
    tenants_by_key: Annotated[
        bool | None,
        options.flag("Share fairly among the callers' keys.", "--tenants-by-key"),
    ] = None
    trust_priority: Annotated[
        bool | None,
        options.flag("Let callers ask for more than normal priority.", "--trust-priority"),
    ] = None
    status: Annotated[
        str | None,
        options.text("Health, statistics, metrics; default: 127.0.0.1:4294.", metavar="ADDRESS"),
    ] = None
    config: Annotated[
        Path | None, options.file("A TOML file with these options; SIGHUP reloads it.")
    ] = None
    limits: tuple[Limit, ...] = field(init=False)
    terms: dict[str, Any] = field(init=False)
    addresses: tuple[tuple[str, int], tuple[str, int]] = field(init=False)
    key: str | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        """Read the file and what was typed.

        Raises:
            ValueError: something cannot be understood; the message says what, and the remedy.
            OSError: the file cannot be read.
        """
        tables = {} if self.config is None else _tables_in(self.config)
        self._complete(tables.get("proxy", {}))
        self._read_limiter(tables.get("asyncbucket"))
        self._check_upstream()
        calls = read_address(self.listen or f"{_HOST}:{DEFAULT_PORT + 1}")
        pages = read_address(self.status or f"{_HOST}:{DEFAULT_PORT}")
        if calls[1] == pages[1] != 0:  # by which the two are told apart
            raise ValueError(f"listen and status are both at port {calls[1]}: change one")
        self.addresses = calls, pages
        if self.key_env is not None:
            self.key = key_in_env(self.key_env)

    def _complete(self, table: Mapping[str, Any]) -> None:
        """Take from ``table`` what was not typed."""
        for name, value in table.items():
            if name not in _ENTRIES:
                known = ", ".join(_ENTRIES)
                raise ValueError(f"{self.config}: [proxy] has no entry {name!r}; known: {known}")
            kind, what = _KINDS.get(name, (str, "a string"))
            if type(value) is not kind:
                raise ValueError(f"{name} must be {what}, not {value!r}")
            if getattr(self, name) is None:
                setattr(self, name, Path(str(value)) if name == "pool" else value)

    def _read_limiter(self, table: Mapping[str, Any] | None) -> None:
        """Take the limiter's arguments from ``table``, where they were not typed."""
        also = self.also or ()
        names = ("rpm", "tpm", "concurrency", "max_queue", "store", "shadow")
        typed = {name: getattr(self, name) for name in names if getattr(self, name) is not None}

        def keep(*limits: Limit, **terms: Any) -> None:
            keywords = {name: terms.pop(name) for name in KEYWORDS if name in terms}
            self.limits, self.terms = tuple(read_limits([*limits, *also], keywords)), terms

        if table is None:
            keep(**typed)
        else:
            from_table(keep, table, where=f"{self.config}, [asyncbucket]", **typed)

    def _check_upstream(self) -> None:
        if (self.upstream is None) == (self.pool is None):
            raise ValueError("say where calls go: --upstream https://api.openai.com, or --pool")
        if self.upstream is None:
            said = [*map(str, self.limits), *self.terms, *(["key_env"] if self.key_env else [])]
            if said:
                raise ValueError(
                    f"{', '.join(said)} cannot go with a pool: write it into {self.pool}"
                )
            return
        if not {"@", "?", "#"}.isdisjoint(self.upstream):
            raise ValueError(
                "upstream must be the provider's URL without a key, such as https://api.openai.com"
            )
        options.check_url(self.upstream, "upstream")
        self.terms.setdefault("name", urlsplit(self.upstream).hostname)


def read_address(text: str) -> tuple[str, int]:
    """Return the host and the port that ``HOST:PORT`` or ``PORT`` means; a port alone is on loopback.

    Raises:
        ValueError: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > _LAST_PORT:
        raise ValueError(
            f"{text!r} is not an address to listen at, such as 4295, 127.0.0.1:4295 or [::1]:4295"
        )
    return host.strip("[]") or _HOST, int(port)


def _tables_in(config: Path) -> Mapping[str, Any]:
    tables = read_toml(config)
    known = {"asyncbucket", "proxy"}
    if not known.issuperset(tables) or not all(isinstance(each, dict) for each in tables.values()):
        raise ValueError(
            f"{config} must have the tables [asyncbucket], for the limits, and [proxy], and nothing "
            f"else; it has {', '.join(tables)}"
        )
    return tables


def proxy(**given: Any) -> None:
    """Pace the calls of any program that can change its base URL.

    Programs in any language call this proxy instead of the provider, and share one limit. Calls
    wait their turn here; paths, bodies and streams pass as they are. Without limits it adopts those
    that the provider's headers announce. Options override the file.

    Examples:
        asyncbucket proxy --upstream https://api.openai.com --rpm 500 --tpm 200k
        asyncbucket proxy --upstream https://api.anthropic.com --key-env MY_KEY
        asyncbucket proxy --pool pool.toml
        asyncbucket proxy --config proxy.toml
        OPENAI_BASE_URL=http://127.0.0.1:4295/v1 node agent.js
    """
    from asyncbucket.cli.proxy.app import Proxy

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.ERROR)
    logging.getLogger("asyncbucket").setLevel(logging.INFO)
    reread = partial(ProxyOptions, **given)
    found = reread()
    server = Proxy(found)
    calls, pages = server.address, server.status_address
    allowed = options.allowed(server.limiter) or "the limits that its headers announce"
    typer.echo(f"base URL http://{calls} for {found.upstream or found.pool}: {allowed}", err=True)
    typer.echo(
        f"status http://{pages}/stats, /metrics, /healthz; asyncbucket watch http://{pages}",
        err=True,
    )
    if not is_loopback(calls):
        whose = "theirs" if found.key is None and found.pool is None else "yours"
        typer.echo(
            f"warning: other machines can reach {calls}, and make calls with a key of {whose}: keep "
            f"it behind a firewall, or listen at 127.0.0.1",
            err=True,
        )
    server.run(None if found.config is None else reread)


options.take_from(ProxyOptions, proxy)
