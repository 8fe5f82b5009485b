"""What calls inherit from the code around them: a priority, a tenant, a deadline."""

import asyncio
import contextvars
import gc
import itertools
import math
import threading
import time
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest

import asyncbucket
from asyncbucket import AcquireTimeout, Limiter
from asyncbucket.core.context import Inherited, inherited
from asyncbucket.testing import VirtualTime


async def test_nested_contexts_combine_and_are_reset_on_exit(virtual_time: VirtualTime) -> None:
    """The inner value of a kind holds inside, other kinds stay, and afterwards all is as before."""
    assert inherited.get() is None
    with asyncbucket.priority("batch"), asyncbucket.tenant("acme"):
        with asyncbucket.priority(7), asyncbucket.deadline(5):
            end = virtual_time.now + 5
            assert inherited.get() == Inherited(priority=7, tenant="acme", deadline=end)
        assert inherited.get() == Inherited(priority=-1, tenant="acme")
    assert inherited.get() is None


def test_context_is_reset_after_error() -> None:
    with pytest.raises(KeyError), asyncbucket.tenant("acme"):
        raise KeyError
    assert inherited.get() is None


@pytest.mark.parametrize(
    "given", [asyncbucket.tenant("acme"), asyncbucket.priority(1), asyncbucket.deadline(5)]
)
def test_context_cannot_be_used_as_decorator(given: Any) -> None:
    """Around an async function it would end before the function runs, which nobody would notice."""

    async def ask() -> None:
        """Ask."""

    with pytest.raises(TypeError, match="inside the function"):
        given(ask)


def test_context_can_be_entered_only_once() -> None:
    """If two tasks shared one, each would reset the other's value."""
    given = asyncbucket.tenant("acme")
    with given, pytest.raises(RuntimeError, match=r"call priority\(\), tenant\(\) or"), given:
        pass
    assert inherited.get() is None
    with pytest.raises(RuntimeError, match="entered before"), given:
        pass


async def test_tasks_and_to_thread_inherit_context_but_threads_do_not() -> None:
    seen: list[Any] = []

    def note() -> None:
        here = inherited.get()
        seen.append(here and (here.priority, here.tenant))

    async def deeper() -> None:
        note()
        await asyncio.create_task(deepest())

    async def deepest() -> None:
        note()

    with asyncbucket.priority("interactive"), asyncbucket.tenant("acme"):
        task = asyncio.create_task(deeper())
        await asyncio.to_thread(note)
        thread = threading.Thread(target=note)
        thread.start()
        thread.join()
    await task
    assert sorted(seen, key=str) == [(1, "acme")] * 3 + [None]


async def test_task_keeps_context_it_was_started_with(virtual_time: VirtualTime) -> None:
    limiter = Limiter("100 RPM", name="key", clock=virtual_time.clock)

    async def call() -> str:
        await asyncio.sleep(1)
        lease = await limiter.acquire()
        return lease._node.name

    with asyncbucket.tenant("a"):
        task = asyncio.create_task(call())
    with asyncbucket.tenant("b"):
        assert await task == limiter.key("a").name


async def test_acquire_sync_in_to_thread_inherits_tenant_and_deadline() -> None:
    limiter = Limiter(concurrency=1, name="key")

    def call() -> str:
        with limiter.acquire_sync() as lease:
            return lease._node.name

    with asyncbucket.tenant("acme"), asyncbucket.deadline(20):
        assert await asyncio.to_thread(call) == limiter.key("acme").name
        with (
            limiter.acquire_nowait(),
            asyncbucket.deadline(0.01),
            pytest.raises(AcquireTimeout),
        ):
            await asyncio.to_thread(call)


def test_generator_shares_context_with_its_caller(virtual_time: VirtualTime) -> None:
    """What it sets is seen outside between two items, and is reset at its end."""

    def items() -> Generator[int]:
        with asyncbucket.tenant("inside"):
            yield 1

    with asyncbucket.tenant("outside"):
        iterator = items()
        next(iterator)
        assert inherited.get() == Inherited(tenant="inside")
        assert next(iterator, None) is None
        assert inherited.get() == Inherited(tenant="outside")
    assert virtual_time.now == 0


async def test_generator_can_be_closed_in_another_context(virtual_time: VirtualTime) -> None:
    """If the loop closes it half-way, there is no error, and that context does not change."""
    errors: list[Any] = []

    async def items() -> AsyncGenerator[int]:
        with asyncbucket.priority("batch"):
            yield 1
            yield 2

    async def leave_early() -> None:
        async for _ in items():
            break

    asyncio.get_running_loop().set_exception_handler(lambda _, what: errors.append(what))
    await asyncio.create_task(leave_early())
    gc.collect()
    await virtual_time.all_blocked()
    left = items()
    await asyncio.create_task(anext(left), context=contextvars.copy_context())
    await left.aclose()
    assert inherited.get() is None
    assert errors == []


async def test_earliest_deadline_holds(virtual_time: VirtualTime) -> None:
    """The earlier one holds, whichever is inside; the limiter's and the call's own hold as well."""
    limiter = Limiter("1 RPM", timeout=50, clock=virtual_time.clock)
    await limiter.acquire()
    for outer, inner, own, expected in (
        (10, 20, None, "10 s"),
        (20, 10, None, "10 s"),
        (20, 30, 5, "5 s"),
        (math.inf, 40, None, "40 s"),
        (math.inf, math.inf, None, "50 s"),
        (30, math.inf, math.inf, "30 s"),
    ):
        with (
            asyncbucket.deadline(outer),
            asyncbucket.deadline(inner),
            pytest.raises(AcquireTimeout, match=f"within {expected}: requests bind"),
        ):
            await limiter.acquire(timeout=own)
    assert virtual_time.now == 0


async def test_past_deadline_refuses_only_calls_that_would_wait(virtual_time: VirtualTime) -> None:
    """Calls that can pass at once still do."""
    limiter = Limiter("1 RPM", clock=virtual_time.clock)
    with asyncbucket.deadline(1):
        await asyncio.sleep(2)
        await limiter.acquire()
        with pytest.raises(AcquireTimeout, match="within 0 s"):
            await limiter.acquire()


async def test_waiting_call_fails_at_inherited_deadline(virtual_time: VirtualTime) -> None:
    key = Limiter(concurrency=1, clock=virtual_time.clock)
    held = await key.acquire()
    late = pytest.raises(AcquireTimeout, match="within 3 s: the one slot is taken")
    with asyncbucket.deadline(3), late:
        await key.acquire()
    assert virtual_time.now == 3
    with asyncbucket.deadline(3), pytest.raises(AcquireTimeout):
        await key.child("a").child("b").acquire()
    assert virtual_time.now == 6
    held.release()


def test_deadline_holds_without_event_loop() -> None:
    """A plain thread waits no longer than its deadline."""
    limiter = Limiter(concurrency=1)
    with limiter.acquire_nowait():
        start = time.monotonic()
        with asyncbucket.deadline(0.02), pytest.raises(AcquireTimeout):
            limiter.acquire_sync()
        assert 0.02 <= time.monotonic() - start < 10


@pytest.mark.parametrize("seconds", [-1, float("nan"), "soon", True, None])
def test_invalid_deadline_is_refused(seconds: Any) -> None:
    ran = False
    with pytest.raises(ValueError, match=r"^a deadline must be "), asyncbucket.deadline(seconds):
        ran = True
    assert not ran


@pytest.mark.parametrize("name", ["", None, 7])
def test_invalid_tenant_is_refused(name: Any) -> None:
    """The context, the call and `key` refuse it."""
    given = "''" if name == "" else type(name).__name__
    message = f"a tenant must be a non-empty string, not {given}"
    with pytest.raises(ValueError, match=message), asyncbucket.tenant(name):
        pass
    with pytest.raises(ValueError, match=message):
        Limiter().key(name)
    if name is not None:
        with pytest.raises(ValueError, match=message):
            Limiter().acquire(tenant=name)


async def test_calls_inherit_tenant_from_context(virtual_time: VirtualTime) -> None:
    """This holds for every kind of acquire; a tenant asked for by name is not replaced."""
    key = Limiter("100 RPM", name="key", clock=virtual_time.clock)
    chat = key.child("chat")
    with asyncbucket.tenant("acme"):
        leases = [
            await key.acquire(),
            key.acquire_nowait(),
            key.acquire_sync(),
            await chat.acquire(),
            await key.key("other").acquire(),
            await key.key("other").child("tools").acquire(),
            await key.acquire(tenant="third"),
        ]
    assert [lease._node.name for lease in leases] == [
        key.key("acme").name,
        key.key("acme").name,
        key.key("acme").name,
        chat.key("acme").name,
        key.key("other").name,
        key.key("other").name + "/tools",
        key.key("third").name,
    ]


async def test_deadlines_beyond_any_clock_are_compared_correctly(virtual_time: VirtualTime) -> None:
    limiter = Limiter("1/s", clock=virtual_time.clock)
    await limiter.acquire()
    has_passed = r"by a deadline that has passed: .* is an instant of time\.monotonic\(\)"
    for past in (-math.inf, -(10**400), -1e300):
        with pytest.raises(AcquireTimeout, match=has_passed):
            await limiter.acquire(deadline=past)
    with pytest.raises(AcquireTimeout, match="cannot pass within 0 s"):
        await limiter.acquire(deadline=0)
    with asyncbucket.deadline(10**400):
        await limiter.acquire(deadline=10**400, timeout=10**400)


async def test_zero_timeout_is_not_reported_as_past_deadline() -> None:
    """The message speaks of the timeout, though time passes while the call is made."""
    ticks = itertools.count(10**12, 1_000)
    limiter = Limiter("1/s", clock=lambda: next(ticks))
    await limiter.acquire()
    refused = "cannot pass within 0 s: requests bind for .* more; raise the timeout or the limit$"
    with pytest.raises(AcquireTimeout, match=refused):
        await limiter.acquire(timeout=0)
