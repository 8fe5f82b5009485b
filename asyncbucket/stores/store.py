"""What a store is: the limits and slots of a limiter, kept where several processes reach them.

A `Store` is a place: a file, a server. Opening a limiter's name in it gives a `Ledger`, and
everything goes through one method, `Ledger.commit`. It hands over a `Batch`: calls that ask for
admission, corrections of earlier calls, and how many slots this worker still holds. It returns a
`Receipt`, in one round trip and all at once or not at all. A worker sends one batch at a time; what
comes up meanwhile goes with the next (group commit), so a round trip serves as many calls as wait.

Reserve ahead. A call that cannot pass now is not sent away to ask again. It is booked at the first
instant that suits all limits, and the receipt names that `start`. The worker sleeps until then and
lets the call go. So nobody polls. Nothing is booked farther ahead than `FAR`, because what other
calls give back should serve those that wait, and slots cannot be booked ahead at all.

The line. A worker whose next call cannot be booked yet stands in line, for units and slots alike.
The line is ordered by virtual time (start-time fair queueing): a worker that comes gets the tag that
the line has reached, and each time it is served its tag moves by the work that it got, divided by the
number of its callers that wait. So workers share in proportion to their callers, a newcomer is next,
and nobody is overtaken for ever. Of a worker the store keeps one record: its tag, what its first call
costs, and when it is due. A turn is 40 ms of the limit, and costs O(log n).

Who is first is told when its call can be booked, the others when their turn has come. `Ledger.on_turn` is
called then. A worker that is more than `LATE` behind its turn leaves the line until it comes. Nobody holds more than
concurrency / workers slots, rounded up, while another waits for one.

A worker lives for `slot_ttl` after each batch. When it is silent for longer, its place and its
slots come back; if it comes again, the slots that it holds count again.

All instants are integer nanoseconds of the store's own clock, which never goes back and means
nothing elsewhere: use differences. A worker that adds ``start - receipt.now`` to the moment when
the receipt arrived is never early. Amounts are whole units by resource; ``"concurrency": 1`` is a
slot. The arithmetic is that of `asyncbucket.engine.meters`. A store may answer later than that by at
most one grain of its clock (a microsecond in Redis), never earlier.

A failure raises `StoreError` within the store's patience (0.2 s). Whether the batch was applied is
then unknown, so nothing is sent again blindly. Each batch has a number, and a store answers a number
that it knows as it did before. The ledger keeps the batch that is in doubt, asks about it before it
sends another, and gives back what was booked for its calls. A caller that is cancelled counts as a
failure. Limits, pauses and corrections are kept until they are applied, once; all else has to be sent
again.
"""

import abc
import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Protocol, Self

from asyncbucket.engine.errors import StoreError
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.meters import Amounts
from asyncbucket.engine.statistics import LimitUse
from asyncbucket.engine.wording import in_seconds

#: Nothing is booked that would start later than this many ns from now.
FAR: Final = 100_000_000
#: A worker that has not come this many ns after its turn leaves the line until it comes.
LATE: Final = 20_000_000
#: The most units of a limit: a double, as a server's script has it, counts exactly to 128 times that;
#: the rest is for debts.
MAX_AMOUNT: Final = 1 << 46
#: Limits whose window is this many times as long as the shortest do not count as work.
LONG: Final = 100
#: The resource of which a slot is one unit.
SLOT: Final = "concurrency"
#: Within so many seconds a store answers, or counts as gone; and the first time, when it is opened.
PATIENCE: Final = 0.2
OPEN_PATIENCE: Final = 5.0
#: A store that has been slow gets more time: so many of its slowest trips, which fade by this factor.
_TRIPS: Final = 5
_FADING: Final = 0.9
#: Seconds of one wait of `in_time`.
_STEP: Final = 0.05


def is_tenant(name: str) -> bool:
    """Tell whether a limiter of this name is a tenant's: there are many, and each may be used once."""
    return "/*" in name


async def in_time(work: Coroutine[Any, Any, Any], patience: float, silence: str) -> Any:
    """Return the result of ``work``, unless it takes too long; then end it, and say ``silence``.

    A short wait that ends late proves that this process, or the machine, is too busy to tell whether
    the store is: it does not count.

    Raises:
        StoreError: it took longer than ``patience`` seconds of waits in time, or than any wait.
    """
    task, loop, left = spawn(work), asyncio.get_running_loop(), patience
    latest = loop.time() + max(patience, OPEN_PATIENCE)
    try:
        while left > 0 and loop.time() < latest:
            began = loop.time()
            await asyncio.wait((task,), timeout=_STEP)
            if task.done():
                return task.result()
            if loop.time() - began < 1.5 * _STEP:
                left -= _STEP
        raise StoreError(f"{silence} (waited {in_seconds(patience)})")
    finally:
        task.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitConfig:
    """What a limiter is limited to, the same for all workers that share it.

    Two limits are the same limit if they have the same resource and window.

    Raises:
        ValueError: a limit is above what a store counts.
    """

    #: In the order of their resources and windows, however they were given.
    limits: tuple[Limit, ...] = ()
    #: The number of slots, over all workers; None for no bound.
    concurrency: int | None = None
    #: A provider announced the limits, to a limiter that was given none: they refuse no call for good.
    learned: bool = False

    @property
    def work(self) -> dict[str, float]:
        """How much work (us) a unit of each resource is; see `asyncbucket.engine.node.Node.work`."""
        work: dict[str, float] = {}
        shortest = min((limit.per for limit in self.limits), default=0)
        for limit in self.limits:
            if limit.per <= LONG * shortest:
                each = limit.per * 1e6 / limit.units
                work[limit.resource] = min(each, work.get(limit.resource, each))
        return work

    def __post_init__(self) -> None:
        for limit in self.limits:
            if limit.units > MAX_AMOUNT:
                raise ValueError(
                    f"a store counts to {MAX_AMOUNT:,}: {limit} is above; lower the limit"
                )
        in_order = sorted(self.limits, key=lambda limit: (limit.resource, limit.window))
        object.__setattr__(self, "limits", tuple(in_order))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return what `to_dict` has written; whatever else is there does not matter."""
        limits = tuple(Limit(**limit) for limit in data["limits"])
        return cls(limits=limits, concurrency=data.get("concurrency"), learned=data["learned"])

    def after(self, other: Self) -> Self:
        """Return what is in force once this comes after ``other``: the latest limits, usually.

        But limits that were given are not replaced by learned ones, nor any limits by none.
        """
        if not self.limits or (self.learned and other.limits and not other.learned):
            return replace(other, concurrency=self.concurrency or other.concurrency)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Change what was booked at ``start`` from ``booked`` to ``used``; the rest stays.

    What was booked beyond ``used`` comes back as if it had never been taken, unless the window has
    already passed it. What was used beyond the booking is a debt, dated now. ``used`` of 0 for each
    resource undoes a booking. ``"concurrency"`` is ignored here: see `Batch.held`.
    """

    #: 0 for a call that was admitted without the store: nothing of it comes back.
    start: int
    booked: Amounts
    used: Amounts
    #: What was used beyond the booking is dated at ``start``, for calls that started late or without the store.
    #: It fills a limit, but no further: such calls hold up others no longer than a full limit does.
    dated: bool = False

    @classmethod
    def undo(cls, booked: Amounts, start: int) -> Self:
        """Return the correction that gives all of a booking back."""
        return cls(start=start, booked=booked, used=dict.fromkeys(booked, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a worker tells the store: applied in this order, in one step, or not at all."""

    #: Put these limits in force for all workers, or what `LimitConfig.after` leaves of them; what is booked
    #: under limits that stay, stays.
    config: LimitConfig | None = None
    #: Let no worker book a start for so many ns; a pause that ends later stays, and starts that were
    #: already given.
    pause: int = 0
    corrections: tuple[Correction, ...] = ()
    #: How many slots this worker holds, for calls that were booked earlier and are not over, whether or
    #: not slots are limited; None if unchanged.
    held: int | None = None
    #: What the waiting calls cost, in the order in which they are to start, as many as may start soon;
    #: ``()`` if none waits: then the worker leaves the line.
    calls: tuple[Amounts, ...] = ()
    #: How many calls wait in all: the worker's weight in the line.
    waiting: int = 1

    def then(self, later: "Batch") -> "Batch":
        """Return what must not be lost of both: corrections, the latest limits, and the longest pause."""
        return Batch(
            config=later.config or self.config,
            pause=max(self.pause, later.pause),
            corrections=self.corrections + later.corrections,
        )


@dataclass(frozen=True, slots=True)
class Booking:
    """Answer one call of a batch; one without a start is sent again: see `Ledger.on_turn`."""

    #: When the call may go, in ns of the store's clock; 0 if it was not booked, because its start is
    #: farther ahead than `FAR`, no slot is free, or others come first.
    start: int = 0
    #: What holds it up (a resource, ``"concurrency"`` for slots, ``"paused"``), or the limit it
    #: exceeds; None if nothing does.
    bound_by: str | None = None
    #: It costs more than a limit and can never pass.
    exceeds: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Answer a batch."""

    #: The store's clock when the batch was applied.
    now: int
    #: One for each call, in order.
    bookings: tuple[Booking, ...] = ()
    #: When calls that were not booked should be sent again at the latest, even if nothing is heard.
    #: 0 if all were booked.
    ask_at: int = 0
    #: What the windows of `LimitConfig.limits` have left, in that order, or less.
    left: tuple[int, ...] = ()
    #: Workers that have given a sign of life within their slots' time to live, this one included.
    workers: int = 1
    #: For how long (ns) no worker has come that was not known.
    steady: int = 0
    #: The worker stands in line: see `Ledger.on_turn`.
    in_line: bool = False
    #: The first call that was not booked cannot start before, whatever comes back; 0 if nothing is known.
    soonest: int = 0
    #: Slots are short, so those that come back should be reported at once: another worker waits for
    #: one, or fewer than half are free.
    crowded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Show the state of a limiter, the same for all workers."""

    now: int
    config: LimitConfig
    #: What the windows contain, starts that were booked ahead included.
    limits: tuple[LimitUse, ...]
    #: Slots taken, over all workers; 0 if none are counted.
    slots: int
    #: Nothing starts before this instant; 0 or in the past if there is no pause.
    paused_until: int
    #: The last start that was booked; no later call starts earlier.
    last_start: int
    workers: int


def spawn(work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    """Have ``work`` done; whether somebody still asks for its result does not matter."""
    task = asyncio.create_task(work, name="asyncbucket store")
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return task


class Ledger(abc.ABC):
    """Keep the limits of one limiter, as one worker sees them.

    Methods may be called by several tasks of one event loop; the ledger puts them in order. Every
    method raises `StoreError` within the store's patience if the store is out of reach or unusable.
    """

    #: Seconds until the store counts as gone.
    patience: float = PATIENCE

    def __init__(self, store: "Store", name: str, worker: str | None, silence: str) -> None:
        #: Where it is kept.
        self.store = store
        #: The limiter's name; all who open the same name share the same limits.
        self.name = name
        #: This worker's unique name.
        self.worker = secrets.token_hex(8) if worker is None else worker
        #: The limits in force, under which the last batch was applied.
        self.config = LimitConfig()
        #: What to say if the store does not answer in time.
        self.silence = silence
        #: What is called, on the loop, when this worker stands in line and its turn has come, or the limits have
        #: changed: in vain now and then, but never too few times. A store that cannot notify looks, at a low rate.
        self.on_turn: Callable[[], object] = int
        self._turn = asyncio.Lock()
        #: The number of the last batch; a worker that opens the limiter again repeats none.
        self._number = secrets.randbelow(1 << 48)
        #: That batch, while it is unknown whether it was applied, and what is on its way.
        self._in_doubt: Batch | None = None
        self._flight: asyncio.Task[Receipt] | None = None
        #: How long (s) the slowest trip took, of those of late.
        self._slowest = 0.0
        #: Limits, pauses and corrections that have not been sent.
        self._owed = Batch()
        #: How many slots it holds, as far as callers know.
        self._held = 0
        self._is_open = True

    async def commit(self, batch: Batch) -> Receipt:
        """Apply ``batch`` in one step; each call of it is charged once or not at all.

        If the caller is cancelled, what was booked for it is given back.

        Raises:
            StoreError: the store does not answer, or fails. See the module's last paragraph.
        """
        patience = max(self.patience, min(_TRIPS * self._slowest, OPEN_PATIENCE))
        return await self._commit(batch, patience)

    async def join(self, config: LimitConfig) -> Self:
        """Return the ledger; see `Store.open`."""
        self.config = config
        if not is_tenant(self.name):
            await self._commit(Batch(config=config), max(self.patience, OPEN_PATIENCE))
        return self

    async def _commit(self, batch: Batch, patience: float) -> Receipt:
        self._held = self._held if batch.held is None else batch.held
        self._owed = self._owed.then(batch)
        async with self._turn:
            receipt: Receipt = await in_time(self._exchange(batch), patience, self.silence)
            self._in_doubt = self._flight = None
        answers = zip(batch.calls, receipt.bookings, strict=True)
        self._held += sum(call.get(SLOT, 0) for call, each in answers if each.start)
        return receipt

    async def _exchange(self, batch: Batch) -> Receipt:
        if self._in_doubt is not None:
            receipt = await self._deliver(self._in_doubt)
            answers = zip(self._in_doubt.calls, receipt.bookings, strict=False)
            undone = [Correction.undo(call, each.start) for call, each in answers if each.start]
            self._owed = self._owed.then(Batch(corrections=tuple(undone)))
            self._in_doubt = self._flight = None
        owed, self._owed = self._owed, Batch()
        self._in_doubt = replace(owed, held=self._held, calls=batch.calls, waiting=batch.waiting)
        self._number += 1
        return await self._deliver(self._in_doubt)

    async def _deliver(self, batch: Batch) -> Receipt:
        """Send ``batch``, again if that has failed; or wait on for what is on its way."""
        flight = self._flight
        if flight is None or (flight.done() and (flight.cancelled() or flight.exception())):
            flight = self._flight = spawn(self._fly(batch))
        return await asyncio.shield(flight)

    async def _fly(self, batch: Batch) -> Receipt:
        loop = asyncio.get_running_loop()
        began = loop.time()
        receipt = await self._send(self._number, batch)
        self._slowest = max(loop.time() - began, _FADING * self._slowest)
        return receipt

    @abc.abstractmethod
    async def _send(self, number: int, batch: Batch) -> Receipt:
        """Apply ``batch``; if ``number`` was applied before, only answer as then."""

    async def aclose(self, last: Batch | None = None) -> None:
        """Say the ``last``, and leave: the worker no longer counts. Slots that it holds expire.

        A worker of a tenant only falls silent, since it comes and goes with each call.
        """
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.suppress(StoreError):  # it expires by itself
            last = last or Batch()
            if (
                self._in_doubt
                or self._owed.then(last) != Batch()
                or last.held not in (None, self._held)
            ):
                await self.commit(last)
            if not self._held and not is_tenant(self.name):
                await in_time(self._leave(), self.patience, self.silence)
        if self._flight is not None:
            self._flight.cancel()

    @abc.abstractmethod
    async def _leave(self) -> None:
        """Tell the store that this worker is gone."""


class Store(Protocol):
    """A place where limiters are kept; make one with `asyncbucket.stores.open_store`.

    It may be made anywhere, connects when it is first used, and serves the event loop and the
    process in which it was first used.
    """

    @property
    def url(self) -> str:
        """Where it is, without a password."""
        ...

    async def open(
        self, name: str, config: LimitConfig, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> Ledger:
        """Join the limiter called ``name``, making it if necessary, and put ``config`` in force.

        The latest limits count (see `LimitConfig.after`): workers that opened it with others adopt these.
        If it `is_tenant`, nothing is sent before the first batch, and ``config`` counts only if the store
        keeps no limits of that name.

        Args:
            name: which limiter; 1 to 200 printable characters, no braces, as `Limiter` sees to.
            config: its limits and slots.
            worker: a unique name for this worker; random by default.
            slot_ttl: seconds of silence after which a worker's slots come back, from 0.1 to a day.

        Raises:
            StoreError: out of reach, or unusable.
        """
        ...

    async def peek(self, name: str) -> Snapshot | None:
        """Look at a limiter without joining it; None if there is none of that name.

        Raises:
            StoreError: out of reach, or unusable.
        """
        ...

    async def names(self) -> list[str]:
        """Return the names of the limiters kept here, in order.

        Raises:
            StoreError: out of reach, or unusable.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections. Ledgers cannot be used afterwards."""
        ...
