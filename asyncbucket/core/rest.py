"""An account that has not been used for a while: what is remembered, and how it is restored."""

from dataclasses import dataclass

from asyncbucket.core.account import Account
from asyncbucket.core.limits import Key


@dataclass(frozen=True, slots=True)
class Rest:
    """Hold what is left of an account that is put to rest: what it used, and when."""

    #: When its limits are as good as new, in ns.
    until: int
    #: For each limit: the units in its window, the date of the latest booking, and the units that
    #: are missing in its bucket.
    used: tuple[tuple[Key, int, int, int], ...]
    #: When it was put to rest, in ns.
    when: int


def is_busy_locked(account: Account, now: int) -> bool:
    """Tell whether it is in use, or has state that a `Rest` cannot hold."""
    return bool(
        account.in_flight
        or account.waiting
        or account.children
        or account.steered
        or account.headrooms
        or account.observers
        or (account.pause is not None and account.pause.until > now)
        # A call was admitted, but has not run since.
        or (account.slots is not None and account.slots.used)
        or any(kept.window.lent > 0 for kept in account.limits.values())
    )


def put_to_rest_locked(account: Account, now: int) -> Rest | None:
    """Retire it, and return what must be remembered; None if its limits are as good as new."""
    assert isinstance(account.parent, Account)
    account.retired = True
    del account.parent.children[account.name]
    used, until = [], now
    for key, (limit, window, bucket) in account.limits.items():
        missing = 0 if bucket is None else bucket.missing(now)
        if window.available(now) < window.amount or missing > 0:
            used.append((key, window.used, window.last, missing))
            refill = missing * limit.window // limit.amount
            until = max(until, now + max(2 * limit.window, refill))
    return Rest(until, tuple(used), now) if used else None


def wake_locked(account: Account, rest: Rest) -> None:
    """Restore what was remembered."""
    for key, units, last, missing in rest.used:
        if key in account.limits:
            _, window, bucket = account.limits[key]
            window.remember(units, last)
            if bucket is not None and missing > 0:
                bucket.remember(missing, rest.when)
