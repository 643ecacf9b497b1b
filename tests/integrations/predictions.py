"""Images for the engines, and what `coatnet predict --out` says of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.inference import Predictor
from coatnet.inference.batch import open_samples, predict_to_file
from coatnet.integrations.tables import COLUMNS

PROBABILITY, NOVELTY = 1e-4, 0.005  # float32 in another order; a novelty has steps of 0.001


def image_folder(folder: Path, *, unreadable: bool = True) -> Path:
    """Twenty garments, some noise and, if asked for, two files that are no images, in two folders."""
    garments = np.asarray(open_fashion_mnist_small().validation.images[::100])
    noise = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    for number, pixels in enumerate([*garments, *noise]):
        path = folder / ("a" if number % 3 else "b c") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    if unreadable:
        (folder / "a" / "cut.png").write_bytes((folder / "a" / "01.png").read_bytes()[:200])
        (folder / "a" / "empty.png").write_bytes(b"")
    return folder


def expected_rows(bundle: Path, folder: Path, out: Path, options: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The rows of `coatnet predict --out`, by file name."""
    from pyarrow import parquet

    predictor = Predictor(bundle, "torch", "fp32", **options)  # pyrefly: ignore
    predict_to_file(predictor, open_samples([str(folder)]), out)
    return {Path(row["path"]).name: row for row in parquet.read_table(out).to_pylist()}


def same_answers(found: Path, expected: dict[str, dict[str, Any]]) -> None:
    """Hold a folder of Parquet files with the columns path and those of a prediction to the expected rows."""
    from pyarrow import parquet

    rows = {Path(row["path"]).name: row for file in found.glob("*.parquet") for row in read_rows(parquet, file)}
    assert rows.keys() == expected.keys()
    assert "cut.png" in rows and any(row["error"] is None for row in rows.values())
    for name, row in rows.items():
        for column in COLUMNS:
            tolerance = NOVELTY if column == "novelty" else PROBABILITY
            wanted = expected[name][column]
            is_number = column in ("probability", "probabilities", "novelty") and wanted is not None
            wanted = pytest.approx(wanted, abs=tolerance) if is_number else wanted
            assert row[column] == wanted, f"{name}: {column}"


def read_rows(parquet: Any, file: Path) -> list[dict[str, Any]]:
    """The rows of one file; `read_table` would take `found` for a partition of the data."""
    return parquet.ParquetFile(file).read().to_pylist()
