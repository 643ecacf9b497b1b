"""Plots are drawn for any data."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coatnet.evaluation.metrics import CalibrationBin
from coatnet.evaluation.plots import draw_calibration, draw_confusion, draw_curves, draw_mistakes, read_series
from coatnet.evaluation.report import Mistake


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def write_metrics(path: Path, *, tail: str = "") -> Path:
    lines = [{"step": step, "epoch": step / 50, "loss": 2 / step, "learning_rate": 0.1} for step in range(1, 200)]
    lines += [{"step": step, "epoch": step / 50, "top1": step / 250, "nll": 1.5 / step} for step in range(50, 201, 50)]
    path.write_text("\n".join(map(json.dumps, lines)) + tail, encoding="utf-8")
    return path


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    draw_curves(write_metrics(tmp_path / "whole.jsonl"), tmp_path / "whole.png")
    draw_curves(write_metrics(tmp_path / "torn.jsonl", tail='\n{"step": 250, "epoch": 5, "to'), tmp_path / "torn.png")
    assert np.array_equal(pixels(tmp_path / "whole.png"), pixels(tmp_path / "torn.png"))


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    once = read_series(write_metrics(tmp_path / "once.jsonl"), "loss")
    again = "\n" + json.dumps({"step": 199, "epoch": 3.98, "loss": 5.0})
    twice = read_series(write_metrics(tmp_path / "twice.jsonl", tail=again), "loss")
    assert len(twice) == len(once) and twice[-1].tolist() == [3.98, 5.0]
    np.testing.assert_array_equal(twice[:-1], once[:-1])


def test_curves_show_the_values(tmp_path: Path) -> None:
    draw_curves(write_metrics(tmp_path / "metrics.jsonl"), tmp_path / "curves.png")
    (tmp_path / "none.jsonl").write_text("")
    draw_curves(tmp_path / "none.jsonl", tmp_path / "none.png")
    assert _num_colored(tmp_path / "curves.png") > 500 + _num_colored(tmp_path / "none.png")


def test_bars_of_a_calibration_are_as_high_as_the_accuracy(tmp_path: Path) -> None:
    areas = []
    for number, accuracy in enumerate((0.2, 0.8)):
        rows = [CalibrationBin(0.0, 0.5, 0, None, None), CalibrationBin(0.5, 1.0, 40, 0.9, accuracy)]
        draw_calibration(rows, tmp_path / f"{number}.png")
        areas.append(_num_colored(tmp_path / f"{number}.png"))
    assert areas[1] / areas[0] == pytest.approx(4, rel=0.1)


def test_the_images_of_mistakes_stand_in_order_in_cells_of_one_size(tmp_path: Path) -> None:
    mistakes = [Mistake("1.png", "shirt", "coat", 0.9), Mistake("2.png", "coat", "shirt", 0.8)]
    thumbnails = [np.zeros((20, 20, 3), np.uint8), np.zeros((40, 160, 3), np.uint8)]
    thumbnails[0][..., 0] = thumbnails[1][..., 1] = 255  # red and green
    draw_mistakes(thumbnails, mistakes, tmp_path / "mistakes.png")
    found = pixels(tmp_path / "mistakes.png")
    (red_rows, red), (_, green) = (
        np.nonzero((found[..., channel] > 250) & (np.delete(found, channel, axis=-1) < 5).all(-1)) for channel in (0, 1)
    )
    side = np.ptp(red) + 1
    assert red.max() < green.min()
    assert side == pytest.approx(np.ptp(red_rows) + 1, abs=2) == pytest.approx(np.ptp(green) + 1, abs=2)
    assert len(red) == pytest.approx(side**2, rel=0.05) and len(green) == pytest.approx(side**2 / 4, rel=0.05)
    draw_mistakes(thumbnails, [mistakes[0], Mistake("2.png", "coat", "bag", 0.8)], tmp_path / "other.png")
    changed = np.nonzero((found != pixels(tmp_path / "other.png")).any(-1))
    assert len(changed[1]) and changed[1].min() > red.max()


def _num_colored(path: Path) -> int:
    """Pixels that are not gray."""
    return int((np.ptp(pixels(path).astype(int), axis=-1) > 50).sum())


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"step": 1, "epoch": 0.1, "loss": 2.0}\n',
        '{"step": 5, "epoch": 1, "mean_average_precision": 0.4}',
    ],
)
def test_curves_of_a_run_without_values(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert pixels(tmp_path / "curves.png").shape == (510, 1350, 3)


@pytest.mark.parametrize("size", [1, 2, 10, 30, 41, 300])
def test_correct_cells_are_blue_and_mistakes_orange(tmp_path: Path, size: int) -> None:
    matrix = 9 * np.eye(size, dtype=int)
    draw_confusion(matrix, [f"class {number}" for number in range(size)], tmp_path / "right.png")
    matrix[0, -1] += 9
    draw_confusion(matrix, [f"class {number}" for number in range(size)], tmp_path / "wrong.png")

    def orange(name: str) -> int:
        red, _, blue = np.moveaxis(pixels(tmp_path / name), -1, 0)
        return int((red > blue + 100).sum())

    def blue(name: str) -> int:
        red, _, blue = np.moveaxis(pixels(tmp_path / name), -1, 0)
        return int((blue > red + 100).sum())

    assert blue("right.png") > 500
    assert orange("right.png") == 0
    assert orange("wrong.png") > 0 or size == 1


def test_a_confusion_matrix_without_images_is_drawn(tmp_path: Path) -> None:
    draw_confusion(np.zeros((3, 3), dtype=int), "abc", tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000
