"""A call that waits for one made inside it gives back the slots that the inner call needs."""

import asyncio
from pathlib import Path

import pytest

from asyncbucket import Limiter, pace
from asyncbucket.core.lease import Lease
from asyncbucket.core.lending import give_back
from asyncbucket.testing import VirtualClock, VirtualTime


def used(*limiters: Limiter) -> list[int]:
    """Return how many slots of each limiter are taken."""
    return [limiter._account.gates.slots[0].used for limiter in limiters]


async def take(limiter: Limiter) -> Lease:
    """Return a lease of ``limiter``."""
    return await limiter.acquire()


def make_tree() -> tuple[Limiter, Limiter, Limiter]:
    """Return a root and two children, with three slots each."""
    root = Limiter("1000/s", concurrency=3, clock=VirtualClock())
    return root, root.child("a", concurrency=3), root.child("b", concurrency=3)


def test_outer_call_gives_back_slot_of_common_parent_once() -> None:
    """The root's slot is given back for the inner call; the child's is kept until the call ends."""
    root, a, b = make_tree()
    with a.acquire_nowait() as lease:
        give_back(lease, b)
        give_back(lease, b)
        assert used(root, a, b) == [0, 1, 0]
    assert used(root, a, b) == [0, 0, 0]


def test_call_that_closes_cycle_of_limiters_gives_back_its_own_slot() -> None:
    """If ``a`` calls ``b`` and ``b`` calls ``c``, a call of ``c`` to ``a`` lends its slot."""
    root, a, b = make_tree()
    c = root.child("c", concurrency=3)
    leases = [child.acquire_nowait() for child in (a, b, c)]
    for lease, inside in zip(leases, (b, c, a), strict=True):
        give_back(lease, inside)
    assert used(root, a, b, c) == [0, 1, 1, 0]
    for lease in leases:
        lease.release()
    assert used(root, a, b, c) == [0, 0, 0, 0]


def test_several_paths_to_one_limiter_are_not_a_cycle() -> None:
    """Several ways that lead to the same limiter do not yet make a circle."""
    root, a, b = make_tree()
    c, d = root.child("c", concurrency=3), root.child("d", concurrency=3)
    for first, inside in ((a, b), (a, c), (b, d), (c, d), (d, b)):
        lease = first.acquire_nowait()
        give_back(lease, inside)
        assert used(first) == [0 if first is d else 1]
        lease.release()


def test_inner_call_passes_when_outer_call_gives_back_its_slot(virtual_time: VirtualTime) -> None:
    """It passes at once, though the outer call goes on."""

    async def main() -> None:
        root = Limiter("1000/s", concurrency=1, clock=virtual_time.clock)
        async with root.acquire() as lease:
            inside = asyncio.create_task(take(root))
            await asyncio.sleep(1)
            assert not inside.done()
            give_back(lease, root)
            (await inside).release()
        assert used(root) == [0]

    virtual_time.run(main())


def test_call_admitted_before_slots_were_set_gives_back_its_slot() -> None:
    """The call was counted when slots were set."""
    root = Limiter("1000/s", clock=VirtualClock())
    with root.acquire_nowait() as lease:
        root.reconfigure(concurrency=2)
        assert used(root) == [1]
        give_back(lease, root)
        assert used(root) == [0]
    assert used(root) == [0]


@pytest.mark.parametrize("of_parent", [False, True])
def test_released_or_inherited_lease_gives_back_no_slot(*, of_parent: bool) -> None:
    """A released lease, or one of a parent process, would give back another call's slot."""
    root = Limiter("1000/s", concurrency=3, clock=VirtualClock())
    lease, other = root.acquire_nowait(), root.acquire_nowait()
    if of_parent:
        root._budget.epoch = 1
    else:
        lease.release()
    before = used(root)
    give_back(lease, root)
    assert used(root) == before
    other.release()


def test_outer_call_keeps_its_slot_for_call_in_another_tree() -> None:
    """A call that waits in another tree needs no slot of this one."""
    root, elsewhere = (Limiter("1000/s", concurrency=1, clock=VirtualClock()) for _ in range(2))
    with root.acquire_nowait() as lease:
        give_back(lease, elsewhere)
        assert used(root) == [1]


async def test_slot_in_store_is_given_back_for_inner_call(tmp_path: Path) -> None:
    """The slot in the store comes back, whichever limiter object the inner call uses."""
    root = Limiter("1000/s", concurrency=1, store=f"sqlite:///{tmp_path}/limits.db?patience=5")
    async with root.acquire() as lease:
        give_back(lease, root.child("a"))
        async with root.acquire(timeout=5):
            pass
    await root.aclose()


def test_pace_wraps_llm_and_refuses_missing_limit() -> None:
    """It wraps in one line; without a limit it is an error."""
    mock = pytest.importorskip("llama_index.core.llms").MockLLM
    llm = pace(mock(), rpm=60, timeout=3.0)
    assert isinstance(llm, mock)
    assert str(llm.complete("one word")) == "one word"
    with pytest.raises(ValueError, match="without a limit would pace nothing"):
        pace(mock())
