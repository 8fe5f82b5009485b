"""What an admission gives: a lease, and the object that one awaits or enters to get it."""

from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, Protocol, Self

from asyncbucket.adaptive import Adaptive
from asyncbucket.cost import Cost, whole
from asyncbucket.errors import AsyncBucketError
from asyncbucket.loops import Holder, reset_after_fork
from asyncbucket.meters import Gates, Slots, Window
from asyncbucket.pacer import Budget


class Account:
    """Keep a limiter's books of leases; all its numbers are read and written under the lock."""

    __slots__ = (
        "__weakref__",  # pyright: ignore[reportUninitializedInstanceVariable]
        "adaptive",
        "admitted",
        "budget",
        "cancelled",
        "in_flight",
        "refunded",
        "refused",
        "slots",
        "waits",
    )

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.admitted = 0
        self.cancelled = 0
        self.refused = 0
        self.in_flight = 0
        self.slots: Slots | None = None
        #: What finds the number of slots, where it is not given.
        self.adaptive: Adaptive | None = None
        #: Units given back by settling, by resource.
        self.refunded: dict[str, int] = {}
        #: How many calls waited, and for how many ns together, by what bound them.
        self.waits: dict[str, tuple[int, int]] = {}
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a child process: the leases in flight are the parent's."""
        self.in_flight = 0
        if self.slots is not None:
            self.slots.used = 0

    def resize_locked(self) -> None:
        """Take over the number of slots that was found, and let in whoever fits by it."""
        assert self.adaptive is not None
        assert self.slots is not None
        larger = self.adaptive.size > self.slots.size
        self.slots.reshape(size=self.adaptive.size)
        if larger and self.budget.waiting:
            self.budget.ring_locked()

    def waited_locked(self, lease: "Lease", waited: int, bound_by: str | None) -> None:
        """Note in the lease and in the books that a call waited ``waited`` ns."""
        lease.waited = waited * 1e-9
        lease.bound_by = bound_by
        if bound_by is not None:
            count, total = self.waits.get(bound_by, (0, 0))
            self.waits[bound_by] = (count + 1, total + waited)


class Door(Protocol):
    """Let calls in; a `Limiter` as an `Acquisition` sees it."""

    def try_now(self, amounts: dict[str, int], *, on_loop: bool = True) -> "Lease | None":
        """Return a lease if that is possible without waiting."""
        ...

    async def wait(
        self, amounts: dict[str, int], deadline: int | None, *, on_loop: bool = True
    ) -> "Lease":
        """Return a lease in turn."""
        ...


class Lease:
    """Hold what one admission took, until it is released.

    It is a context manager, plain and async, that releases on leaving. `settle` says what the call
    really used; `release` gives the slot back. Both are synchronous, may be called from any thread
    and repeatedly, and before or after each other. A lease that is dropped releases itself.

    Where the limiter finds its concurrency by itself, how a call ended is told by which of `release`,
    `overloaded` and `failed` comes first; leaving by an exception is one of the latter two.
    """

    __slots__ = (
        "__weakref__",  # pyright: ignore[reportUninitializedInstanceVariable]
        "_account",
        "_amounts",
        "_epoch",
        "_gates",
        "_holder",
        "_open",
        "_settled",
        "_when",
        "bound_by",
        "waited",
    )

    def __init__(
        self,
        account: Account,
        gates: Gates,
        amounts: dict[str, int],
        when: int,
        holder: Holder,
    ) -> None:
        """Open the books for a booking at ``when``; called with the budget's lock held."""
        self._account = account
        self._gates = gates
        self._amounts = amounts
        self._when = when
        self._holder = holder
        self._settled: dict[str, int] | None = None
        self._open = True
        self._epoch = account.budget.epoch
        #: Seconds between asking and admission.
        self.waited = 0.0
        #: The resource that held it up: ``"requests"``, ``"tokens"``, ``"concurrency"``,
        #: ``"paused"``...; None if it did not wait.
        self.bound_by: str | None = None
        account.admitted += 1
        account.in_flight += 1
        holder.leases += 1

    @property
    def cost(self) -> Cost:
        """What was reserved."""
        return Cost.of(self._amounts)

    @property
    def released(self) -> bool:
        """Whether the lease has been released."""
        return not self._open

    def settle(
        self,
        *,
        requests: float | None = None,
        tokens: float | None = None,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        **resources: float,
    ) -> None:
        """Say what the call really used.

        What was reserved beyond it is given back at once, and whoever waits is admitted by it; what
        was used beyond the reservation is a debt that later calls wait for. Resources that are not
        named stay as they are. Settling again corrects the earlier word; the same word twice
        changes nothing.

        Raises:
            TypeError, ValueError: an amount is no finite number from 0 on; nothing is changed then.
        """
        if tokens is None and (input_tokens is not None or output_tokens is not None):
            reserved = self._settled or self._amounts
            tokens = sum(
                reserved.get(name, 0) if given is None else given
                for name, given in (
                    ("input_tokens", input_tokens),
                    ("output_tokens", output_tokens),
                )
            )
        named = {
            "requests": requests,
            "tokens": tokens,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            **resources,
        }
        used = {name: whole(value, name) for name, value in named.items() if value is not None}
        budget = self._account.budget
        with budget.lock:
            if self._settle_locked(used):
                budget.ring_locked()

    def _settle_locked(self, used: dict[str, int]) -> bool:
        """Correct the meters to ``used``; return whether anything came back."""
        now = self._account.budget.clock()
        reserved, settled = self._amounts, self._settled or {}
        for meter, resource in self._gates.meters:
            if resource in used:
                more = used[resource] - settled.get(resource, reserved.get(resource, 0))
                if more > 0:
                    meter.owe(more, now)
                elif more < 0:
                    meter.unbook(-more, self._when, left=used[resource])
                if not self._open and isinstance(meter, Window):
                    meter.lent -= more
        back = False
        for resource, actual in used.items():
            less = settled.get(resource, reserved.get(resource, 0)) - actual
            if less > 0:
                refunded = self._account.refunded
                refunded[resource] = refunded.get(resource, 0) + less
                back = True
        self._settled = settled | used
        return back

    def sent(self) -> None:
        """Say that the call leaves only now, so that its cost is dated now.

        Between an admission and the moment when a request is on its way lies a client's work. A
        provider counts from the arrival; dating the booking likewise keeps windows true.
        """
        budget = self._account.budget
        with budget.lock:
            now = budget.clock()
            booked = self._amounts | (self._settled or {})
            for meter, resource in self._gates.meters:
                if resource != "concurrency" and booked.get(resource):
                    meter.unbook(booked[resource], self._when)
                    meter.owe(booked[resource], now)
            self._when = now

    def release(self) -> None:
        """Give the slot back; the cost stays counted, as reserved or as settled."""
        if self._open:
            account = self._account
            lock = account.budget.lock
            lock.acquire()  # `with` would take twice the time
            try:
                if account.adaptive is not None and self._counts():
                    self._succeeded_locked(account.adaptive)
                self._release_locked()
            finally:
                lock.release()

    def overloaded(self) -> None:
        """Release, and say that the server refused the call (429, 503) or let it time out.

        It matters where the limiter finds its concurrency by itself: there will be fewer slots.
        """
        account = self._account
        with account.budget.lock:
            if account.adaptive is not None and self._counts():
                account.adaptive.overloaded(started=self._when, now=account.budget.clock())
                account.resize_locked()
            self._release_locked()

    def failed(self) -> None:
        """Release, and say that how long the call took tells nothing about the server's load."""
        with self._account.budget.lock:
            self._release_locked()

    def _succeeded_locked(self, adaptive: Adaptive) -> None:
        latency = self._account.budget.clock() - self._when
        adaptive.succeeded(latency, waited=self.bound_by == "concurrency")
        self._account.resize_locked()

    def _counts(self) -> bool:
        """Tell whether the lease is still to be released, and in the process that took it."""
        return self._open and self._epoch == self._account.budget.epoch

    def _broken(self, error: BaseException) -> None:
        """Release on leaving a ``with`` block by an exception."""
        if isinstance(error, TimeoutError) and not isinstance(error, AsyncBucketError):
            self.overloaded()
        else:
            self.failed()

    def _release_locked(self) -> None:
        account = self._account
        budget = account.budget
        if not self._open or self._epoch != budget.epoch:
            return
        self._open = False
        account.in_flight -= 1
        self._holder.leases -= 1
        booked = self._amounts if self._settled is None else self._amounts | self._settled
        for window, resource in self._gates.windows:
            window.lent -= booked.get(resource, 0)
        for slots in self._gates.slots:
            slots.used -= 1
            if budget.waiting:
                budget.ring_locked()

    def undo(self) -> None:
        """Give everything back, as if the call had never been; for calls that were not made."""
        reserved = {name: 0 for name in self._amounts if name != "concurrency"}
        with self._account.budget.lock:
            if self._settle_locked(reserved):
                self._account.budget.ring_locked()
        self.failed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.release()
        else:
            self._broken(error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)

    def __del__(self) -> None:
        if self._open:  # a finalizer may run anywhere, even inside the lock
            self._account.budget.drop(self._release_locked)

    def __repr__(self) -> str:
        state = "open" if self._open else "released"
        return f"<Lease {state} {self.cost} waited={self.waited:.3f} s bound_by={self.bound_by}>"


class Acquisition(Coroutine[Any, Any, Lease]):
    """Be awaited for a lease, or entered for one that is released on leaving.

    Nothing is taken before that. It is a coroutine as far as ``asyncio.create_task`` and its like
    are concerned.
    """

    __slots__ = ("_amounts", "_coroutine", "_deadline", "_door", "_lease")

    def __init__(self, door: Door, amounts: dict[str, int], deadline: int | None) -> None:
        self._door = door
        self._amounts = amounts
        self._deadline = deadline
        self._lease: Lease | None = None
        self._coroutine: Generator[Any, Any, Lease] | None = None

    def __await__(self) -> Generator[Any, Any, Lease]:
        lease = self._door.try_now(self._amounts)
        if lease is None:
            lease = yield from self._door.wait(self._amounts, self._deadline).__await__()
        return lease

    async def __aenter__(self) -> Lease:
        lease = self._door.try_now(self._amounts)
        if lease is None:
            lease = await self._door.wait(self._amounts, self._deadline)
        self._lease = lease
        return lease

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            self._lease.__exit__(kind, error, trace)

    def _running(self) -> Generator[Any, Any, Lease]:
        if self._coroutine is None:
            self._coroutine = self.__await__()
        return self._coroutine

    def send(self, value: Any) -> Any:
        """Run as a coroutine."""
        return self._running().send(value)

    def throw(self, *args: Any) -> Any:
        """Raise inside, as in a coroutine."""
        return self._running().throw(*args)

    def close(self) -> None:
        """End, as a coroutine does."""
        if self._coroutine is not None:
            self._coroutine.close()
