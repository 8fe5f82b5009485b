"""Draw `warm-light.svg` and `warm-dark.svg`: what charging warm prompts as the provider does brings.

    python docs/pictures/warm.py

The seconds are those of ``python -m tests.feedback.warm agents``: 50 agents make five calls of 10 s each,
one after the other, with a prefix of 36,000 tokens that all share and 1,000 of their own, at 450,000
input tokens a minute. "Whole prompts reserved" is without what `asyncbucket.providers.prefixes` knows.
"""

from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
#: What is drawn: a label, and seconds.
ROWS: Final = (
    ("Whole prompts reserved, whole replies", 242),
    ("Whole prompts reserved, streams", 132),
    ("Charged as counted, whole replies", 71),
    ("Charged as counted, streams", 58),
    ("No limit at all", 50),
)
#: Text, faint text, bar, and the bar of what came before.
COLORS: Final = {
    "light": ("#1f2328", "#59636e", "#1a7f37", "#afb8c1"),
    "dark": ("#e6edf3", "#9198a1", "#3fb950", "#484f58"),
}
LEFT: Final = 280
PER_SECOND: Final = 1.35
STEP: Final = 34


def draw(theme: str) -> str:
    """Return the picture as SVG."""
    text, faint, bar, before = COLORS[theme]
    height = 44 + STEP * len(ROWS)
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-size="14" '
            f'font-family="system-ui, sans-serif">'
        ),
        (
            f'<text x="0" y="18" fill="{faint}">Seconds until 50 agents have made five calls of 10 s '
            f"with one shared prompt prefix</text>"
        ),
    ]
    for place, (label, seconds) in enumerate(ROWS):
        top = 34 + STEP * place
        color = bar if label.startswith("Charged") else before
        lines += [
            f'<text x="{LEFT - 10}" y="{top + 16}" fill="{text}" text-anchor="end">{label}</text>',
            (
                f'<rect x="{LEFT}" y="{top}" width="{seconds * PER_SECOND:.0f}" height="22" rx="3" '
                f'fill="{color}"/>'
            ),
            (
                f'<text x="{LEFT + seconds * PER_SECOND + 8:.0f}" y="{top + 16}" '
                f'fill="{text}">{seconds} s</text>'
            ),
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    for name in COLORS:
        (HERE / f"warm-{name}.svg").write_text(draw(name), "utf-8")
