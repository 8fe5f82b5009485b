"""What pictures are drawn on: their colours, light and dark, and the file they are written to."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS: Final = "#1f9d55"
OTHER: Final = "#9aa0a6"
LINE: Final = "#3b7dd8"
LIMIT: Final = "#d98c00"
PAUSE: Final = "#d9534f"
_PAPER: Final = {False: "#ffffff", True: "#17191c"}
_INK: Final = {False: "#202124", True: "#e8eaed"}
_SUFFIXES: Final = (".png", ".svg", ".pdf")
_INK_SETTINGS: Final = (
    "text.color",
    "axes.labelcolor",
    "axes.edgecolor",
    "axes.titlecolor",
    "xtick.color",
    "ytick.color",
)


@contextmanager
def canvas(path: Path, *, what: str, size: tuple[float, float], dark: bool) -> Generator["Figure"]:
    """Provide a figure of ``size`` inches that is written to ``path`` at the end of the block.

    The same picture gives the same file, byte for byte, if that is a PNG or an SVG.

    Raises:
        ValueError: the suffix of the path is not that of a picture.
        ImportError: matplotlib is missing; the message names ``what`` is drawn, e.g. "a plan".
        OSError: the file cannot be written.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"a picture must be one of {', '.join(_SUFFIXES)}, not {path.name!r}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            f'drawing {what} needs {error.name}: pip install "asyncbucket[plot]"'
        ) from error
    style: dict[Any, Any] = {
        **dict.fromkeys(_INK_SETTINGS, _INK[dark]),
        "axes.facecolor": "none",
        "legend.facecolor": _PAPER[dark],
        "svg.hashsalt": "asyncbucket",
        "text.parse_math": False,  # names may hold dollars
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, dpi=150)
        figure.set_layout_engine("constrained")
        figure.set_facecolor(_PAPER[dark])
        yield figure
        with warnings.catch_warnings():  # a glyph that no font has appears as a box
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(path, metadata=None if path.suffix.lower() == ".pdf" else {"Date": None})
