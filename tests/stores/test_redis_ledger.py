"""What a ledger on a real server promises while the server is well."""

import asyncio
import traceback
from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.core.limits import Limit
from asyncbucket.stores import (
    Batch,
    Booking,
    Correction,
    Outcome,
    Receipt,
    StoreError,
    Terms,
    open_store,
    without_password,
)
from asyncbucket.stores.redis import RedisStore
from asyncbucket.stores.redis_ledger import RedisLedger
from asyncbucket.stores.store import FAR
from asyncbucket.testing import assert_within_bucket

SECOND = 1_000_000_000
MILLISECOND = 1_000_000
CALL = {"requests": 1, "tokens": 100, "concurrency": 1}
FREE = {"requests": 1}


def terms(*limits: str, concurrency: int | None = None) -> Terms:
    """Read limits as people write them."""
    return Terms(limits=tuple(map(Limit.parse, limits)), concurrency=concurrency)


def outcomes(receipt: Receipt) -> list[str]:
    """Return the outcome of each call, as a word."""
    return [booking.outcome.value for booking in receipt.bookings]


def slots(receipt: Receipt) -> tuple[str, ...]:
    """Return the slots that were given out."""
    return tuple(booking.slot for booking in receipt.bookings if booking.slot is not None)


async def test_workers_share_one_limit_in_order_of_arrival(store: RedisStore) -> None:
    """Starts of two workers never decrease, and together they keep the limit."""
    one = await store.open("shared", terms("100/s burst 10"))
    two = await store.open("shared", terms("100/s burst 10"))
    starts: list[int] = []
    for _ in range(8):
        for ledger in (one, two):
            receipt = await ledger.commit(Batch(calls=(FREE,) * 2))
            starts += [booking.start for booking in receipt.bookings]
    assert len(starts) == 32
    assert starts == sorted(starts)
    assert_within_bucket([(start, 1) for start in starts], rate=100, burst=10)


async def test_batch_books_no_further_than_its_horizon(store: RedisStore) -> None:
    """A batch books a slice of time, which begins with its first start."""
    ledger = await store.open("horizon", terms("40/s burst 1"))
    horizon = 60 * MILLISECOND
    receipt = await ledger.commit(Batch(calls=(FREE,) * 5, horizon=horizon))
    assert outcomes(receipt) == ["booked", "booked", "booked", "later", "later"]
    assert receipt.bookings[2].bound_by == receipt.bookings[4].bound_by == "requests"
    assert receipt.ask_at == max(receipt.now, receipt.bookings[2].start - horizon)
    next_one = await ledger.commit(Batch(calls=(FREE, FREE), horizon=0))
    assert outcomes(next_one) == ["booked", "later"]
    assert next_one.bookings[0].start == receipt.bookings[2].start + 25 * MILLISECOND


async def test_call_due_far_ahead_is_not_booked_but_keeps_its_place(store: RedisStore) -> None:
    """Refunds that come before then should serve the call; smaller calls wait behind it."""
    one, two = [await store.open("far", terms("2/s burst 1", "1000 tokens/s")) for _ in range(2)]
    await one.commit(Batch(calls=(FREE,)))
    receipt = await one.commit(Batch(calls=(FREE,)))
    assert outcomes(receipt) == ["later"]
    assert 240 * MILLISECOND < receipt.ask_at - receipt.now <= SECOND // 2 - FAR
    other = await two.commit(Batch(calls=({"tokens": 1},)))
    assert outcomes(other) == ["later"], "it passed one that stands in line"
    await one.commit(Batch())
    assert outcomes(await two.commit(Batch(calls=({"tokens": 1},)))) == ["booked"]


async def test_refund_wakes_workers_in_line_one_after_the_other(store: RedisStore) -> None:
    """A refund calls it at once; a worker that becomes the first is told how long to wait."""
    spender, one, two = [await store.open("told", terms("1000 tokens/minute")) for _ in range(3)]
    for ledger in (one, two):
        await ledger.changed(timeout=0.2)  # begins to listen
    call = {"tokens": 400}
    spent = await spender.commit(Batch(calls=({"tokens": 1000},)))
    for ledger in (one, two):
        assert outcomes(await ledger.commit(Batch(calls=(call,)))) == ["later"]
    less = Correction(start=spent.bookings[0].start, booked={"tokens": 1000}, used={"tokens": 100})
    await spender.commit(Batch(corrections=(less,)))
    assert await one.changed(timeout=2)
    assert not await two.changed(timeout=0.05)
    assert outcomes(await one.commit(Batch(calls=(call,)))) == ["booked"]
    assert await two.changed(timeout=2)
    receipt = await two.commit(Batch(calls=(call,)))
    assert (receipt.bookings[0].start, receipt.bookings[0].bound_by) == (receipt.now, "tokens")
    for ledger in (one, two):
        await ledger.aclose()


async def test_call_above_limit_is_never_booked_and_holds_up_no_other(store: RedisStore) -> None:
    """A call that can never pass does not hold up those behind it."""
    ledger = await store.open("never", terms("100/s", "1000 tokens/s"))
    receipt = await ledger.commit(Batch(calls=({"requests": 1, "tokens": 1001}, CALL)))
    assert receipt.bookings[0] == Booking(Outcome.NEVER, 0, "tokens")
    assert outcomes(receipt) == ["never", "booked"]


async def test_call_without_free_slot_is_charged_nothing(store: RedisStore) -> None:
    """All or nothing: without a slot neither requests nor tokens are charged."""
    ledger = await store.open("slots", terms("100/s", "1000 tokens/s", concurrency=2))
    receipt = await ledger.commit(Batch(calls=(CALL,) * 3))
    assert outcomes(receipt) == ["booked", "booked", "full"]
    assert receipt.bookings[2].bound_by == "concurrency"
    seen = await ledger.peek()
    assert seen.slots == 2
    assert [(use.limit.resource, use.used) for use in seen.limits] == [
        ("requests", 2),
        ("tokens", 200),
    ]


async def test_slot_released_in_a_batch_serves_a_call_of_the_same_batch(store: RedisStore) -> None:
    """Release and admission are one round trip."""
    ledger = await store.open("same", terms("100/s", concurrency=1))
    first = await ledger.commit(Batch(calls=(CALL, CALL)))
    second = await ledger.commit(Batch(released=slots(first), calls=(CALL,)))
    assert outcomes(second) == ["booked"]
    again = await ledger.commit(Batch(released=slots(first), calls=(CALL,)))
    assert outcomes(again) == ["full"], "a slot given back twice came back twice"


async def test_workers_take_turns_for_slots(store: RedisStore) -> None:
    """The worker that has waited longest is called; newcomers do not pass those in line."""
    ledgers = [await store.open("turns", terms("100/s", concurrency=1)) for _ in range(3)]
    held = await ledgers[0].commit(Batch(calls=(CALL,)))
    for ledger in ledgers[1:]:
        assert outcomes(await ledger.commit(Batch(calls=(CALL, CALL)))) == ["full", "full"]
    order: list[int] = []
    turn = 0
    for _ in range(6):
        released = await ledgers[turn].commit(Batch(released=slots(held), calls=(CALL,)))
        assert outcomes(released) == ["full"], "the releaser passed those who wait"
        for number, ledger in enumerate(ledgers):
            receipt = await ledger.commit(Batch(calls=(CALL, CALL)))
            if outcomes(receipt)[0] == "booked":
                order.append(number)
                held, turn = receipt, number
    assert order == [1, 2, 0, 1, 2, 0]


async def test_only_next_worker_in_line_hears_of_free_slot(store: RedisStore) -> None:
    """Nobody polls: only the worker whose turn it is hears of it."""
    one, two, three = [await store.open("bell", terms("100/s", concurrency=1)) for _ in range(3)]
    for ledger in (two, three):
        await ledger.changed(timeout=1)  # begins to listen
    held = await one.commit(Batch(calls=(CALL,)))
    assert outcomes(await two.commit(Batch(calls=(CALL,)))) == ["full"]
    assert outcomes(await three.commit(Batch(calls=(CALL,)))) == ["full"]
    await one.commit(Batch(released=slots(held)))
    assert await two.changed(timeout=2)
    assert not await three.changed(timeout=0.05)
    assert outcomes(await two.commit(Batch(calls=(CALL,)))) == ["booked"]
    for ledger in (one, two, three):
        await ledger.aclose()


async def test_refund_is_available_at_once_and_debt_delays_later_calls(store: RedisStore) -> None:
    """A correction changes what is available to later calls."""
    ledger = await store.open("settle", terms("1000 tokens/minute"))
    call = {"tokens": 800}
    receipt = await ledger.commit(Batch(calls=(call,)))
    start = receipt.bookings[0].start
    less = Correction(start=start, booked=call, used={"tokens": 300})
    after = await ledger.commit(Batch(corrections=(less,), calls=({"tokens": 700},)))
    assert after.bookings[0].start == after.now
    more = Correction(start=start, booked={"tokens": 300}, used={"tokens": 900})
    await ledger.commit(Batch(corrections=(more,)))
    assert (await ledger.peek()).limits[0].available == -600
    owed = await ledger.commit(Batch(calls=({"tokens": 1},)))
    assert outcomes(owed) == ["later"]
    assert owed.ask_at - owed.now > 59 * SECOND


async def test_pause_by_one_worker_holds_up_all_and_ends_gradually(store: RedisStore) -> None:
    """A 429 that one worker gets stops the others, and they resume slowly."""
    one, two = [await store.open("pause", terms("1000/s burst 1000")) for _ in range(2)]
    await one.pause(SECOND // 5, gradually=True)
    await one.pause(SECOND // 10)
    receipt = await two.commit(Batch(calls=(FREE,) * 9))
    assert {booking.bound_by for booking in receipt.bookings} == {"paused"}
    starts = [booking.start - receipt.now for booking in receipt.bookings]
    assert SECOND // 10 < starts[0] < SECOND // 5
    steps = [start - starts[0] for start in starts]
    assert steps[1] == SECOND // 80
    assert steps[3] == 2 * SECOND // 80
    assert steps[7] == 3 * SECOND // 80


async def test_latest_limits_apply_to_all_workers(store: RedisStore) -> None:
    """A worker that opens the limiter with other limits, or configures it, changes them for all."""
    one = await store.open("terms", terms("10 requests/minute burst 10"))
    await one.commit(Batch(calls=(FREE,) * 8))
    two = await store.open("terms", terms("12 requests/minute burst 12", concurrency=3))
    receipt = await one.commit(Batch(calls=(CALL,) * 5))
    assert receipt.changed == two.terms == one.terms
    assert outcomes(receipt)[:4] == ["booked", "booked", "booked", "full"]
    assert (await two.peek()).limits[0].used == 11
    await one.configure(terms("12 requests/minute burst 12", concurrency=4))
    assert (await two.heartbeat([])).changed == one.terms


async def test_cancelled_commit_returns_units_and_slots(store: RedisStore) -> None:
    """If a caller is gone when the answer arrives, its units and slots are returned."""
    ledger = await store.open("gone", terms("100 requests/minute burst 100", concurrency=10))
    for delay in range(6):
        task = asyncio.create_task(ledger.commit(Batch(calls=(CALL,) * 5)))
        for _ in range(delay):
            await asyncio.sleep(0)
        assert task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.gather(*ledger._tasks)
    await asyncio.gather(*ledger._tasks)
    seen = await ledger.peek()
    assert (seen.limits[0].used, seen.slots) == (0, 0)


async def test_batch_whose_answer_was_lost_is_recognized_and_undone(store: RedisStore) -> None:
    """A batch that was booked, but whose answer was lost, is recognised by its number."""
    ledger = await store.open("once", terms("100 requests/minute burst 100"))
    first = await ledger.commit(Batch(calls=(FREE,) * 3))
    ledger._in_doubt = Batch(calls=(FREE,) * 3)  # as if the answer had not arrived
    second = await ledger.commit(Batch(calls=(FREE,)))
    assert outcomes(first) == ["booked"] * 3
    assert outcomes(second) == ["booked"]
    assert (await ledger.peek()).limits[0].used == 1, "what was in doubt was not given back once"


async def test_redis_keys_hold_only_limiter_name_and_expire(store: RedisStore, redis: Any) -> None:
    """Keys hold no tenant and no secret, have one hash tag, and expire."""
    ledger = await store.open("acme", terms("10 requests/minute", concurrency=2), slot_ttl=5)
    await ledger.commit(Batch(calls=(CALL,)))
    keys = await redis.keys("*")
    assert sorted(keys) == [
        f"asyncbucket:{{acme}}:{part}" for part in ("slots", "state", "workers")
    ]
    for key in keys:
        assert 0 < await redis.pttl(key) < 200_000


async def test_closed_worker_is_neither_counted_nor_waited_for(store: RedisStore) -> None:
    """Closing gives up the place in line and the worker's name."""
    one = await store.open("leave", terms("10/s", concurrency=1))
    two = await store.open("leave", terms("10/s", concurrency=1))
    held = await one.commit(Batch(calls=(CALL,)))
    await two.commit(Batch(calls=(CALL,)))
    await two.aclose()
    await two.aclose()
    assert (await one.peek()).workers == 1
    after = await one.commit(Batch(released=slots(held), calls=(CALL,)))
    assert outcomes(after) == ["booked"], "one who had left was waited for"


async def test_window_in_redis_uses_bounded_memory(store: RedisStore, redis: Any) -> None:
    """A long series of calls leaves fewer than 530 fields in the hash."""
    ledger = await store.open("memory", terms("100000/s burst 100000"))
    for _ in range(700):
        await ledger.commit(Batch(calls=(FREE,) * 3))
    assert await redis.hlen("asyncbucket:{memory}:state") < 530


@pytest.mark.parametrize("name", ["", "a{b}", "x" * 201, "line\nbreak"])
async def test_limiter_name_unfit_for_a_redis_key_is_refused(store: RedisStore, name: str) -> None:
    """A name is part of a key."""
    with pytest.raises(ValueError, match="1 to 200 printable characters"):
        await store.open(name, terms("10/s"))


async def test_users_redis_client_is_accepted_and_left_open(redis: Any) -> None:
    """A client that decodes answers serves as well, and is not closed by the store."""
    store = RedisStore.of(redis)
    ledger = await store.open("own", terms("10/s"))
    assert outcomes(await ledger.commit(Batch(calls=(FREE,)))) == ["booked"]
    await ledger.aclose()
    await store.aclose()
    assert await redis.ping()
    with pytest.raises(TypeError, match=r"redis\.asyncio\.Redis"):
        RedisStore.of("redis://")


async def test_workers_are_counted_by_their_heartbeats(store: RedisStore) -> None:
    """Workers are counted by their heartbeats."""
    one = await store.open("count", terms("10/s"), slot_ttl=0.2)
    two = await store.open("count", terms("10/s"), slot_ttl=0.2)
    assert (await one.heartbeat([])).workers == 2
    for _ in range(5):
        await asyncio.sleep(0.05)
        await one.heartbeat([])
    assert (await one.heartbeat([])).workers == 1
    assert isinstance(two, RedisLedger)


async def test_repr_and_errors_show_url_without_password() -> None:
    """Neither repr nor errors contain it."""
    store = open_store("redis://user:s3cret@127.0.0.1:1/0?health_check_interval=0")
    assert "s3cret" not in repr(store)
    assert store.url == "redis://user:***@127.0.0.1:1/0"
    with pytest.raises(StoreError) as error:
        await store.open("x", terms("10/s"))
    assert "cannot be reached" in str(error.value)
    assert "s3cret" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read") as wrong:
        open_store("redis+sentinel://:s3cret@host/mymaster")
    assert "s3cret" not in str(wrong.value)
    for url in ("redis://:s3[cret@host/0", "redis://:s3\uff1acret@host/0"):
        with pytest.raises(ValueError, match=r"'redis://:\*\*\*@host/0' is not a URL") as wrong:
            open_store(url)
        assert "cret" not in str(wrong.value)
    assert without_password("unix:///run/redis.sock?db=1") == "unix:///run/redis.sock"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://s3cret@host:6379/0", "redis://***@host:6379/0"),
        ("redis://:s3cret", "redis://:***"),
        ("redis://user:s3cret/0", "redis://user:***/0"),
        ("redis+cluster://a:1,b:s3cret", "redis+cluster://a:1,b:***"),
        ("redis+cluster://a:1,b:2", "redis+cluster://a:1,b:2"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://[::1]", "redis://[::1]"),
        ("sqlite:limits.db", "sqlite:limits.db"),
        ("sqlite:///a@b:c.db", "sqlite:///a@b:c.db"),
    ],
)
def test_misplaced_password_in_url_is_hidden_too(url: str, shown: str) -> None:
    """The colon before the password was forgotten, or the host behind it."""
    assert without_password(url) == shown
    if "s3cret" in shown or "***" in shown.rpartition("@")[2]:
        with pytest.raises(ValueError, match=r"\*\*\*") as wrong:
            open_store(url)
        assert "s3cret" not in "".join(traceback.format_exception_only(wrong.value))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://127.0.0.1/production", "a database must be a number, not 'production': redis://"),
        ("redis://127.0.0.1/1/2", "a database must be a number, not '1/2'"),
        ("redis://127.0.0.1/0?timeout=5", "unexpected keyword argument 'timeout'"),
        ("redis://127.0.0.1:1,127.0.0.1:2/0", r"for several servers write redis\+cluster:// or"),
    ],
)
def test_meaningless_redis_url_is_refused_when_limiter_is_made(url: str, why: str) -> None:
    """redis-py reads a database that is no number as 0, and checks settings only on connecting."""
    with pytest.raises(ValueError, match=f"^'redis://127.0.0.1[^?]*' cannot be read: .*{why}"):
        Limiter("10 RPM", store=url)


@pytest.mark.parametrize(
    "url",
    [
        "user:s3cret@host:6379/0",
        ":s3cret@host:6379",
        "redis:user:s3cret@host",
        *(f"redis://user:s3cret{sign}more@host:6379/0" for sign in "/#?"),
        "redis://user:1/s3cret@host:6379/0",
        "redis+sentinel://user:s3cret/more@host:1/main",
        "sqlite://user:s3cret@host/limits.db",
        "sqlite://host/limits.db?password=s3cret",
    ],
)
def test_malformed_url_is_refused_without_showing_password(url: str) -> None:
    """The scheme is missing, a sign is not escaped, or a file's URL has a host."""
    with pytest.raises(ValueError) as wrong:
        open_store(url)
    assert "s3cret" not in str(wrong.value)


def test_error_explains_unescaped_character_in_password() -> None:
    """Otherwise the error would be about a port that nobody wrote."""
    with pytest.raises(ValueError, match="write special characters of a password as %2F for /"):
        open_store("redis://user:s3cret/more@host:6379/0")
    assert isinstance(open_store("redis://host:6379/0?client_name=me@here"), RedisStore)


def test_url_passed_instead_of_client_is_not_shown_in_error() -> None:
    """The URL may hold a password."""
    with pytest.raises(TypeError, match=r"^a client must be .*, not a builtins\.str$"):
        RedisStore.of("redis://user:s3cret@host")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "redis+cluster://127.0.0.1:1",
            r"the store redis\+cluster://127\.0\.0\.1:1 cannot be reached: .*; see whether it runs",
        ),
        (
            "redis+sentinel://127.0.0.1:1/mymaster/0",
            r"cannot be reached: No master found for 'mymaster'; see whether the Sentinels run",
        ),
    ],
)
async def test_unreachable_cluster_or_sentinel_raises_store_error(url: str, message: str) -> None:
    """Errors of clusters and Sentinels are of other types, and contain the repr of clients."""
    store = open_store(url)
    with pytest.raises(StoreError, match=message) as error:
        await store.open("x", terms("10/s"))
    assert "<redis." not in str(error.value)
    await store.aclose()


async def test_heartbeat_does_not_take_released_slots_again(store: RedisStore) -> None:
    """A heartbeat asked for before a release, but sent after it, leaves out the released slots."""
    ledger = await store.open("late", terms("1000/s", concurrency=9))
    for _ in range(20):
        held = slots(await ledger.commit(Batch(calls=(CALL,) * 3)))
        release = asyncio.create_task(ledger.commit(Batch(released=held)))
        beat = asyncio.create_task(ledger.heartbeat(held))
        await asyncio.gather(release, beat)
        assert (await ledger.peek()).slots == 0


async def test_state_of_dead_workers_is_removed_from_redis(store: RedisStore, redis: Any) -> None:
    """A job that starts again and again, and never closes, does not fill the memory."""
    for _ in range(5):
        ledger = await store.open("cron", terms("1000 requests/day"), slot_ttl=0.1)
        await ledger.commit(Batch(calls=(FREE,)))
        await asyncio.sleep(0.15)
    fields = await redis.hkeys("asyncbucket:{cron}:state")
    assert sum(field.startswith("r:") for field in fields) == 1
    assert await redis.pttl("asyncbucket:{cron}:workers") > 86_400_000


async def test_closing_ledger_never_hangs_after_cancelled_listening(store: RedisStore) -> None:
    """Wherever it comes while connecting or listening, closing does not hang."""
    ledgers = [await store.open("close", terms("1 RPM")) for _ in range(40)]
    for number, ledger in enumerate(ledgers):
        listening = asyncio.create_task(ledger.changed(timeout=5))
        await asyncio.sleep(number * 0.0001)
        listening.cancel()
        async with asyncio.timeout(5):
            await ledger.aclose()
