"""What a store is: the meters of a limiter, kept where several processes reach them.

A `Store` is a place: a file, a server. Opening a limiter's name in it gives a `Ledger`, and nearly
everything goes through one verb of it: `Ledger.commit` hands over a `Batch` of calls that want in,
corrections of earlier calls and slots that are given back, and brings a `Receipt`, in one round
trip and all at once or not at all. A worker sends one batch at a time; what comes up meanwhile
gathers for the next (group commit), so a round trip serves as many calls as wait.

Reserve ahead. A call that cannot pass now is not sent away to ask again: it is booked at the first
instant that suits all limits, and the receipt names that `start`. The worker sleeps until then and
lets the call go. So nobody polls, and calls start in the order in which they were booked, over all
processes: no call gets a start earlier than the last one that was booked. In order that an urgent
call is not stuck behind far reservations, a batch has a `horizon`: calls that would start later than
so long after the first one are left out (`Outcome.LATER`). A worker asks again when it has used up
what it has but for a horizon. So workers that all want more than there is take turns with equal
slices of time.

Nothing is booked farther ahead than `FAR`, for what other calls give back shall serve those who
wait. A worker whose first call would start later gets `Outcome.LATER` for all of them and stands in
the store's line of those who wait for units: one place a worker, first come, first served. Whoever
asks while others stand there joins them, however little it wants. Slots cannot be booked ahead at
all: nobody knows when one comes back. A call that needs one and finds none is not booked
(`Outcome.FULL`), nor is any behind it, and its worker stands in the line of those who wait for slots.

`Ledger.changed` returns when a worker's turn has come in either line. As long as it waits it sends its
waiting calls with every batch; a batch without calls leaves both. A slot is a lease: it expires unless
its worker's `heartbeat` prolongs it, so that a killed process gives its slots back.

All instants are integer nanoseconds of the store's own clock, which never goes back and means
nothing elsewhere: use differences. A worker that adds ``start - receipt.now`` to the moment when the
receipt arrived is never early. Amounts are whole units by resource, ``"concurrency": 1`` being a
slot. The arithmetic is that of `asyncbucket.meters`; a store may answer later than it by at most one
grain of its clock (a microsecond in Redis), never earlier.

What fails raises `StoreError` within the store's patience (0.2 s). The calls of a batch that failed
count as not booked: what may have been booked nevertheless is given back when the store answers
again. Its corrections and releases are kept and applied then, once.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, Self

from asyncbucket.limiter.terms import read_slot_ttl
from asyncbucket.limits import Limit
from asyncbucket.meters import Amounts

#: Nothing is booked that would start later than so many ns from now.
FAR: Final = 250_000_000
_LONGEST_NAME: Final = 200


def check_membership(name: str, slot_ttl: float) -> None:
    """Refuse what no store opens a limiter with.

    Raises:
        ValueError: ``name`` or ``slot_ttl`` cannot be: see `Store.open`.
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
    #: Not booked: its start lies beyond the horizon, or farther ahead than `FAR`, or others wait.
    #: Await `Ledger.changed`, and ask again at `Receipt.ask_at` at the latest.
    LATER = "later"
    #: Not booked: it costs more than a limit and can never pass.
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a limiter is limited to: the same for all workers that share it.

    Two limits are the same limit if they have resource and window in common.
    """

    limits: tuple[Limit, ...]
    #: The number of slots, over all workers; None for no bound.
    concurrency: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Change what was booked at ``start`` from ``booked`` to ``used``; the rest stays.

    What was booked beyond ``used`` comes back, as if never taken, unless the window has passed it
    already; what was used beyond it is a debt, dated now. A booking that was for nothing is undone
    by ``used`` of 0 each. Slots are given back by `Batch.released`, not by corrections:
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
    """What a worker has to say: applied in this order, in one step, or not at all."""

    corrections: tuple[Correction, ...] = ()
    #: Slots that are given back; one that is not held (any more) is ignored.
    released: tuple[str, ...] = ()
    #: What calls cost, in the order in which they shall start.
    calls: tuple[Amounts, ...] = ()
    #: How far behind the first start (ns) others may lie.
    horizon: int = 50_000_000


@dataclass(frozen=True, slots=True)
class Booking:
    """Answer one call of a batch."""

    outcome: Outcome
    #: When it may go, in ns of the store's clock; 0 unless booked.
    start: int = 0
    #: The resource that holds it up (``"concurrency"`` for slots, ``"paused"``), or that it exceeds;
    #: None if nothing does.
    bound_by: str | None = None
    #: The slot that it holds, to be given back; None if it needs none, or none are counted.
    slot: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Answer a batch."""

    #: The store's clock when the batch was applied.
    now: int
    #: One for each call, in order.
    bookings: tuple[Booking, ...] = ()
    #: Under which date debts of this batch were counted: now, or the last start if that is later.
    debts_at: int = 0
    #: When calls that were not booked should be sent again at the latest, though nothing is heard:
    #: a slot expires, or a start will have come near enough. 0 if all were booked.
    ask_at: int = 0
    #: The terms in force if they are others than the ledger had; None if they are the same. The
    #: batch was applied under them.
    changed: Terms | None = None
    #: The store had lost what it kept, and began again with nothing available.
    lost: bool = False
    #: What the windows of `Terms.limits` have left, in that order, or less: what is known should the
    #: store be lost. Empty if the store does not say.
    left: tuple[int, ...] = ()
    #: As many workers as `Pulse.workers`, or fewer; 0 if the store does not say.
    workers: int = 0
    #: Another worker stands in line for slots: what is released is best told at once.
    crowded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """Answer a heartbeat."""

    now: int
    #: Workers whose last sign of life is younger than the slots' time to live, this one included.
    workers: int
    #: Terms that another worker has set, if they are new to this one.
    changed: Terms | None = None
    #: See `Receipt.left`.
    left: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How much of one limit is used."""

    limit: Limit
    #: Units booked within the window, debts and reserved starts included.
    used: int
    #: Units that could pass now, pacing included: at most 0 while starts lie ahead, negative while a
    #: debt is paid off.
    available: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Show the state of a limiter, as it is for all workers."""

    now: int
    terms: Terms
    limits: tuple[Use, ...]
    #: Slots taken, over all workers; 0 if none are counted.
    slots: int
    #: Nothing starts before this instant; 0 or past if nothing is paused.
    paused_until: int
    #: The last start that was booked: no later call starts earlier.
    last_start: int
    workers: int
    #: What stands there that only this kind of store has, for people: version, memory, file...
    details: dict[str, str] = field(default_factory=dict)


class Ledger(Protocol):
    """Keep the meters of one limiter, as one worker sees them.

    Methods may be called by several tasks of one event loop; the ledger puts them in order. A
    caller that is cancelled during `commit` has its bookings given back. Every method raises
    `StoreError` within the store's patience if the store is out of reach or unusable.
    """

    @property
    def name(self) -> str:
        """The limiter's name: who opens the same name shares the same meters."""
        ...

    @property
    def worker(self) -> str:
        """This worker's own name, unlike any other's."""
        ...

    @property
    def terms(self) -> Terms:
        """The terms in force, as last heard."""
        ...

    async def commit(self, batch: Batch) -> Receipt:
        """Apply ``batch`` in one step; each call of it is charged once or not at all.

        Raises:
            StoreError: the store does not answer, or cannot do it. See the module's last paragraph.
        """
        ...

    async def heartbeat(self, slots: Sequence[str]) -> Pulse:
        """Prolong this worker's life and ``slots``, all that it holds; a third of their life apart.

        A slot that the store knows no more, having lost or expired it, is taken again: its call is
        still under way.
        """
        ...

    async def changed(self, *, timeout: float) -> bool:
        """Wait until this worker's turn has come, for units or a slot, or the terms have changed.

        Return whether that happened; ``timeout`` seconds later at the latest it is False. What has
        happened since the last batch was answered counts: nothing is lost in between. A store that
        cannot tell looks itself, seldom enough.
        """
        ...

    async def pause(self, span: int, *, gradually: bool = False) -> None:
        """Let no worker book a start for ``span`` ns from now; an earlier, longer pause stays.

        Starts that were given already stay. ``gradually`` begins again slowly: see
        `asyncbucket.feedback.pause`.
        """
        ...

    async def configure(self, terms: Terms) -> None:
        """Put ``terms`` in force for all workers; what is booked stays booked.

        Meters keep what they know of limits that stay, by resource and window; a new limit begins
        with nothing used, and what is not named is limited no more.
        """
        ...

    async def peek(self) -> Snapshot:
        """Return what is used and what is left, changing nothing."""
        ...

    async def aclose(self) -> None:
        """Give back what this worker holds in the line, and its name. Closing twice is fine.

        Slots are given back by their owners, or expire.
        """
        ...


class Store(Protocol):
    """A place where limiters' meters are kept; make one by `asyncbucket.stores.open_store`.

    It may be made anywhere, and connects when it is first used. It serves the event loop on which
    it was first used.
    """

    @property
    def url(self) -> str:
        """Where it is, without a password."""
        ...

    def check(self, terms: Terms) -> None:
        """Refuse terms that cannot be kept here; nobody is asked, and nothing happens.

        Raises:
            ValueError: a limit is above what the store counts; the message has both numbers.
        """
        ...

    async def open(
        self, name: str, terms: Terms, *, worker: str | None = None, slot_ttl: float = 30.0
    ) -> Ledger:
        """Join the limiter called ``name``, making it if need be, and put ``terms`` in force.

        The last word counts: workers that opened it with other terms adopt these.

        Args:
            name: which limiter; 1 to 200 printable characters, no braces.
            terms: its limits and slots.
            worker: a name for this worker, unlike any other's; a random one by default.
            slot_ttl: seconds without a heartbeat after which a worker's slots come back, from 0.1
                to a day.

        Raises:
            StoreError: out of reach, or unusable.
            ValueError: such a name or time to live cannot be: `check_membership` says so.
        """
        ...

    async def peek(self, name: str) -> Snapshot | None:
        """Look at a limiter without taking part in it; None if none of that name is kept here.

        Raises:
            StoreError: out of reach, or unusable.
        """
        ...

    async def names(self) -> list[str]:
        """Return which limiters are kept here, in order.

        Raises:
            StoreError: out of reach, or unusable.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections. Ledgers are of no use afterwards."""
        ...
