"""Objects that start and stop as a context, plain or async."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from asyncbucket.testing.provider.server import in_thread


class Running(ABC):
    """Make a context, async or not, from `start` and `stop`; neither blocks the loop."""

    @abstractmethod
    def start(self) -> None:
        """Start, and return when it runs."""

    @abstractmethod
    def stop(self) -> None:
        """Stop, and return when nothing is left. Idempotent."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            await in_thread(self.start)
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await in_thread(self.stop)
