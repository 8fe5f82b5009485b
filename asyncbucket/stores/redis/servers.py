"""Redis and Valkey servers: clients for URLs, errors without secrets, what a server says of itself.

redis-py sends a command again when a connection breaks, although the server may have run it. The
script knows a batch by its number, and everything else may be said twice, so that is safe. Here it
does so once.
"""

import asyncio
import contextlib
import re
import time
from typing import Any, Final
from urllib.parse import urlsplit

from asyncbucket.core.errors import StoreError
from asyncbucket.core.wording import in_seconds

try:
    from redis import exceptions
    from redis.asyncio import Redis, RedisCluster
    from redis.asyncio.retry import Retry
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
NO_SCRIPT: Final = exceptions.NoScriptError
FAILURES: Final = (
    exceptions.RedisError,
    exceptions.RedisClusterException,
    OSError,
    asyncio.IncompleteReadError,
)
_HOW: Final = (
    "write redis://user:password@host:6379/0, and special characters of a password as %2F for /, "
    "%5B for [, %40 for @ and so on"
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
        exceptions.TimeoutError,
        f"gave no answer within {_BACKSTOP:g} s; see whether it runs and how far away it is",
    ),
    (exceptions.ReadOnlyError, "is a replica: {}; give the primary's address"),
    (
        exceptions.MovedError,
        "is one node of a cluster: give RedisStore.of(RedisCluster(...)) as the store",
    ),
    (
        (exceptions.ConnectionError, exceptions.RedisClusterException, OSError, EOFError),
        "cannot be reached: {}; see whether it runs",
    ),
)


def connect(url: str, shown: str) -> Any:
    """Return a client of the server at ``url``, not connected yet; errors call it ``shown``.

    Raises:
        ValueError: the URL cannot be read.
    """
    settings: dict[str, Any] = {
        "retry": Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
        "socket_timeout": _BACKSTOP,
        "socket_connect_timeout": _BACKSTOP,
        "protocol": 2,
    }
    client: Any = None
    try:
        split = urlsplit(url)
        database = split.path.strip("/ ")
        if split.scheme == "unix" or not database or database.isdecimal():
            client = Redis.from_url(re.sub("^valkey", "redis", url), **settings)
            client.connection_pool.make_connection()  # it refuses unknown settings
    except TypeError as error:
        raise ValueError(f"{shown!r} cannot be read: {error}") from None
    except ValueError:  # which might quote a password
        client = None
    if client is None:
        raise ValueError(f"{shown!r} cannot be read: {_HOW}")
    return client


def name_of(client: Any) -> str:
    """Return what to call the server of the user's client.

    Raises:
        TypeError: it is no client.
    """
    if not isinstance(client, (Redis, RedisCluster)):
        kind = f"{type(client).__module__}.{type(client).__qualname__}"  # a URL holds a password
        raise TypeError(f"a client must be a redis.asyncio.Redis or RedisCluster, not a {kind}")
    return f"redis ({'cluster' if isinstance(client, RedisCluster) else 'server'} of your client)"


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


def store_error(name: str, client: Any, error: Exception) -> StoreError:
    """Return what a failure means to the person who must fix it, without secrets."""
    message = str(error).rstrip(".")
    settings = getattr(getattr(client, "connection_pool", client), "connection_kwargs", {})
    if password := str(settings.get("password") or ""):
        message = message.replace(password, "***")
    message = _TRAILER.sub("", message)
    if message.startswith("SCHEMA"):
        _, theirs, ours = message.split()
        return StoreError(
            f"the store {name} keeps a limiter that has schema {theirs}, and this asyncbucket needs "
            f"{ours}: use one version of asyncbucket for one limiter, or another name"
        )
    templates = (template for error_types, template in _REMEDIES if isinstance(error, error_types))
    template = next(templates, "failed: {}")
    if message.startswith("ACL failure"):  # in a script, so it is of another kind
        template = _NO_PERMISSION
    return StoreError(f"the store {name} {template.format(message or type(error).__name__)}")


async def details(client: Any) -> dict[str, str]:
    """Return its clock, version, scripts, memory and persistence, as far as the login may ask.

    Of a cluster, one primary is asked.
    """
    node: dict[str, Any] = {}
    if isinstance(client, RedisCluster):
        node = {"target_nodes": client.get_primaries()[0]}
    told: dict[str, str] = {}
    with contextlib.suppress(TimeoutError, *FAILURES):
        async with asyncio.timeout(_DETAILS_PATIENCE):
            asked = time.time()
            seconds, micros = await client.time(**node)
            ahead = seconds + micros * 1e-6 - (asked + time.time()) / 2
            clock = f"{in_seconds(abs(ahead))} {'ahead' if ahead > 0 else 'behind'}"
            told["clock"] = "in step" if abs(ahead) < _IN_STEP else clock
            info = await client.info(**node)
            name, maxmemory = info.get("server_name", "redis"), int(info.get("maxmemory", 0))
            told[name] = str(info.get(f"{name}_version", info.get("redis_version")))
            policy = info.get("maxmemory_policy", "unknown policy")
            told["memory"] = (
                f"{maxmemory:,} bytes at most and {policy}" if maxmemory else "unbounded"
            )
            told["persistence"] = "append-only file" if info.get("aof_enabled") else "unknown"
            if not info.get("aof_enabled"):
                save = (await client.config_get("save", **node)).get("save")
                told["persistence"] = "snapshots alone" if save else "none"
    return told
