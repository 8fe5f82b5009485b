"""Redis and Valkey: one budget for processes on many machines.

A batch is one run of one script, so it happens at once or not at all; the server's clock is the
only one. `asyncbucket.stores.redis_ledger` explains how each batch is charged once, whatever
breaks.
"""

import secrets
from typing import Any

from asyncbucket.stores import servers
from asyncbucket.stores.redis_ledger import RedisLedger
from asyncbucket.stores.script import Codec
from asyncbucket.stores.servers import Server
from asyncbucket.stores.store import Snapshot, Terms, check_membership


def from_url(url: str) -> "RedisStore":
    """Return the store at ``url``: see `asyncbucket.stores.open_store`."""
    return RedisStore(servers.connect(url))


class RedisStore:
    """Keep limiters on a Redis or Valkey server; see `asyncbucket.stores.store.Store`."""

    def __init__(self, server: Server) -> None:
        self._server = server

    @classmethod
    def of(cls, client: Any) -> "RedisStore":
        """Return a store on a client of yours, `redis.asyncio.Redis` or ``RedisCluster``.

        The client stays yours: closing the store leaves it open. Set its time-outs below a second.
        """
        return cls(servers.server_of(client))

    @property
    def url(self) -> str:
        """Where it is, without a password."""
        return self._server.url

    def check(self, terms: Terms) -> None:
        """See `asyncbucket.stores.store.Store.check`."""
        Codec(terms)

    async def open(
        self, name: str, terms: Terms, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> "RedisLedger":
        """See `asyncbucket.stores.store.Store.open`."""
        check_membership(name, slot_ttl)
        ledger = RedisLedger(self._server, name, worker or secrets.token_hex(8), slot_ttl)
        await ledger.join(terms)
        return ledger

    async def peek(self, name: str) -> Snapshot | None:
        """See `asyncbucket.stores.store.Store.peek`."""
        reader = RedisLedger(self._server, name, "", 0)
        return await reader.look()

    async def names(self) -> list[str]:
        """See `asyncbucket.stores.store.Store.names`."""
        head, tail = "asyncbucket:{", "}:state"
        keys = await self._server.keys(f"{head}*{tail}")
        return sorted(key.removeprefix(head).removesuffix(tail) for key in keys)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._server.aclose()

    def __repr__(self) -> str:
        return f"<RedisStore {self.url}>"
