"""Views for a terminal, or as plain lines if there is none."""

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from asyncbucket.cli.watch.view import Bar, View

_FULL: Final = 0.9
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"


def draw(views: Sequence[View], *, width: int, unicode: bool) -> RenderableType:
    """Return the picture of all limiters."""
    return Group(*(line for view in views for line in _limiter(view, width, unicode=unicode)))


def _limiter(view: View, width: int, *, unicode: bool) -> Iterable[RenderableType]:
    title = Text(view.name, style="bold")
    yield title
    labels = max((len(_label(bar)) for bar in view.bars), default=0)
    room = max(4, width - labels - (26 if unicode else 28))  # the rest of a line, brackets included
    for bar in view.bars:
        line = Text(_label(bar).ljust(labels))
        line.append("  ")
        colour = "red" if bar.binds else "yellow" if bar.fraction >= _FULL else "green"
        line.append(_bar(bar.fraction, min(room, 40), unicode=unicode), style=colour)
        line.append(f" {bar.fraction:4.0%}")
        if bar.binds:
            what = "binds" if bar.fraction >= _FULL else "binds (paced)"
            line.append(f" ◀ {what}" if unicode else f" < {what}", style="bold red")
        yield _indented(line)
    facts = Text((" · " if unicode else ", ").join(view.facts))
    facts.stylize("yellow" if view.alarming else "dim")
    facts.overflow = "fold"
    yield _indented(facts)
    yield Text("")


def _indented(text: Text) -> RenderableType:
    """Indent ``text``, and all lines that it takes on a narrow terminal."""
    return Padding(text, (0, 0, 0, 2), expand=False)


def _label(bar: Bar) -> str:
    return f"{bar.used:,} of {bar.limit}"


def _bar(fraction: float, width: int, *, unicode: bool) -> str:
    if not unicode:
        full = round(fraction * width)
        return "[" + "#" * full + "-" * (width - full) + "]"
    eighths = round(fraction * width * 8)
    bar = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return bar.ljust(width, "·")


def plain(views: Sequence[View]) -> Iterable[str]:
    """Yield a line for each limiter: for pipes and logs."""
    for view in views:
        bars = [
            f"{bar.used:,} of {bar.limit}{' (binds)' if bar.binds else ''}" for bar in view.bars
        ]
        yield f"{view.name}: " + ", ".join([*bars, *view.facts])
