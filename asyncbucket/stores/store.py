"""What a store is: the meters of a limiter, kept where several processes reach them.

A `Store` is a place: a file, a server. Opening a limiter's name in it gives a `Ledger`, and nearly
everything goes through one method, `Ledger.commit`. It hands over a `Batch` of calls that ask for
admission, corrections of earlier calls and slots that are given back, and returns a `Receipt`, in
one round trip and all at once or not at all. A worker sends one batch at a time; what comes up
meanwhile goes with the next (group commit), so a round trip serves as many calls as wait.

Reserve ahead. A call that cannot pass now is not sent away to ask again. It is booked at the first
instant that suits all limits, and the receipt names that `start`. The worker sleeps until then and
lets the call go. So nobody polls, and calls start in the order in which they were booked, over all
processes: no call gets a start earlier than the last one booked. A batch has a `horizon`, so that
an urgent call is not stuck behind far reservations: calls that would start more than that after the
batch's first start are left out (`Outcome.LATER`). A worker asks again when it has used up all but
a horizon of what it has. So if all workers want more than there is, they take turns with equal
slices of time.

Nothing is booked farther ahead than `FAR`, because what other calls give back should serve those
that wait. If a worker's first call would start later than that, all its calls get `Outcome.LATER`,
and the worker stands in the store's line for units: one place for each worker, first come, first
served. A worker that asks while others stand there joins them, however little it wants. Slots
cannot be booked ahead at all: nobody knows when one comes back. A call that needs a slot and finds
none is not booked (`Outcome.FULL`), nor is any call behind it, and its worker stands in the line
for slots.

`Ledger.changed` returns when a worker's turn has come in either line. While it waits, a worker
sends its waiting calls with every batch; a batch without calls leaves both lines. A slot is a
lease: it expires unless its worker's `heartbeat` prolongs it, so a killed process gives its slots
back.

All instants are integer nanoseconds of the store's own clock, which never goes back and means
nothing elsewhere: use differences. A worker that adds ``start - receipt.now`` to the moment when
the receipt arrived is never early. Amounts are whole units by resource; ``"concurrency": 1`` is a
slot. The arithmetic is that of `asyncbucket.core.meters`. A store may answer later than that by at most
one grain of its clock (a microsecond in Redis), never earlier.

A failure raises `StoreError` within the store's patience (0.2 s). The calls of a failed batch count
as not booked: anything that was booked nevertheless is given back when the store answers again. The
batch's corrections and releases are kept and applied then, once.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, Self

from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import Amounts
from asyncbucket.core.terms import read_slot_ttl

#: Nothing is booked that would start later than this many ns from now.
FAR: Final = 250_000_000
_LONGEST_NAME: Final = 200


def check_membership(name: str, slot_ttl: float) -> None:
    """Refuse a name or a time to live that no store accepts.

    Raises:
        ValueError: ``name`` or ``slot_ttl`` is not allowed: see `Store.open`.
    """
    if not (0 < len(name) <= _LONGEST_NAME and name.isprintable()) or set(name) & set("{}"):
        raise ValueError(
            f"a limiter's name in a store has 1 to {_LONGEST_NAME} printable characters and no "
            f"braces, not {name[: _LONGEST_NAME + 1]!r}"
        )
    read_slot_ttl(slot_ttl)


class Outcome(enum.Enum):
    """What became of a call."""

    #: Booked in all limits; it may go at `Booking.start`.
    BOOKED = "booked"
    #: Not booked: no slot was free, or others come first. Await `Ledger.changed`, then ask again.
    FULL = "full"
    #: Not booked: its start is beyond the horizon, or farther ahead than `FAR`, or others wait.
    #: Await `Ledger.changed`, and ask again at `Receipt.ask_at` at the latest.
    LATER = "later"
    #: Not booked: it costs more than a limit and can never pass.
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a limiter is limited to, the same for all workers that share it.

    Two limits are the same limit if they have the same resource and window.
    """

    limits: tuple[Limit, ...]
    #: The number of slots, over all workers; None for no bound.
    concurrency: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Change what was booked at ``start`` from ``booked`` to ``used``; the rest stays.

    What was booked beyond ``used`` comes back as if it had never been taken, unless the window has
    already passed it. What was used beyond the booking is a debt, dated now. ``used`` of 0 for each
    resource undoes a booking. Slots are given back by `Batch.released`, not by corrections:
    ``"concurrency"`` is ignored here.
    """

    start: int
    booked: Amounts
    used: Amounts

    @classmethod
    def undo(cls, booked: Amounts, start: int) -> Self:
        """Return the correction that gives all of a booking back."""
        return cls(start=start, booked=booked, used=dict.fromkeys(booked, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a worker tells the store: applied in this order, in one step, or not at all."""

    corrections: tuple[Correction, ...] = ()
    #: Slots that are given back; a slot that is no longer held is ignored.
    released: tuple[str, ...] = ()
    #: What calls cost, in the order in which they are to start.
    calls: tuple[Amounts, ...] = ()
    #: How long after the first start (ns) the others may start.
    horizon: int = 50_000_000


@dataclass(frozen=True, slots=True)
class Booking:
    """Answer one call of a batch."""

    outcome: Outcome
    #: When the call may go, in ns of the store's clock; 0 unless booked.
    start: int = 0
    #: What holds it up (a resource, ``"concurrency"`` for slots, ``"paused"``), or the limit it
    #: exceeds; None if nothing does.
    bound_by: str | None = None
    #: The slot that it holds and must give back; None if it needs none, or none are counted.
    slot: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Answer a batch."""

    #: The store's clock when the batch was applied.
    now: int
    #: One for each call, in order.
    bookings: tuple[Booking, ...] = ()
    #: The date of this batch's debts: now, or the last start if that is later.
    debts_at: int = 0
    #: When calls that were not booked should be sent again at the latest, even if nothing is heard:
    #: when a slot expires, or a start has come near enough. 0 if all were booked.
    ask_at: int = 0
    #: The terms in force if they differ from the ledger's; None if they are the same. The batch was
    #: applied under them.
    changed: Terms | None = None
    #: The store had lost its state, and began again with nothing available.
    lost: bool = False
    #: What the windows of `Terms.limits` have left, in that order, or less: used if the store is
    #: lost later. Empty if the store does not say.
    left: tuple[int, ...] = ()
    #: As many workers as `Pulse.workers`, or fewer; 0 if the store does not say.
    workers: int = 0
    #: Another worker waits for slots, so released slots should be reported at once.
    crowded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """Answer a heartbeat."""

    now: int
    #: Workers that have given a sign of life within the slots' time to live, this one included.
    workers: int
    #: Terms that another worker has set, if they are new to this one.
    changed: Terms | None = None
    #: See `Receipt.left`.
    left: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How much of one limit is used."""

    limit: Limit
    #: Units booked in the window, debts and reserved starts included.
    used: int
    #: Units that could pass now, with pacing: at most 0 while starts lie ahead, negative during a
    #: debt.
    available: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Show the state of a limiter, the same for all workers."""

    now: int
    terms: Terms
    limits: tuple[Use, ...]
    #: Slots taken, over all workers; 0 if none are counted.
    slots: int
    #: Nothing starts before this instant; 0 or in the past if there is no pause.
    paused_until: int
    #: The last start that was booked; no later call starts earlier.
    last_start: int
    workers: int
    #: What only this kind of store can tell, for people: version, memory, file...
    details: dict[str, str] = field(default_factory=dict)


class Ledger(Protocol):
    """Keep the meters of one limiter, as one worker sees them.

    Methods may be called by several tasks of one event loop; the ledger puts them in order. If a
    caller is cancelled during `commit`, its bookings are given back. Every method raises
    `StoreError` within the store's patience if the store is out of reach or unusable.
    """

    @property
    def name(self) -> str:
        """The limiter's name; all who open the same name share the same meters."""
        ...

    @property
    def worker(self) -> str:
        """This worker's unique name."""
        ...

    @property
    def terms(self) -> Terms:
        """The terms in force, as last heard."""
        ...

    async def commit(self, batch: Batch) -> Receipt:
        """Apply ``batch`` in one step; each call of it is charged once or not at all.

        Raises:
            StoreError: the store does not answer, or fails. See the module's last paragraph.
        """
        ...

    async def heartbeat(self, slots: Sequence[str]) -> Pulse:
        """Prolong the life of this worker and of ``slots``, all that it holds.

        Call it at intervals of a third of that life. A slot that the store has lost or let expire
        is taken again, because its call is still running.
        """
        ...

    async def changed(self, *, timeout: float) -> bool:
        """Wait until this worker's turn has come, for units or a slot, or the terms have changed.

        Return whether that happened; after ``timeout`` seconds return False. Changes since the last
        batch was answered count, so none is missed in between. A store that cannot notify checks by
        itself, at a low rate.
        """
        ...

    async def pause(self, span: int, *, gradually: bool = False) -> None:
        """Let no worker book a start for ``span`` ns from now; a pause that ends later stays.

        Starts that were already given stay. ``gradually`` makes a slow start afterwards: see
        `asyncbucket.feedback.pause`.
        """
        ...

    async def configure(self, terms: Terms) -> None:
        """Put ``terms`` in force for all workers; what is booked stays booked.

        Meters of limits that stay, by resource and window, keep their state; a new limit begins
        with nothing used; and limits that are not named are removed.
        """
        ...

    async def peek(self) -> Snapshot:
        """Return what is used and what is left, without changing anything."""
        ...

    async def aclose(self) -> None:
        """Give back this worker's places in line, and its name. Closing twice is fine.

        Slots are given back by their calls, or expire.
        """
        ...


class Store(Protocol):
    """A place where limiters' meters are kept; make one with `asyncbucket.stores.open_store`.

    It may be made anywhere, connects when it is first used, and serves the event loop on which it
    was first used.
    """

    @property
    def url(self) -> str:
        """Where it is, without a password."""
        ...

    def check(self, terms: Terms) -> None:
        """Refuse terms that cannot be kept here; this asks nobody and changes nothing.

        Raises:
            ValueError: a limit is above what the store counts; the message has both numbers.
        """
        ...

    async def open(
        self, name: str, terms: Terms, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> Ledger:
        """Join the limiter called ``name``, making it if necessary, and put ``terms`` in force.

        The latest terms count: workers that opened it with other terms adopt these.

        Args:
            name: which limiter; 1 to 200 printable characters, no braces.
            terms: its limits and slots.
            worker: a unique name for this worker; random by default.
            slot_ttl: seconds without a heartbeat after which a worker's slots come back, from 0.1
                to a day.

        Raises:
            StoreError: out of reach, or unusable.
            ValueError: the name or the time to live is not allowed: see `check_membership`.
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
