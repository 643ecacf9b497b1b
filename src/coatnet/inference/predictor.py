"""A finished model and an engine: from images in any form to class names with probabilities.

Shapes: B images, V views of each, R resolution, C channels (3, or 1 for grey models), K classes.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coatnet.bundle import Bundle, load
from coatnet.data.decode import BadImage, decode
from coatnet.data.transforms import as_images, match_channels
from coatnet.deprecation import renamed_attribute
from coatnet.errors import UserError
from coatnet.inference.engines import open_engine
from coatnet.inference.network import probabilities_of
from coatnet.inference.prediction import Prediction, check_amounts
from coatnet.inference.test_time_augmentation import check_views, look, num_views
from coatnet.system.hardware import num_cores

Image = str | Path | bytes | NDArray[np.uint8] | Tensor


class Predictor:
    """Names images with the engine that is fastest here, or the one that is asked for.

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
        self.image_shape = (num_views(views), side, side, self.bundle.preprocessing.channels)
        self.engine = open_engine(self.bundle, engine, precision)

    picture_shape = renamed_attribute("picture_shape", "image_shape", since="0.2", removed_in="0.3")

    def __call__(self, images: Image | Iterable[Image], *, top_k: int = 5, batch_size: int = 32) -> list[Prediction]:
        """One prediction an image, in order; an image that is no use gets one with its `error`.

        Args:
            images: files by path, encoded bytes, uint8 arrays (H, W) or (H, W, 3), uint8 tensors (1 or 3, H, W), or
                one of these.

        Raises:
            UserError: top_k or batch_size is below 1, or something is no image in any form.
        """
        check_amounts(top_k, batch_size)
        given = as_list(images)
        answers: list[Prediction] = []
        with ThreadPoolExecutor(num_cores()) as readers:
            for first in range(0, len(given), batch_size):
                part = given[first : first + batch_size]
                names = [_name(image, first + place) for place, image in enumerate(part)]
                answers += self._answer(names, list(readers.map(self._attempt, part, names)), top_k)
        return answers

    def prepare(self, image: Image, name: str = "picture") -> NDArray[np.uint8]:
        """What the engine takes of an image in any form: uint8 (V, R, R, C). From any thread.

        Raises:
            BadImage: it can not be read or decoded; the error bears `name`.
            UserError: it is an image in no form.
        """
        if isinstance(image, str | Path):
            try:
                image = Path(image).read_bytes()
            except OSError as error:
                raise BadImage(name, f"unreadable: {error.strerror or error}") from error
        pixels = decode(image, name) if isinstance(image, bytes) else _pixels(image, name)
        views = look(match_channels(pixels, self.bundle.preprocessing), self.bundle.preprocessing, self.views)
        return views.permute(0, 2, 3, 1).expand(self.image_shape).contiguous().numpy()

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (B, V, R, R, C), as `prepare` makes them, to (B, K): a softmax, or K sigmoids for several labels.

        By one thread at a time.
        """
        logits = torch.from_numpy(self.engine.run(images.reshape(-1, *self.image_shape[1:])))
        probabilities = probabilities_of(logits, multilabel=self.multilabel)
        return probabilities.unflatten(0, (len(images), -1)).mean(dim=1).numpy()

    def top(self, probabilities: NDArray[np.float32], k: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """The names and probabilities of the `k` likeliest classes of one row (K,), likeliest first."""
        likeliest = np.argsort(-probabilities, kind="stable")[:k]
        return tuple(self.classes[index] for index in likeliest), tuple(probabilities[likeliest].tolist())

    def _attempt(self, image: Image, name: str) -> NDArray[np.uint8] | str:
        try:
            return self.prepare(image, name)
        except BadImage as error:
            return error.reason

    def _answer(self, names: Sequence[str], prepared: Sequence[NDArray[np.uint8] | str], k: int) -> list[Prediction]:
        good = [views for views in prepared if not isinstance(views, str)]
        rows = iter(self.probabilities(np.stack(good)) if good else ())
        return [
            Prediction(name, error=views) if isinstance(views, str) else Prediction(name, *self.top(next(rows), k))
            for name, views in zip(names, prepared, strict=True)
        ]


def as_list(images: Image | Iterable[Image]) -> list[Image]:
    """Several images, or a list of one."""
    if isinstance(images, str | Path | bytes):
        return [images]
    return [images] if isinstance(images, np.ndarray | Tensor) and images.ndim < 4 else [*images]


def _name(image: Image, place: int) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {place}"


def _pixels(image: object, name: str) -> Tensor:
    """uint8 (1 or 3, H, W)."""
    if not isinstance(image, np.ndarray | Tensor):
        raise UserError(f"{name} is a {type(image).__name__}: give a path, encoded bytes, an array or a tensor")
    if str(image.dtype).removeprefix("torch.") != "uint8" or 0 in image.shape:
        raise UserError(f"{name} is {image.dtype} of shape {tuple(image.shape)}: give pixels from 0 to 255 as uint8")
    pixels = as_images(image)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise UserError(
            f"{name} has shape {tuple(image.shape)}: an array is (H, W) or (H, W, 3), a tensor (1, H, W) or (3, H, W)"
        )
    return pixels
