"""The text itself, each byte coloured by its weight and the corrupted ones marked."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from torch import Tensor


COLUMNS = 90  # longer lines of the text are folded in the picture
CELL = (0.085, 0.17)  # inches
COLOURS = plt.get_cmap("Greens")
DARKEST = 0.65  # of the colour map: text stays readable on it
MARK = "#dd2222"

STYLE = """
body { font-family: system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
pre { font-size: 14px; line-height: 1.5; border: 1px solid #ddd; padding: 1rem; overflow-x: auto; }
.x { outline: 1.5px solid #d22; outline-offset: -1px; }
.bar span { display: inline-block; width: 2.2rem; text-align: center; }
"""


@dataclass(frozen=True)
class Heatmap:
    """Some rows of text, `[rows, seq]` each: the bytes, their weights, which are corrupted."""

    title: str
    tokens: Tensor
    weights: Tensor
    corrupted: Tensor

    @property
    def top(self) -> float:
        return max(self.weights.max().item(), 1.0)

    def colour(self, weight: float) -> str:
        return to_hex(COLOURS(DARKEST * weight / self.top))

    def rows(self) -> Iterator[list[tuple[int, float, bool]]]:
        for row in zip(self.tokens, self.weights, self.corrupted, strict=True):
            yield list(zip(*(part.tolist() for part in row), strict=True))


def write_heatmap(heatmap: Heatmap, path: Path) -> Path:
    """One page that needs nothing else; hover over a byte to read its weight."""
    title = html.escape(heatmap.title)
    blocks = [
        f"<pre>{''.join(_cell(heatmap, *cell) for cell in row)}</pre>" for row in heatmap.rows()
    ]
    legend = "".join(
        f'<span style="background:{heatmap.colour(value)}">{value:.1f}</span>'
        for value in (heatmap.top * i / 5 for i in range(6))
    )
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        f'<p class="bar">weight {legend} &nbsp; <span class="x">x</span> a corrupted byte</p>'
        f"{''.join(blocks)}</body></html>\n",
        encoding="utf-8",
    )
    return path


def draw_heatmap(heatmap: Heatmap, path: Path) -> Path:
    """The same as a picture."""
    cells, line = [], 0
    for row in heatmap.rows():
        places, line = _lay_out([token for token, _, _ in row], line)
        cells += zip(places, row, strict=True)
        line += 2
    width, height = COLUMNS * CELL[0] + 0.6, line * CELL[1] + 0.8
    figure = plt.figure(figsize=(width, height))
    axis = figure.add_axes((0.03, 0.02, 0.94, 1 - 0.6 / height))
    axis.set(xlim=(0, COLUMNS), ylim=(line, 0))
    axis.axis("off")
    axis.set_title(f"{heatmap.title}; red: corrupted", fontsize=9, loc="left")
    for (x, y), (token, weight, noisy) in cells:
        edge = MARK if noisy else "none"
        axis.add_patch(
            Rectangle((x, y), 1, 1, facecolor=heatmap.colour(weight), edgecolor=edge, linewidth=0.9)
        )
        axis.text(
            x + 0.5, y + 0.52, _glyph(token), family="monospace", fontsize=7, ha="center",
            va="center", parse_math=False,
        )  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _lay_out(row: list[int], line: int) -> tuple[list[tuple[int, int]], int]:
    """Where each byte goes: a new line after a newline byte and at the right edge."""
    places, column = [], 0
    for token in row:
        if column == COLUMNS:
            line, column = line + 1, 0
        places.append((column, line))
        column += 1
        if token == ord("\n"):
            line, column = line + 1, 0
    return places, line


def _cell(heatmap: Heatmap, token: int, weight: float, noisy: bool) -> str:
    mark = ' class="x"' if noisy else ""
    newline = "\n" if token == ord("\n") else ""
    return (
        f'<span{mark} style="background:{heatmap.colour(weight)}" title="weight {weight:.2f}">'
        f"{html.escape(_glyph(token))}</span>{newline}"
    )


def _glyph(token: int) -> str:
    if token == ord("\n"):
        return "↵"
    return chr(token) if 32 <= token < 127 else "·"
