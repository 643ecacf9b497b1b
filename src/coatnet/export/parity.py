"""Whether an export says what the bundle says of real images; a difference that matters is an error.

Shapes: B batch, N images in all, K classes.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.transforms import EvaluationTransform, match_channels, normalise
from coatnet.errors import UserError, first_line
from coatnet.export.sample_images import BATCH_SIZES, at_several_sizes, check_batches
from coatnet.export.signature import Interface, Run
from coatnet.inference.network import probabilities_of

PROBABILITY_LIMIT = 1e-3  # chosen: rounding in float32 gives 1e-6 to 1e-5, a wrong pixel or weight far more
LOGIT_LIMIT = 1e-3  # of the largest logit, if that is above 1
SMALLEST = 1e-4  # as logarithms, probabilities are compared from here to 1 - SMALLEST: float32 is coarse near 1
ROUNDS, SECONDS = 30, 3.0  # of timing, whichever is over first


@dataclass(frozen=True)
class Latency:
    """Median milliseconds a batch, measured in turns; torch takes the same input to the same output."""

    batch_size: int
    export: float
    torch: float


@dataclass(frozen=True)
class Parity:
    """How far an export is from its bundle, on `num_images` images of `data`.

    Differences are the largest of all. Without logits in the export, those are of log-probabilities (of log-odds for
    several labels). `agreement` is the share of images with the same likeliest class.
    """

    data: str
    num_images: int
    batch_sizes: tuple[int, ...]
    probability_difference: float
    logit_difference: float
    logit_limit: float
    agreement: float
    latency: tuple[Latency, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        """A page for people."""
        sizes = ", ".join(map(str, self.batch_sizes))
        lines = [
            "# The export beside its bundle",
            "",
            f"{self.num_images} images of {self.data}, in batches of {sizes}; both in float32.",
            "",
            "| | |",
            "|---|---|",
            f"| largest difference of a probability | {self.probability_difference:.1e} |",
            f"| largest difference of a logit | {self.logit_difference:.1e} |",
            f"| same likeliest class | {100 * self.agreement:.1f} % |",
            "",
            "| batch | export, ms | torch, ms |",
            "|---:|---:|---:|",
            *(f"| {each.batch_size} | {each.export:.2f} | {each.torch:.2f} |" for each in self.latency),
        ]
        return "\n".join(lines) + "\n"


class Reference:
    """What the bundle itself makes of images, as an export with that interface should."""

    def __init__(self, bundle: Bundle, interface: Interface) -> None:
        self.bundle, self.interface = bundle, interface

    def given(self, images: Tensor) -> NDArray:
        """uint8 (B, 3, H, W) as the export takes them."""
        if self.interface.logits:
            return np.ascontiguousarray(self.images(images).numpy())
        return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())

    def images(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to what the network sees."""
        seen = self.bundle.preprocessing
        if self.interface.any_size:
            return normalise(match_channels(images, seen), seen)
        return EvaluationTransform(seen).batch(images)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to (B, K)."""
        return self.bundle.model(self.images(images))

    @torch.inference_mode()
    def answer(self, given: NDArray) -> Tensor:
        """What an export is given to what it should make of it, (B, K)."""
        tensor = torch.from_numpy(given)
        if self.interface.logits:
            return self.bundle.model(tensor)
        return self.probabilities(self.logits(tensor.permute(0, 3, 1, 2)))

    def probabilities(self, logits: Tensor) -> Tensor:
        return probabilities_of(logits, multilabel=self.bundle.multilabel)


def compare(bundle: Bundle, interface: Interface, run: Run, data: str, images: list[Tensor]) -> Parity:
    """Run both on all the images, then time both.

    Raises:
        UserError: the export gives something else than one finite row an image.
    """
    reference = Reference(bundle, interface)
    batches = check_batches(images)
    batches = list(at_several_sizes(batches, bundle.preprocessing) if interface.any_size else batches)
    ours, theirs = [], []
    for batch in batches:
        ours.append(reference.logits(batch))
        theirs.append(attempt(run, reference.given(batch)))
        if theirs[-1].shape != ours[-1].shape or not torch.isfinite(theirs[-1]).all():
            raise UserError(
                f"the export is wrong, and nothing was written: for a batch of {len(batch)} it gives "
                f"{tuple(theirs[-1].shape)}, not {tuple(ours[-1].shape)} finite numbers"
            )
    logits, given = torch.cat(ours), torch.cat(theirs)
    expected = reference.probabilities(logits)
    found = reference.probabilities(given) if interface.logits else given
    apart = given - logits if interface.logits else in_logarithms(found, bundle) - in_logarithms(expected, bundle)
    return Parity(
        data=data,
        num_images=len(images),
        batch_sizes=BATCH_SIZES,
        probability_difference=float((found - expected).abs().max()),
        logit_difference=float(apart.abs().max()),
        logit_limit=LOGIT_LIMIT * max(1.0, float(logits.abs().max())),
        agreement=float((found.argmax(1) == expected.argmax(1)).float().mean()),
        latency=tuple(measure(reference, run, batch) for batch in (batches[0], batches[min(2, len(batches) - 1)])),
    )


def attempt(run: Run, given: NDArray) -> Tensor:
    """Raises UserError if the export does not run."""
    try:
        return torch.from_numpy(np.array(run(given)))
    except Exception as error:  # each runtime has errors of its own
        raise UserError(
            f"the export does not run for a batch of {len(given)}, and nothing was written: {first_line(error)}"
        ) from error


def require_parity(parity: Parity) -> None:
    """Raises UserError, with the figures, if the export differs by more than rounding."""
    if parity.probability_difference <= PROBABILITY_LIMIT and parity.logit_difference <= parity.logit_limit:
        return
    raise UserError(
        f"the export differs from the bundle, and nothing was written: on {parity.num_images} images of "
        f"{parity.data} by up to {parity.probability_difference:.2g} in a probability ({PROBABILITY_LIMIT:g} at most) "
        f"and {parity.logit_difference:.2g} in a logit ({parity.logit_limit:.2g} at most), with the same likeliest "
        f"class for {100 * parity.agreement:.1f} %"
    )


def in_logarithms(probabilities: Tensor, bundle: Bundle) -> Tensor:
    """Logits of probabilities, up to a constant for each image."""
    inside = probabilities.double().clamp(SMALLEST, 1 - SMALLEST)
    return inside.logit() if bundle.multilabel else inside.log()


def measure(reference: Reference, run: Run, images: Tensor) -> Latency:
    """Both in turns on one batch."""
    given = reference.given(images)
    theirs, ours = alternate([lambda: run(given), lambda: reference.answer(given)])
    return Latency(len(images), theirs, ours)


def alternate(calls: Iterable[Callable[[], object]]) -> list[float]:
    """Median milliseconds of each call, made in turns after two that do not count."""
    calls = list(calls)
    took: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(), call()
    end = time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        for call, times in zip(calls, took, strict=True):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        if time.perf_counter() > end:
            break
    return [median(times) for times in took]
