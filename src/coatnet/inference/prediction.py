"""What a predictor says of an image, and naming images from files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from coatnet.data.folder import expand_paths
from coatnet.errors import UserError

if TYPE_CHECKING:
    from coatnet.inference.predictor import Predictor


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, likeliest first, or the reason why there are none."""

    name: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


def check_amounts(top_k: int, batch_size: int) -> None:
    """Raises UserError if one of them is below 1."""
    if top_k < 1 or batch_size < 1:
        raise UserError(f"top_k is {top_k} and batch_size {batch_size}; both must be at least 1")


def predict(
    predictor: "Predictor", paths: Iterable[str | Path], *, top_k: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """One prediction an image, in the order of the paths; folders and theirs are searched in natural order.

    A path that is missing, unreadable or no image yields a prediction with its `error`; others go on.

    Raises:
        UserError: top_k or batch_size is below 1.
    """
    check_amounts(top_k, batch_size)
    return _predictions(predictor, paths, top_k, batch_size)


def _predictions(
    predictor: "Predictor", paths: Iterable[str | Path], top_k: int, batch_size: int
) -> Iterator[Prediction]:
    found = expand_paths(paths)
    while batch := list(islice(found, batch_size)):
        answers = iter(predictor([path for path, error in batch if error is None], top_k=top_k, batch_size=batch_size))
        yield from (next(answers) if error is None else Prediction(str(path), error=error) for path, error in batch)
