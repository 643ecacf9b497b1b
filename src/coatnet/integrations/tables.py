"""What a prediction is in a table of another engine: the columns of `coatnet predict --out`, without path and label."""

from collections.abc import Sequence
from typing import Any

from coatnet.inference.batch.samples import Row, as_row
from coatnet.inference.predictor import Image, Predictor

COLUMNS = tuple(name for name in Row._fields if name not in ("path", "label"))


def predict_columns(predictor: Predictor, images: Sequence[Image | None], *, top_k: int) -> dict[str, list[Any]]:
    """Classify images, computed together: for each of `COLUMNS`, a list with one value per image.

    An image that is missing or unreadable has an `error`, and no class.
    """
    present = [image for image in images if image is not None]
    predictions = iter(predictor(present, top_k=top_k, batch_size=max(1, len(present))))
    rows = [as_row("", None, None if image is None else next(predictions), "missing") for image in images]
    return {name: [getattr(row, name) for row in rows] for name in COLUMNS}
