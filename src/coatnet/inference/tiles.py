"""Predictions for an image that is too large to be seen at once: of overlapping tiles, averaged, and as a map.

Shapes: N tiles, K classes; H, W the image; h, w its thumbnail.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from coatnet.data.channels import to_shown
from coatnet.data.decode import BadImage
from coatnet.data.windows import Windows, open_windows
from coatnet.errors import UserError, nearest, reason_of
from coatnet.inference.explanation import heat_colors
from coatnet.inference.predictor import Prediction, Predictor, most_probable

if TYPE_CHECKING:
    import PIL.Image

OVERLAP = 0.25  # chosen: what a crop of 0.875 cuts off of a tile lies within its neighbors
MAX_TILES = 1_000_000
THUMBNAIL_SIDE = 1600  # pixels
_BAND_PIXELS = 30_000_000  # a row of tiles up to this size is read at once, so that strips are decoded once


@dataclass(frozen=True, eq=False)
class TiledPrediction:
    """The answers to the tiles of an image.

    Attributes:
        prediction: what they say together, by the mean of their probabilities.
        size: (H, W) of the image in pixels.
        boxes: top, left, height and width of each tile, (N, 4).
        probabilities: of each tile, (N, K).
        novelties: of each tile, (N,); None if the model is not calibrated.
        unknown: whether each tile is refused, (N,) of bool.
        class_sets: of each tile; None if no sets were asked for.
        classes: names of the K classes.
        thumbnail: the image, uint8 (h, w, 3).
    """

    prediction: Prediction
    size: tuple[int, int]
    boxes: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    novelties: NDArray[np.float32] | None
    unknown: NDArray[np.bool_]
    class_sets: tuple[tuple[str, ...] | None, ...]
    classes: tuple[str, ...]
    thumbnail: NDArray[np.uint8]

    def each(self, top_k: int = 5) -> Iterator[Prediction]:
        """The answer to each tile, named `image.tif[top:bottom,left:right]`."""
        for number, (top, left, height, width) in enumerate(self.boxes.tolist()):
            novelty = None if self.novelties is None else round(float(self.novelties[number]), 6)
            name = f"{self.prediction.name}[{top}:{top + height},{left}:{left + width}]"
            found = most_probable(self.classes, self.probabilities[number], top_k)
            yield Prediction(name, *found, None, novelty, bool(self.unknown[number]), self.class_sets[number])

    def heat(self, target: str | None = None) -> NDArray[np.float32]:
        """The probability of a class over the thumbnail, (h, w): the mean over the tiles that show a place.

        By default of the most probable class of the image.
        """
        if target is not None and target not in self.classes:
            raise UserError(f"no class is called {target!r}{nearest(target, self.classes)}")
        index = self.classes.index(target or self.prediction.classes[0])
        total, count = np.zeros((2, *self.thumbnail.shape[:2]), np.float32)
        for box, probability in zip(self.boxes, self.probabilities[:, index], strict=True):
            rows, columns = _on_thumbnail(box, self.size, total.shape)
            total[rows, columns] += probability
            count[rows, columns] += 1
        return total / np.maximum(count, 1)

    def map(self, target: str | None = None) -> "PIL.Image.Image":
        """The thumbnail with `heat` laid over."""
        import PIL.Image

        shown, layer = PIL.Image.fromarray(self.thumbnail), PIL.Image.fromarray(heat_colors(self.heat(target)))
        shown.paste(layer, (0, 0), layer)
        return shown


def classify_tiles(
    predictor: Predictor,
    path: str | Path,
    *,
    side: int | None = None,
    overlap: float = OVERLAP,
    top_k: int = 5,
    batch_size: int = 32,
) -> TiledPrediction:
    """Classify overlapping tiles of an image file; together they are answered by the mean of their probabilities.

    Read tile by tile are upright TIFF of 8-bit gray, RGB or RGBA values and, for a model with a scale, upright TIFF of
    any values and `.npy`; what else there is, such as `.npz`, is decoded whole, within the limit of pixels.

    Args:
        predictor: the model in an engine.
        path: of the image file.
        side: the shorter side of the tiles in pixels of the image; they have the proportions of what the model sees. By
            default the size at which it sees an image whole.
        overlap: the least part of a side that two neighbors share, 0 or more and below 1.
        top_k: number of classes of the prediction.
        batch_size: tiles computed together.

    Raises:
        BadImage: the image cannot be read, or has more than a million such tiles.
        UserError: side or overlap are out of bounds.
    """
    if not 0 <= overlap < 1:
        raise UserError(f"tile-overlap is a part of a side from 0 to below 1, such as 0.25, got {overlap:g}")
    if batch_size < 1 or top_k < 1 or (side is not None and side < 1):
        raise UserError(f"side {side}, batch_size {batch_size} and top_k {top_k} must be at least 1")
    seen = predictor.bundle.preprocessing.resized_size
    tile = seen if side is None else [round(side * each / min(seen)) for each in seen]
    with open_windows(Path(path), predictor.scale) as windows:
        tops, lefts = (
            starts(length, part, overlap, str(path)) for length, part in zip(windows.size, tile, strict=True)
        )
        if len(tops) * len(lefts) > MAX_TILES:
            raise BadImage(
                str(path), f"large: {len(tops) * len(lefts):,} tiles, {MAX_TILES:,} are computed: give larger ones"
            )
        height, width = (min(pair) for pair in zip(windows.size, tile, strict=True))
        scale = min(1.0, THUMBNAIL_SIDE / max(windows.size))
        drawn = torch.zeros(3, *(max(1, round(length * scale)) for length in windows.size))
        boxes, rows, novelties = [], [], []

        def views() -> Iterator[NDArray]:
            """What the model sees of each tile, whose pixels are let go before the next are read."""
            for box, pixels in _read_tiles(windows, tops, lefts, height, width, str(path)):
                boxes.append(box)
                _draw(drawn, box, pixels, windows.size)
                yield predictor.prepare_pixels(pixels)

        prepared = views()
        while batch := list(itertools.islice(prepared, batch_size)):
            probabilities, novelty = predictor.scores(np.stack(batch))
            rows.append(probabilities)
            if novelty is not None:
                novelties.append(novelty)
        thumbnail = to_shown(drawn.round().byte() if predictor.scale is None else drawn).permute(1, 2, 0).numpy()
    answers, places = np.concatenate(rows), np.array(boxes, np.int64)
    novelty = np.concatenate(novelties) if novelties else None
    mean_novelty = None if novelty is None else float(novelty.mean())
    together = replace(predictor.describe(answers.mean(axis=0), mean_novelty, top_k), name=str(path))
    if together.error is not None:
        raise BadImage(str(path), together.error)
    refused = [predictor.is_unknown(None if novelty is None else float(novelty[row])) for row in range(len(answers))]
    return TiledPrediction(
        together,
        windows.size,
        places,
        answers,
        novelty,
        np.array(refused, bool),
        tuple(map(predictor.class_set, answers)),
        predictor.classes,
        thumbnail,
    )


def starts(length: int, tile: int, overlap: float, name: str) -> list[int]:
    """Where tiles begin on a side, evenly: the first at its start, the last at its end."""
    if tile >= length:
        return [0]
    count = 1 + math.ceil((length - tile) / max(1, math.floor(tile * (1 - overlap))))
    if count > MAX_TILES:
        raise BadImage(name, f"large: {count:,} tiles on a side, {MAX_TILES:,} are computed: give larger ones")
    return np.unique(np.linspace(0, length - tile, count).round().astype(np.int64)).tolist()


Tile = tuple[tuple[int, int, int, int], Tensor]


def _read_tiles(
    windows: Windows, tops: list[int], lefts: list[int], height: int, width: int, name: str
) -> Iterator[Tile]:
    """Place and pixels of each tile, row by row."""
    at_once = windows.size[1] * height <= min(_BAND_PIXELS, windows.most_pixels)
    try:
        for top in tops:
            band = windows.read(top, 0, height, windows.size[1]) if at_once else None
            for left in lefts:
                pixels = windows.read(top, left, height, width) if band is None else band[:, :, left : left + width]
                yield (top, left, height, width), pixels
                del pixels
            del band
    except (BadImage, UserError):
        raise
    except MemoryError as error:
        raise BadImage(name, f"large: no memory for tiles of {width} x {height} pixels") from error
    except Exception as error:  # parsers of untrusted bytes raise almost anything
        raise BadImage(name, f"corrupt: {reason_of(error)}") from error


def _on_thumbnail(box: NDArray[np.int64], size: tuple[int, int], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The rows and columns of a thumbnail that show a tile."""
    sides = []
    for first, length, whole, small in zip(box[:2], box[2:], size, shape, strict=False):
        start = min(small - 1, int(first * small / whole))
        sides.append(slice(start, max(start + 1, round((first + length) * small / whole))))
    return sides[0], sides[1]


def _draw(drawn: Tensor, box: tuple[int, int, int, int], pixels: Tensor, size: tuple[int, int]) -> None:
    """Reduce a tile to its place: the first three channels as red, green and blue, one or two as gray."""
    rows, columns = _on_thumbnail(np.array(box), size, drawn.shape[1:])
    part = drawn[:, rows, columns]
    colors = pixels[: 3 if len(pixels) > 2 else 1].float()
    part[:] = F.interpolate(colors[None], size=part.shape[1:], mode="bilinear", antialias=True)[0]
