"""Redis and Valkey: one limit for processes on many machines.

A batch is one run of one script, so it happens at once or not at all; the server's clock is the
only one. `script` says how the script is called, `servers` where it runs.

*Charged once.* The script keeps its last answer to each worker, and the number of the batch.

*Lost.* The state has an epoch. If a worker knows an epoch that the server does not (because it was
flushed, or restarted without its data), everything counts as used up: a full window must pass.
"""

import asyncio
import contextlib
import json
import os
import secrets
import time
from dataclasses import replace
from typing import Any, Final

from asyncbucket.core.errors import StoreError
from asyncbucket.core.statistics import LimitUse
from asyncbucket.core.wording import in_seconds
from asyncbucket.feedback.pause import Pause
from asyncbucket.stores.redis import script, servers
from asyncbucket.stores.redis.script import GRAIN, Codec
from asyncbucket.stores.redis.servers import FAILURES, NO_SCRIPT
from asyncbucket.stores.store import (
    OPEN_PATIENCE,
    Batch,
    Ledger,
    LimitConfig,
    Receipt,
    Snapshot,
    check_membership,
)

__all__ = ["RedisLedger", "RedisStore", "from_url"]

#: Seconds before listening is tried again.
_RETRY_INTERVAL: Final = 0.5


def from_url(url: str) -> "RedisStore":
    """Return the store at ``url``: see `asyncbucket.stores.open_store`."""
    from asyncbucket.stores import without_password

    shown = without_password(url)
    return RedisStore(servers.connect(url, shown), url=shown, owned=True)


class RedisStore:
    """Keep limiters on a Redis or Valkey server; see `asyncbucket.stores.store.Store`."""

    def __init__(self, client: Any, *, url: str, owned: bool) -> None:
        self.client = client
        #: Where it is, without a password.
        self.url = url
        self._owned = owned
        #: Connections belong to the loop and the process in which they were made.
        self._used_in: tuple[asyncio.AbstractEventLoop, int] | None = None

    @classmethod
    def of(cls, client: Any) -> "RedisStore":
        """Return a store on a client of yours, `redis.asyncio.Redis` or ``RedisCluster``.

        So limits are kept behind Sentinels (``Sentinel(...).master_for(...)``), in a cluster, or
        wherever else redis-py gets to. The client stays yours: closing the store leaves it open.
        """
        return cls(client, url=servers.name_of(client), owned=False)

    def check(self, config: LimitConfig) -> None:
        """See `asyncbucket.stores.store.Store.check`."""
        Codec(config)

    async def open(
        self, name: str, config: LimitConfig, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> "RedisLedger":
        """See `asyncbucket.stores.store.Store.open`."""
        check_membership(name, slot_ttl)
        ledger = RedisLedger(self, name, worker, slot_ttl)
        await ledger.join(config)
        return ledger

    async def peek(self, name: str) -> Snapshot | None:
        """See `asyncbucket.stores.store.Store.peek`."""
        return await RedisLedger(self, name, "", 0).look()

    async def names(self) -> list[str]:
        """See `asyncbucket.stores.store.Store.names`."""
        head, tail = "asyncbucket:{", "}:state"
        try:
            found = [key async for key in self.client.scan_iter(f"{head}*{tail}", count=1_000)]
        except FAILURES as error:
            raise servers.store_error(self.url, self.client, error) from error
        keys = [key.decode() if isinstance(key, bytes) else key for key in found]
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
                f"the store {self.url} was made for another event loop or process, where it was first "
                f"used: give the limiter a URL, and it makes one for each"
            )
        command, given = self.client.execute_command, (len(keys), *keys, *args)
        try:
            try:
                text = await command("EVALSHA", script.digest(), *given)
            except NO_SCRIPT:
                text = await command("EVAL", script.source(), *given)
        except FAILURES as error:
            raise servers.store_error(self.url, self.client, error) from error
        reply: dict[str, Any] = json.loads(text)
        return reply

    async def aclose(self) -> None:
        """Close the connections that were made here."""
        if self._owned:
            await self.client.aclose()

    def __repr__(self) -> str:
        return f"<RedisStore {self.url}>"


class RedisLedger(Ledger):
    """Keep one limiter on a server, for one worker."""

    def __init__(self, store: RedisStore, name: str, worker: str | None, slot_ttl: float) -> None:
        super().__init__(name, worker)
        self._store = store
        self._ttl = round(slot_ttl * 1_000_000)
        hash_tag = f"asyncbucket:{{{name}}}"
        self._keys = (f"{hash_tag}:state", f"{hash_tag}:workers")
        self._channel = f"{hash_tag}:wake:"
        self._codec = Codec(LimitConfig())
        #: The epoch that the worker knows, when it last heard of it, and how long it lives unused.
        self._epoch = ""
        self._epoch_heard_at = self._epoch_life = 0.0
        #: Whether the last batch left calls waiting.
        self._is_waiting = False
        #: Whether the worker was called, and when it will be.
        self._called = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._listener: asyncio.Task[None] | None = None

    async def _send(self, number: int, batch: Batch) -> Receipt:
        """Send ``batch``; if the limits have changed, under the new ones.

        If a period of the calendar begins, the server asks when the next ones do.
        """
        self._reset_call()
        changed, starts = None, "{}"
        codec = self._codec if batch.config is None else Codec(batch.config)
        local = Pause()
        local.begin(batch.pause, 0, gradually=batch.gradually)
        while True:
            reply = await self._run(
                codec,
                "commit",
                number,
                batch.horizon // GRAIN,
                batch.held or 0,
                codec.corrections(batch.corrections),
                codec.calls(batch.calls),
                int(batch.config is not None),
                -(-batch.pause // GRAIN),
                local.step // GRAIN,
                starts,
            )
            if "bookings" in reply:
                break
            if "wall" in reply:
                starts = codec.starts(reply["wall"])
                continue
            codec = Codec.from_reply(reply["config"])
            changed = codec.config
        self._codec, self.config = codec, codec.config
        receipt = codec.receipt(reply, batch, changed)
        if batch.calls is not None:
            self._is_waiting = receipt.ask_at > 0
        return receipt

    async def changed(self, *, timeout: float) -> bool:
        """See `asyncbucket.stores.store.Ledger.changed`."""
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen(), name="asyncbucket store listener")
        try:
            async with asyncio.timeout(timeout):
                await self._called.wait()
                async with self._turn:  # a batch under way is answered first, as of before the call
                    pass
        except TimeoutError:
            return False
        self._reset_call()
        return True

    def _reset_call(self) -> None:
        """Forget earlier calls: the state is being looked at anew."""
        self._called.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _call(self, delay: int) -> None:
        """Note that the worker's turn comes in ``delay`` microseconds; this replaces earlier calls."""
        if delay >= 0:
            self._reset_call()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(delay * 1e-6, self._called.set)

    async def _listen(self) -> None:
        while not servers.is_cancelling():
            with contextlib.suppress(*FAILURES, StoreError):
                await self._receive()
            if not servers.is_cancelling():
                await asyncio.sleep(_RETRY_INTERVAL)

    async def _receive(self) -> None:
        channels = (f"{self._channel}{self.worker}", f"{self._channel}*")
        async with self._store.client.pubsub() as pubsub:
            await pubsub.subscribe(*channels)
            for _ in channels:
                if not servers.is_cancelling():
                    await pubsub.get_message(timeout=None)
            self._call((await self._run(self._codec, "turn", int(self._is_waiting)))["come"])
            while not servers.is_cancelling():
                message = await pubsub.get_message(timeout=None)
                if message is not None and message["type"] == "message":
                    self._call(int(message["data"]))

    async def peek(self) -> Snapshot:
        """See `asyncbucket.stores.store.Ledger.peek`."""
        snapshot = await self.look()
        assert snapshot is not None
        return replace(snapshot, details=await servers.details(self._store.client))

    async def look(self) -> Snapshot | None:
        """Return a snapshot; None if there is no such limiter."""
        patience = self.patience if self.worker else OPEN_PATIENCE
        reply = await self._in_time(self._run(self._codec, "peek"), patience)
        if not reply:
            return None
        config = Codec.from_reply(reply["config"]).config
        uses = zip(config.limits, reply["uses"][::2], reply["uses"][1::2], strict=True)
        return Snapshot(
            now=reply["now"] * GRAIN,
            config=config,
            limits=tuple(LimitUse(*use) for use in uses),
            slots=reply["slots"],
            paused_until=reply["paused"] * GRAIN,
            last_start=reply["last"] * GRAIN,
            workers=reply["workers"],
        )

    async def aclose(self) -> None:
        """See `asyncbucket.stores.store.Ledger.aclose`."""
        self._reset_call()
        await servers.cancel_and_wait(self._listener)
        await super().aclose()

    async def _leave(self) -> None:
        await self._run(self._codec, "leave")

    def _too_late(self, patience: float) -> str:
        return (
            f"the store {self._store.url} gave no answer within {in_seconds(patience)}; "
            f"see whether it runs and how far away it is"
        )

    async def _run(self, codec: Codec, verb: str, *args: str | int) -> dict[str, Any]:
        # An epoch that may have expired by itself, with nothing left to remember, is not a loss.
        is_alive = time.monotonic() < self._epoch_heard_at + self._epoch_life
        sent = time.monotonic()
        reply = await self._store.run(
            self._keys,
            verb,
            self.worker,
            self._epoch if is_alive else "",
            secrets.token_hex(8),
            codec.text if self.worker else "",
            self._channel,
            self._ttl,
            *args,
        )
        self._epoch = reply.get("epoch", self._epoch)
        if "life" in reply:
            self._epoch_heard_at, self._epoch_life = sent, reply["life"] * 1e-3
        return reply

    def __repr__(self) -> str:
        return f"<RedisLedger {self.name!r} on {self._store.url}, worker {self.worker}>"
