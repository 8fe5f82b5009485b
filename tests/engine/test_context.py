"""What calls inherit from the code around them: a priority, a tenant, a deadline."""

import asyncio
import contextlib
import contextvars
import gc
import math
import pickle
from collections.abc import AsyncGenerator
from typing import Any

import pytest

import asyncbucket
from asyncbucket import AcquireTimeout, Limiter
from asyncbucket.engine.context import Inherited, inherited
from asyncbucket.testing import VirtualTime


async def test_nested_contexts_combine_and_are_reset_on_exit(time: VirtualTime) -> None:
    assert inherited.get() is None
    with asyncbucket.priority("batch"), asyncbucket.tenant("acme"):
        with asyncbucket.priority(7), asyncbucket.deadline(5):
            end = time.now + 5
            assert inherited.get() == Inherited(priority=7, tenant="acme", deadline=end)
        assert inherited.get() == Inherited(priority=-1, tenant="acme")
    assert inherited.get() is None


def test_context_is_entered_once() -> None:
    """If two tasks shared one, each would reset the other's value."""
    given = asyncbucket.tenant("acme")
    twice = pytest.raises(RuntimeError, match=r"call priority\(\), tenant\(\), deadline\(\) or")
    with contextlib.suppress(KeyError), given:
        with twice, given:
            pass
        raise KeyError
    assert inherited.get() is None
    with pytest.raises(RuntimeError, match="entered before"), given:
        pass


async def test_generator_can_be_closed_in_another_context(time: VirtualTime) -> None:
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
    await time.all_blocked()
    left = items()
    await asyncio.create_task(anext(left), context=contextvars.copy_context())
    await left.aclose()
    assert inherited.get() is None
    assert errors == []


async def test_earliest_deadline_holds(time: VirtualTime) -> None:
    limiter = Limiter("1 RPM", timeout=50, clock=time.clock)
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
    assert time.now == 0


async def test_past_deadline_refuses_only_calls_that_would_wait(time: VirtualTime) -> None:
    limiter = Limiter("1 RPM", clock=time.clock)
    with asyncbucket.deadline(1):
        await asyncio.sleep(2)
        await limiter.acquire()
        with pytest.raises(AcquireTimeout, match="within 0 s"):
            await limiter.acquire()
    has_passed = r"by a deadline that has passed: .* is an instant of time\.monotonic\(\)"
    with pytest.raises(AcquireTimeout, match=has_passed):
        await limiter.acquire(deadline=-math.inf)
    with asyncbucket.deadline(10**400):
        await limiter.acquire(deadline=10**400, timeout=10**400)


async def test_calls_inherit_tenant_from_context(time: VirtualTime) -> None:
    key = Limiter("100 RPM", name="key", clock=time.clock)
    chat, other = key.child("chat"), key.key("other")
    with asyncbucket.tenant("acme"):
        await key.acquire()
        key.acquire_nowait()
        key.acquire_sync()
        await chat.acquire()
        await other.acquire()
        await other.child("tools").acquire()
        await key.acquire(tenant="third")
        later = asyncio.ensure_future(key.acquire().__aenter__())
    with asyncbucket.tenant("another"):
        await later
    tenants = (key.key("acme"), chat.key("acme"), other, other.child("tools"), key.key("third"))
    assert [each.statistics().admitted for each in tenants] == [4, 1, 2, 1, 1]
    assert key.key("another").statistics().admitted == 0


def test_what_is_inherited_shows_no_tenant_and_cannot_be_pickled() -> None:
    with asyncbucket.tenant("jane@example.org"), asyncbucket.sticky("jane's chat"):
        assert "jane" not in repr(inherited.get())
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(asyncbucket.tenant("jane@example.org"))
    with pytest.raises(ValueError, match="a tenant must be a non-empty string, not ''"):
        asyncbucket.tenant("")
