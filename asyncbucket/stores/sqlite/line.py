"""Who is next, in order of arrival: for a slot that comes back, and for units that flow in.

A slot that comes back is kept for the first in line, and the next for the second: asking at the
right moment does not get anyone past those who wait. But order alone is not fair. A worker whose
calls end all at once gives back many slots in the same batch in which it asks for as many. If only
one were kept for each of the others, it would take the rest again, for ever. So slots go to
whichever worker holds fewest, like water that fills the lowest places first, and order decides
among equals. It follows that a worker that holds no more than the others takes back the slot that
it gives back, without a detour.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

#: A worker that does not ask again for this long (ns) has lost its place, because it may be dead.
_PATIENCE: Final = 2_000_000_000
#: A worker should ask again within this time (ns) to keep its place.
ASK_AGAIN: Final = 1_000_000_000


class Line:
    """Keep the places of workers that wait for slots."""

    __slots__ = ("_places",)

    def __init__(self, places: Iterable[tuple[str, int, int]] = ()) -> None:
        #: Until when each place is kept, and for how many calls.
        self._places = {worker: (until, wanted) for worker, until, wanted in places}

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        return ((worker, *place) for worker, place in self._places.items())

    def reserved_for_others(self, worker: str, now: int, held: Mapping[str, int]) -> int:
        """Return how many free slots are not for ``worker``, which may have no place yet.

        ``held`` says how many slots each worker holds.
        """
        own_slots = held.get(worker, 0)
        total, ahead = 0, 1
        for other, until, wanted in self:
            if other == worker:
                ahead = 0
            elif until > now:
                total += min(max(0, own_slots + ahead - held.get(other, 0)), wanted)
        return total

    def should_ask(self, worker: str, now: int, held: Mapping[str, int], *, free: int) -> bool:
        """Return whether ``worker`` should ask: there is a slot for it, or it has lost its place."""
        until, _ = self._places.get(worker, (0, 0))
        return until <= now or free > self.reserved_for_others(worker, now, held)

    def wanted(self, worker: str) -> int:
        """Return for how many calls ``worker`` waits."""
        return self._places.get(worker, (0, 0))[1]

    def has_others(self, worker: str) -> bool:
        """Return whether anyone but ``worker`` waits."""
        return any(other != worker for other in self._places)

    def enter(self, worker: str, now: int, *, wanted: int) -> None:
        """Note that ``worker`` waits with ``wanted`` calls: in its place, or at the end."""
        self._places[worker] = (now + _PATIENCE, wanted)

    def leave(self, worker: str) -> None:
        """Give up the place of ``worker``, if it has one."""
        self._places.pop(worker, None)

    def expire(self, now: int) -> None:
        """Drop the places of workers that have been silent for too long."""
        for worker in [worker for worker, until, _ in self if until <= now]:
            del self._places[worker]


class Turn(NamedTuple):
    """The place of a worker whose next call may not start soon."""

    worker: str
    #: When it will ask again if it hears nothing before.
    ask_at: int
    #: What its next call costs, and what that waits for.
    amounts: dict[str, int]
    bound_by: str | None
    #: Since when it has been the first; 0 while others are before it.
    since: int


class Turns:
    """Keep the places of workers whose next call may not start soon, first come, first served.

    Nothing is booked for them while they wait, so that what others give back serves them at once. A
    place is kept as long as its worker lives and asks in time.
    """

    __slots__ = ("_places",)

    def __init__(self, places: Iterable[Turn] = ()) -> None:
        self._places = {place.worker: place for place in places}

    def __iter__(self) -> Iterator[Turn]:
        return iter(self._places.values())

    def first(self, now: int, workers: Mapping[str, int]) -> Turn | None:
        """Return whose turn it is; ``workers`` says until when each lives."""
        return next((turn for turn in self if not _is_silent(turn, now, workers)), None)

    def of(self, worker: str) -> Turn | None:
        """Return the place of ``worker``, if it has one."""
        return self._places.get(worker)

    def enter(self, turn: Turn) -> None:
        """Note that a worker waits: in its place, or at the end."""
        self._places[turn.worker] = turn

    def leave(self, worker: str) -> None:
        """Give up the place of ``worker``, if it has one."""
        self._places.pop(worker, None)

    def expire(self, now: int, workers: Mapping[str, int]) -> None:
        """Drop the places of dead and silent workers."""
        for turn in [turn for turn in self if _is_silent(turn, now, workers)]:
            del self._places[turn.worker]


def _is_silent(turn: Turn, now: int, workers: Mapping[str, int]) -> bool:
    return turn.ask_at + _PATIENCE <= now or workers.get(turn.worker, 0) <= now
