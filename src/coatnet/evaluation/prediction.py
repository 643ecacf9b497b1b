"""Naming pictures from files: the file system on one side, a finished model on the other."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.decoding import decode
from coatnet.data.folder import PICTURE_SUFFIXES, natural_key
from coatnet.data.transforms import EvaluationTransform
from coatnet.errors import UserError


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a picture, likeliest first, or the reason why there are none."""

    path: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


def predict(
    bundle: Bundle, paths: Iterable[str | Path], *, top_k: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """One prediction a picture, in the order of the paths; folders and theirs are searched in natural order.

    A path that is missing, unreadable or no picture yields a prediction with its `error`; others go on.

    Raises:
        UserError: top_k or batch_size is below 1.
    """
    if top_k < 1 or batch_size < 1:
        raise UserError(f"top_k is {top_k} and batch_size {batch_size}; both must be at least 1")
    return _predictions(bundle, paths, min(top_k, len(bundle.classes)), batch_size)


def _predictions(bundle: Bundle, paths: Iterable[str | Path], top_k: int, batch_size: int) -> Iterator[Prediction]:
    transform = EvaluationTransform(bundle.preprocessing)
    waiting: list[tuple[Path, Tensor | str]] = []  # in order: a picture, or why it is none
    for path, error in expand_paths(paths):
        waiting.append((path, error or _read(path, transform)))
        if len(waiting) == batch_size:
            yield from _answer(bundle, waiting, top_k)
            waiting = []
    yield from _answer(bundle, waiting, top_k)


def expand_paths(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str | None]]:
    """The files behind the paths, or why there are none."""
    for path in map(Path, paths):
        if not path.is_dir():
            yield path, None if path.exists() else "no such file"
            continue
        found = False
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted((name for name in subfolders if not name.startswith(".")), key=natural_key)
            for name in sorted(names, key=natural_key):
                if Path(name).suffix.lower() in PICTURE_SUFFIXES and not name.startswith("."):
                    found = True
                    yield Path(folder, name), None
        if not found:
            yield path, "no pictures in this folder"


def _read(path: Path, transform: EvaluationTransform) -> Tensor | str:
    try:
        return transform(decode(path.read_bytes(), str(path)))
    except UserError as error:
        return getattr(error, "reason", str(error))
    except OSError as error:
        return error.strerror or str(error)


@torch.inference_mode()
def _answer(bundle: Bundle, waiting: Sequence[tuple[Path, Tensor | str]], top_k: int) -> list[Prediction]:
    pictures = [picture for _, picture in waiting if isinstance(picture, Tensor)]
    answers: Iterator[tuple[Tensor, Tensor]] = iter(())
    if pictures:
        device = next(bundle.model.parameters()).device
        images = torch.stack(pictures).to(device, memory_format=torch.channels_last)
        logits = bundle.model(images).float().cpu()
        probabilities = logits.sigmoid() if bundle.multilabel else logits.softmax(dim=1)
        answers = zip(*probabilities.topk(top_k, dim=1), strict=True)
    predictions = []
    for path, picture in waiting:
        if isinstance(picture, str):
            predictions.append(Prediction(path, error=picture))
        else:
            values, indices = next(answers)
            names = tuple(bundle.classes[i] for i in indices.tolist())
            predictions.append(Prediction(path, names, tuple(values.tolist())))
    return predictions
