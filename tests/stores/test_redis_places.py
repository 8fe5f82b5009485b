"""Servers of all kinds: behind a login, in a cluster, behind Sentinel, at a socket."""

import asyncio
import contextlib
import re
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, ReadOnlyError, ResponseError

from asyncbucket import StoreError
from asyncbucket.stores import Batch, Store, open_store
from asyncbucket.stores.redis import RedisStore
from tests.stores.conformance.place import outcomes, peek, terms
from tests.stores.conftest import RunningServer, StartServer

SECOND = 1_000_000_000
CALL = {"requests": 1, "concurrency": 1}
#: What a login must be allowed to do, as docs/stores.md says.
RULES = (
    "~asyncbucket:* &asyncbucket:* +eval +evalsha +time +exists +pexpire +hget +hmget +hset +hdel "
    "+zadd +zrem +zcard +zcount +zrange +zrank +zrangebyscore +publish +subscribe +unsubscribe"
)


async def use(store: Store, name: str = "place") -> None:
    one, two = [await store.open(name, terms("100/s", concurrency=1)) for _ in range(2)]
    assert outcomes(await one.commit(Batch(calls=(CALL,)))) == ["booked"]
    assert outcomes(await two.commit(Batch(calls=(CALL,)))) == ["later"]
    called = asyncio.Event()
    two.on_turn = called.set
    await one.commit(Batch(held=0))
    await asyncio.wait_for(called.wait(), 5)
    assert outcomes(await two.commit(Batch(calls=(CALL,)))) == ["booked"]
    await two.commit(Batch(held=0))
    assert (await one.commit(Batch())).workers == 2
    await one.commit(Batch(pause=SECOND))
    await one.commit(Batch(config=terms("50/s", concurrency=2)))
    assert (await peek(two)).config == one.config
    for ledger in (one, two):
        await ledger.aclose()
    await store.aclose()


async def test_least_rights_are_enough(start_server: StartServer) -> None:
    server = start_server(*f"--user app on >s3cret {RULES} --user default off".split())
    where = f"127.0.0.1:{server.port}/0"
    await use(open_store(f"redis://app:s3cret@{where}"))
    await use(open_store(f"valkey://app:s3cret@{where}"), "another place")
    async with contextlib.aclosing(open_store(f"redis://app:wr0ng@{where}")) as wrong:
        with pytest.raises(StoreError, match=r"refuses the login.*check the user") as error:
            await wrong.open("place", terms("1/s"))
        assert "wr0ng" not in str(error.value)


@pytest.mark.parametrize(
    "rules",
    [
        "~other:* &* +@all",
        "~* &* +@all -evalsha",
        pytest.param("~* resetchannels +@all", id="no channels, which is a server's default"),
        "~* &* +@all -publish",
    ],
)
async def test_login_without_needed_right_is_refused(start_server: StartServer, rules: str) -> None:
    server = start_server("--user", "app", "on", ">s3cret", *rules.split())
    store = open_store(f"redis://app:s3cret@127.0.0.1:{server.port}/0")
    says = r"refuses the login: .* permissions? .*the ACL in the docs"
    with pytest.raises(StoreError, match=says) as error:
        await store.open("place", terms("1/s"))
    assert "user_script" not in str(error.value)
    assert await store.names() == []
    await store.aclose()


async def test_store_works_over_socket(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "valkey.sock"
    start_server("--unixsocket", str(path))
    await use(open_store(f"unix://{path}?db=0"))


async def test_limiters_spread_over_a_cluster(start_server: StartServer) -> None:
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    nodes = [start_server(*options) for _ in range(3)]
    await join(nodes)
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes[:2])
    store = open_store(f"redis+cluster://{hosts}")
    assert repr(store) == f"<RedisStore redis+cluster://{hosts}>"
    await use(store)
    for number in range(12):
        ledger = await store.open(f"limiter {number}", terms("10/s"))
        assert outcomes(await ledger.commit(Batch(calls=({"requests": 1},)))) == ["booked"]
        await ledger.aclose()
    for node in nodes:
        async with Redis(port=node.port) as one:
            assert await one.dbsize()
    alone = [open_store(node.url) for node in nodes]
    peeks = (each.peek("limiter 0") for each in alone)
    found = await asyncio.gather(*peeks, return_exceptions=True)
    errors = [str(each) for each in found if isinstance(each, StoreError)]
    assert len(errors) == 2
    assert all("is one node of a cluster: write redis+cluster://" in each for each in errors)
    for each in (store, *alone):
        await each.aclose()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ReadOnlyError("no"), "is a replica: no; give the primary's address"),
        (
            AuthenticationError("no"),
            "refuses the login: no; check the user and password in its URL",
        ),
        (ResponseError("BUSY running"), "failed: BUSY running"),
    ],
)
async def test_error_of_an_unavailable_server_names_the_remedy(
    error: Exception, told: str, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.client, "execute_command", AsyncMock(side_effect=error))
    with pytest.raises(StoreError, match=f"^the store {store.url} {told}"):
        await store.open("refused", terms("1/s"))


async def join(nodes: list[RunningServer]) -> None:
    """Make a cluster of the servers, each with a third of the hash slots."""
    clients: list[Any] = [Redis(port=node.port, decode_responses=True) for node in nodes]
    for number, client in enumerate(clients):
        first, last = 16_384 * number // 3, 16_384 * (number + 1) // 3 - 1
        await client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        await client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
    async with asyncio.timeout(20):
        for client in clients:
            info = ""
            while not re.search(r"(?s)cluster_state\W+ok.*cluster_known_nodes\W+3", info):
                await asyncio.sleep(0.05)
                info = str(await client.execute_command("CLUSTER", "INFO"))
            await client.aclose()


@pytest.mark.real_clock
async def test_failover_to_replica_keeps_replicated_bookings(start_server: StartServer) -> None:
    primary = start_server()
    of = f"127.0.0.1 {primary.port}"
    replica = start_server("--replicaof", of, "--repl-diskless-sync-delay", "0")
    await wait_for_replica(replica)
    sentinel = start_server(
        "--sentinel",
        f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds main 300\n"
        "sentinel failover-timeout main 2000\n",
    )
    hosts = f"127.0.0.1:1,127.0.0.1:{sentinel.port}"
    store = open_store(f"redis+sentinel://{hosts}/main?socket_timeout=0.5")
    ledger = await store.open("failover", terms("100 requests/minute burst 100", concurrency=99))
    await ledger.commit(Batch(calls=(CALL,) * 60))
    await until_replicated(primary)
    primary.kill()
    receipt = None
    async with asyncio.timeout(20):
        while receipt is None:
            with contextlib.suppress(StoreError):
                receipt = await ledger.commit(Batch(calls=(CALL,) * 50))
    assert outcomes(receipt).count("booked") == 39, "slots of before are held, calls counted"
    await ledger.aclose()
    await store.aclose()


async def wait_for_replica(replica: RunningServer) -> None:
    async with asyncio.timeout(20), Redis(port=replica.port, decode_responses=True) as client:
        while True:
            if (await client.info("replication"))["master_link_status"] == "up":
                return
            await asyncio.sleep(0.02)


async def until_replicated(primary: RunningServer) -> None:
    client: Any = Redis(port=primary.port)
    await client.set("asyncbucket:mark", 1)
    assert await client.execute_command("WAIT", 1, 5_000) == 1
    await client.aclose()
