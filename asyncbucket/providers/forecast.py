"""How long a reply will be, if nothing limits it, and what a call costs if it is that long."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from asyncbucket.core.cost import Cost
from asyncbucket.core.limits import Limit
from asyncbucket.providers.profiles import Call, Profile
from asyncbucket.waiting import Lock

#: Tokens expected before any reply; LlamaIndex assumes as many, too.
FORESEEN: Final = 256
#: The share of replies that are to be no longer than the forecast, and how many are remembered.
_QUANTILE: Final = 0.9
_REMEMBERED: Final = 200


class OutputForecast:
    """Estimate how long a reply will be: an upper quantile of the latest replies.

    The one foreseen before any counts as the first. So a longer reply raises the forecast at once,
    and shorter ones lower it only when they are nine of ten. Safe on several threads.
    """

    __slots__ = ("_foreseen", "_latest", "_lock")

    def __init__(self) -> None:
        self.__setstate__(deque([FORESEEN], maxlen=_REMEMBERED))

    def __repr__(self) -> str:
        return f"<OutputForecast {self.foresee():,} tokens from {len(self._latest)} replies>"

    def __getstate__(self) -> deque[int]:
        """Leave out the lock: a copy may go to another process."""
        with self._lock:
            return self._latest.copy()

    def __setstate__(self, state: deque[int]) -> None:
        self._latest, self._lock = state, Lock()
        self._foreseen = _quantile(state)

    def observe(self, output_tokens: int) -> None:
        """Remember the length of a reply, and forget the oldest."""
        with self._lock:
            self._latest.append(output_tokens)
            self._foreseen = _quantile(self._latest)

    def foresee(self) -> int:
        """Return the tokens that a reply probably stays under (nearest rank, no interpolation)."""
        return self._foreseen


def _quantile(lengths: Sequence[int]) -> int:
    return sorted(lengths)[math.ceil(_QUANTILE * len(lengths)) - 1]


def charge(
    call: Call, profile: Profile, limits_by_way: Iterable[Iterable[Limit]]
) -> tuple[Call, Cost | None]:
    """Return ``call`` as it is charged, and its cost: None if it needs no admission.

    A mere forecast must not make a call impossible, so it is cut to what the limits of at least one
    way can ever admit.
    """
    cost = profile.cost(call)
    excess = 0 if cost is None else excess_of(cost, limits_by_way)
    if excess:
        call = replace(call, foreseen=max(0, call.foreseen - excess), excess=excess)
        cost = profile.cost(call)
    return call, cost


def excess_of(cost: Mapping[str, int], limits_by_way: Iterable[Iterable[Limit]]) -> int:
    """Return by how much ``cost`` exceeds what the limits of any way can ever admit."""
    return min(
        max([0, *(cost.get(limit.resource, 0) - limit.units for limit in limits)])
        for limits in limits_by_way
    )
