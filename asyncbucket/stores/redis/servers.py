"""Redis and Valkey servers: URLs, connections that never send twice, errors without secrets.

redis-py sends a command again up to ten times when a connection breaks, although the server may
have run it. For a script that charges this is wrong, so connections made here do not. This module
itself resends two things: the text of a script that the server does not know, because that proves
that nothing has happened; and once, on a new connection, what a broken one carried. The latter is
safe because the script recognises a batch by its number, and everything else may be said twice. A
server that is silent for a fifth of a second is not asked again.
"""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from asyncbucket.core.errors import StoreError
from asyncbucket.core.wording import in_seconds
from asyncbucket.stores.redis import script

try:
    from redis import exceptions
    from redis.asyncio import Redis, RedisCluster
    from redis.asyncio.cluster import ClusterNode
    from redis.asyncio.connection import parse_url
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
    from redis.backoff import NoBackoff
except ImportError as missing:
    raise ImportError(
        'a redis:// store needs redis-py: pip install "asyncbucket[redis]"'
    ) from missing

#: Where in the script a command was refused, which servers append to the reason.
_TRAILER: Final = re.compile(r"\.? script: [0-9a-f]{40}, on @?user_script:\d+$")
#: Seconds after which a connection gives up by itself, if nobody has ended it before.
_BACKSTOP: Final = 5.0
#: Clocks that differ by less (s) are in step.
_IN_STEP: Final = 0.5
#: Seconds to wait for what a server reports about itself; what has not been answered is left out.
_DETAILS_PATIENCE: Final = 2.0
FAILURES: Final = (
    exceptions.RedisError,
    exceptions.RedisClusterException,
    OSError,
    asyncio.IncompleteReadError,
)
_NO_PERMISSION: Final = (
    "refuses the login: {}; the docs' page on shared stores has the ACL that it needs"
)
#: What failures mean, and what to do about them; the first kind that fits counts.
_REMEDIES: Final = (
    (exceptions.NoPermissionError, _NO_PERMISSION),
    (
        exceptions.AuthenticationError,
        "refuses the login: {}; look at user and password in its URL",
    ),
    (
        exceptions.OutOfMemoryError,
        "is out of memory: {}; raise maxmemory or delete what is not needed",
    ),
    (
        (exceptions.ReadOnlyError, exceptions.MasterDownError),
        "is a replica: {}; give the primary's address, or a Sentinel's",
    ),
    (
        exceptions.MovedError,
        "is one node of a cluster: write redis+cluster:// with the same host and port",
    ),
    (exceptions.BusyLoadingError, "is starting: {}; wait until it has loaded its data"),
    (MasterNotFoundError, "cannot be reached: {}; see whether the Sentinels run"),
    (
        (exceptions.ConnectionError, exceptions.RedisClusterException, OSError, EOFError),
        "cannot be reached: {}; see whether it runs",
    ),
)


class Server:
    """Run the script on a server, a cluster's node, or the primary that a sentinel names."""

    def __init__(
        self,
        url: str,
        client: Any,
        *,
        owned: bool = True,
        make_listener: Callable[[], Any] | None = None,
        others: Sequence[Any] = (),
    ) -> None:
        """Take over ``client``, and, if ``owned``, ``others`` that are closed with it.

        ``make_listener`` makes a client to listen on; by default it is the same one.
        """
        self.url = url
        self.client = client
        self._owned = owned
        self._others = others
        self._make_listener = make_listener
        #: Connections belong to the loop and the process in which they were made.
        self._used_in: tuple[asyncio.AbstractEventLoop, int] | None = None

    async def run(self, keys: tuple[str, ...], *args: str | int) -> dict[str, Any]:
        """Run the script once and return its answer.

        Raises:
            StoreError: it could not be run, or it is unknown whether it was.
        """
        here = (asyncio.get_running_loop(), os.getpid())
        self._used_in = self._used_in or here
        if self._used_in != here:
            raise StoreError(
                f"the store {self.url} was made for another event loop or process, where it was first "
                f"used: give the limiter a URL, and it makes one for each"
            )
        try:
            text = await self._send(keys, args)
        except FAILURES as error:
            raise self._store_error(error) from error
        reply: dict[str, Any] = json.loads(text)
        return reply

    async def _send(self, keys: tuple[str, ...], args: tuple[str | int, ...]) -> Any:
        for last in (False, True):
            try:
                return await self.client.execute_command(
                    "EVALSHA", script.digest(), len(keys), *keys, *args
                )
            except exceptions.NoScriptError:
                return await self.client.execute_command(
                    "EVAL", script.source(), len(keys), *keys, *args
                )
            except exceptions.AuthenticationError:
                raise
            except exceptions.ConnectionError:  # most likely closed while idle
                if last:
                    raise
        raise AssertionError

    async def keys(self, pattern: str) -> list[str]:
        """Return the names of all keys that match ``pattern``, on all nodes."""
        try:
            found = [key async for key in self.client.scan_iter(match=pattern, count=1_000)]
        except FAILURES as error:
            raise self._store_error(error) from error
        return [key.decode() if isinstance(key, bytes) else key for key in found]

    def too_late(self, patience: float) -> str:
        """Return what to say of a server that does not answer within ``patience`` seconds."""
        return (
            f"the store {self.url} gave no answer within {patience:g} s; "
            f"see whether it runs and how far away it is"
        )

    def _store_error(self, error: Exception) -> StoreError:
        if isinstance(error, exceptions.TimeoutError):
            return StoreError(self.too_late(_BACKSTOP))
        message = _without_secrets(str(error), _secrets_of(self.client)).rstrip(".")
        message = _TRAILER.sub("", message)
        return StoreError(f"the store {self.url} {_remedy(error, message)}")

    @contextlib.asynccontextmanager
    async def pubsub(self) -> AsyncGenerator[Any, None]:
        """Give something to listen with; in a cluster on any node, as the last one may be gone."""
        client = self.client if self._make_listener is None else self._make_listener()
        try:
            async with client.pubsub() as pubsub:
                yield pubsub
        finally:
            if client is not self.client:
                await client.aclose()

    async def aclose(self) -> None:
        """Close the connections that were made here."""
        if self._owned:
            for client in (self.client, *self._others):
                await client.aclose()


def connect(url: str) -> Server:
    """Return the server at ``url``, not connected yet.

    Raises:
        ValueError: the URL cannot be read.
    """
    from asyncbucket.stores import ESCAPES, without_password

    shown, split = without_password(url), urlsplit(url)
    scheme = split.scheme
    # With one of /?# in the password, the host would end there, and the URL be misread.
    is_torn = "@" in url and "@" not in split.netloc and scheme != "unix"
    if is_torn and "@" in split.path + split.fragment:
        raise ValueError(f"{shown!r} cannot be read: {ESCAPES}")
    try:
        if scheme.endswith("+sentinel"):
            client, sentinels = _sentinel(url)
            return Server(shown, client, others=sentinels)
        if scheme.endswith("+cluster"):
            client, make_listener = _cluster(url)
            return Server(shown, client, make_listener=make_listener)
        return Server(shown, _single(url))
    except (ValueError, TypeError) as error:
        _, colon, port = split.netloc.rpartition(":")
        invalid_port = "" if not colon or port.isdecimal() else port  # a password without a host
        message = (
            ESCAPES
            if is_torn
            else _without_secrets(str(error), [split.password or "", invalid_port])
        )
        raise ValueError(f"{shown!r} cannot be read: {message}") from None


def server_of(client: Any) -> Server:
    """Return the server that the user's client is connected to."""
    if not isinstance(client, (Redis, RedisCluster)):
        class_name = (
            f"{type(client).__module__}.{type(client).__qualname__}"  # a URL holds a password
        )
        raise TypeError(
            f"a client must be a redis.asyncio.Redis or RedisCluster, not a {class_name}"
        )
    kind = "cluster" if isinstance(client, RedisCluster) else "server"
    return Server(f"redis ({kind} of your client)", client, owned=False)


def is_cancelling() -> bool:
    """Return whether the running task has been asked to end.

    redis-py sometimes swallows a cancellation that comes while it connects, so loops check this.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def cancel_and_wait(task: asyncio.Task[None] | None) -> None:
    """Cancel ``task`` until it has ended: see `is_cancelling`."""
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait((task,), timeout=0.1)


def _settings() -> dict[str, Any]:
    return {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": _BACKSTOP,
        "socket_connect_timeout": _BACKSTOP,
        "socket_keepalive": True,
        "protocol": 2,
    }


def _parse_url(url: str) -> tuple[dict[str, Any], list[tuple[str, int]], list[str]]:
    """Return the settings, the hosts and the path of ``scheme://user:password@a:1,b:2/path?...``."""
    split = urlsplit(url)
    login, at, hosts = split.netloc.rpartition("@")
    settings = _settings() | parse_url(f"redis://{login}{at}?{split.query}")
    if split.scheme.startswith("rediss"):
        settings["ssl"] = True
    nodes: list[tuple[str, int]] = []
    for address in hosts.split(","):
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal():
            raise ValueError("write host:port, with commas in between")
        nodes.append((host, int(port)))
    return settings, nodes, [part for part in split.path.split("/") if part]


def _single(url: str) -> Any:
    """Return a client of the server at ``url``, most of which redis-py parses."""
    split = urlsplit(url)
    settings = _settings()
    database = split.path.strip("/ ")
    if split.scheme == "unix":
        del settings["socket_keepalive"]
    elif database and not database.isdecimal():
        raise ValueError(f"a database must be a number, not {database!r}: redis://host:6379/0")
    if "," in split.netloc.rpartition("@")[2]:
        raise ValueError("for several servers write redis+cluster:// or redis+sentinel://")
    redis_url = url.replace("valkey", "redis", 1) if split.scheme.startswith("valkey") else url
    client: Any = Redis.from_url(redis_url, **settings)
    client.connection_pool.make_connection()  # not connected, but unknown settings are refused
    return client


def _sentinel(url: str) -> tuple[Any, Sequence[Any]]:
    """Return a client of the primary, and those of the sentinels that know which it is."""
    settings, nodes, path = _parse_url(url)
    if not path:
        raise ValueError("write the service after the hosts: redis+sentinel://host:port/service/0")
    if path[1:]:
        settings["db"] = int(path[1])
    sentinel_settings = _settings()
    if "sentinel_password" in settings:
        sentinel_settings["password"] = settings.pop("sentinel_password")
    if "sentinel_username" in settings:
        sentinel_settings["username"] = settings.pop("sentinel_username")
    for name in list(settings):
        if name.startswith("ssl"):
            sentinel_settings[name] = settings[name]
    sentinel_class: Any = Sentinel
    sentinel = sentinel_class(nodes, sentinel_kwargs=sentinel_settings, **settings)
    return sentinel.master_for(path[0]), sentinel.sentinels


def _cluster(url: str) -> tuple[Any, Callable[[], Any]]:
    settings, nodes, _ = _parse_url(url)
    client = RedisCluster(startup_nodes=[ClusterNode(*node) for node in nodes], **settings)

    def make_listener() -> Any:
        """Return a client of any node: a cluster delivers messages on all."""
        node = client.get_random_node()
        return Redis(host=node.host, port=int(node.port), **settings)

    return client, make_listener


def _secrets_of(client: Any) -> list[str]:
    pool = getattr(client, "connection_pool", None)
    return [str(getattr(pool, "connection_kwargs", {}).get("password") or "")]


def _without_secrets(message: str, secrets: list[str]) -> str:
    for secret in secrets:
        if secret:
            message = message.replace(secret, "***")
    return message


def _remedy(error: Exception, message: str) -> str:
    """Say what a failure means to the person who must fix it."""
    if message.startswith("ACL failure"):  # in a script, so it is of another kind
        return _NO_PERMISSION.format(message)
    if message.startswith("SCHEMA"):
        _, theirs, ours = message.split()
        return (
            f"keeps a limiter that has schema {theirs}, and this asyncbucket needs {ours}: use one "
            f"version of asyncbucket for one limiter, or another name"
        )
    if isinstance(error, MasterNotFoundError):  # behind the colon it describes its clients
        message = message.partition(" : ")[0]
    templates = (template for error_types, template in _REMEDIES if isinstance(error, error_types))
    return next(templates, "failed: {}").format(message or type(error).__name__)


async def details(client: Any) -> dict[str, str]:
    """Return its clock, version, scripts, memory and persistence, as far as the login may ask.

    Of a cluster, one primary is asked.
    """
    node: dict[str, Any] = {}
    if isinstance(client, RedisCluster):
        node = {"target_nodes": client.get_primaries()[0]}
    reported: dict[str, str] = {}
    with contextlib.suppress(TimeoutError, *FAILURES):
        async with asyncio.timeout(_DETAILS_PATIENCE):
            asked = time.time()
            seconds, micros = await client.time(**node)
            ahead = seconds + micros * 1e-6 - (asked + time.time()) / 2
            clock = f"{in_seconds(abs(ahead))} {'ahead' if ahead > 0 else 'behind'}"
            reported["clock"] = "in step" if abs(ahead) < _IN_STEP else clock
            info = await client.info(**node)
            reported = _about(info, "unknown") | reported
            save = (await client.config_get("save", **node)).get("save")
            reported |= _about(info, "snapshots alone" if save else "none")
    return reported


def _about(info: dict[str, Any], snapshots: str) -> dict[str, str]:
    """Describe a server; ``snapshots`` says what it saves besides an append-only file."""
    name = info.get("server_name", "redis")
    maxmemory = int(info.get("maxmemory", 0))
    policy = info.get("maxmemory_policy", "unknown policy")
    return {
        name: str(info.get(f"{name}_version", info.get("redis_version"))),
        "scripts": f"{info.get('number_of_cached_scripts', 0)} cached",
        "memory": f"{maxmemory:,} bytes at most and {policy}" if maxmemory else "unbounded",
        "persistence": "append-only file" if info.get("aof_enabled") else snapshots,
    }
