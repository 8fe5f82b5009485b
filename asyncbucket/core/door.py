"""How a call gets in: at once, in turn, or not at all."""

import functools
import math
from typing import TYPE_CHECKING, Any, Final

from asyncbucket.core.account import Account
from asyncbucket.core.context import Inherited, Priority, deadline_of, read_priority
from asyncbucket.core.cost import Cost
from asyncbucket.core.errors import AcquireTimeout, CostExceedsLimit, QueueFull, WouldBlock
from asyncbucket.core.events import Admitted, Cancelled, Queued, Reason, Refused
from asyncbucket.core.lease import Lease
from asyncbucket.core.refusal import refusal_locked
from asyncbucket.core.wording import counted, in_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

_AT_ONCE: Final = "without waiting"
#: A deadline further back (ns) than this was probably meant as seconds from now.
_LONG_PAST: Final = 1_000_000_000
#: What observers hear of a refusal.
_REASONS: Final[dict[type, Reason]] = {
    WouldBlock: "would_block",
    AcquireTimeout: "timeout",
    QueueFull: "queue_full",
    CostExceedsLimit: "too_costly",
}


class Door:
    """Admit calls under the limits of one account and of those above it."""

    __slots__ = ("_account", "called", "find_again", "priority", "timeout")

    def __init__(
        self, account: Account, *, timeout: float | None = None, priority: int = 0
    ) -> None:
        self._account = account
        #: Finds the account again after it was put to rest.
        self.find_again: Callable[[], Account] | None = None
        #: Whether any call is known to have come this way: the latest answer of `was_called`.
        self.called = False
        #: What applies to calls that have none of their own.
        self.timeout = timeout
        self.priority = priority

    @property
    def account(self) -> Account:
        """The account whose limits hold here."""
        if self._account.retired:
            assert self.find_again is not None
            self._account = self.find_again()
        return self._account

    def was_called(self) -> bool:
        """Tell whether any call has come this way; it may be called anywhere, even by a finalizer."""
        if not self.called:
            account = self._account
            calls = account.admitted or account.waiting or account.refused or account.cancelled
            self.called = bool(calls)
        return self.called

    def deadline_for(
        self, timeout: float | None, deadline: float | None, context: Inherited | None
    ) -> int | None:
        """Return the earliest of all given deadlines, in ns of the limiter's clock."""
        if timeout is None:
            timeout = self.timeout
        now = self.account.budget.clock()
        end = deadline_of(now, timeout=timeout, deadline=deadline)
        left = None if context is None else context.seconds_left()
        if left is None or math.isinf(left):
            return end
        inherited = now + round(left * 1_000_000_000)
        return inherited if end is None else min(end, inherited)

    def priority_for(self, priority: Priority | None, context: Inherited | None) -> int:
        """Return the priority of a call: its own, the inherited one, or the limiter's."""
        if priority is not None:
            return read_priority(priority)
        return self.priority if context is None or context.priority is None else context.priority

    def try_now(self, amounts: dict[str, int], *, on_loop: bool = True) -> Lease | None:
        """Return a lease, held on this loop or thread, if nobody has to wait for it."""
        account = self._account
        budget = account.budget
        budget.lock.acquire()  # `with` would take twice the time
        if account.retired:
            budget.lock.release()
            account = self._lock_account()
        try:
            now = budget.clock()
            gates = budget.take_locked(account, amounts, now)
            if gates is None:
                return None
            blocked = budget.blocked
            holder = blocked.current_holder() if on_loop else blocked.threads
            lease = Lease(account, gates, amounts, now, holder)
        finally:
            budget.lock.release()
        if budget.observed:
            _notify_admitted(account, lease, now)
        return lease

    def take(self, amounts: dict[str, int]) -> Lease:
        """Return a lease now, or refuse.

        Raises:
            WouldBlock: it cannot pass now, or others wait.
            CostExceedsLimit: it can never pass.
        """
        lease = self.try_now(amounts)
        if lease is not None:
            return lease
        account = self._lock_account()
        try:
            try:
                account.check_locked(amounts)
                raise refusal_locked(WouldBlock, account, amounts, _AT_ONCE, "wait with acquire()")
            finally:
                account.budget.lock.release()
        except (WouldBlock, CostExceedsLimit) as error:
            _record_refusal(account, amounts, error)
            raise

    async def wait(
        self,
        amounts: dict[str, int],
        deadline: int | None,
        priority: int,
        *,
        on_loop: bool = True,
    ) -> Lease:
        """Return a lease in turn; ``on_loop`` tells whether a task of this loop will hold it."""
        account = self._lock_account()
        budget = account.budget
        try:
            try:
                account.check_locked(amounts)
                now = budget.clock()
                _refuse_if_hopeless_locked(account, amounts, now, deadline)
                waiter = budget.join_locked(account, amounts, now, deadline, priority)
            finally:
                budget.lock.release()
            try:
                if budget.observed:
                    account.notify(Queued, cost=Cost.of(amounts), waiting=account.waiting)
                passage = await waiter
            except CostExceedsLimit:  # whoever raised it has taken the waiter out
                raise
            except BaseException as error:
                budget.run_or_postpone(functools.partial(account.give_up_locked, waiter))
                del waiter  # else the error's traceback would keep it alive
                _notify_cancelled(account, amounts, budget.clock() - now, error)
                raise
            with budget.lock:
                if passage is None:
                    account.check_locked(amounts)  # limits may have been lowered since
                    assert deadline is not None
                    raise _timeout_error_locked(account, amounts, now, deadline)
                if passage.gates is not account.cached_path_gates:
                    account.hold_added_slots_locked(passage.gates)
                holder = budget.blocked.current_holder() if on_loop else budget.blocked.threads
                lease = Lease(account, passage.gates, amounts, passage.when, holder, priority)
                waited = passage.when - now
                lease.waited = waited * 1e-9
                lease.bound_by = passage.bound_by
                account.count_wait_locked(waited, passage.bound_by)
        except (AcquireTimeout, QueueFull, CostExceedsLimit) as error:
            _record_refusal(account, amounts, error)
            raise
        if budget.observed:
            _notify_admitted(account, lease, passage.when)
        return lease

    def _lock_account(self) -> Account:
        """Return the account, with its budget's lock held; another thread may put it to rest first."""
        while True:
            account = self.account
            account.budget.lock.acquire()
            if not account.retired:
                return account
            account.budget.lock.release()


def _refuse_if_hopeless_locked(
    account: Account, amounts: dict[str, int], now: int, deadline: int | None
) -> None:
    for level in account.path:
        waiting = level.waiting
        if level.max_queue is not None and waiting >= level.max_queue:
            raise refusal_locked(
                QueueFull,
                account,
                amounts,
                f"behind {counted(waiting, 'calls')} waiting already" if waiting else _AT_ONCE,
                f"try again later or raise max_queue={level.max_queue:,}",
            )
    if deadline is None:
        return
    # A head that gives up leaves to the next what it has earned by being first in line.
    since = 0 if account.waiting else now
    if account.path_gates.soonest(amounts, now, since=since) > deadline:
        raise _timeout_error_locked(account, amounts, now, deadline)


def _timeout_error_locked(
    account: Account, amounts: dict[str, int], now: int, deadline: int
) -> AcquireTimeout:
    how = f"within {in_seconds(max(0, deadline - now) * 1e-9)}"
    remedy = "raise the timeout or the limit"
    if now - deadline > _LONG_PAST:
        how = "by a deadline that has passed"
        remedy = f"a deadline is an instant of time.monotonic(), not seconds from now: {remedy}"
    return refusal_locked(AcquireTimeout, account, amounts, how, remedy)


def _notify_admitted(account: Account, lease: Lease, when: int) -> None:
    account.notify(
        Admitted,
        at=when,
        cost=lease.cost,
        waited=lease.waited,
        bound_by=lease.bound_by,
        waiting=account.waiting,
        in_flight=account.in_flight,
    )


def _notify_cancelled(
    account: Account, amounts: dict[str, int], waited: int, error: BaseException
) -> None:
    if account.budget.observed:
        collected = isinstance(error, GeneratorExit)  # perhaps with the lock held
        notify = account.notify_later if collected else account.notify
        notify(Cancelled, cost=Cost.of(amounts), waited=waited * 1e-9)


def _record_refusal(
    account: Account,
    amounts: dict[str, int],
    error: WouldBlock | AcquireTimeout | QueueFull | CostExceedsLimit,
) -> None:
    """Count a refused call, and tell observers."""
    with account.budget.lock:
        account.count_refusal_locked()
    if account.budget.observed:
        bound: Any = {"bound_by": None, "retry_after": None}
        if not isinstance(error, CostExceedsLimit):
            bound = {"bound_by": error.bound_by, "retry_after": error.retry_after}
        account.notify(Refused, cost=Cost.of(amounts), reason=_REASONS[type(error)], **bound)
