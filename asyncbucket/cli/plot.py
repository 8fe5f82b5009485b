"""Plot rates over time in characters, with or without colours, in Unicode or ASCII."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from rich.console import Console
from rich.text import Text

#: Columns left of a plot: a number and the axis.
MARGIN: Final = 8
_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"
_FOURTHS: Final = " .:|#"
_MINUTES: Final = (60, 120, 300, 600, 1_200, 1_800)
_HOURS: Final = (3_600, 7_200, 10_800, 21_600, 43_200)
_DAY: Final = 86_400
_DAYS: Final = tuple(days * _DAY for days in (1, 2, 5, 10, 20, 50, 100, 200, 500))
_STEPS: Final = (1, 2, 5, 10, 20, 30, *_MINUTES, *_HOURS, *_DAYS)
_MAX_WIDTH: Final = 120
#: The fewest columns between two marks of the axis.
_MIN_GAP: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """The size of a plot, and the time it covers; plots to be compared share one.

    Attributes:
        seconds: the time that the width covers.
        width: columns, with the margin.
        height: rows above the axis, an even number.
        unicode: whether the terminal can show blocks.
    """

    seconds: float
    width: int = 80
    height: int = 6
    unicode: bool = True

    @classmethod
    def on(cls, console: Console, seconds: float) -> Self:
        """Return a canvas that fits on ``console``."""
        width = min(console.width, _MAX_WIDTH)
        return cls(seconds=seconds, width=width, unicode=shows_blocks(console))

    @property
    def columns(self) -> int:
        """The columns right of the margin."""
        return max(10, self.width - MARGIN)

    @property
    def bins(self) -> int:
        """The number of parts in which the time is divided."""
        return max(1, math.ceil(self.seconds / self.bin))

    @property
    def bin(self) -> int:
        """The seconds that are counted together: one, or more if the time is long."""
        return max(1, math.ceil(self.seconds / self.columns))

    def rates(self, times: Sequence[float], *, until: float) -> list[float]:
        """Count events by their times (s), and return the rate per second in each bin.

        The last bin, in which everything ended at ``until``, reaches back to be as long as the
        others.
        """
        counts = [0] * self.bins
        for time in times:
            counts[min(max(int(time / self.bin), 0), len(counts) - 1)] += 1
        last = min(int(until / self.bin), len(counts) - 1)
        counts[last] = sum(until - self.bin < time for time in times)
        return [count / self.bin for count in counts]

    def spread(self, rates: Sequence[float], *, until: float) -> list[float]:
        """Return a rate for each column, from one for each bin; 0 after the end."""
        span = self.bins * self.bin
        last = math.ceil(until / span * self.columns)
        return [
            rates[column * self.bins // self.columns] if column < last else 0.0
            for column in range(self.columns)
        ]


def shows_blocks(console: Console) -> bool:
    """Tell whether the output may be Unicode."""
    return console.encoding.startswith("utf")


def against_limit(canvas: Canvas, columns: Sequence[float], limit: float, *, style: str) -> Text:
    """Plot a rate for each column, up to twice the limit, with the limit as a line."""
    text = Text()
    limit_row = canvas.height // 2  # the row on whose lower edge the limit lies
    labels = dict(
        zip((canvas.height - 1, limit_row - 1), format_rates(2 * limit, limit), strict=True)
    )
    for row in reversed(range(canvas.height)):
        text.append(f"{labels.get(row, ''):>{MARGIN - 2}} ")
        text.append("│" if canvas.unicode else "|", "dim")
        for rate in columns:
            cell = _cell(canvas, rate / limit * limit_row - row)
            line = row == limit_row and cell == " "
            text.append("_" if line else cell, "yellow" if line else style)
        text.append("\n")
    text.append(_axis(canvas))
    return text


def sparkline(canvas: Canvas, columns: Sequence[float], label: str, *, style: str) -> Text:
    """Plot a rate for each column, in one row and on a scale of its own."""
    text = Text(f"{label:>{MARGIN - 2}}  ")
    highest = max(columns) or 1.0
    ramp = _EIGHTHS if canvas.unicode else _FOURTHS
    for rate in columns:
        # Rounded up, so that the smallest rate is visible.
        text.append(ramp[math.ceil(rate / highest * (len(ramp) - 1))], style)
    return text


def _cell(canvas: Canvas, filled: float) -> str:
    """Return a character that is ``filled`` to this fraction."""
    eighths = min(8, max(0, round(filled * 8)))
    if canvas.unicode:
        return _EIGHTHS[eighths]
    return "#" if 2 * eighths >= len(_EIGHTHS) - 1 else " "


def format_rates(*values: float) -> list[str]:
    """Return rates in one unit, in which the lowest of them has significant digits."""
    least, units = min(values), ((1, "s", 0.1), (_HOURS[0], "h", 10))
    found = ((per, unit) for per, unit, threshold in units if least * per >= threshold)
    per, unit = next(found, (_DAY, "d"))
    counts = [value * per for value in values]
    return [f"{n:,.0f}/{unit}" if n >= 10 else f"{n:.2g}/{unit}" for n in counts]  # noqa: PLR2004 - two digits


def _time_label(seconds: int, every: int) -> str:
    """Return an instant in the unit of the steps between marks."""
    units = ((_DAYS, "d"), (_HOURS, "h"), (_MINUTES, "min"))
    unit, name = next(((steps[0], name) for steps, name in units if every in steps), (1, "s"))
    return f"{seconds // unit:,} {name}"


def _axis(canvas: Canvas) -> Text:
    corner, line, tick = ("└", "─", "┬") if canvas.unicode else "+-+"
    span = canvas.bins * canvas.bin
    steps = (step for step in _STEPS if step / span * canvas.columns >= _MIN_GAP)
    every = next(steps, span + 1)
    marks, labels = [line] * canvas.columns, [" "] * (canvas.columns + MARGIN)
    for time in range(0, span, every):
        column = math.ceil(time / span * canvas.columns)
        if column == canvas.columns:
            break
        marks[column] = tick
        label = _time_label(time, every)
        if column + len(label) <= canvas.columns:  # half a label would be wrong
            labels[column : column + MARGIN] = label.ljust(MARGIN)
    indent = " " * (MARGIN - 1)
    ruler, legend = "".join(marks), "".join(labels).rstrip()
    return Text(f"{indent}{corner}{ruler}\n{indent} {legend}", "dim")
