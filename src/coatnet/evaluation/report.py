"""What an evaluation found, as one value that reads as text, as numbers and as images."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coatnet.bundle.config import readable_json
from coatnet.evaluation import report_markdown
from coatnet.evaluation.calibration import CalibrationBin
from coatnet.evaluation.intervals import Interval
from coatnet.evaluation.metrics import ClassFigures
from coatnet.system.files import atomic_files, atomic_write


@dataclass(frozen=True)
class Mistake:
    """An image the model was sure and wrong about; `probability` is what it gave to its wrong answer."""

    image: str
    truth: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Report:
    """Figures as fractions with their 95 % intervals, and everything needed to believe or doubt them.

    `per_class` is in the order of `classes`; `confusion[i][j]` counts images of class i taken for class j;
    `thumbnails` are the worst mistakes' images, uint8 (H, W, 3). Equality ignores what the clock and the
    thumbnails say.
    """

    data: str
    split: str
    model: str
    resolution: int
    num_parameters: int
    classes: tuple[str, ...]
    multilabel: bool
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval | None]
    per_class: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    confused_pairs: tuple[tuple[str, str, int], ...]
    calibration: tuple[CalibrationBin, ...]
    mistakes: tuple[Mistake, ...]
    bad_images: Mapping[str, str]
    seconds: float = field(compare=False)
    thumbnails: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)

    def headline(self) -> str:
        """The main figure, its interval and its n, in one line."""
        return report_markdown.headline(self)

    def to_markdown(self, *, with_plots: bool = False) -> str:
        """The report as GitHub-flavoured Markdown; `with_plots` shows the files that `write` makes."""
        return report_markdown.render(self, with_plots=with_plots)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fractions not percent: what report.json and a bundle's record hold."""
        plain = {name: value for name, value in vars(self).items() if name not in ("thumbnails", "per_class")}
        rows = [{"class": name} | asdict(row) for name, row in zip(self.classes, self.per_class, strict=True)]
        plain |= {
            "headline": self.headline(),
            "per_class": rows,
            "figures": dict(self.figures),
            "intervals": {name: value and list(value) for name, value in self.intervals.items()},
            "calibration": [asdict(row) for row in self.calibration],
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
            "bad_images": dict(self.bad_images),
        }
        # Through JSON once: tuples become lists, as they are in the file, and NaN is refused.
        return json.loads(json.dumps(plain, allow_nan=False))

    def to_json(self) -> str:
        """`to_dict` as text."""
        return readable_json(self.to_dict())


def write(report: Report, folder: str | Path) -> None:
    """Put report.md, report.json and the plots they show into a folder, which is made if need be."""
    from coatnet.evaluation.plots import draw_calibration, draw_confusion, draw_mistakes

    folder = Path(folder)
    # Names of files need not be Unicode; what is not is written as JSON would escape it.
    atomic_write(folder / "report.json", report.to_json(), errors="backslashreplace")
    if report.confusion is not None:
        with atomic_files(folder / "confusion.png") as (staged,):
            draw_confusion(np.array(report.confusion), report.classes, staged)
    if report.thumbnails:
        with atomic_files(folder / "mistakes.png") as (staged,):
            draw_mistakes(report.thumbnails, report.mistakes, staged)
    with atomic_files(folder / "calibration.png") as (staged,):
        draw_calibration(report.calibration, staged)
    atomic_write(folder / "report.md", report.to_markdown(with_plots=True), errors="backslashreplace")
