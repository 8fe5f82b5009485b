"""Plots in characters show what was counted."""

import pytest

from asyncbucket.cli.plot import MARGIN, Canvas, against_limit, sparkline


def rows(text: object) -> list[str]:
    """Return the rows of a plot without its margin."""
    return [line[MARGIN:] for line in str(text).splitlines()]


def test_rate_is_in_events_per_second() -> None:
    """In three seconds there are two events in the first, and one in the second."""
    canvas = Canvas(seconds=3.0, width=MARGIN + 30)

    assert canvas.rates([0.0, 0.9, 1.0], until=3.0) == [2.0, 1.0, 0.0]


def test_long_run_has_longer_bins_with_rates_per_second() -> None:
    """With 100 s in 50 columns each bin is 2 s, and rates are still per second."""
    canvas = Canvas(seconds=100.0, width=MARGIN + 50)

    assert (canvas.bin, canvas.bins) == (2, 50)
    assert canvas.rates([0.5, 1.5, 99.0], until=100.0)[::49] == [1.0, 0.5]


def test_last_bin_covers_a_whole_second() -> None:
    """The last bin of a run that ends at 2.25 s reaches back to 1.25 s, so it shows no drop."""
    canvas = Canvas(seconds=2.25, width=MARGIN + 30)
    steady = [number / 4 for number in range(9)]

    assert canvas.rates(steady, until=2.25) == [4.0, 4.0, 3.0]
    assert canvas.rates([*steady, 2.2], until=2.25)[-1] == 4.0


def test_nothing_is_drawn_after_the_end() -> None:
    """A run of 1 s on a canvas of 3 s fills a third of it."""
    canvas = Canvas(seconds=3.0, width=MARGIN + 30)

    assert canvas.spread([5.0, 5.0, 5.0], until=1.0) == [5.0] * 10 + [0.0] * 20


def test_column_at_the_limit_touches_the_limit_line() -> None:
    """The limit is the lower edge of the middle row, so a rate at the limit fills all below."""
    canvas = Canvas(seconds=10.0, width=MARGIN + 10, height=4)
    plot = rows(against_limit(canvas, [10.0] * 5 + [5.0] * 5, 10.0, style=""))

    assert plot[:4] == [" " * 10, "_" * 10, "█" * 5 + " " * 5, "█" * 10]


def test_column_over_twice_the_limit_is_cut_off_at_the_top() -> None:
    """It ends at the top."""
    canvas = Canvas(seconds=10.0, width=MARGIN + 10, height=2)

    assert rows(against_limit(canvas, [90.0] * 10, 10.0, style=""))[:2] == ["█" * 10, "█" * 10]


@pytest.mark.parametrize(("limit", "label"), [(1_200, "1,200/s"), (20, "20/s"), (25 / 3, "8.3/s")])
def test_limit_is_labelled_at_its_row(limit: float, label: str) -> None:
    """It has only as many digits as are meaningful."""
    canvas = Canvas(seconds=10.0, width=MARGIN + 10)

    lines = str(against_limit(canvas, [0.0] * 10, limit, style="")).splitlines()

    assert lines[3].split("│")[0].strip() == label


def test_plot_without_unicode_is_pure_ascii() -> None:
    """A terminal without Unicode gets only ASCII."""
    canvas = Canvas(seconds=4.0, width=MARGIN + 12, unicode=False)
    values = [0.0, 5.0, 10.0, 25.0] * 3

    plot = (
        f"{against_limit(canvas, values, 10.0, style='')}{sparkline(canvas, values, '', style='')}"
    )

    assert plot.isascii()


def test_sparkline_shows_even_the_smallest_rate() -> None:
    """One among a thousand is visible, and zero is blank."""
    canvas = Canvas(seconds=3.0, width=MARGIN + 10)

    assert str(sparkline(canvas, [0.0, 1.0, 1000.0], "429s", style="")) == "  429s   ▁█"


def test_axis_labels_stand_under_their_marks() -> None:
    """A mark at 10 s is in the column of 10 s."""
    canvas = Canvas(seconds=20.0, width=MARGIN + 40)
    *_, ruler, labels = rows(against_limit(canvas, [1.0] * 40, 1.0, style=""))

    marks = [column for column, mark in enumerate(ruler) if mark == "┬"]
    assert marks == [0, 10, 20, 30]
    assert [labels[column : column + 4].strip() for column in marks] == [
        "0 s",
        "5 s",
        "10 s",
        "15 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (240.0, ["0 min", "1 min", "2 min", "3 min"]),
        (14_400.0, ["0 h", "1 h", "2 h", "3 h"]),
        (345_600.0, ["0 d", "1 d", "2 d", "3 d"]),
    ],
)
def test_long_axis_is_labelled_in_minutes_hours_or_days(seconds: float, labels: list[str]) -> None:
    """The unit is that of the steps between the marks."""
    canvas = Canvas(seconds=seconds, width=MARGIN + 40)
    *_, names = rows(against_limit(canvas, [1.0] * 40, 1.0, style=""))

    assert [name.strip() for name in names.split("  ") if name.strip()] == labels


@pytest.mark.parametrize(("limit", "label"), [(0.08, "288/h"), (0.05, "180/h"), (0.001, "86/d")])
def test_slow_rates_are_labelled_per_hour_or_day(limit: float, label: str) -> None:
    """0.0035/s would mean little, and an axis has only one unit."""
    canvas = Canvas(seconds=10.0, width=MARGIN + 10)

    lines = str(against_limit(canvas, [0.0] * 10, limit, style="")).splitlines()

    twice, once = (lines[row].split("│")[0].strip() for row in (0, 3))
    assert once == label
    assert twice == f"{2 * limit * (86_400 if 'd' in label else 3_600):,.0f}/{label[-1]}"


def test_axis_label_that_does_not_fit_is_omitted() -> None:
    """Its mark is always there; "50 mi" would be no label."""
    canvas = Canvas(seconds=3_240.0, width=60)
    *_, ruler, names = rows(against_limit(canvas, [1.0] * 40, 1.0, style=""))

    assert names.split("  ")[-1].strip() == "40 min"
    assert ruler.count("┬") == 6
