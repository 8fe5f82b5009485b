"""How long a reply will be, if nothing limits it, and what a call costs if it is that long."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from asyncbucket.core.cost import Cost
from asyncbucket.core.limits import Limit
from asyncbucket.providers.profiles import Call, Profile
from asyncbucket.providers.request import replies_of
from asyncbucket.waiting import Lock

#: Tokens expected before any reply; LlamaIndex assumes as many, too.
FORESEEN: Final = 256


class OutputForecast:
    """Estimate how long a reply will be: an upper quantile of the latest replies.

    ``start`` counts as the first reply. So a longer reply raises the forecast at once, and shorter
    ones lower it only when they are nine of ten. Safe on several threads.

    Args:
        start: tokens expected before any reply.
        quantile: the share of replies that are to be no longer than the forecast.
        window: how many replies are remembered.
    """

    __slots__ = ("_latest", "_lock", "_quantile", "_sorted")

    def __init__(self, start: int = FORESEEN, *, quantile: float = 0.9, window: int = 200) -> None:
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must be above 0 and at most 1, not {quantile!r}")
        if start < 0 or window < 1:
            raise ValueError(
                f"start must be at least 0 and window at least 1, not {start!r} and {window!r}"
            )
        self._quantile = quantile
        self._latest = deque([start], maxlen=window)
        self._sorted = [start]
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"<OutputForecast {self.foresee():,} tokens from {len(self._latest)} replies>"

    def __getstate__(self) -> tuple[float, deque[int]]:
        """Leave out the lock: a copy may go to another process."""
        with self._lock:
            return self._quantile, self._latest.copy()

    def __setstate__(self, state: tuple[float, deque[int]]) -> None:
        self._quantile, self._latest = state
        self._sorted = sorted(self._latest)
        self._lock = Lock()

    def observe(self, output_tokens: int) -> None:
        """Remember the length of a reply, and forget the oldest."""
        with self._lock:
            if len(self._latest) == self._latest.maxlen:
                del self._sorted[bisect_left(self._sorted, self._latest[0])]
            self._latest.append(output_tokens)
            insort(self._sorted, output_tokens)

    def foresee(self) -> int:
        """Return the tokens that a reply probably stays under (nearest rank, no interpolation)."""
        with self._lock:
            return self._sorted[math.ceil(self._quantile * len(self._sorted)) - 1]


def price(
    call: Call, profile: Profile, limits: Iterable[Limit]
) -> tuple[Call, Profile, Cost | None]:
    """Return ``call`` as it is priced, the profile, and the cost: None if it needs no admission.

    A mere forecast must not make a call impossible, so it is cut to what ``limits`` can ever admit.
    """
    cost = profile.cost(call)
    excess = _excess(cost, limits)
    if not excess:
        return call, profile, cost
    shorter = call
    for replies in (replies_of(call.body), 1):  # a profile may count one forecast for all
        shorter = replace(call, foreseen=max(0, call.foreseen - -(-excess // replies)))
        cost = profile.cost(shorter)
        if not _excess(cost, limits):
            break
    return shorter, profile, cost


def _excess(cost: Cost | None, limits: Iterable[Limit]) -> int:
    """Return by how much ``cost`` exceeds what any limit can ever admit."""
    if cost is None:
        return 0
    return max([0, *(cost.get(limit.resource, 0) - limit.amount for limit in limits)])
