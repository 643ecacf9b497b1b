"""Samples of a batch prediction: images by index, with a label where the data has one; and rows computed from them.

Shapes: V views, C channels, R resolution.
"""

import hashlib
import json
import re
import threading
from array import array
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from coatnet.data.builtin import is_idx_folder
from coatnet.data.datasets import Dataset, Encoded, FileDataset
from coatnet.data.decode import BadImage
from coatnet.data.folder import MANIFEST_SUFFIXES, open_images
from coatnet.data.hugging_face import is_saved_folder
from coatnet.data.manifest import read_manifest
from coatnet.data.open import NAMES, open_dataset
from coatnet.data.shards.dataset import ShardDataset, is_shard_folder
from coatnet.errors import UserError
from coatnet.inference.predictor import Prediction, Predictor
from coatnet.system.files import user_path
from coatnet.system.hardware import num_cores
from coatnet.system.terminal import warn


class Sample(NamedTuple):
    """An image with its name and its label (None without one), or the error why it cannot be read."""

    name: str
    label: str | None
    image: Encoded | None
    error: str | None = None


class SampleSource:
    """The images of some datasets, one dataset after the other, in the order in which they are stored."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = tuple(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in datasets])
        thread_safe = all(dataset.thread_safe for dataset in datasets)
        self._lock: AbstractContextManager = nullcontext() if thread_safe else threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Sample:
        """Read a sample. Thread-safe. Raises UserError if a shard is missing or cannot be fetched."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        dataset, index = self._datasets[number], index - (int(self._ends[number - 1]) if number else 0)
        with self._lock:
            name = dataset.describe(index)
            try:
                image, label = dataset.read(index)
            except BadImage as error:
                return Sample(name, _label_name(dataset, dataset.label(index)), None, error.reason)
        return Sample(name, _label_name(dataset, label), image)

    def identity(self) -> str:
        """SHA-256 of names, labels and classes in their order, as 32 hex digits; of shards, of their index."""
        digest = hashlib.sha256()
        for dataset in self._datasets:
            digest.update(f"{dataset.name} {len(dataset)}\n".encode(errors="surrogatepass"))
            for part in dataset.identity():
                digest.update(part)
            if dataset.classes:
                digest.update(json.dumps(dataset.classes).encode())
                if not isinstance(dataset, ShardDataset):  # whose index has the labels
                    digest.update(dataset.labels.tobytes())
        return digest.hexdigest()[:32]


def open_samples(sources: Sequence[str], left_out: Counter[str] | None = None) -> SampleSource:
    """Open all images of a dataset, or of files and of folders that are searched.

    Args:
        sources: one dataset (a manifest, whose labels may be missing; shards; or another that `open_dataset` opens),
            or files and folders of images without labels.
        left_out: counts the files below folders that are no images, by the ending of their names.

    Raises:
        UserError: there is no such data, it holds no image, or a dataset is given beside other sources.
    """
    datasets = [source for source in sources if _is_dataset(source)]
    if datasets and len(sources) > 1:
        raise UserError(f"{datasets[0]} is a dataset of its own: give it alone, or files and folders of images")
    if not datasets:
        return SampleSource([open_images(sources, left_out)])
    path = user_path(sources[0])
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return SampleSource([_open_manifest(path)])
    splits = open_dataset(sources[0], evaluation=True)
    for note in splits.notes:
        if ", without " in note:
            warn(f"{splits.name}: {note}")
    return SampleSource(list(splits.parts.values()))


class Row(NamedTuple):
    """A row of the file, most probable classes first. One without an answer has path, label and error only.

    `novelty` is None if the model is not calibrated, `class_set` if no sets were asked for.
    """

    path: str
    label: str | None
    top1: str | None
    probability: float | None
    classes: Sequence[str]
    probabilities: Sequence[float]
    error: str | None
    novelty: float | None = None
    unknown: bool | None = None
    class_set: Sequence[str] | None = None


class PreparedSample(NamedTuple):
    """A sample for the engine, uint8 (V, R, R, C), or the error why it has no image."""

    name: str
    label: str | None
    views: NDArray[np.uint8] | None
    error: str | None


def prepare_ahead(
    predictor: Predictor, samples: SampleSource, indices: Iterable[int], max_held: int
) -> Generator[PreparedSample]:
    """Read and prepare samples in threads, yielding them in order; at most `max_held` are held at a time."""

    def prepare(index: int) -> PreparedSample:
        name, label, image, error = samples.read(index)
        if image is None:
            return PreparedSample(name, label, None, error)
        try:
            return PreparedSample(name, label, predictor.prepare(image, name), None)
        except BadImage as bad:
            return PreparedSample(name, label, None, bad.reason)

    # Each uses one of torch's threads: they run in parallel, and beside the engine.
    threads = ThreadPoolExecutor(num_cores(), "decoding", torch.set_num_threads, (1,))
    waiting: deque[Future[PreparedSample]] = deque()
    try:
        for index in indices:
            waiting.append(threads.submit(prepare, index))
            if len(waiting) >= max_held:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def predict_batch(predictor: Predictor, batch: Sequence[PreparedSample], top_k: int) -> list[Row]:
    """Classify the readable samples of a batch together: one row per sample, in order."""
    readable = [sample.views for sample in batch if sample.views is not None]
    answers = predictor.describe_all(np.stack(readable), top_k) if readable else iter(())
    return [as_row(name, label, None if views is None else next(answers), error) for name, label, views, error in batch]


def as_row(name: str, label: str | None, found: Prediction | None, error: str | None) -> Row:
    """The row of a prediction; of an image without one, of its error."""
    if found is None or found.error is not None:
        return Row(name, label, None, None, (), (), error if found is None else found.error)
    first = (found.classes[0], found.probabilities[0])
    more = (found.novelty, found.unknown, found.class_set)
    return Row(name, label, *first, found.classes, found.probabilities, None, *more)


def _label_name(dataset: Dataset, label: np.ndarray) -> str | None:
    """Class names of a label, joined by `;` as in a manifest; None without a label."""
    if dataset.multilabel:
        return ";".join(dataset.classes[index] for index in np.flatnonzero(label))
    return dataset.classes[int(label)] if label >= 0 else None


def _is_dataset(source: str) -> bool:
    path = user_path(source)
    if path.is_dir():
        path = path.resolve()
        return is_idx_folder(path) or is_saved_folder(path) or is_shard_folder(path)
    return "://" in source or path.suffix.lower() in MANIFEST_SUFFIXES or (source in NAMES and not path.exists())


def _open_manifest(path: Path) -> FileDataset:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    paths, labels, numbers = [], array("q"), {"": -1}
    for image, label in read_manifest(path):
        label = ";".join(part.strip() for part in re.split("[;|]", label) if part.strip())
        paths.append(image)
        labels.append(numbers.setdefault(label, len(numbers) - 1))
    if not paths:
        raise UserError(f"{path} has no rows; it needs the column path and one row an image")
    root = (path.resolve() if path.is_symlink() else path).parent  # from which a table names images
    return FileDataset(path.stem, tuple(numbers)[1:], root, paths, np.array(labels))
