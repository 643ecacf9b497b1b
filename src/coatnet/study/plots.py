"""Plots of a study, as in the paper's Figure 1: loss and accuracy by steps, and the gap by number of images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coatnet.evaluation.plots import open_figure, short_name, smooth
from coatnet.study.record import Run
from coatnet.study.statistics import Estimate, estimate

# Colors that people with any kind of color vision can tell apart (M. Okabe and K. Ito, 2008), darkest first.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vP*"


def draw_curves(runs: Mapping[str, Mapping[int, Sequence[Run]]], path: Path) -> None:
    """Draw training loss and held-out accuracy by steps, a row a size, a line a member, with 95 % bands over seeds.

    Args:
        runs: finished runs by member and number of training images.
        path: PNG file to write.
    """
    sizes = sorted({size for by_size in runs.values() for size in by_size})
    with open_figure(path, 9.0, 2.7 * len(sizes) + 0.4) as figure:
        rows = figure.subplots(len(sizes), 2, squeeze=False)
        for size, (loss, accuracy) in zip(sizes, rows, strict=True):
            loss.set(title=f"Training loss, {size:,} images", xlabel="step")
            accuracy.set(title=f"Held-out accuracy, {size:,} images, %", xlabel="step")
            curves = {member: [run.curves for run in by_size.get(size, ())] for member, by_size in runs.items()}
            trained = {
                member: [dict(zip(each.step, each.train_loss, strict=True)) for each in seeds]
                for member, seeds in curves.items()
            }
            measured = {
                member: [
                    dict(zip(each.held_out_step, 100 * np.array(each.held_out_top1), strict=True)) for each in seeds
                ]
                for member, seeds in curves.items()
            }
            _draw_bands(loss, trained, is_loss=True)
            _draw_bands(accuracy, measured)
        _legend(figure, rows)


def draw_gap(
    gaps: Mapping[str, Mapping[int, Estimate]], accuracies: Mapping[str, Mapping[int, Estimate]], path: Path
) -> None:
    """Draw the generalization gap and the held-out accuracy by number of training images, with 95 % intervals.

    Args:
        gaps, accuracies: in percent, by member and number of training images.
        path: PNG file to write.
    """
    with open_figure(path, 9.0, 3.8) as figure:
        panels = figure.subplots(1, 2)
        titles = ("Gap, points", "Held-out accuracy, %")
        for axes, values, title in zip(panels, (gaps, accuracies), titles, strict=True):
            axes.set(title=title, xscale="log", xlabel="training images")
            for number, (member, by_size) in enumerate(values.items()):
                sizes = sorted(by_size)
                means = [by_size[size].mean for size in sizes]
                halves = [_half(by_size[size]) for size in sizes]
                # Points of equal size lie beside each other: intervals stay readable.
                places = [size * 1.06 ** (number - (len(values) - 1) / 2) for size in sizes]
                axes.errorbar(
                    places,
                    means,
                    halves,
                    color=_color(number),
                    linestyle=_line(number),
                    marker=_MARKERS[number % len(_MARKERS)],
                    markersize=5,
                    linewidth=1.2,
                    capsize=3,
                    label=_label(member),
                )
            ticks = sorted({size for by_size in values.values() for size in by_size})
            axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
            axes.set_xticks([], minor=True)
            axes.set_xlim(ticks[0] / 1.6, ticks[-1] * 1.6)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        _legend(figure, panels[None])


def _draw_bands(axes: Any, members: Mapping[str, Sequence[Mapping[int, float]]], *, is_loss: bool = False) -> None:
    """Draw for each member the mean over the steps that all its seeds have, and its interval if there are several.

    A loss is smoothed, and its axis is logarithmic.
    """
    bands = []
    for number, (member, seeds) in enumerate(members.items()):
        steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
        if not steps:
            continue
        found = [estimate(seed[step] for seed in seeds) for step in steps]
        means, halves = np.array([each.mean for each in found]), np.array([_half(each) for each in found])
        if is_loss:
            means, halves = smooth(means), smooth(halves)
        axes.plot(
            steps,
            means,
            color=_color(number),
            linestyle=_line(number),
            linewidth=1.4,
            marker="" if len(steps) > 1 else _MARKERS[number % len(_MARKERS)],
            label=_label(member),
        )
        if len(seeds) > 1:
            bands.append((steps, means - halves, means + halves, _color(number)))
    is_log = is_loss and all(min(line.get_ydata()) > 0 for line in axes.lines)
    if is_log:
        axes.set_yscale("log")
    axes.margins(y=0.1)
    axes.set_ylim(axes.get_ylim())  # the lines set it: bands of two seeds would leave them no room
    if is_log:
        _label_log_axis(axes)
    for steps, low, high, color in bands:
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)


def _label(member: str) -> str:
    """A name in the legend, where matplotlib leaves out what begins with an underscore."""
    return f" {short_name(member)}" if member.startswith("_") else short_name(member)


def _half(value: Estimate) -> float:
    return value.interval[1] - value.mean if value.interval else 0.0


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _line(number: int) -> str:
    return ("-", "--", ":")[number // len(_COLORS) % 3]


def _label_log_axis(axes: Any) -> None:
    """Label 1, 2 and 5 of each power of ten, or even steps where the range is too narrow for them."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_ylim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [tick for power in powers for digit in (1, 2, 5) if low <= (tick := digit * 10.0**power) <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def _legend(figure: Any, rows: Any) -> None:
    """One legend for all axes, above them."""
    named: dict[str, Any] = {}
    for axes in rows.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    figure.legend(named.values(), named, loc="outside upper center", ncols=min(len(named), 5) or 1, frameon=False)
