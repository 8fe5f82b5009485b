"""Redis and Valkey: one limit for processes on many machines.

A batch is one run of one script, so it happens at once or not at all; the server's clock is the
only one. `asyncbucket.stores.script` says how the script is called.

*Charged once.* redis-py sends a command again, here once, when a connection breaks, although the
server may have run it. The script keeps its last answer to each worker, and the number of the batch;
everything else may be said twice.

*Lost.* The state has an epoch. If a worker knows an epoch that the server does not (because it was
flushed, or restarted without its data), everything counts as used up: a full window must pass.
"""

import asyncio
import contextlib
import json
import os
import re
import secrets
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from asyncbucket.engine.errors import StoreError
from asyncbucket.engine.statistics import LimitUse
from asyncbucket.stores import script, without_password
from asyncbucket.stores.script import GRAIN, Codec
from asyncbucket.stores.store import (
    OPEN_PATIENCE,
    Batch,
    Ledger,
    LimitConfig,
    Receipt,
    Snapshot,
    in_time,
)

try:
    from redis import exceptions
    from redis.asyncio import Redis, RedisCluster
    from redis.asyncio.cluster import ClusterNode
    from redis.asyncio.connection import parse_url
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import Sentinel
    from redis.backoff import NoBackoff
except ImportError as missing:
    raise ImportError(
        'a redis:// store needs redis-py: pip install "asyncbucket[redis]"'
    ) from missing

__all__ = ["RedisLedger", "RedisStore", "from_url"]

#: The channels on which processes are called begin so; all listen to the one that ends in ``*``.
_WAKE: Final = "asyncbucket:wake:"
#: Seconds before listening is tried again.
_RETRY_INTERVAL: Final = 0.5
#: Seconds after which a connection gives up by itself, if nobody has ended it before.
_BACKSTOP: Final = 5.0
_FAILURES: Final = (exceptions.RedisError, exceptions.RedisClusterException, OSError, EOFError)
_TIMEOUTS: Final[dict[str, Any]] = {
    "socket_timeout": _BACKSTOP,
    "socket_connect_timeout": _BACKSTOP,
}
#: Where they listen unless a URL says otherwise.
_PORTS: Final = {"sentinel": 26_379, "cluster": 6_379}
_HOW: Final = (
    "write redis://user:password@host:6379/0, and special characters of a password as %2F for /, "
    "%5B for [, %40 for @ and so on"
)
_REFUSED: Final = (
    "refuses the login: {}; check the user and password in its URL, and the ACL in the docs"
)
#: What failures mean, and what to do about them; the first kind that fits counts.
_REMEDIES: Final = (
    ((exceptions.NoPermissionError, exceptions.AuthenticationError), _REFUSED),
    (
        exceptions.OutOfMemoryError,
        "is out of memory: {}; raise maxmemory or delete what is not needed",
    ),
    (exceptions.ReadOnlyError, "is a replica: {}; give the primary's address"),
    (
        exceptions.MovedError,
        "is one node of a cluster: write redis+cluster://host:6379",
    ),
    (exceptions.ResponseError, "failed: {}"),
    (
        ssl.SSLCertVerificationError,
        "shows a certificate that is not trusted: {}; name its issuer's file with ?ssl_ca_certs=",
    ),
    (
        ssl.SSLError,
        "does not speak TLS as expected: {}; write redis:// if it speaks none on this port",
    ),
    (
        Exception,
        "cannot be reached: {}; check that it is running, and speaks TLS if the URL says rediss://",
    ),
)


def from_url(url: str) -> "RedisStore":
    """Return the store at ``url``: see `asyncbucket.stores.open_store`.

    Raises:
        ValueError: the URL cannot be read.
    """
    shown, why = without_password(url), _HOW
    try:
        if "+" in url.partition("://")[0]:
            return _of_several(url, shown)
        split = urlsplit(url)
        database = split.path.strip("/ ")
        if split.scheme == "unix" or not database or database.isdecimal():
            client: Any = Redis.from_url(
                re.sub("^valkey", "redis", url), retry=_retry(), **_TIMEOUTS, protocol=2
            )
            client.connection_pool.make_connection()  # it refuses unknown settings
            return RedisStore(client, url=shown, owned=True)
    except (TypeError, exceptions.RedisError) as error:
        why = str(error)
    except ValueError:  # which might quote a password
        pass
    raise ValueError(f"{shown!r} cannot be read: {why}")


def _of_several(url: str, shown: str) -> "RedisStore":
    """Return the store of ``redis+sentinel://host:port,host:port/service/0`` or ``redis+cluster://host,host``."""
    scheme, _, rest = url.partition("://")
    base, _, kind = scheme.partition("+")
    login, at, address = rest.rpartition("@")
    address, _, query = address.partition("?")
    hosts, _, path = address.partition("/")
    service, _, database = path.partition("/")
    split = [urlsplit(f"//{each}") for each in hosts.split(",")]
    nodes = [(each.hostname or "127.0.0.1", each.port or _PORTS[kind]) for each in split]
    options: dict[str, Any] = {
        **_TIMEOUTS,
        **parse_url(f"redis://{login}{at}host/{database}?{query}"),
    }
    del options["host"]
    if base in {"rediss", "valkeys"}:
        options["ssl"] = True
    if kind == "cluster":
        client: Any = RedisCluster(startup_nodes=[ClusterNode(*each) for each in nodes], **options)
        return RedisStore(client, url=shown, owned=True)
    if not service:
        raise TypeError("name the service: redis+sentinel://host:26379,host:26379/service")
    find: Any = Sentinel(nodes, sentinel_kwargs=_TIMEOUTS, **options)  # type: ignore[no-untyped-call]
    client = find.master_for(service, retry=_retry(), protocol=2)
    return RedisStore(client, url=shown, owned=True, others=find.sentinels)


def _retry() -> Retry:
    return Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,))


class RedisStore:
    """Keep limiters on a Redis or Valkey server; see `asyncbucket.stores.store.Store`."""

    def __init__(self, client: Any, *, url: str, owned: bool, others: Sequence[Any] = ()) -> None:
        self.client = client
        #: Clients that are closed with it: those of Sentinels.
        self._others = others
        #: Where it is, without a password.
        self.url = url
        self._owned = owned
        #: Connections belong to the loop and the process in which they were made.
        self._used_in: tuple[asyncio.AbstractEventLoop, int] | None = None
        #: Runs of the script that wait to be sent, each with who waits for its answer.
        self._unsent: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._sender: asyncio.Task[None] | None = None
        #: What listens for all limiters.
        self.calls = Listener(client)

    @classmethod
    def of(cls, client: Any) -> "RedisStore":
        """Return a store on a client of yours, `redis.asyncio.Redis` or ``RedisCluster``.

        So limits are kept behind Sentinels (``Sentinel(...).master_for(...)``), in a cluster, or
        wherever else redis-py gets to. The client stays yours: closing the store leaves it open. It needs
        two connections.

        Raises:
            TypeError: it is no client.
        """
        if not isinstance(client, (Redis, RedisCluster)):
            kind = type(client).__name__  # a URL holds a password
            raise TypeError(f"a client must be a redis.asyncio.Redis or RedisCluster, not a {kind}")
        return cls(client, url="redis (your client)", owned=False)

    async def open(
        self, name: str, config: LimitConfig, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> "RedisLedger":
        """See `asyncbucket.stores.store.Store.open`."""
        return await RedisLedger(self, name, worker, slot_ttl).join(config)

    async def peek(self, name: str) -> Snapshot | None:
        """See `asyncbucket.stores.store.Store.peek`."""
        return await RedisLedger(self, name, "", 0).look()

    async def names(self) -> list[str]:
        """See `asyncbucket.stores.store.Store.names`."""
        head, tail = "asyncbucket:{", "}:state"
        try:
            found = [key async for key in self.client.scan_iter(f"{head}*{tail}", count=1_000)]
        except _FAILURES as error:
            raise _store_error(self.url, self.client, error) from error
        keys = (key.decode() if isinstance(key, bytes) else key for key in found)
        return sorted(key.removeprefix(head).removesuffix(tail) for key in keys)

    async def run(self, keys: tuple[str, ...], *args: str | int) -> dict[str, Any]:
        """Run the script and return its answer.

        Raises:
            StoreError: it could not be run, or it is unknown whether it was.
        """
        here = (asyncio.get_running_loop(), os.getpid())
        self._used_in = self._used_in or here
        if self._used_in != here:
            raise StoreError(
                f"the store {self.url} was made for another event loop or process: give the limiter a URL"
            )
        answer = asyncio.get_running_loop().create_future()
        self._unsent.append(((len(keys), *keys, *args), answer))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_all(), name="asyncbucket store batches")
        try:
            reply: dict[str, Any] = json.loads(await answer)
        except _FAILURES as error:
            raise _store_error(self.url, self.client, error) from error
        return reply

    async def _send_all(self) -> None:
        """Send what all limiters have to say, as one batch at a time on one connection."""
        while self._unsent:
            sent, self._unsent = self._unsent, []
            try:
                replies = await self._send([given for given, _ in sent])
            except _FAILURES as error:
                replies = [error] * len(sent)
            for (_, answer), reply in zip(sent, replies, strict=True):
                if answer.done():  # nobody waits any more
                    continue
                if isinstance(reply, Exception):
                    answer.set_exception(reply)
                else:
                    answer.set_result(reply)

    async def _send(self, batch: list[tuple[Any, ...]]) -> list[Any]:
        """Run the script once for each of ``batch``; return replies and errors."""
        if len(batch) == 1 or isinstance(self.client, RedisCluster):
            runs = (self._run_once("EVALSHA", script.digest(), each) for each in batch)
            replies = list(await asyncio.gather(*runs, return_exceptions=True))
        else:
            pipeline = self.client.pipeline(transaction=False)
            for each in batch:
                pipeline.execute_command("EVALSHA", script.digest(), *each)
            replies = await pipeline.execute(raise_on_error=False)
        for number, reply in enumerate(replies):
            if isinstance(reply, exceptions.NoScriptError):
                replies[number] = await self._run_once("EVAL", script.source(), batch[number])
        return replies

    async def _run_once(self, command: str, code: str, given: tuple[Any, ...]) -> Any:
        return await self.client.execute_command(command, code, *given)

    async def aclose(self) -> None:
        """Close the connections that were made here."""
        await self.calls.aclose()
        if self._owned:
            for each in (self.client, *self._others):
                await each.aclose()

    def __repr__(self) -> str:
        return f"<RedisStore {self.url}>"


class Listener:
    """Hear on one connection when workers of this process are called, whichever limiters they are of."""

    def __init__(self, client: Any) -> None:
        self._client = client
        #: Where this process is called.
        self.channel = f"{_WAKE}{secrets.token_hex(8)}"
        #: What is told of a worker, or of a limiter by its key: in how many microseconds its turn comes, or None
        #: if something may have been missed.
        self._told: dict[str, list[Callable[[int | None], None]]] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, names: Sequence[str], tell: Callable[[int | None], None]) -> None:
        """Tell ``tell`` what concerns ``names``."""
        for name in names:
            self._told.setdefault(name, []).append(tell)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen(), name="asyncbucket store listener")
        else:
            tell(None)

    async def remove(self, names: Sequence[str], tell: Callable[[int | None], None]) -> None:
        """Tell it no more."""
        for name in names:
            self._told[name].remove(tell)
        self._told = {name: told for name, told in self._told.items() if told}
        if not self._told:
            await self.aclose()

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(*_FAILURES):
                async with self._client.pubsub() as pubsub:
                    await pubsub.subscribe(self.channel, f"{_WAKE}*")
                    while True:
                        message = await pubsub.get_message(timeout=None)
                        if message is not None and message["type"] in {"subscribe", "message"}:
                            self._tell(message["type"], message["data"])
            await asyncio.sleep(_RETRY_INTERVAL)

    def _tell(self, kind: str, data: Any) -> None:
        if kind == "subscribe":
            for tell in [tell for told in self._told.values() for tell in told]:
                tell(None)
            return
        number, _, name = (data.decode() if isinstance(data, bytes) else data).partition(" ")
        for tell in self._told.get(name, ()):
            tell(int(number))

    async def aclose(self) -> None:
        """End, and give back the connection."""
        while self._task is not None and not self._task.done():
            self._task.cancel()  # redis-py may swallow it while it connects
            await asyncio.wait((self._task,), timeout=0.1)
        self._task = None


class RedisLedger(Ledger):
    """Keep one limiter on a server, for one worker."""

    def __init__(self, store: RedisStore, name: str, worker: str | None, slot_ttl: float) -> None:
        tls = "does" if store.url.startswith(("rediss", "valkeys")) else "does not"
        silence = (
            f"the store {store.url} does not answer: check whether it is running, how far away it is, and whether "
            f"it speaks TLS on this port (this URL {tls})"
        )
        super().__init__(store, name, worker, silence)
        self._store = store
        self._ttl = round(slot_ttl * 1_000_000)
        limiter, star, tenant = name.partition("/*")  # which is on the same node of a cluster
        hash_tag = f"asyncbucket:{{{limiter}}}{star}{tenant}"
        self._keys = (f"{hash_tag}:state", f"{hash_tag}:workers", f"{hash_tag}:line")
        self._codec = Codec(LimitConfig())
        #: The epoch that the worker knows.
        self._epoch = ""
        #: When the worker's turn comes, as it was called.
        self._timer: asyncio.TimerHandle | None = None
        self._listens = False

    async def _send(self, number: int, batch: Batch) -> Receipt:
        """Send ``batch``; if the limits have changed, under the new ones.

        If a period of the calendar begins, the server asks when the next ones do.
        """
        self._reset_call()
        starts = "{}"
        known = self._codec if self.config == self._codec.config else Codec(self.config)
        while True:
            codec = known if batch.config is None else Codec(batch.config.after(known.config))
            reply = await self._run(
                codec,
                "commit",
                number,
                batch.held or 0,
                batch.waiting,
                codec.corrections(batch.corrections),
                script.as_json([dict(call) for call in batch.calls]),
                "" if batch.config is None else known.text,
                -(-batch.pause // GRAIN),
                starts,
            )
            if "answers" in reply:
                break
            if "wall" in reply:
                starts = codec.starts(int(reply["wall"]))
            else:
                known = Codec.from_text(reply["config"])
        self._codec, self.config, self._epoch = codec, codec.config, reply["epoch"]
        receipt = codec.receipt(reply, batch)
        if receipt.in_line and not self._listens:
            self._listens = True
            self._store.calls.add((self.worker, self._keys[0]), self._call)
        return receipt

    def _reset_call(self) -> None:
        """Forget an earlier call."""
        if self._timer is not None:
            self._timer.cancel()

    def _call(self, delay: int | None) -> None:
        """Note that the worker's turn comes in ``delay`` microseconds; this replaces an earlier call.

        If it is None, a call may have come while nobody listened. If it is negative, it is a trial.
        """
        if delay is None or delay >= 0:
            self._reset_call()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later((delay or 0) * 1e-6, self.on_turn)

    async def look(self) -> Snapshot | None:
        """Return a snapshot; None if there is no such limiter."""
        reply = await in_time(self._run(self._codec, "peek"), OPEN_PATIENCE, self.silence)
        if not reply:
            return None
        config = Codec.from_text(reply["config"]).config
        left = zip(config.limits, map(int, reply["left"]), strict=True)
        return Snapshot(
            now=int(reply["now"]) * GRAIN,
            config=config,
            limits=tuple(LimitUse(limit, limit.units - units, units) for limit, units in left),
            slots=reply["slots"],
            paused_until=int(reply["paused"]) * GRAIN,
            last_start=int(reply["last"]) * GRAIN,
            workers=reply["workers"],
        )

    async def aclose(self, last: Batch | None = None) -> None:
        """See `asyncbucket.stores.store.Ledger.aclose`."""
        self._reset_call()
        if self._listens:
            self._listens = False
            await self._store.calls.remove((self.worker, self._keys[0]), self._call)
        await super().aclose(last)

    async def _leave(self) -> None:
        await self._run(self._codec, "leave")

    async def _run(self, codec: Codec, verb: str, *args: str | int) -> dict[str, Any]:
        new_epoch = secrets.token_hex(8)
        me = self.worker, self._epoch, new_epoch, codec.text, self._store.calls.channel, self._ttl
        return await self._store.run(self._keys, verb, *me, *args)


def _store_error(name: str, client: Any, error: Exception) -> StoreError:
    """Return what a failure means to the person who must fix it, without secrets."""
    # In a script, it goes on with where that was.
    message = re.sub(r"\.?( script: [0-9a-f]{40}.*)?$", "", str(error))
    settings = getattr(getattr(client, "connection_pool", client), "connection_kwargs", {})
    if password := str(settings.get("password") or ""):
        message = message.replace(password, "***")
    if message.startswith("SCHEMA"):
        _, theirs, ours = message.split()
        return StoreError(
            f"the store {name} keeps a limiter that has schema {theirs}, and this asyncbucket needs "
            f"{ours}: use one version of asyncbucket for one limiter, or another name"
        )
    causes = (error, error.__cause__, error.__context__)
    cause = next((each for each in causes if isinstance(each, ssl.SSLError)), error)
    templates = (template for error_types, template in _REMEDIES if isinstance(cause, error_types))
    template = next(templates)
    if message.startswith("ACL failure"):  # in a script, so it is of another kind
        template = _REFUSED
    return StoreError(f"the store {name} {template.format(message or type(error).__name__)}")
