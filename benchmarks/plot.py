"""Draw a sweep of ``linear_loss.py``: time and memory against vocabulary, predictions and heads.

python benchmarks/plot.py benchmarks/results/sweep.csv benchmarks/images/linear_loss.png
"""

import argparse
import csv
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator


AXES = {
    "vocab": "vocabulary V",
    "predictions": "predictions N",
    "heads": "heads H, same trunk",
}
STYLES = {"wmtp": ("C0", "o-"), "dense": ("C3", "s-"), "torch chunked": ("C2", "^-")}


def draw(rows: list[dict[str, str]], path: Path) -> None:
    figure, panels = plt.subplots(2, 3, figsize=(11, 6), sharex="col", layout="constrained")
    for column, (axis, words) in enumerate(AXES.items()):
        for name, (color, style) in STYLES.items():
            mine = [row for row in rows if row["axis"] == axis and row["contender"] == name]
            if not mine:
                continue
            mine.sort(key=lambda row: int(row[axis]))
            x = [int(row[axis]) for row in mine]
            for line, field in enumerate(("seconds", "peak_mib")):
                y = [float(row[field]) for row in mine]
                panels[line, column].plot(x, y, style, color=color, label=name, markersize=4)
        points = {
            int(row[axis]): float(row["floor_seconds"]) for row in rows if row["axis"] == axis
        }
        panels[0, column].plot(*zip(*sorted(points.items()), strict=True), "k:", label="floor")
        panels[1, column].set_xlabel(words)
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.xaxis.set_minor_locator(NullLocator())
            panel.grid(alpha=0.3)
        ticks = sorted(points)
        panels[1, column].set_xticks(ticks)
        panels[1, column].set_xticklabels([f"{x // 1000}k" if x >= 8000 else str(x) for x in ticks])
    panels[0, 0].set_ylabel("seconds, forward and backward")
    panels[1, 0].set_ylabel("peak MiB beyond the inputs")
    panels[0, 0].legend()
    first = rows[0]
    fixed = ", ".join(
        f"{words.split()[0]}: " + _fixed([row for row in rows if row["axis"] == axis], axis)
        for axis, words in AXES.items()
    )
    figure.suptitle(
        f"{first['dtype']}, {first['chip']}, {first['threads']} threads, torch {first['torch']}\n"
        f"held fixed — {fixed}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _fixed(rows: list[dict[str, str]], axis: str) -> str:
    names = {"predictions": "N", "dim": "D", "vocab": "V", "heads": "H"}
    kept = {names[key]: {row[key] for row in rows} for key in names if key != axis}
    return " ".join(f"{name} {values.pop()}" for name, values in kept.items() if len(values) == 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    options = parser.parse_args()
    with options.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    draw([row for row in rows if row["dtype"] == rows[0]["dtype"]], options.png)


if __name__ == "__main__":
    main()
