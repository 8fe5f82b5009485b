"""What an admission gives: the lease that holds it.

`settle` and `release` never wait for the lock. If it is held by another thread, or by this thread
(when the garbage collector interrupts it to close a generator or a coroutine that holds a lease),
the work is left to whoever holds the lock (`Budget.run_or_postpone`).
"""

import functools
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Final, Self

from asyncbucket.core.account import Account
from asyncbucket.core.cost import Cost, rounded_up
from asyncbucket.core.errors import AsyncBucketError
from asyncbucket.core.events import Outcome, Released, Settled
from asyncbucket.core.gates import Gates
from asyncbucket.core.holders import Holder
from asyncbucket.core.loops import OfThisProcess
from asyncbucket.core.parts import Parts, add_debt, redate, take_back

#: The parts of tokens.
_TOKENS: Final = ("input_tokens", "output_tokens")


class Lease(OfThisProcess):
    """Hold what one admission took, until it is released.

    It is a context manager, plain and async, that releases on leaving. `settle` reports what the
    call really used; `release` gives the slot back. Both are synchronous and may be called from any
    thread, repeatedly, and in any order. A lease that is dropped releases itself.

    If the limiter finds its concurrency by itself, it learns from whichever of `release`,
    `overloaded` and `failed` comes first; leaving by an exception counts as one of the latter two.
    """

    __slots__ = (
        "__weakref__",  # pyright: ignore[reportUninitializedInstanceVariable]
        "_account",
        "_admitted",
        "_amounts",
        "_cost",
        "_epoch",
        "_gates",
        "_holder",
        "_open",
        "_parts",
        "_priority",
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
        priority: int | None = None,
    ) -> None:
        """Note a booking made at ``when``; called with the budget's lock held.

        ``priority`` is that of a call that had to wait, so its share was charged for it.
        """
        self._account = account
        self._gates = gates
        self._amounts = amounts
        self._cost: Cost | None = None
        #: When it was admitted; and the date of its cost, which `sent` moves to when the call left.
        self._admitted = self._when = when
        self._holder = holder
        #: For each settled resource, units and dates: first the reservation, then each debt.
        self._parts: dict[str, Parts] | None = None
        self._open = True
        self._epoch = account.budget.epoch
        self._priority = priority
        #: Seconds between asking and admission.
        self.waited = 0.0
        #: What held it up: ``"requests"``, ``"tokens"``, ``"concurrency"``, ``"paused"``...;
        #: None if it did not wait.
        self.bound_by: str | None = None
        for level in account.path:
            level.admitted += 1
        holder.leases += 1

    @property
    def cost(self) -> Cost:
        """What was reserved."""
        if self._cost is None:
            self._cost = Cost.of(self._amounts)
        return self._cost

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
        """Report what the call really used.

        What was reserved beyond it is given back at once, and admits waiting calls. What was used
        beyond the reservation becomes a debt that later calls wait for. Resources that are not
        named stay as they are, except that ``tokens`` follows its parts. (If only ``tokens`` was
        reserved, report both parts, or ``tokens``: one part alone gives nothing back of the whole.)
        Settling again replaces the earlier report; reporting the same again changes nothing.

        Raises:
            TypeError, ValueError: an amount is not a finite number from 0 on, or no limit counts
                the resource; nothing is changed then.
        """
        if resources:
            self._account.check_known(resources)
        named = {
            "requests": requests,
            "tokens": tokens,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            **resources,
        }
        used = {name: rounded_up(value, name) for name, value in named.items() if value is not None}
        self._settle(used)

    def _settle(self, used: dict[str, int]) -> None:
        account = self._account
        if self._epoch != account.budget.epoch:  # a parent process's lease, counted there
            return
        if account.budget.run_or_postpone(functools.partial(self._settle_locked, used)):
            account.flush()

    def _settle_locked(self, used: dict[str, int]) -> None:
        """Correct the meters to ``used``, and admit calls that fit into what comes back."""
        account, booked = self._account, self._booked()
        if "tokens" not in used and not used.keys().isdisjoint(_TOKENS):
            used = used | {"tokens": self._total(booked | used, used.keys() | (self._parts or {}))}
        if account.budget.observed:
            corrects = {name: booked[name] for name in used if name in (self._parts or ())}
            account.notify_later(Settled, reserved=self.cost, used=used, corrects=corrects)
        refunds = changes = False
        for name, amount in used.items():
            delta = amount - booked.get(name, 0)
            self._correct_locked(name, delta)
            changes = changes or delta != 0
            if delta < 0:
                refunds = True
                account.count_refund_locked(name, -delta)
        if self._priority is not None:
            account.correct(self._priority, booked, self._booked())
        if refunds or (changes and account.is_below_child):
            account.budget.ring_locked(account)

    def _total(self, booked: Mapping[str, int], reported: Collection[str]) -> int:
        """Return input and output tokens together, of which one may not be ``reported`` yet.

        If the split was unknown, each was reserved as the whole. Then one that is not reported yet
        adds no delta than the other leaves of the whole.
        """
        total = sum(booked.get(name, 0) for name in _TOKENS)
        if all(name in reported for name in _TOKENS):
            return total
        reserved = self._amounts
        beyond = sum(max(0, booked.get(name, 0) - reserved.get(name, 0)) for name in _TOKENS)
        return min(total, reserved.get("tokens", 0) + beyond)

    def _correct_locked(self, resource: str, delta: int) -> None:
        """Book ``delta`` units of ``resource`` now.

        If it is negative, give that many back: the latest bookings first, each at its own date.
        """
        self._parts = self._parts or {}
        parts = self._parts.setdefault(resource, [(self._amounts.get(resource, 0), self._when)])
        if not delta:
            return
        if not self._open:
            for window, counts in self._gates.windows:
                if counts == resource:
                    window.lent -= delta
        meters = [meter for meter, counts in self._gates.meters if counts == resource]
        if delta > 0:
            now = self._account.budget.clock()
            add_debt(parts, delta, now)
            for meter in meters:
                meter.owe(delta, now)
            return
        for back, when, left in take_back(parts, -delta):
            for meter in meters:
                meter.unbook(back, when, left=left)

    def _booked(self) -> dict[str, int]:
        """Return what is booked: as settled, or else as reserved."""
        if self._parts is None:
            return self._amounts
        settled = {name: sum(units for units, _ in parts) for name, parts in self._parts.items()}
        return self._amounts | settled

    def sent(self) -> None:
        """Date the cost to now, because the call leaves only now.

        A client may work for a while between the admission and sending the request, and a provider
        counts from its arrival. Dating the booking likewise keeps windows true.
        """
        budget = self._account.budget
        with budget.lock:
            now = budget.clock()
            for resource, amount in self._booked().items():
                settled = (self._parts or {}).get(resource)
                for units, when in settled or [(amount, self._when)]:
                    redate(self._gates, {resource: units}, when, now)
                if settled:
                    settled[:] = [(amount, now)]
            self._when = now

    def release(self) -> None:
        """Give the slot back; the cost stays counted, as reserved or as settled."""
        self._end("ok")

    def overloaded(self) -> None:
        """Release, and report that the server refused the call (429, 503) or let it time out.

        If the limiter finds its concurrency by itself, there will be fewer slots.
        """
        self._end("overloaded")

    def failed(self) -> None:
        """Release, and report that the call's duration says nothing about the server's load."""
        self._end("failed")

    def _end(self, outcome: Outcome) -> None:
        if not self._open:
            return
        account = self._account
        budget = account.budget
        if not budget.lock.acquire(False):  # a keyword argument would take twice the time
            budget.run_or_postpone(functools.partial(self._drop_locked, outcome))
            return
        try:
            ended = self._end_locked(outcome)
        finally:
            budget.lock.release()
        if ended and budget.observed:
            account.notify(Released, **self._released_fields(outcome))

    def _end_locked(self, outcome: Outcome) -> bool:
        """Close the booking, here and above; return whether it was open, in this process."""
        account = self._account
        budget = account.budget
        if not self._open or self._epoch != budget.epoch:
            return False
        self._open = False
        self._holder.leases -= 1
        awaited = self._gates.close(self._amounts if self._parts is None else self._booked())
        for level in account.path:
            level.ended += 1
            if level.early_calls and level.release_added_slot_locked(self._gates):
                awaited = True
            if level.adaptive is not None:
                self._report_outcome_locked(level, outcome)
        if awaited and budget.waiting:
            budget.ring_locked(account)
        return True

    def _report_outcome_locked(self, account: Account, outcome: Outcome) -> None:
        """Tell the search for the number of slots how the call ended."""
        adaptive, slots, now = account.adaptive, account.slots, account.budget.clock()
        assert adaptive is not None
        assert slots is not None
        if outcome == "ok":
            full = slots.available(now) <= 1  # this call's own slot has just come back
            waited = self.bound_by == "concurrency"
            adaptive.succeeded(now - self._when, waited=waited, full=full)
        elif outcome == "overloaded":
            adaptive.overloaded(started=self._admitted, now=now)
        account.resize_locked()

    def broken(self, error: BaseException) -> None:
        """Release on leaving a ``with`` block by an exception."""
        if isinstance(error, TimeoutError) and not isinstance(error, AsyncBucketError):
            self.overloaded()
        else:
            self.failed()

    def _drop_locked(self, outcome: Outcome = "failed") -> None:
        """Release a lease that was collected, or that was released while the lock was held."""
        if self._end_locked(outcome) and self._account.budget.observed:
            self._account.notify_later(Released, **self._released_fields(outcome))

    def _released_fields(self, outcome: Outcome) -> dict[str, Any]:
        held = (self._account.budget.clock() - self._when) * 1e-9
        return {"cost": self.cost, "held": held, "outcome": outcome}

    def undo(self) -> None:
        """Give everything back, as if the call had never been: for calls that were not made."""
        nothing = {name: 0 for name in self._booked() if name != "concurrency"}
        self._settle(nothing)
        self.failed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.release()
        else:
            self.broken(error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, error, traceback)

    def __del__(self) -> None:
        if self._open:  # a finalizer may run anywhere, even inside the lock
            self._account.budget.run_or_postpone(self._drop_locked)

    def __repr__(self) -> str:
        state = "open" if self._open else "released"
        return f"<Lease {state} {self.cost} waited={self.waited:.3f} s bound_by={self.bound_by}>"
