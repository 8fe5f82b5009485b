"""What a tree of limiters does whose root's limits are kept elsewhere, in a store that a test plays."""

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from asyncbucket import AcquireTimeout, CostExceedsLimit, Lease, Limit, Limiter, WouldBlock
from asyncbucket.core.levels import give_back, observe_remaining, terms_of
from asyncbucket.core.meters import NEVER, Window
from asyncbucket.core.node import Meters
from asyncbucket.core.queue import AnyWaiter
from asyncbucket.core.seats import Seat
from asyncbucket.core.statistics import LimitUse
from asyncbucket.testing import VirtualTime
from tests.core.conftest import nothing_is_left, used

TPM = Limit("tokens", 100)


class Store:
    """Keep the limits of ``limiter``; let calls go when the test says so."""

    def __init__(self, limiter: Limiter, *, places: int = 2) -> None:
        self.pacer = limiter._node.pacer
        self.pacer.place = self
        limiter._node.pacer.is_plain = False
        self.window = Window(TPM)
        self.places = places
        #: Those that stand here, since when; and those that left.
        self.standing: list[tuple[AnyWaiter, int]] = []
        self.gone: list[AnyWaiter] = []
        self.slots_back: list[Lease] = []
        self.told: list[object] = []
        self.bound: tuple[str, int] | None = None

    def let_go(self, bound_by: str | None = "tokens") -> bool:
        """Let the first go, booked in the store's own window."""
        with self.pacer:
            (waiter, pushed), now = self.standing.pop(0), self.pacer.clock()
            for meter, resource in waiter.line.node.meters:
                if waiter.amounts.get(resource):
                    meter.redate(waiter.amounts[resource], pushed, now)
            self.window.book(waiter.amounts["tokens"], now)
            meters = (*waiter.line.node.meters, (self.window, "tokens"))
            passed = self.pacer.pass_on_locked(waiter, meters, now, bound_by)
            if not passed:  # it had given up
                self._unbook(waiter, now)
            for seat in list(self.pacer.seats.values()):
                seat.ring(now)
        assert isinstance(passed, bool)
        return passed

    def room(self, seat: Seat) -> bool:
        assert seat.waiting
        return len(self.standing) < self.places

    def push(self, waiter: AnyWaiter, below: Meters, now: int) -> None:
        assert below == waiter.line.node.meters[: len(below)]  # all but the root's
        assert now == self.pacer.clock()
        self.standing.append((waiter, now))

    def leave(self, waiter: AnyWaiter) -> bool:
        for each, pushed in self.standing:
            if each is waiter:
                self.standing.remove((waiter, pushed))
                self._unbook(waiter, pushed)
                return True
        return waiter in self.gone

    def _unbook(self, waiter: AnyWaiter, when: int) -> None:
        """Give back what was booked below the root."""
        self.gone.append(waiter)
        for meter, resource in waiter.line.node.meters:
            meter.unbook(waiter.amounts[resource], when)

    def ended(self, lease: Any) -> None:
        self.slots_back.append(lease)

    def waiting(self) -> int:
        return len(self.standing)

    def held_up(self) -> tuple[str, int] | None:
        return self.bound

    def use(self) -> Iterator[LimitUse]:
        yield LimitUse(TPM, used=self.window.used, available=100 - self.window.used)

    def options(self) -> dict[str, Any]:
        return {"store": "sqlite:///somewhere"}

    def check(self, limits: Iterable[Limit], concurrency: Any) -> None:
        if concurrency == "auto":
            raise ValueError("a store keeps a fixed number of slots")
        self.told.append((list(limits), concurrency))

    def configure(self) -> None:
        self.told.append("configured")

    def pause(self, span: int, *, gradually: bool) -> None:
        self.told.append((span, gradually))

    async def aclose(self) -> None:
        self.told.append("closed")


async def stand_in(
    store: Store, limiter: Limiter, time: VirtualTime, *, calls: int = 1, tokens: int = 30
) -> list[asyncio.Task[Lease]]:
    """Let calls wait until the store has them."""
    tasks = [asyncio.create_task(limiter.acquire(tokens=tokens)) for _ in range(calls)]
    await time.all_blocked()
    assert len(store.standing) == min(calls, store.places)
    return tasks


@pytest.mark.parametrize("path", [(), ("team", "agent")])
async def test_calls_pass_when_store_has_booked_them(
    virtual_time: VirtualTime, path: tuple[str, ...]
) -> None:
    """In order, and no more at a time than the store takes; what they give back goes there."""
    limiter = key = Limiter(clock=virtual_time.clock)
    store = Store(key)
    for name in path:
        limiter = limiter.child(name, "500 RPM", "50 images/m")
    calls = await stand_in(store, limiter, virtual_time, calls=3)
    await asyncio.sleep(2)
    for call in calls:
        assert store.let_go()
        lease = await call
        assert (lease.waited, lease.bound_by) == (2.0, "tokens")
        lease.settle(tokens=10)
        lease.release()
        lease.release()
        await virtual_time.all_blocked()
    assert store.window.used == 30
    assert len(store.slots_back) == 3
    assert used(key) == [30]
    nothing_is_left(key, limiter)
    assert (key.statistics().admitted, limiter.statistics().waits["tokens"].count) == (3, 3)


@pytest.mark.parametrize("when", ["in line", "in the store", "handed over", "just before"])
async def test_call_that_gives_up_leaves_nothing_anywhere(
    virtual_time: VirtualTime, when: str
) -> None:
    key = Limiter(clock=virtual_time.clock)
    store = Store(key, places=1)
    team = key.child("team", "60 TPM", concurrency=5)
    first, *others = await stand_in(
        store, team, virtual_time, calls=1 + (when == "in line"), tokens=30
    )
    gone = others[0] if when == "in line" else first
    if when == "just before":
        gone.cancel()
    if when in {"handed over", "just before"}:
        assert store.let_go() == (when == "handed over")
    gone.cancel()
    await virtual_time.all_blocked()
    assert gone.cancelled()
    assert len(store.slots_back) == (when == "handed over")
    if when == "in line":
        assert store.let_go()
        (await first)._undo()
    assert team.statistics().cancelled == 1
    assert used(team) == [0]
    nothing_is_left(key, team)


async def test_call_times_out_in_store(virtual_time: VirtualTime) -> None:
    """The error says what the store said binds."""
    key = Limiter(clock=virtual_time.clock)
    store = Store(key)
    call = asyncio.create_task(key.acquire(tokens=30, timeout=5))
    await virtual_time.all_blocked()
    store.bound = ("tokens", 20_000_000_000)
    with pytest.raises(AcquireTimeout, match="within 5 s: tokens bind for 15 s more"):
        await call
    assert (virtual_time.now, store.standing) == (5, [])
    nothing_is_left(key)


@pytest.mark.parametrize(
    ("bound", "why", "retry_after", "explained"),
    [
        (None, "the store that keeps its limits has to be asked", None, "pass at once behind 1"),
        (("tokens", 3_000_000_000), "tokens bind for 3 s more", 3.0, "wait 3 s behind 1 call: tok"),
        (("concurrency", NEVER), "all slots are taken", None, "wait behind 1 call until a slot"),
    ],
)
async def test_refusals_and_explanations_say_what_store_said(
    virtual_time: VirtualTime,
    bound: tuple[str, int] | None,
    why: str,
    retry_after: float | None,
    explained: str,
) -> None:
    key = Limiter(clock=virtual_time.clock)
    store = Store(key)
    (call,) = await stand_in(store, key, virtual_time)
    store.bound = bound
    with pytest.raises(WouldBlock, match=f"without waiting: {why}; wait with") as error:
        key.acquire_nowait(tokens=1)
    assert error.value.retry_after == retry_after
    assert str(key.explain(tokens=1)).startswith(f"a call would {explained}")
    assert key.statistics().bound_by == (bound and bound[0])
    call.cancel()


async def test_explanation_of_call_for_which_store_has_no_room(virtual_time: VirtualTime) -> None:
    """When it will have is not known here."""
    key = Limiter(clock=virtual_time.clock)
    store = Store(key)
    store.window.book(90, 0)
    said = key.explain(tokens=20)
    assert (said.wait, said.bound_by) == (None, "tokens")
    assert key.explain(tokens=10).bound_by is None
    key.reconfigure(concurrency=1)
    (call,) = await stand_in(store, key, virtual_time)
    assert key.explain(tokens=1).bound_by == "concurrency"
    call.cancel()
    await virtual_time.all_blocked()
    store.bound = ("tokens", 7_000_000_000)
    calls = await stand_in(store, key, virtual_time, calls=2)
    assert (key.explain().wait, key.explain().ahead) == (None, 2)
    for call in calls:
        call.cancel()


async def test_changes_of_root_are_told_to_store_and_those_of_children_are_not(
    virtual_time: VirtualTime,
) -> None:
    key = Limiter(TPM, clock=virtual_time.clock)
    store = Store(key)
    child = key.child("child")
    child.reconfigure("5 RPM", concurrency=3)
    child.pause(1)
    child.learn(Limit("tokens", 7))
    await child.aclose()
    assert store.told == []
    key.reconfigure("50 TPM", concurrency=3)
    key.pause(2, gradually=True)
    await key.aclose()
    assert store.told == [([Limit("tokens", 50)], 3), "configured", (2_000_000_000, True), "closed"]
    with pytest.raises(ValueError, match="a store keeps a fixed number"):
        key.reconfigure("40 TPM", concurrency="auto")
    assert key.limits == (Limit("tokens", 50),)
    observe_remaining(key, 0, resource="tokens", per=60)
    assert used(key) == [0]
    assert terms_of(key)["store"] == "sqlite:///somewhere"


async def test_call_that_can_never_pass_fails_in_line_and_in_store(
    virtual_time: VirtualTime,
) -> None:
    key = Limiter(TPM, clock=virtual_time.clock)
    store = Store(key, places=1)
    calls = await stand_in(store, key, virtual_time, calls=2)
    key.reconfigure("20 TPM")
    await virtual_time.all_blocked()
    with pytest.raises(CostExceedsLimit, match="exceeds the limit of 20 tokens"):
        await calls[1]
    (waiter, _), error = store.standing[0], CostExceedsLimit("so says the store")
    with store.pacer:
        store.pacer.fail_locked(waiter, error)
        store.pacer.fail_locked(waiter, error)
    with pytest.raises(CostExceedsLimit, match="so says the store"):
        await calls[0]
    assert store.standing == []
    nothing_is_left(key)
    assert key.statistics().refused == 2


async def test_slot_in_store_is_given_up_for_call_inside(virtual_time: VirtualTime) -> None:
    key = Limiter(clock=virtual_time.clock)
    store = Store(key)
    (call,) = await stand_in(store, key, virtual_time)
    store.let_go(bound_by=None)
    lease = await call
    assert lease.bound_by is None
    give_back(lease, key)
    assert store.slots_back == [lease]
    lease.release()
    nothing_is_left(key)
