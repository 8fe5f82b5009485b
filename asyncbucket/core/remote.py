"""What a limiter asks of the store that keeps its limits."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from asyncbucket.core.limits import Limit
from asyncbucket.core.statistics import LimitUse
from asyncbucket.feedback.adaptive import Concurrency


class Remote(Protocol):
    """Keep an account's limits where other processes reach them."""

    def use(self) -> Iterator[LimitUse]:
        """Yield how much of each limit is used, as last heard."""
        ...

    def held_up(self) -> tuple[str, int] | None:
        """Return what the calls waiting there wait for, and until when at least, if known.

        `NEVER` means that it depends on a slot being given back.
        """
        ...

    def waiting(self) -> int:
        """Return how many calls are there: until the store books them, or until they start."""
        ...

    def pause(self, span: int, *, gradually: bool) -> None:
        """Tell all processes to let nobody pass for ``span`` ns."""
        ...

    def options(self) -> dict[str, Any]:
        """Return the arguments with which another `Limiter` keeps its limits there; {} if none can."""
        ...

    def check(self, changes: Iterable[Limit], concurrency: Concurrency | None) -> None:
        """Refuse changes that the store cannot keep; this changes nothing.

        Raises:
            ValueError: it cannot keep one of them.
        """
        ...

    def configure(self) -> None:
        """Tell all processes the limits as they are now."""
        ...

    async def aclose(self) -> None:
        """Give back what this process holds, and leave the store."""
        ...
