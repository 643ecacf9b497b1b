"""Plots of a run and of a report: learning curves, confusion matrix, calibration, worst mistakes."""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from coatnet.evaluation.metrics import CalibrationBin
from coatnet.evaluation.report import Mistake
from coatnet.system.files import MAX_LOG_BYTES, read_regular

_INK, _FAINT = "#24292f", "#8c959f"
_RIGHT, _WRONG = "#1f6feb", "#d1480f"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": "#d0d7de",
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#eaeef2",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a class may be called "$5"
    "text.usetex": False,
}
_MAX_NAMED_CLASSES = 40  # beside the confusion matrix
_MAX_COUNTED_CLASSES = 16  # with numbers in its cells


@contextmanager
def open_figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure, width and height in inches, saved to `path` at the end of the block."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # without a home it tells at length where it keeps its fonts
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        logging.disable(disabled)

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # characters that the font lacks become boxes
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path)


def draw_curves(metrics_path: str | Path, out_png: str | Path) -> None:
    """Draw the learning curves of a run: loss, and accuracy or mean average precision.

    Args:
        metrics_path: metrics.jsonl of the run, one JSON object per line with `step` and `epoch`: training lines have
            `loss`, validation lines `nll` and `top1` or `mean_average_precision`. The last line of a step counts;
            incomplete lines are skipped.
        out_png: file to write.
    """
    training = read_series(metrics_path, "loss")
    losses = read_series(metrics_path, "nll")
    values, name = read_series(metrics_path, "top1"), "top-1 accuracy"
    if not len(values):
        values, name = read_series(metrics_path, "mean_average_precision"), "mean average precision"

    with open_figure(out_png, 9.0, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        left.set(title="Loss", xlabel="epoch")
        if len(training):
            left.plot(*training.T, color=_RIGHT, alpha=0.25, linewidth=0.8)
            left.plot(training[:, 0], smooth(training[:, 1]), color=_RIGHT, linewidth=1.6, label="training")
        if len(losses):
            left.plot(*losses.T, color=_WRONG, linewidth=1.6, marker="o", markersize=3, label="held out")
        if len(training) or len(losses):
            left.legend(frameon=False)
        right.set(title=f"Held-out {name}, %", xlabel="epoch")
        if len(values):
            epochs, percent = values[:, 0], 100 * values[:, 1]
            right.plot(epochs, percent, color=_WRONG, linewidth=1.6, marker="o", markersize=3)
            best = int(percent.argmax())
            right.plot(epochs[best], percent[best], "o", color=_WRONG, markersize=7)
            right.annotate(
                f"{percent[best]:.1f} %",
                (epochs[best], percent[best]),
                xytext=(0, -14),
                textcoords="offset points",
                ha="right",
                va="top",
                fontweight="bold",
            )
        for axes in (left, right):
            axes.set_xlim(left=0)
            axes.grid(axis="y")
            axes.set_axisbelow(True)


def read_series(metrics_path: str | Path, name: str) -> np.ndarray:
    """Epoch and value of the M lines that have the value, (M, 2)."""
    by_step = {}
    for line in read_regular(metrics_path, MAX_LOG_BYTES).decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record.get(name) is not None:
                by_step[int(record["step"])] = float(record["epoch"]), float(record[name])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # a line that is cut or damaged
    rows = np.array([by_step[step] for step in sorted(by_step)], dtype=float)
    return rows.reshape(-1, 2)  # (0, 2) without lines


def smooth(values: np.ndarray) -> np.ndarray:
    """Centered moving average over 5 % of the points, narrower at the ends."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], out_png: str | Path) -> None:
    """Draw a confusion matrix, as fractions of each true class: right in blue, wrong in orange on a finer scale.

    Args:
        matrix: `matrix[i, j]` is the number of images of class i predicted as class j, (K, K).
        classes: K names, shown up to 40 classes; numbers are shown up to 16.
        out_png: file to write.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm

    size = len(classes)
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(size, dtype=bool)
    worst = max(float(fractions[~diagonal].max(initial=0.0)), 1e-9)
    blues = LinearSegmentedColormap.from_list("right", ["#eef4fd", _RIGHT])
    oranges = LinearSegmentedColormap.from_list("wrong", ["#ffffff", "#fbc9a5", _WRONG])
    # Few mistakes among many classes would vanish on a linear scale.
    scale = PowerNorm(0.5, 0, worst) if size > _MAX_COUNTED_CLASSES else Normalize(0, worst)
    colors = np.where(diagonal[..., None], blues(fractions), oranges(scale(fractions)))

    side = float(np.clip(2.2 + 0.5 * size, 4.2, 9.0))
    with open_figure(out_png, side, side) as figure:
        axes = figure.add_subplot(title="What is taken for what", xlabel="predicted", ylabel="truth")
        axes.imshow(colors, interpolation="nearest")
        axes.tick_params(length=0)
        if size > _MAX_NAMED_CLASSES:
            axes.spines[:].set_visible(True)
            axes.set(xticks=[], yticks=[], ylabel=f"truth ({size:,} classes)")
            return
        axes.spines[:].set_visible(False)
        names = [short_name(name) for name in classes]
        font = 10 if size <= _MAX_COUNTED_CLASSES else 7
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=font)
        axes.set_yticks(range(size), names, fontsize=font)
        axes.set_xticks(np.arange(-0.5, size), minor=True)
        axes.set_yticks(np.arange(-0.5, size), minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5 if size <= _MAX_COUNTED_CLASSES else 0.5)
        axes.tick_params(which="minor", length=0)
        if size <= _MAX_COUNTED_CLASSES:
            for (row, column), count in np.ndenumerate(matrix):
                dark = fractions[row, column] > 0.6 if row == column else fractions[row, column] > 0.7 * worst
                color = "white" if dark else _INK if count else "#d0d7de"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=8.5)


def draw_mistakes(thumbnails: Sequence[np.ndarray], mistakes: Sequence[Mistake], out_png: str | Path) -> None:
    """Draw a grid of images, uint8 (H, W, 3), numbered as in the report: true class in blue, predicted in orange."""
    columns = min(6, len(thumbnails))
    rows = -(-len(thumbnails) // columns)
    with open_figure(out_png, 1.6 * max(columns, 3), 2.05 * rows) as figure:
        for number, (image, mistake) in enumerate(zip(thumbnails, mistakes, strict=False), start=1):
            axes = figure.add_subplot(rows, columns, number)
            height, width = image.shape[:2]
            side = max(height, width)
            # Pixels of small images stay visible, larger images are smoothed; every cell is square.
            axes.imshow(image, interpolation="nearest" if side <= 64 else "antialiased")
            axes.set_xlim((width - side) / 2 - 0.5, (width + side) / 2 - 0.5)
            axes.set_ylim((height + side) / 2 - 0.5, (height - side) / 2 - 0.5)
            axes.set(xticks=[], yticks=[], facecolor="#f6f8fa")
            axes.spines[:].set(visible=True, color="#d0d7de")
            truth = f"{number}  {short_name(mistake.truth)}"
            axes.set_title(truth, pad=16, color=_RIGHT, fontsize=8, fontweight="normal")
            answer = f"{short_name(mistake.predicted)}  {100 * mistake.probability:.0f} %"
            axes.text(0, 1.04, answer, transform=axes.transAxes, color=_WRONG, fontsize=8)


def draw_calibration(bins: Sequence[CalibrationBin], out_png: str | Path) -> None:
    """Draw a reliability diagram: above, accuracy by probability against the diagonal; below, number of predictions."""
    filled = [row for row in bins if row.count]
    width = bins[0].high - bins[0].low
    middles = [row.low + width / 2 for row in filled]
    with open_figure(out_png, 4.6, 4.8) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        above.bar(middles, [row.accuracy for row in filled], 0.9 * width, color=_RIGHT, alpha=0.85)
        above.plot((0, 1), (0, 1), color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
        above.text(
            0.03,
            0.95,
            "dashed: exactly as often as claimed\nabove it: too modest; below: too sure",
            va="top",
            fontsize=8,
        )
        above.set(title="Can the probabilities be trusted?", ylabel="how often right", xlim=(0, 1), ylim=(0, 1.02))
        above.grid(axis="y")
        above.set_axisbelow(True)
        below.bar(middles, [row.count for row in filled], 0.9 * width, color=_FAINT)
        below.set(xlabel="probability given", ylabel="how many", yticks=[])


def short_name(name: str) -> str:
    """A name on one line of at most 18 characters; what is not Unicode is escaped."""
    line = " ".join(name.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= 18 else line[:17] + "…"
