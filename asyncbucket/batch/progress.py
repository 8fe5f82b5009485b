"""A progress bar on standard error: rich's, tqdm's, or none."""

import contextlib
import sys
from collections.abc import AsyncGenerator
from typing import Any, Final, Literal, Protocol, TypeAlias

import anyio

from asyncbucket.batch.outlook import Outlook, Snapshot, duration
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.wording import named

Shown: TypeAlias = bool | Literal["rich", "tqdm"]

#: Seconds between two updates.
_REFRESH_INTERVAL: Final = 0.2


class Progress:
    """Show nothing."""

    def count(self, *, failed: bool = False, restored: bool = False) -> None:
        """Count an item that is done."""

    @contextlib.asynccontextmanager
    async def shown(self, total: int | None) -> AsyncGenerator[None]:
        """Show the bar during an ``async with`` block."""
        del total
        yield


class _Bar(Protocol):
    """A bar of either library."""

    def show(self, done: int, words: str) -> None: ...
    def close(self) -> None: ...


def progress_for(limiter: Limiter, shown: Shown) -> Progress:
    """Return an object that shows the progress.

    Raises:
        ImportError: the library is not installed.
        ValueError: ``shown`` is not one of the choices.
    """
    if shown is False:
        return Progress()
    if shown is True:
        shown = "rich" if _is_installed("rich") or not _is_installed("tqdm") else "tqdm"
    if shown not in ("rich", "tqdm"):
        raise ValueError(f"show_progress must be True, False, 'rich' or 'tqdm', not {shown!r}")
    if not _is_installed(shown):
        remedy = '"asyncbucket[batch]"' if shown == "rich" else "tqdm"
        raise ImportError(f"a progress bar needs {shown}: pip install {remedy}")
    return _ShownProgress(limiter, _RichBar if shown == "rich" else _TqdmBar)


def _is_installed(library: str) -> bool:
    from importlib.util import find_spec

    return find_spec(library) is not None


class _ShownProgress(Progress):
    """Read the limiter a few times a second; counting itself costs next to nothing."""

    def __init__(self, limiter: Limiter, bar: "type[_RichBar | _TqdmBar]") -> None:
        self._limiter = limiter
        self._bar_type = bar
        self._done = 0
        self._failed = 0
        self._restored = 0

    def count(self, *, failed: bool = False, restored: bool = False) -> None:
        self._done += 1
        self._failed += failed
        self._restored += restored

    @contextlib.asynccontextmanager
    async def shown(self, total: int | None) -> AsyncGenerator[None]:
        bar = self._bar_type(total)
        outlook = Outlook(self._limiter, clock=anyio.current_time)
        started = anyio.current_time()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._refresh, bar, outlook, total)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
        finally:
            took = f"in {duration(anyio.current_time() - started)}"
            bar.show(self._done, ", ".join([took, *self._words(Snapshot())]))
            bar.close()

    async def _refresh(self, bar: _Bar, outlook: Outlook, total: int | None) -> None:
        while True:
            left = None if total is None else float(total - self._done)
            amounts = None if left is None else {"items": left, "requests": left}
            snapshot = outlook.snapshot(self._done - self._restored, left=amounts)
            bar.show(self._done, ", ".join(self._words(snapshot)))
            await anyio.sleep(_REFRESH_INTERVAL)

    def _words(self, snapshot: Snapshot) -> list[str]:
        words = snapshot.words()
        if snapshot.bound_by is not None:
            words.append(f"waiting for {named(snapshot.bound_by)}")
        if self._restored:
            words.append(f"{self._restored:,} restored")
        if self._failed:
            words.append(f"{self._failed:,} failed")
        return words


class StandardError:
    """Standard error for what may be missed: if nobody reads it any more, the batch goes on."""

    def __init__(self) -> None:
        self._file = sys.stderr

    def write(self, text: str) -> int:
        """Write, or not."""
        with contextlib.suppress(OSError, AttributeError):  # gone, or never there
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """See `write`."""
        with contextlib.suppress(OSError, AttributeError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _RichBar:
    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        file: Any = StandardError()
        # Refreshed only by `show`: a thread of rich's would compete with the calls.
        self._progress = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(file=file),
            auto_refresh=False,
            # What is printed meanwhile appears above the bar, unless it goes somewhere else.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("", total=total)
        self._progress.start()

    def show(self, done: int, words: str) -> None:
        self._progress.update(self._task, completed=done, description=words, refresh=True)

    def close(self) -> None:
        self._progress.stop()


class _TqdmBar:
    def __init__(self, total: int | None) -> None:
        from tqdm import tqdm

        # Without tqdm's own rate, which is among the words.
        layout = "{n_fmt} items" if total is None else "{l_bar}{bar:30}| {n_fmt}/{total_fmt}"
        bar_format = layout + " {elapsed}{postfix}"
        file: Any = StandardError()
        self._bar = tqdm(total=total, file=file, mininterval=0, bar_format=bar_format)

    def show(self, done: int, words: str) -> None:
        self._bar.n = done
        self._bar.set_postfix_str(words, refresh=True)

    def close(self) -> None:
        self._bar.close()
