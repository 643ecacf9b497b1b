"""A finished model and an engine: from pictures in any form to class names with probabilities.

Shapes: B pictures, V views of each, R resolution, C channels (3, or 1 for grey models), K classes.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coatnet.bundle import Bundle, load
from coatnet.data.decoding import BadImage, decode
from coatnet.data.loading import num_cores
from coatnet.data.transforms import as_pictures, match_channels
from coatnet.deploy.engines import open_engine
from coatnet.deploy.network import probabilities_of
from coatnet.deploy.prediction import Prediction, check_amounts
from coatnet.deploy.views import check_views, look, num_views
from coatnet.errors import UserError

Picture = str | Path | bytes | NDArray[np.uint8] | Tensor


class Predictor:
    """Names pictures with the engine that is fastest here, or the one that is asked for.

    Args:
        source: a bundle, its folder, or the id of one on the hub.
        engine: "torch", "torch-compiled", "openvino" or "onnxruntime"; "auto" is the fastest that is installed.
        precision: "fp32" or "bf16"; "auto" is bf16 where engine and hardware compute in it.
        views: "one"; or "flip", "five-crop" or "ten-crop", whose probabilities are averaged.

    Raises:
        UserError: there is no such model, engine, precision or view, or the engine is not installed.
    """

    def __init__(
        self, source: Bundle | str | Path, engine: str = "auto", precision: str = "auto", *, views: str = "one"
    ) -> None:
        check_views(views)
        self.bundle = source if isinstance(source, Bundle) else load(source)
        self.classes, self.multilabel = self.bundle.classes, self.bundle.multilabel
        self.views = views
        side = self.bundle.preprocessing.resolution
        self.picture_shape = (num_views(views), side, side, self.bundle.preprocessing.channels)
        self.engine = open_engine(self.bundle, engine, precision)

    def __call__(
        self, pictures: Picture | Iterable[Picture], *, top_k: int = 5, batch_size: int = 32
    ) -> list[Prediction]:
        """One prediction a picture, in order; a picture that is no use gets one with its `error`.

        Args:
            pictures: files by path, encoded bytes, uint8 arrays (H, W) or (H, W, 3), uint8 tensors (1 or 3, H, W), or
                one of these.

        Raises:
            UserError: top_k or batch_size is below 1, or something is no picture in any form.
        """
        check_amounts(top_k, batch_size)
        given = as_list(pictures)
        answers: list[Prediction] = []
        with ThreadPoolExecutor(num_cores()) as readers:
            for first in range(0, len(given), batch_size):
                part = given[first : first + batch_size]
                names = [_name(picture, first + place) for place, picture in enumerate(part)]
                answers += self._answer(names, list(readers.map(self._attempt, part, names)), top_k)
        return answers

    def prepare(self, picture: Picture, name: str = "picture") -> NDArray[np.uint8]:
        """What the engine takes of a picture in any form: uint8 (V, R, R, C). From any thread.

        Raises:
            BadImage: it can not be read or decoded; the error bears `name`.
            UserError: it is a picture in no form.
        """
        if isinstance(picture, str | Path):
            try:
                picture = Path(picture).read_bytes()
            except OSError as error:
                raise BadImage(name, f"unreadable: {error.strerror or error}") from error
        pixels = decode(picture, name) if isinstance(picture, bytes) else _pixels(picture, name)
        views = look(match_channels(pixels, self.bundle.preprocessing), self.bundle.preprocessing, self.views)
        return views.permute(0, 2, 3, 1).expand(self.picture_shape).contiguous().numpy()

    def probabilities(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (B, V, R, R, C), as `prepare` makes them, to (B, K): a softmax, or K sigmoids for several labels.

        By one thread at a time.
        """
        logits = torch.from_numpy(self.engine.run(pictures.reshape(-1, *self.picture_shape[1:])))
        probabilities = probabilities_of(logits, multilabel=self.multilabel)
        return probabilities.unflatten(0, (len(pictures), -1)).mean(dim=1).numpy()

    def top(self, probabilities: NDArray[np.float32], k: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """The names and probabilities of the `k` likeliest classes of one row (K,), likeliest first."""
        likeliest = np.argsort(-probabilities, kind="stable")[:k]
        return tuple(self.classes[index] for index in likeliest), tuple(probabilities[likeliest].tolist())

    def _attempt(self, picture: Picture, name: str) -> NDArray[np.uint8] | str:
        try:
            return self.prepare(picture, name)
        except BadImage as error:
            return error.reason

    def _answer(self, names: Sequence[str], prepared: Sequence[NDArray[np.uint8] | str], k: int) -> list[Prediction]:
        good = [views for views in prepared if not isinstance(views, str)]
        rows = iter(self.probabilities(np.stack(good)) if good else ())
        return [
            Prediction(name, error=views) if isinstance(views, str) else Prediction(name, *self.top(next(rows), k))
            for name, views in zip(names, prepared, strict=True)
        ]


def as_list(pictures: Picture | Iterable[Picture]) -> list[Picture]:
    """Several pictures, or a list of one."""
    if isinstance(pictures, str | Path | bytes):
        return [pictures]
    return [pictures] if isinstance(pictures, np.ndarray | Tensor) and pictures.ndim < 4 else [*pictures]


def _name(picture: Picture, place: int) -> str:
    return str(picture) if isinstance(picture, str | Path) else f"picture {place}"


def _pixels(picture: object, name: str) -> Tensor:
    """uint8 (1 or 3, H, W)."""
    if not isinstance(picture, np.ndarray | Tensor):
        raise UserError(f"{name} is a {type(picture).__name__}: give a path, encoded bytes, an array or a tensor")
    if str(picture.dtype).removeprefix("torch.") != "uint8" or 0 in picture.shape:
        raise UserError(
            f"{name} is {picture.dtype} of shape {tuple(picture.shape)}: give pixels from 0 to 255 as uint8"
        )
    pixels = as_pictures(picture)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise UserError(
            f"{name} has shape {tuple(picture.shape)}: an array is (H, W) or (H, W, 3), a tensor (1, H, W) or (3, H, W)"
        )
    return pixels
