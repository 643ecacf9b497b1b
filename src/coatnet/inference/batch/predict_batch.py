"""Images to rows: decoded ahead by threads while the engine runs."""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from coatnet.data.decode import BadImage
from coatnet.inference.batch.samples import Images
from coatnet.inference.predictor import Predictor
from coatnet.system.hardware import num_cores


class Row(NamedTuple):
    """What the file says of an image; the likeliest classes come first. Of a bad one only path, label and error."""

    path: str
    label: str | None
    top1: str | None
    probability: float | None
    classes: Sequence[str]
    probabilities: Sequence[float]
    error: str | None


class Prepared(NamedTuple):
    """What the engine takes of an image, uint8 (V, R, R, C), or the reason why there is nothing to take."""

    name: str
    label: str | None
    views: NDArray[np.uint8] | None
    error: str | None


def prepare_ahead(predictor: Predictor, images: Images, indices: Iterable[int], most: int) -> Generator[Prepared]:
    """These images in this order; at most so many are held at a time."""

    def prepare(index: int) -> Prepared:
        name, label, image, error = images.take(index)
        if image is None:
            return Prepared(name, label, None, error)
        try:
            return Prepared(name, label, predictor.prepare(image, name), None)
        except BadImage as bad:
            return Prepared(name, label, None, bad.reason)

    # One thread of torch's own for each: they work side by side, and beside the engine.
    threads = ThreadPoolExecutor(num_cores(), "decoding", torch.set_num_threads, (1,))
    waiting: deque[Future[Prepared]] = deque()
    try:
        for index in indices:
            waiting.append(threads.submit(prepare, index))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def name_batch(predictor: Predictor, batch: Sequence[Prepared], top_k: int) -> list[Row]:
    """A row an image, in order; the good ones go through the engine together."""
    good = [each.views for each in batch if each.views is not None]
    probabilities = iter(predictor.probabilities(np.stack(good)) if good else ())
    rows = []
    for name, label, views, error in batch:
        if views is None:
            rows.append(Row(name, label, None, None, (), (), error))
        else:
            classes, values = predictor.top(next(probabilities), top_k)
            rows.append(Row(name, label, classes[0], values[0], classes, values, None))
    return rows
