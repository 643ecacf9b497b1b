"""Distillation: beside the labels, a network learns from the outputs of a trained one, its teacher.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network": the probabilities of the teacher at a temperature.
Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent": both see the same view of an
image, augmented and mixed. Shapes: B images, C channels, R resolution, K classes, D features of the teacher.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.loader import BadImages
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError, shorten
from coatnet.evaluation.predictions import read_array
from coatnet.inference.graph_cache import fingerprint
from coatnet.inference.logits import infer
from coatnet.model.network import CoAtNet
from coatnet.system.files import atomic_files
from coatnet.system.progress import ProgressBar
from coatnet.system.validated import NonNegativeFloat, PositiveFloat, Probability, validated
from coatnet.training.distributed.processes import Processes
from coatnet.version import __version__

LOGITS_BATCH = 64  # images; always as many, so that the last bit of a logit does not depend on the run
MAX_STORED_BYTES = 16 << 30  # chosen: 1.2 million images of 1,000 classes take 2.4 GB
PROJECTION = "teacher.projection"  # its name in checkpoints

Loss = Callable[[Tensor, Tensor], Tensor]


@validated
class Distillation:
    """With `teacher`: how the network learns from its outputs."""

    weight: Probability = 0.9
    """Part of the teacher's probabilities in the loss, 0 to 1; the labels have the rest."""
    temperature: PositiveFloat = 2.0
    """What logits are divided by before they are compared; the higher, the more the unlikely classes count."""
    views: Literal["same", "fixed"] = "same"
    """`same`: the teacher sees each image as the network does, augmented and mixed, in every step; `fixed`: each image
    once, unchanged, before the training, which then takes no longer than without a teacher."""
    feature_weight: NonNegativeFloat = 0.0
    """Weight of the squared distance between normalized features, those of the network projected linearly to the
    teacher's; only for views `same`; 0 for none."""

    def __post_init__(self) -> None:
        if self.feature_weight and self.views == "fixed":
            raise UserError(
                "feature_weight is for views same: of fixed views only the teacher's probabilities are kept"
            )


def divergence(logits: Tensor, probabilities: Tensor, temperature: float, *, multilabel: bool) -> Tensor:
    """Kullback-Leibler divergence of a network from a teacher at a temperature, summed over the images.

    Times temperature^2, so that gradients have one size at any temperature (Hinton et al., section 2).

    Args:
        logits: of the network, (B, K).
        probabilities: of the teacher at the temperature, (B, K); for `multilabel` those of each class.
        multilabel: sum the divergences of the K decisions, each for one class, yes or no.
    """
    scaled = logits.float() / temperature
    if multilabel:
        yes, no = F.logsigmoid(scaled), F.logsigmoid(-scaled)
        total = F.kl_div(yes, probabilities, reduction="sum") + F.kl_div(no, 1 - probabilities, reduction="sum")
    else:
        total = F.kl_div(F.log_softmax(scaled, dim=-1), probabilities, reduction="sum")
    return temperature**2 * total


def change_preprocessing(images: Tensor, now: Preprocessing, wanted: Preprocessing) -> Tensor:
    """Normalized images (B, C, R, R) as another preprocessing has them: its size, channels, mean and deviation.

    What is cut out stays: a view is a view of any preprocessing.
    """

    def per_channel(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=images.device)[:, None, None]

    resized = tuple(images.shape[-2:]) != wanted.size
    if not resized and (now.mean, now.std, now.scale) == (wanted.mean, wanted.std, wanted.scale):
        return images
    pixels = images * per_channel(now.std) + per_channel(now.mean)  # from 0 to 1
    if now.scale is not None and wanted.scale is not None:
        reach = wanted.scale.high - wanted.scale.low
        pixels = pixels * ((now.scale.high - now.scale.low) / reach) + (now.scale.low - wanted.scale.low) / reach
    elif wanted.channels < now.channels:
        pixels = pixels.mean(1, keepdim=True)
    if resized:
        pixels = F.interpolate(pixels, size=wanted.size, mode=wanted.interpolation, antialias=True)
        pixels = pixels.clamp(0, 1) if wanted.value_range is None else pixels
    return (pixels - per_channel(wanted.mean)) / per_channel(wanted.std)  # a gray image gets three equal channels


def _kind(seen: Preprocessing) -> str:
    return "8-bit RGB" if seen.scale is None else f"images of {seen.channels} channels"


class Teacher:
    """A trained model in evaluation mode, which nothing here changes, and what a network learns from it.

    The targets of a step get more columns: after those of the labels (B, K) the teacher's probabilities at the
    temperature (B, K) and, with a feature weight, its normalized features (B, D). `loss` takes such targets.
    With several processes each holds the whole teacher.

    Attributes:
        logits: for fixed views, those of all training images, (N, K) in half precision; rows of NaN for images that
            could not be read. None until `compute_logits`.
        key: a hash of the teacher.
    """

    def __init__(
        self, bundle: Bundle, settings: Distillation, dataset: Dataset, preprocessing: Preprocessing, student: CoAtNet
    ) -> None:
        """Raises UserError unless the teacher has the classes of the data, and takes such images.

        Args:
            dataset: the training images.
            preprocessing: of the network.
            student: the network, on its device.
        """
        check_classes(bundle, dataset)
        theirs, ours = bundle.preprocessing, preprocessing
        if (theirs.scale is None) != (ours.scale is None) or (ours.scale and theirs.channels != ours.channels):
            raise UserError(
                f"the teacher takes {_kind(theirs)}, and the network {_kind(ours)}: give a teacher for the same images"
            )
        if settings.views == "fixed" and (stored := 2 * len(dataset) * len(bundle.classes)) > MAX_STORED_BYTES:
            raise UserError(
                f"distillation.views fixed would keep {stored / 2**30:,.0f} GiB of logits, of which there may be "
                f"{MAX_STORED_BYTES >> 30}: give views same"
            )
        device = next(student.parameters()).device
        self.model = bundle.model.to(device).requires_grad_(False).eval()
        self.settings, self.multilabel, self.num_classes = settings, bundle.multilabel, len(bundle.classes)
        self.key = fingerprint(bundle, __version__, torch.__version__)  # other versions compute other last digits
        self.preprocessing, self._seen = bundle.preprocessing, preprocessing
        self._order = torch.tensor([bundle.classes.index(name) for name in dataset.classes], device=device)
        self.logits: NDArray[np.float16] | None = None
        self._projection: nn.Parameter | None = None
        self._features: Tensor | None = None
        if settings.feature_weight:
            self._add_projection(student, device)

    @torch.no_grad()
    def __call__(self, images: Tensor, images_per_pass: int) -> Tensor:
        """Columns of targets (B, K + D), for images as the network sees them, (B, C, R, R)."""
        columns = []
        for part in images.split(images_per_pass):
            maps = self.model.forward_features(change_preprocessing(part, self._seen, self.preprocessing))
            features = self.model.forward_head(maps, pre_logits=True)
            columns.append([self.probabilities(self.model.get_classifier()(features)[:, self._order])])
            if self.settings.feature_weight:
                columns[-1].append(F.normalize(features.float(), dim=1))
        return torch.cat([torch.cat(each, dim=1) for each in columns])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (B, K) at the temperature."""
        scaled = logits.float() / self.settings.temperature
        return scaled.sigmoid() if self.multilabel else scaled.softmax(dim=-1)

    def stored(self, indices: Tensor) -> Tensor:
        """The probabilities (B, K) of images by their place in the dataset; NaN where there are none."""
        if self.logits is None:
            return torch.full((len(indices), self.num_classes), torch.nan, device=self._order.device)
        rows = torch.from_numpy(self.logits[indices.cpu().numpy()])
        return self.probabilities(rows.to(self._order.device))

    def loss(self, label_loss: Loss) -> Loss:
        """`(logits, targets with the teacher's columns) -> scalar`, summed over the images."""
        settings = self.settings

        def combined(logits: Tensor, targets: Tensor) -> Tensor:
            labels, probabilities, features = targets.tensor_split((self.num_classes, 2 * self.num_classes), dim=1)
            followed = divergence(logits, probabilities, settings.temperature, multilabel=self.multilabel)
            loss = (1 - settings.weight) * label_loss(logits, labels) + settings.weight * followed
            if self._projection is not None:
                loss = loss + settings.feature_weight * self._feature_distance(features)
            return loss

        return combined

    # Fixed views

    def compute_logits(
        self,
        dataset: Dataset,
        processes: Processes,
        path: Path,
        *,
        bf16: bool,
        bad_images: BadImages,
        num_workers: int | None,
        quiet: bool = False,
    ) -> None:
        """Compute the logits of every image once, as in an evaluation of the teacher, unless `path` holds them already.

        The processes share the work, and the first one writes the file.

        Raises:
            UserError: a logit is not finite.
            OSError: the file cannot be written; the logits are there all the same.
        """
        self.logits = read_array(path, (len(dataset), self.num_classes), np.float16)
        if all(processes.gather(self.logits is not None)):
            return
        own = []
        batches = infer(
            self.model,
            dataset,
            preprocessing=self.preprocessing,
            batch_size=LOGITS_BATCH,
            bad_images=bad_images,
            num_workers=num_workers,
            bf16=bf16,
            first=processes.rank,
            every=processes.world_size,
        )
        bar = ProgressBar("teacher", len(dataset), "images", shown=processes.is_main and not quiet)
        with processes.collective(), bar, closing(batches):
            for logits, _, indices, *_ in batches:
                logits = logits[:, self._order.cpu()]
                if not logits.isfinite().all():
                    first = dataset.describe(int(indices[0]))
                    raise UserError(f"the teacher's output for {first} or an image after it is not finite")
                if not self.multilabel:  # the same probabilities, and the likely classes to more digits
                    logits = logits - logits.amax(dim=1, keepdim=True)
                own.append((indices.numpy(), logits.clamp(-6e4, 6e4).half().numpy()))
                bar.advance(len(indices) * processes.world_size)
        self.logits = np.full((len(dataset), self.num_classes), np.nan, dtype=np.float16)
        for indices, rows in (batch for of_process in processes.gather(own) for batch in of_process):
            self.logits[indices] = rows
        if processes.is_main:
            with atomic_files(path) as (staged,), open(staged, "wb") as file:
                np.save(file, self.logits)

    # Features

    def _add_projection(self, student: CoAtNet, device: torch.device) -> None:
        """Make the projection, drawn by a generator of its own, and keep what the student's classifier gets."""
        shape = (self.model.num_features, student.num_features)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
        self._projection = nn.Parameter(drawn.to(device))

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            self._features = given[0]

        student.get_classifier().register_forward_pre_hook(keep)

    def _feature_distance(self, features: Tensor) -> Tensor:
        """Squared distances to the teacher's normalized features (B, D), summed over the images of the last pass."""
        assert self._projection is not None and self._features is not None
        projected, self._features = F.linear(self._features.float(), self._projection), None
        return (F.normalize(projected, dim=1) - features).square().sum()

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """The optimizer of the projection, if there is one."""
        if self._projection is None:
            return []
        group = {"params": [self._projection], "names": [PROJECTION], "weight_decay": 0.0, "scale": 1.0}
        return [torch.optim.AdamW([group], lr=learning_rate, fused=True)]

    def average_gradient(self, processes: Processes) -> None:
        """Average the gradient of the projection over the processes."""
        if self._projection is not None and processes.is_distributed:
            gradient = self._projection.grad
            assert gradient is not None
            dist.all_reduce(gradient)
            gradient /= processes.world_size

    def check_projection(self, stored: Mapping[str, Tensor]) -> None:
        """Raise UserError if the projection of a checkpoint leads to features of another width than this teacher's."""
        if self._projection is not None and PROJECTION in stored:
            (began, _), (now, _) = stored[PROJECTION].shape, self._projection.shape
            if began != now:
                raise UserError(
                    f"the run began with a teacher of {began} features, and this one has "
                    f"{now}: give the one that it began with, or begin a new run"
                )

    def tensors(self) -> Mapping[str, Tensor]:
        """What a step changes here, by name."""
        return {} if self._projection is None else {PROJECTION: self._projection}


def check_classes(bundle: Bundle, dataset: Dataset) -> None:
    """Raises UserError unless a teacher has the classes of a dataset, in any order, and the same kind of labels."""
    kinds = {True: "several labels per image", False: "one label per image"}
    if bundle.multilabel != dataset.multilabel:
        raise UserError(
            f"{dataset.name} has {kinds[dataset.multilabel]}, but the teacher learned with {kinds[bundle.multilabel]}: "
            "give one of the same kind"
        )
    unknown = sorted(set(dataset.classes) - set(bundle.classes))
    more = sorted(set(bundle.classes) - set(dataset.classes))
    if unknown or more:
        found = [f"does not know {shorten(unknown)}"] * bool(unknown) + [f"also knows {shorten(more)}"] * bool(more)
        raise UserError(
            f"the teacher {' and '.join(found)}: it must have the {len(dataset.classes)} classes of {dataset.name}; "
            "fine-tune it on these images first (coatnet train finetune --init)"
        )
