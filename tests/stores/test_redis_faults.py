"""What a ledger promises when the server, the network or a worker fails: one test per fault."""

import asyncio
import re
from typing import Any

import pytest

from asyncbucket import StoreError
from asyncbucket.stores import Batch, open_store
from asyncbucket.stores.redis import RedisStore
from asyncbucket.stores.store import FAR, Correction, Ledger, Receipt
from tests.stores.conformance.place import outcomes, peek, terms, used
from tests.stores.conftest import Proxy, StartServer

SECOND = 1_000_000_000
FREE = {"requests": 1}
CALL = {"requests": 1, "concurrency": 1}


def closed_for(receipt: Receipt) -> int:
    assert outcomes(receipt) == ["later"]
    return receipt.ask_at + FAR - receipt.now


async def refused(ledger: Ledger, batch: Batch) -> StoreError:
    """Commit in vain, for the store is gone: 0.3 s is promised, and a busy machine gets room."""
    before, ledger.patience = ledger.patience, 0.2
    async with asyncio.timeout(3):
        with pytest.raises(StoreError) as error:
            await ledger.commit(batch)
    ledger.patience = before
    return error.value


async def test_script_flush_loses_nothing_and_charges_once(store: RedisStore, redis: Any) -> None:
    ledger = await store.open("flush", terms("100 requests/minute"))
    redis.script_flush()
    await ledger.commit(Batch(calls=(FREE,)))
    redis.script_flush()
    assert await used(ledger) == 1


async def test_flushall_closes_limiter_for_a_whole_window_and_forgets_no_slot(
    store: RedisStore, redis: Any
) -> None:
    limits = terms("100 requests/minute", concurrency=4)
    one, two = [await store.open("lost", limits) for _ in range(2)]
    await one.commit(Batch(calls=(CALL,) * 3))
    redis.flushall()
    assert closed_for(await one.commit(Batch(calls=(CALL,)))) >= 60 * SECOND
    await two.commit(Batch(calls=(CALL,)))
    assert await used(two) == 100, "one loss was paid for twice"
    assert (await peek(two)).slots == 3


@pytest.mark.parametrize("limit", ["100 requests/minute", "200 requests/minute"])
async def test_newcomer_does_not_hide_data_loss_from_others(
    limit: str, store: RedisStore, redis: Any
) -> None:
    one = await store.open("hide", terms("100 requests/minute"))
    await one.commit(Batch(calls=(FREE,)))
    redis.flushall()
    newcomer = await store.open("hide", terms(limit))
    assert outcomes(await newcomer.commit(Batch(calls=(FREE,)))) == ["booked"]
    loss = await one.commit(Batch(calls=(FREE,)))
    receipt = await newcomer.commit(Batch(calls=(FREE,)))
    assert closed_for(receipt) + receipt.now - loss.now >= 60 * SECOND


#: What servers are told, what is booked after a restart, and how much the limiter then counts.
RESTARTS: dict[str, tuple[list[str], list[str], int]] = {
    "no data": ([], ["later"] * 4, 5),
    "a snapshot": ([], ["booked", "booked", "booked", "later"], 5),
    "appendfsync always": (["--appendonly", "yes", "--appendfsync", "always"], ["later"] * 4, 5),
}


@pytest.mark.parametrize("kept", RESTARTS)
async def test_restart_forgets_only_what_the_server_has_not_kept(
    start_server: StartServer, kept: str
) -> None:
    options, answers, counted = RESTARTS[kept]
    server = start_server(*options)
    store: Any = open_store(server.url)
    ledger = await store.open("restart", terms("5 requests/minute burst 5"))
    await ledger.commit(Batch(calls=(FREE,) * 2))
    if kept == "a snapshot":
        await store.client.save()
    await ledger.commit(Batch(calls=(FREE,) * 3))
    server.kill()
    assert "cannot be reached" in str(await refused(ledger, Batch()))
    server.start()
    receipt = await ledger.commit(Batch(calls=(FREE,) * 4))
    assert (outcomes(receipt), await used(ledger)) == (answers, counted)
    if kept == "no data":
        assert receipt.ask_at + FAR - receipt.now >= 60 * SECOND
    await store.aclose()


async def test_server_that_has_been_slow_gets_more_time(start_server: StartServer) -> None:
    server = start_server()
    store = open_store(server.url)
    ledger = await store.open("slow", terms("100 requests/minute"))
    ledger.patience = 0.2
    for seconds in (0.15, 0.5):
        server.freeze()
        answer = asyncio.create_task(ledger.commit(Batch()))
        await asyncio.sleep(seconds)
        server.thaw()
        await answer
    for _ in range(30):
        await ledger.commit(Batch())
    server.freeze()
    await refused(ledger, Batch())
    server.thaw()
    await store.aclose()


@pytest.mark.heavy
@pytest.mark.parametrize("times", [1, 2])
async def test_connection_cut_at_any_byte_charges_at_most_once(proxy: Proxy, times: int) -> None:
    store = open_store(proxy.url)
    ledger = await store.open("cut", terms("1000 requests/minute burst 1000", concurrency=99))
    assert outcomes(await ledger.commit(Batch(calls=(CALL,)))) == ["booked"]
    failed = cut = 0
    for cut in range(1, 400):
        proxy.cut(cut, times=times)
        undone: tuple[Correction, ...] = ()
        try:
            receipt = await ledger.commit(Batch(calls=(CALL,)))
            undone = (Correction.undo(CALL, receipt.bookings[0].start),)
        except StoreError:
            failed += 1
        is_whole, proxy.cuts = not proxy.broken, 0
        await ledger.commit(Batch(corrections=undone, held=1))
        seen = await peek(ledger)
        assert (seen.limits[0].used, seen.slots) == (1, 1), f"cut after {cut} bytes"
        if is_whole:
            break
    assert cut > 100
    assert failed == 0 if times == 1 else failed > 100
    await ledger.aclose()
    await store.aclose()


async def test_server_short_of_memory_books_nothing(start_server: StartServer) -> None:
    server = start_server("--maxmemory-policy", "noeviction")
    store: Any = open_store(server.url)
    ledger = await store.open("memory", terms("100 requests/minute burst 100"))
    await store.client.config_set("maxmemory", "1")
    for calls in ((FREE,) * 5, ()):  # or the outage would seem to be over
        error = await refused(ledger, Batch(calls=calls))
        assert re.search("is out of memory: .*; raise maxmemory", str(error))
    with pytest.raises(StoreError, match="out of memory"):
        await store.open("another", terms("1/s"))
    await store.client.config_set("maxmemory", "0")
    assert await used(ledger) == 0
    await ledger.commit(Batch(calls=(FREE,)))
    assert await used(ledger) == 1
    await store.aclose()


async def test_state_of_another_schema_is_refused(store: RedisStore, redis: Any) -> None:
    await store.open("schema", terms("1000/s"))
    state = redis.execute_command("HGET", "asyncbucket:{schema}:state", "state", NEVER_DECODE=[])
    other = state.replace(b"\xa6schema\x09", b"\xa6schema\x05")
    assert other != state
    redis.hset("asyncbucket:{schema}:state", "state", other)
    with pytest.raises(
        StoreError, match="has schema 5, and this asyncbucket needs 9: use one version"
    ):
        await store.open("schema", terms("1000/s"))


async def test_keys_hold_only_limiter_name_and_expire(store: RedisStore, redis: Any) -> None:
    for _ in range(5):  # a job that starts again and again, and never closes
        ledger = await store.open("acme", terms("1000 requests/day", concurrency=9), slot_ttl=0.1)
        await ledger.commit(Batch(calls=(CALL,)))
        await asyncio.sleep(0.15)
    keys = sorted(redis.keys("*"))
    assert keys == ["asyncbucket:{acme}:state", "asyncbucket:{acme}:workers"]
    for key in keys:
        assert 86_400_000 + 3_500_000 < redis.pttl(key) < 3 * 86_400_000
    fields = redis.hkeys(keys[0])
    assert sum(field.startswith("w:") for field in fields) == 1, "of dead workers"
