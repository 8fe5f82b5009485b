"""A limiter whose limits are in a store: what stands between the core's pacer and the session.

The pacer still decides who goes next, including children and priorities, and books the limits below
the root. Then it hands the call over to the session instead of letting it go. There it waits, first
come, first served, until the session has booked it at the store and its start has come. A process
has one session, on a thread of its own, for the calls of all its loops and threads. So a loop that
is blocked, or ends without closing the limiter, holds up nothing at the store. A store that was made
by the user belongs to the user's loop, and so does its session.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import secrets
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Final

from asyncbucket.core.errors import CostExceedsLimit, StoreError
from asyncbucket.core.events import Event, LimitChanged
from asyncbucket.core.explain import too_late_locked
from asyncbucket.core.limits import Limit
from asyncbucket.core.meters import NEVER
from asyncbucket.core.node import Meters, Node
from asyncbucket.core.queue import AnyWaiter
from asyncbucket.core.seats import NOWHERE, Seat, reset_after_fork
from asyncbucket.core.statistics import LimitUse
from asyncbucket.core.terms import OnOutage
from asyncbucket.stores import open_store
from asyncbucket.stores.calls import StoreCalls
from asyncbucket.stores.pending import BookedMeter, PendingUpdates, Reservation
from asyncbucket.stores.session import Session
from asyncbucket.stores.store import SLOT, Correction, LimitConfig, Store, check_membership

_AUTO_REFUSED: Final = (
    "with a store, concurrency must be a number: one process alone cannot find it"
)
_CLOSED: Final = "the limiter was closed while this call waited: close it when all calls have ended"


def open_place(
    node: Node, store: Any, *, on_outage: OnOutage = "share", slot_ttl: float = 30.0
) -> "StorePlace":
    """Return what keeps the limits of ``node``, a root, in ``store``.

    Args:
        node: whose limits; processes share them by its name.
        store: a URL, or a store made by the caller. That serves one event loop only, and stays open
            when the limiter is closed, because others may use it.
        on_outage: what to do while the store is gone: see `asyncbucket.stores.outage`.
        slot_ttl: seconds without a sign of life after which a process's slots come back.

    Raises:
        ValueError: no store accepts the name, the URL is not a store's, the limiter finds its
            concurrency by itself, or the store cannot count that far.
        TypeError: ``store`` is neither a URL nor a store.
        ImportError: the extra for this store is not installed.
    """
    check_membership(node.name, slot_ttl)
    if node.sizer is not None:
        raise ValueError(_AUTO_REFUSED)
    if isinstance(store, str) and store.lower().startswith("sqlite:"):
        store = open_store(store).url  # which is absolute: changing directories is harmless
    place = StorePlace(node, store, on_outage=on_outage, slot_ttl=slot_ttl)
    # A wrong URL is refused here, not at the first call, and so are limits that are too large.
    place.check((), None)
    return place


class StorePlace:
    """Keep what a process has to do with the store; see `asyncbucket.core.seats.Place`."""

    def __init__(self, node: Node, store: Any, *, on_outage: OnOutage, slot_ttl: float) -> None:
        self.name = node.name
        self.on_outage: OnOutage = on_outage
        self.slot_ttl = slot_ttl
        self._node = node
        self._pacer = node.pacer
        self._given = store
        #: Whether the session makes the store, and closes it.
        self.owns_store = isinstance(store, str)
        self.clock = self._pacer.clock
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Start afresh in a child process: what the parent holds at the store is the parent's."""
        #: Its name at the store: sessions follow one another under the same one.
        self.worker = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._session: Session | None = None
        self.pending = PendingUpdates()
        self.calls = StoreCalls(self)
        #: By its lease's identity, each call in flight that holds a slot.
        self._slots: set[int] = set()
        #: The units that are left of each limit, as last heard.
        self.left: dict[Limit, int] = {}

    # --- what the pacer asks: see `asyncbucket.core.seats.Place` ---

    def room(self, seat: Seat) -> bool:
        self._open_session(seat.loop)
        return self.calls.has_room(self.clock())

    def push(self, waiter: AnyWaiter, below: Meters, now: int) -> None:
        session = self._open_session(waiter.seat.loop)
        self.calls.push(waiter, (below, now))
        session.wake_for(waiter)

    def leave(self, waiter: AnyWaiter) -> bool:
        is_first = self.calls.first() is waiter
        stood_here = self.calls.leave(waiter)
        if stood_here and self._session is not None:
            self._session.ask_again(is_first=is_first)
        return stood_here

    def ended(self, lease: Any) -> None:
        if id(lease) in self._slots:
            self._slots.remove(id(lease))
            self.release()

    def waiting(self) -> int:
        return sum(not waiter.done() for waiter in self.calls)

    def held_up(self) -> tuple[str, int] | None:
        return None if self._session is None else self._session.held_up()

    def holds_up(self) -> bool:
        return self._session is not None and self._session.holds_up()

    def held_back(self) -> list[AnyWaiter]:
        return self.calls.unbooked() if self.holds_up() else []

    def use(self) -> Iterator[LimitUse]:
        for limit in self.config().limits:
            available = self.left.get(limit, limit.units)
            yield LimitUse(limit, used=limit.units - available, available=available)

    def options(self) -> dict[str, Any]:
        if not self.owns_store:
            return {}
        return {"store": self._given, "on_outage": self.on_outage, "slot_ttl": self.slot_ttl}

    def check(self, limits: Iterable[Limit], concurrency: Any) -> None:
        if not isinstance(concurrency, int | None):
            raise ValueError(_AUTO_REFUSED)  # noqa: TRY004 - "auto" is of the right type elsewhere
        self.make_store().check(self.config(limits, concurrency))

    def configure(self) -> None:
        self.pending.config = self.config()
        self._ring()

    def pause(self, span: int, *, gradually: bool) -> None:
        self.pending.pause(self.clock() + span, gradually=gradually)
        self._ring()

    async def aclose(self) -> None:
        """Fail the calls that wait, give back what was booked for them, and leave the store.

        Calls in flight keep their slots; the last one to give its slot back disconnects.
        """
        told: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._pacer:
            self.fail_all(StoreError(_CLOSED))
            if self._session is None and not self.pending:
                return
            self._open_session(asyncio.get_running_loop()).close(told)
        await asyncio.wrap_future(told)

    # --- what the session asks ---

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Hold the limiter's lock; observers are told on a loop of theirs afterwards."""
        with self._pacer.lock:
            yield
        self._pacer.catch_up(tell=False)
        self._tell_observers()

    def emit(self, event: Event) -> None:
        """Tell observers; without the lock."""
        self._pacer.news.append(functools.partial(self._node.emit, event))
        self._tell_observers()

    def _tell_observers(self) -> None:
        pacer = self._pacer
        if not pacer.news:
            return
        loops = [seat.loop for seat in list(pacer.seats.values())]
        running = [loop for loop in loops if loop is not None and loop.is_running()]
        if not running or asyncio._get_running_loop() in running:  # noqa: SLF001 - None in a plain thread
            pacer.catch_up()
        else:
            running[0].call_soon_threadsafe(pacer.catch_up)

    def make_store(self) -> Store:
        """Return the store, not connected yet."""
        given = self._given
        store: Store = given if hasattr(given, "check") else open_store(given)
        return store

    def config(self, changes: Iterable[Limit] = (), concurrency: int | None = None) -> LimitConfig:
        """Return the limits as they are, or as they would be after ``changes``."""
        node = self._node
        limits = {key: window.limit for key, window in node.limits.items()}
        limits |= {limit.key: limit for limit in changes}
        if concurrency is None and node.slots < NEVER:
            concurrency = node.slots
        return LimitConfig(limits=tuple(limits.values()), concurrency=concurrency)

    def adopt(self, config: LimitConfig) -> None:
        """Adopt limits that another process has set; limits that it does not name are removed."""
        node, pacer, before = self._node, self._pacer, self.config()
        named = {limit.key for limit in config.limits}
        with self.lock():
            node.limits = {key: each for key, each in node.limits.items() if key in named}
            node.set_limits(config.limits, self.clock())
            node.slots = NEVER if config.concurrency is None else config.concurrency
            pacer.limits_changed_locked(node)
            for limit in config.limits:
                if limit not in before.limits:
                    pacer.notify_locked(node, LimitChanged, limit=str(limit))
            if config.concurrency not in {None, before.concurrency}:
                pacer.notify_locked(node, LimitChanged, limit=f"concurrency {config.concurrency}")

    def fail_all(self, cause: Exception) -> None:
        """Make all calls fail that have come by now; with the lock held."""
        self.calls.fail_all(cause, self._pacer.seats.arrivals)
        self._ring()

    def fail(self, waiter: AnyWaiter, cause: Exception) -> None:
        """Make a call fail; with the lock held."""
        error = StoreError(str(cause) or repr(cause))
        error.__cause__ = None if isinstance(cause, StoreError) else cause
        self._pacer.fail_locked(waiter, error)

    def fail_late(self, waiter: AnyWaiter) -> None:
        """Make a call fail that cannot start before its deadline; with the lock held.

        A pool may have another member take it.
        """
        if waiter.deadline is not None and self._pacer.group is None:
            node, amounts = waiter.line.node, waiter.amounts
            error = too_late_locked(node, amounts, waiter.asked, waiter.deadline)
            self._pacer.fail_locked(waiter, error)

    def bury(self, waiter: AnyWaiter) -> None:
        """Count out a call whose loop has ended; with the lock held."""
        self._pacer.gone_locked(waiter, self.clock())
        waiter.seat = NOWHERE

    def refuse(self, waiter: AnyWaiter) -> None:
        """Make a call fail that exceeds a limit and can never pass; with the lock held.

        If own limits allow it, the store has not heard of them: the call is asked for again.
        """
        try:
            self._node.check(waiter.amounts)
        except CostExceedsLimit as error:
            self._pacer.fail_locked(waiter, error)

    def admit(self, waiter: AnyWaiter, reservation: Reservation, below: Meters, now: int) -> bool:
        """Let a booked call go, because its start has come; return whether it still waited."""
        # A call may use limited resources that it did not reserve.
        amounts = {**dict.fromkeys(self._node.resources(), 0), **waiter.amounts}
        booked: list[Any] = [
            (BookedMeter(self, reservation, resource, units), resource)
            for resource, units in amounts.items()
            if resource != SLOT
        ]
        if not self._pacer.pass_on_locked(waiter, (*below, *booked), now, reservation.bound_by):
            return False
        if reservation.slot:
            self._slots.add(id(waiter.lease))
        waiter.seat.ring(now)  # a thread has to look
        return True

    def ring_pool(self) -> None:
        """Have a pool look whose calls the store holds up: another member may take them."""
        if self._pacer.group is not None:
            with self.lock():
                self.ring_seats()

    def ring_seats(self) -> None:
        """Have those look whose calls wait: there may be room; with the lock held."""
        now = self.clock()
        for seat in list(self._pacer.seats.values()):
            if seat.waiting:
                seat.ring(now)

    def forget(self, session: Session) -> None:
        """Note that a session has ended."""
        if self._session is session:
            self._session = None

    # --- what comes back; with the lock held ---

    def correct(self, correction: Correction) -> None:
        """Have a booking changed.

        For a call that was admitted without the store (``start`` is 0) nothing comes back, but
        debts count.
        """
        if not correction.start:
            booked, used = correction.booked, correction.used
            more = {name: max(amount, booked.get(name, 0)) for name, amount in used.items()}
            correction = Correction(start=0, booked=booked, used=more)
        self.pending.corrections.append(correction)
        self._tell(correction)

    def release(self) -> None:
        """Give a slot back."""
        self.pending.held -= 1
        self._tell(None)

    def _tell(self, correction: Correction | None) -> None:
        """Have the session tell the store; if there is none, one is opened for that."""
        loop = asyncio._get_running_loop()  # noqa: SLF001 - None in a plain thread
        with contextlib.suppress(RuntimeError):  # the interpreter is ending
            self._open_session(loop, is_closing=True).report(correction)

    def _ring(self) -> None:
        if self._session is not None:
            self._session.ring()

    def _open_session(
        self, loop: asyncio.AbstractEventLoop | None, *, is_closing: bool = False
    ) -> Session:
        """Return the session; if there is none, open it, on ``loop`` if the store is the user's."""
        if self._session is not None and self._session.loop.is_closed():
            self._session = None
            self.calls.bury()
        if self._session is None:
            home = None if self.owns_store else loop
            self._session = Session(self, home, is_closing=is_closing)
        return self._session
