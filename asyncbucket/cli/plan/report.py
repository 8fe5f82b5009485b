"""A plan in a terminal: a sentence, a table, and the admissions over time."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncbucket.cli.plot import Canvas, against_limit, format_rates, shows_blocks
from asyncbucket.plan.result import Plan, details, limit_in_words, table, tenants


def show(plan: Plan) -> None:
    """Print a plan."""
    console = Console(highlight=False)
    unicode = shows_blocks(console)
    console.print(Text(plan.summary, "bold"))
    for line in details(plan):
        console.print(line, markup=False)
    if plan.limits:
        console.print(_limits(plan, unicode=unicode))
    if plan.tenants:
        console.print(_table(tenants(plan), unicode=unicode))
    if plan.bound_by is not None or plan.waits.max:
        _plot(console, Canvas.on(console, plan.duration), plan)


def _limits(plan: Plan, *, unicode: bool) -> Table:
    shown = _table(table(plan), unicode=unicode)
    for row, limit in zip(shown.rows, plan.limits, strict=True):
        row.style = "bold yellow" if limit is plan.binding else None
    return shown


def _table(rows: Sequence[tuple[str, ...]], *, unicode: bool) -> Table:
    header, *body = rows
    shown = Table(box=box.SIMPLE_HEAD if unicode else box.ASCII2, pad_edge=False)
    shown.add_column(header[0])
    for name in header[1:]:
        shown.add_column(name, justify="right")
    for row in body:
        shown.add_row(*map(Text, row))
    return shown


def _plot(console: Console, canvas: Canvas, plan: Plan) -> None:
    binding = plan.binding
    rate = None if binding is None else binding.rate
    title = "admitted over time"
    if rate is not None and binding is not None:
        title += f"; ____ is the limit of {limit_in_words(binding)}"
    columns = columns_of(plan, canvas)
    limit = rate or max(columns)
    if max(columns) > 2 * limit:
        title += f", {format_rates(max(columns), limit)[0]} the peak"
    console.print(Text(title, "bold"))
    console.print(against_limit(canvas, columns, limit, style="green"))


def columns_of(plan: Plan, canvas: Canvas) -> list[float]:
    """Return the admissions a second in each column, from the parts of the plan that it covers."""
    slice_seconds = plan.duration / len(plan.timeline)
    column_seconds = canvas.bins * canvas.bin / canvas.columns
    columns = [0.0] * canvas.columns
    for number, count in enumerate(plan.timeline):
        start, end = number * slice_seconds, (number + 1) * slice_seconds
        column = int(start / column_seconds)
        while start < end and column < len(columns):
            slice_end = min(end, (column + 1) * column_seconds)
            columns[column] += count / slice_seconds * (slice_end - start) / column_seconds
            start, column = slice_end, column + 1
    return columns
