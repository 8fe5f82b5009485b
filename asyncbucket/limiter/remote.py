"""What a limiter asks of a store that keeps its limits."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from asyncbucket.feedback.adaptive import Concurrency
from asyncbucket.limiter.statistics import LimitUse
from asyncbucket.limits import Limit


class Remote(Protocol):
    """Keep an account's limits where other processes reach them."""

    def use(self) -> Iterator[LimitUse]:
        """Yield how much of each limit is used, as last heard."""
        ...

    def held_up(self) -> tuple[str, int] | None:
        """Return what those who wait there wait for, and until when at least, if it is known.

        `NEVER` says that only a slot which is given back can tell.
        """
        ...

    def waiting(self) -> int:
        """Return how many calls stand there: until the store books them, or until their start."""
        ...

    def pause(self, span: int, *, gradually: bool) -> None:
        """Tell all processes to let nobody pass for ``span`` ns."""
        ...

    def options(self) -> dict[str, Any]:
        """Return what `Limiter` takes to keep its limits there; nothing where another cannot."""
        ...

    def check(self, changes: Iterable[Limit], concurrency: Concurrency | None) -> None:
        """Refuse changes that cannot be kept there; nothing is changed by it.

        Raises:
            ValueError: there is one.
        """
        ...

    def configure(self) -> None:
        """Tell all processes of the limits as they are now."""
        ...

    async def aclose(self) -> None:
        """Give back what this process holds, and take leave."""
        ...
