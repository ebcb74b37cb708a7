"""Two pictures: how the heads learned, and how the weights were spread while they did."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # files only, no window

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


SMOOTH = 5  # logged points on each side
History = Sequence[Mapping[str, float]]


def plot_losses(histories: Mapping[str, History], heads: int, path: Path) -> Path:
    """Validation loss of each head against the steps, one line per arm."""
    figure, axes = plt.subplots(1, heads, figsize=(3.2 * heads, 3.2), squeeze=False)
    for head, axis in enumerate(axes[0]):
        for name, history in histories.items():
            _line(axis, history, f"validation_head{head}_loss", name, marker="o")
        axis.set(title=f"head {head}", xlabel="step", ylabel="validation loss (nats)")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    return _save(figure, path)


def plot_weights(history: History, path: Path, title: str) -> Path:
    """The quantiles of the weights, and the mean weight of corrupted and of clean bytes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    logged = [entry for entry in history if "weight_mean" in entry]
    steps = [entry["step"] for entry in logged]
    for low, high, alpha in (("weight_min", "weight_max", 0.15), ("weight_p25", "weight_p75", 0.3)):
        lower, upper = ([entry[name] for entry in logged] for name in (low, high))
        name = f"{low.removeprefix('weight_')} to {high.removeprefix('weight_')}"
        left.fill_between(steps, lower, upper, alpha=alpha, color="tab:blue", label=name)
    _line(left, logged, "weight_p50", "median", "tab:blue")
    _line(left, logged, "effective_sample_ratio", "effective sample ratio", "tab:orange")
    left.set(title="weights", xlabel="step")
    _smooth_line(right, logged, "weight_on_clean", "clean bytes", "tab:green")
    _smooth_line(right, logged, "weight_on_corrupted", "corrupted bytes", "tab:red")
    right.set(title="mean weight", xlabel="step", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2)
    figure.suptitle(title)
    return _save(figure, path)


def _line(
    axis: Axes, history: History, name: str, label: str, colour: str | None = None, marker: str = ""
) -> None:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker)


def _smooth_line(axis: Axes, history: History, name: str, label: str, colour: str) -> None:
    """The points and their moving average: one batch holds only a few documents."""
    steps, values = ([e[key] for e in history if name in e] for key in ("step", name))
    if steps:
        around = [values[max(0, i - SMOOTH) : i + SMOOTH + 1] for i in range(len(values))]
        axis.plot(steps, values, ".", color=colour, alpha=0.4)
        axis.plot(steps, [sum(v) / len(v) for v in around], color=colour, label=label)


def _save(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
