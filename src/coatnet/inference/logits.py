"""The inference loop: a model over a dataset, batch by batch. Evaluation, features and validation all read from here.

Shapes: B images, V views of each, C channels, R resolution, K classes, D features.
"""

import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet.bundle.calibration import means_of
from coatnet.data.datasets import Dataset
from coatnet.data.loader import BadImages, InspectImages, evaluation_batches
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import CoAtNet

MAX_IMAGES_WITHOUT_WORKERS = 2000  # chosen: starting workers takes about as long as reading as many small photographs


class OutputBatch(NamedTuple):
    """What a model computed for a batch, and which images of the dataset these are.

    Attributes:
        outputs: logits (B, K), features (B, D), or features and means of all feature maps side by side; float32 on the
            CPU. With V views of each image they have B * V rows, those of an image are neighbors.
        labels: class indices (B,), or 0 and 1 per class (B, K), in the dataset's own order of classes.
        indices: place of each image in the dataset, (B,).
        digests: with "features and means", a hash of each image as the network sees it, int64 (B,); of several views,
            that of the first.
        inspected: what `inspect` gave for each image.
    """

    outputs: Tensor
    labels: Tensor
    indices: Tensor
    digests: Tensor | None = None
    inspected: list[Any] | None = None


def infer(
    model: CoAtNet,
    dataset: Dataset,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    bad_images: BadImages,
    num_workers: int | None = None,
    output: Literal["logits", "features", "features and means"] = "logits",
    bf16: bool = False,
    first: int = 0,
    every: int = 1,
    inspect: InspectImages | None = None,
    views: str = "one",
) -> Generator[OutputBatch, None, None]:
    """Run a model over every image of a dataset, once and in order.

    The model computes on the device of its parameters, in evaluation mode; its mode is restored when the generator
    ends or is closed. Features are the input of the classifier, (B, D).

    Args:
        bad_images: collects the images that cannot be read; they are left out of their batch.
        num_workers: processes that decode; None is one per core, up to 8.
        bf16: whether matrix products are computed in bf16 (`torch.autocast`).
        first: number of the first batch to compute, such as the rank of this process.
        every: distance to the next, such as the number of processes.
        inspect: as in `evaluation_batches`.
        views: as in `evaluation_batches`.

    Raises:
        UserError: batch_size is below 1, there are no such views, or `bad_images` is over its budget.
    """
    forward = {"logits": _logits, "features": _features, "features and means": _features_and_means}[output]
    device = next(model.parameters()).device
    batches = evaluation_batches(
        dataset,
        preprocessing=preprocessing,
        batch_size=batch_size,
        num_workers=num_workers,
        bad_images=bad_images,
        first=first,
        every=every,
        pin_memory=device.type == "cuda",
        inspect=inspect,
        views=views,
    )
    with in_evaluation(model), closing(batches):
        for images, labels, indices, *inspected in batches:
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                outputs = forward(model, images.to(device, non_blocking=True, memory_format=torch.channels_last))
            digests = _digests(images[:: len(images) // len(indices)]) if output == "features and means" else None
            yield OutputBatch(outputs.float().cpu(), labels, indices, digests, *inspected)


def average_views(logits: Tensor, num_images: int, *, multilabel: bool) -> Tensor:
    """Logits of the views of each image (B * V, K) to logits of the mean of their probabilities, (B, K).

    With one view they are returned as they are.
    """
    if len(logits) == num_images:
        return logits
    views = logits.unflatten(0, (num_images, -1))  # (B, V, K)
    if multilabel:
        return F.logsigmoid(views).logsumexp(1) - F.logsigmoid(-views).logsumexp(1)
    return views.log_softmax(2).logsumexp(1) - math.log(views.shape[1])


@contextmanager
def in_evaluation(model: CoAtNet) -> Iterator[None]:
    """The model in evaluation mode; afterwards its mode is what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def workers_for(dataset: Dataset, num_workers: int | None) -> int | None:
    """`num_workers` if given; 0 for a dataset that is read faster than workers start; else None, one per core."""
    return 0 if num_workers is None and len(dataset) <= MAX_IMAGES_WITHOUT_WORKERS else num_workers


@torch.inference_mode()
def _logits(model: CoAtNet, images: Tensor) -> Tensor:
    return model(images)


@torch.inference_mode()
def _features_and_means(model: CoAtNet, images: Tensor) -> Tensor:
    last, maps = model.forward_intermediates(images)
    return torch.cat([model.forward_head(last, pre_logits=True).float(), means_of(maps)], dim=1)


def _digests(images: Tensor) -> Tensor:
    rows = images.contiguous().flatten(1).numpy()
    found = [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), signed=True) for row in rows]
    return torch.tensor(found, dtype=torch.int64)


# Not inference mode: autograd refuses its tensors, and a new head is often trained on features.
@torch.no_grad()
def _features(model: CoAtNet, images: Tensor) -> Tensor:
    maps = model.forward_features(images)
    return model.forward_head(maps, pre_logits=True)
