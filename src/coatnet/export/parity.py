"""The parity check: an export gives the bundle's answers to real images, or it is an error.

Shapes: B batch, N images in all, H W any size, K classes.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from coatnet.bundle import Bundle
from coatnet.bundle.calibration import logits_and_means
from coatnet.data.channels import read_pixels, with_scale
from coatnet.data.datasets import Dataset, evenly_spaced
from coatnet.data.decode import BadImage, Scale, decode
from coatnet.data.loader import read_image
from coatnet.data.open import open_dataset
from coatnet.data.transforms import (
    EvaluationTransform,
    Preprocessing,
    as_images,
    center_crop,
    match_channels,
    normalize,
    resize,
)
from coatnet.errors import UserError, counted, first_line, is_memory_shortage
from coatnet.export import decode_image
from coatnet.export.signature import Run, Signature
from coatnet.inference.graph import to_probabilities

MAX_CHECKED_IMAGES = 64
LEAST_CHECKED_IMAGES, MAX_CHECKED_BYTES = 8, 5e8  # of photographs fewer, since they are held at full size
BATCH_SIZES = (1, 2, 5)
PROBABILITY_LIMIT = 1e-3  # chosen: rounding in float32 gives 1e-6 to 1e-5, a wrong pixel or weight far more
NOVELTY_LIMIT = 0.01  # it has steps of 0.001, and rounding may move an image by some
LOGIT_LIMIT = 1e-3  # of the largest logit, if that is above 1
MIN_PROBABILITY = 1e-4  # log-probabilities are compared between this and 1 - this: float32 is coarse near 1
FP16_TIMES = 10  # chosen: weights of 11 bits gave 7e-4 of a probability and 4e-3 of a logit in a network of 16 pixels
TIMING_ROUNDS, TIMING_SECONDS = 30, 3.0  # whichever ends first


@dataclass(frozen=True)
class Latency:
    """Median milliseconds for a batch, measured alternately; torch computes the same from the same input."""

    batch_size: int
    export: float
    torch: float


@dataclass(frozen=True)
class Parity:
    """How far an export is from its bundle, on `num_images` images of `data`.

    Differences are the largest of all. Without logits in the export, those are of log-probabilities (of log-odds for
    several labels). `agreement` is the share of images with the same likeliest class. `files` has that of a probability
    for each kind of image file, decoded by the code of the export. `novelty_difference` is None if the export has no
    such output.
    """

    data: str
    num_images: int
    batch_sizes: tuple[int, ...]
    probability_difference: float
    logit_difference: float
    logit_limit: float
    agreement: float
    latency: tuple[Latency, ...]
    files: Mapping[str, float] = field(default_factory=dict)
    novelty_difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of parity.json."""
        values = asdict(self)
        if self.novelty_difference is None:
            del values["novelty_difference"]
        return values

    def to_markdown(self) -> str:
        """The content of parity.md."""
        sizes = ", ".join(map(str, self.batch_sizes))
        lines = [
            "# The export beside its bundle",
            "",
            f"{counted(self.num_images, 'image')} of {self.data}, in batches of {sizes}; both in float32.",
            "",
            "| | |",
            "|---|---|",
            f"| largest difference of a probability | {self.probability_difference:.1e} |",
            f"| largest difference of a logit | {self.logit_difference:.1e} |",
            *(
                []
                if (apart := self.novelty_difference) is None
                else [f"| largest difference of a novelty | {apart:.1e} |"]
            ),
            f"| same likeliest class | {100 * self.agreement:.1f} % |",
            *(f"| a probability of a file that is {kind} | {apart:.1e} |" for kind, apart in self.files.items()),
            "",
            "| batch | export, ms | torch, ms |",
            "|---:|---:|---:|",
            *(f"| {each.batch_size} | {each.export:.2f} | {each.torch:.2f} |" for each in self.latency),
        ]
        return "\n".join(lines) + "\n"


class Reference:
    """The bundle's own answers, computed as an export with this signature should."""

    def __init__(self, bundle: Bundle, signature: Signature) -> None:
        self.bundle, self.signature = bundle, signature

    def given(self, images: Tensor) -> NDArray:
        """uint8 (B, 3, H, W), or levels (B, C, H, W), to the input of the export."""
        if self.signature.logits:
            return np.ascontiguousarray(self.images(images).numpy())
        if (scale := self.bundle.preprocessing.scale) is not None:
            images = scale.values(images)
        return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())

    def images(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to the input of the network."""
        seen = self.bundle.preprocessing
        if self.signature.any_size:
            return normalize(match_channels(images, seen), seen)
        return EvaluationTransform(seen).batch(images)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to (B, K)."""
        return self.bundle.model(self.images(images))

    @torch.inference_mode()
    def novelty(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to (B,), of a calibrated bundle."""
        assert self.bundle.calibration is not None
        logits, means = logits_and_means(self.bundle.model, self.images(images))
        return self.bundle.calibration.novelty(self.probabilities(logits), means)

    @torch.inference_mode()
    def answer(self, given: NDArray) -> Tensor:
        """The input of an export to the output it should have, (B, K)."""
        tensor = torch.from_numpy(given)
        if self.signature.logits:
            return self.bundle.model(tensor)
        if (scale := self.bundle.preprocessing.scale) is not None:
            return self.probabilities(self.logits(scale.levels(given)))
        return self.probabilities(self.logits(tensor.permute(0, 3, 1, 2)))

    def probabilities(self, logits: Tensor) -> Tensor:
        return to_probabilities(logits, multilabel=self.bundle.multilabel)


def compare(bundle: Bundle, signature: Signature, run: Run, data: str, images: list[Tensor]) -> Parity:
    """Run export and bundle on all images, then time both.

    Args:
        bundle: the model that was exported.
        signature: input and output of the export.
        run: the export, opened again.
        data: the name of the images' source, for the report.
        images: uint8 (3, H, W) each.

    Raises:
        UserError: the export fails, or gives anything but one finite row an image.
    """
    reference = Reference(bundle, signature)
    batches = check_batches(images)
    batches = resize_batches(batches, bundle.preprocessing) if signature.any_size else batches
    ours, theirs, novelty, timed = [], [], [], []
    for batch in batches:
        if len(timed) < len(BATCH_SIZES):
            timed.append(batch)
        ours.append(reference.logits(batch))
        found, also = split_outputs(attempt(run, reference.given(batch)), bundle)
        theirs.append(found)
        if also is not None:
            novelty.append(float((also - reference.novelty(batch)).abs().max()))
        if theirs[-1].shape != ours[-1].shape or not torch.isfinite(theirs[-1]).all():
            raise UserError(
                f"the export is wrong, and nothing was written: for a batch of {len(batch)} it gives "
                f"{tuple(theirs[-1].shape)}, not {tuple(ours[-1].shape)} finite numbers"
            )
    logits, given = torch.cat(ours), torch.cat(theirs)
    expected = reference.probabilities(logits)
    found = reference.probabilities(given) if signature.logits else given
    apart = (
        given - logits if signature.logits else log_probabilities(found, bundle) - log_probabilities(expected, bundle)
    )
    return Parity(
        files=compare_files(reference, run),
        novelty_difference=max(novelty, default=None),
        data=data,
        num_images=len(images),
        batch_sizes=BATCH_SIZES,
        probability_difference=float((found - expected).abs().max()),
        logit_difference=float(apart.abs().max()),
        logit_limit=LOGIT_LIMIT * max(1.0, float(logits.abs().max())),
        agreement=float((found.argmax(1) == expected.argmax(1)).float().mean()),
        latency=tuple(measure(reference, run, batch) for batch in (timed[0], timed[-1])),
    )


def compare_files(reference: Reference, run: Run) -> dict[str, float]:
    """The largest difference of a probability for each kind of file: the bundle decodes it as it does, the export by
    the code that is given with it."""
    found: dict[str, float] = {}
    for kind, batches in decoded_files(reference.bundle.preprocessing):
        if reference.signature.any_size:
            batches = [resize(batch, reference.bundle.preprocessing.size, "bilinear") for batch in batches]
        given, _ = split_outputs(attempt(run, reference.given(batches[1])), reference.bundle)
        theirs = reference.probabilities(given) if reference.signature.logits else given
        found[kind] = float((theirs - reference.probabilities(reference.logits(batches[0]))).abs().max())
    return found


def decoded_files(preprocessing: Preprocessing) -> Iterator[tuple[str, list[Tensor]]]:
    """For each kind of file the batches of one image (1, C, H, W) that the bundle and the code of an export decode."""
    if (scale := preprocessing.scale) is None:
        for kind, data in image_files().items():
            theirs = torch.from_numpy(decode_image.decode(io.BytesIO(data))).permute(2, 0, 1)
            yield kind, [decode(data, kind)[None], theirs[None]]
        return
    with TemporaryDirectory() as folder:
        for kind, path in value_files(preprocessing, scale, Path(folder)):
            theirs = scale.levels(decode_image.read_values(path, scale.channels))
            yield kind, [read_pixels(path.read_bytes(), path.name, scale)[None], theirs[None]]


def value_files(preprocessing: Preprocessing, scale: Scale, folder: Path) -> Iterator[tuple[str, Path]]:
    """A file of each kind that holds values, as far as what writes it is installed."""
    values = scale.values(next(made_images(preprocessing))).permute(1, 2, 0).numpy()  # (H, W, C)
    np.save(folder / "values.npy", values)
    yield "a NumPy array", folder / "values.npy"
    np.savez(folder / "values.npz", values)
    yield "a NumPy archive", folder / "values.npz"
    if scale.channels == 1:
        Image.fromarray(values[..., 0].clip(0, 65_535).astype(np.uint16)).save(folder / "values.png")
        yield "a PNG of 16 bits", folder / "values.png"
    if find_spec("tifffile"):
        from tifffile import imwrite

        turned = [(274, "H", 1, 6, True)]  # the EXIF orientation
        options: Any = {"photometric": "minisblack", "planarconfig": "contig", "extratags": turned}
        imwrite(folder / "values.tif", values[..., 0] if scale.channels == 1 else values, **options)
        yield "a turned TIFF", folder / "values.tif"


def image_files() -> dict[str, bytes]:
    """A small colored image as a file of each kind that decoders treat in different ways."""
    rows, columns = np.mgrid[0:1:48j, 0:1:64j]
    color = Image.fromarray((255 * np.stack([rows, columns, (1 - rows) * columns], axis=-1)).astype(np.uint8))
    alpha = Image.fromarray((510 * np.hypot(rows - 0.5, columns - 0.5)).clip(0, 255).astype(np.uint8))
    transparent, palette, upright = color.copy(), color.quantize(16), Image.Exif()
    transparent.putalpha(alpha)
    upright[0x0112] = 6
    wide = Image.fromarray((65535 * rows * columns).astype(np.uint16))
    return {
        "transparent": _encoded(transparent, "PNG"),
        "grey and transparent": _encoded(transparent.convert("LA"), "PNG"),
        "a transparent palette": _encoded(palette, "PNG", transparency=bytes(16 * number for number in range(16))),
        "turned by EXIF data": _encoded(color, "JPEG", exif=upright),
        "of 16 bits": _encoded(wide, "PNG"),
        "CMYK": _encoded(color.convert("CMYK"), "JPEG"),
        "grey": _encoded(color.convert("L"), "JPEG"),
    }


def example_file(preprocessing: Preprocessing) -> tuple[str, bytes]:
    """The image beside an export, and its name: a PNG with transparent parts, or values in a NumPy file."""
    if (scale := preprocessing.scale) is None:
        return "example.png", image_files()["transparent"]
    buffer = io.BytesIO()
    np.save(buffer, scale.values(next(made_images(preprocessing))).permute(1, 2, 0).numpy())
    return "example.npy", buffer.getvalue()


def made_images(preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Images of soft blobs, of the mean and deviation that a model expects: levels (C, H, W) of several sizes."""
    random = torch.Generator().manual_seed(0)
    height, width = preprocessing.size
    for number in range(MAX_CHECKED_IMAGES):
        size = (height + number % 5 * height // 4, width + number % 3 * width // 2)
        blobs = torch.randn(1, preprocessing.channels, 4, 4, generator=random)
        blobs = F.interpolate(blobs, size=size, mode="bicubic")[0]
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
        yield 255 * (mean + std * blobs)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def attempt(run: Run, given: NDArray) -> Tensor:
    """The output of the export. Raises UserError if it does not run."""
    try:
        return torch.from_numpy(np.array(run(given)))
    except Exception as error:  # each runtime has errors of its own
        if is_memory_shortage(error):
            raise
        raise UserError(
            f"the export does not run for a batch of {len(given)}, and nothing was written: {first_line(error)}"
        ) from error


def split_outputs(found: Tensor, bundle: Bundle) -> tuple[Tensor, Tensor | None]:
    """What an export gave to probabilities or logits (B, K), and the novelty (B,) if there is one."""
    num_classes = len(bundle.classes)
    if bundle.calibration is None or found.shape[1:] != (num_classes + 1,):
        return found, None
    return found[:, :num_classes], found[:, num_classes]


def require_parity(parity: Parity, times: int = 1) -> None:
    """Raise UserError, with the figures, if the export differs by more than so many times the limits for float32."""
    novelty_limit, probability_limit = times * NOVELTY_LIMIT, times * PROBABILITY_LIMIT
    logit_limit = times * parity.logit_limit
    if parity.novelty_difference is not None and not parity.novelty_difference <= novelty_limit:
        raise UserError(
            f"the export differs from the bundle, and nothing was written: by {parity.novelty_difference:.2g} in a "
            f"novelty ({novelty_limit:g} at most)"
        )
    for kind, apart in parity.files.items():
        if not apart <= probability_limit:
            raise UserError(
                f"the export differs from the bundle, and nothing was written: for a file that is {kind} by "
                f"{apart:.2g} in a probability ({probability_limit:g} at most)"
            )
    if parity.probability_difference <= probability_limit and parity.logit_difference <= logit_limit:
        return
    raise UserError(
        f"the export differs from the bundle, and nothing was written: on {counted(parity.num_images, 'image')} of "
        f"{parity.data} by up to {parity.probability_difference:.2g} in a probability ({probability_limit:g} at most) "
        f"and {parity.logit_difference:.2g} in a logit ({logit_limit:.2g} at most), with the same likeliest "
        f"class for {100 * parity.agreement:.1f} %"
    )


def log_probabilities(probabilities: Tensor, bundle: Bundle) -> Tensor:
    """(B, K) probabilities to log-probabilities, or log-odds for several labels."""
    inside = probabilities.double().clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return inside.logit() if bundle.multilabel else inside.log()


def measure(reference: Reference, run: Run, images: Tensor) -> Latency:
    """Time both on one batch."""
    given = reference.given(images)
    theirs, ours = median_milliseconds([lambda: run(given), lambda: reference.answer(given)])
    return Latency(len(images), theirs, ours)


def median_milliseconds(calls: Iterable[Callable[[], object]]) -> list[float]:
    """Median milliseconds of each call, made alternately after two warm-up calls."""
    calls = list(calls)
    took: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(), call()
    end = time.perf_counter() + TIMING_SECONDS
    for _ in range(TIMING_ROUNDS):
        for call, times in zip(calls, took, strict=True):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        if time.perf_counter() > end:
            break
    return [median(times) for times in took]


def open_check_images(bundle: Bundle, data: str | None) -> tuple[str, list[Tensor]]:
    """The name of the data, and images uint8 (3, H, W) spread evenly over its validation split.

    Without data, the garments of the package, or its digits if the classes are the ten digits.

    Raises:
        UserError: there is no such data, or none of its images can be read.
    """
    if data is None and bundle.preprocessing.scale is not None:
        return "made images", list(made_images(bundle.preprocessing))
    if data is None:
        data = "digits" if set(bundle.classes) == set(map(str, range(10))) else "fashion-mnist-small"
    splits = open_dataset(data, evaluation=True)
    dataset = splits.validation if len(splits.validation) else splits.training
    first = next((image for image, _ in spread_images(dataset, bundle.preprocessing, MAX_CHECKED_IMAGES)), None)
    most = MAX_CHECKED_IMAGES if first is None else max(LEAST_CHECKED_IMAGES, int(MAX_CHECKED_BYTES / first.nbytes))
    images, num_bytes = list[Tensor](), 0
    for image, _ in spread_images(dataset, bundle.preprocessing, min(most, MAX_CHECKED_IMAGES)):
        images.append(image)
        num_bytes += image.nbytes
        if num_bytes > MAX_CHECKED_BYTES and len(images) >= LEAST_CHECKED_IMAGES:
            break  # they are larger than the first
    if not images:
        raise UserError(f"{data}: none of its validation images can be read; give other --data to check with")
    return splits.name, images


def spread_images(dataset: Dataset, preprocessing: Preprocessing, most: int) -> Iterator[tuple[Tensor, int]]:
    """At most `most` readable images of a dataset, spread evenly, uint8 (3, H, W), with their indices.

    Where the preprocessing has a scale, levels (C, H, W).
    """
    dataset = with_scale(dataset, preprocessing.scale)
    for index in evenly_spaced(len(dataset), most):
        try:
            image, _ = read_image(dataset, index)
        except BadImage:
            continue
        pixels = as_images(image)
        yield pixels if preprocessing.scale is not None else pixels.expand(3, -1, -1), index


def check_batches(images: list[Tensor]) -> Iterator[Tensor]:
    """The images in batches uint8 (B, 3, H, W) of 1, 2 and 5 in turn, each cropped to its smallest height and width."""
    first, turn = 0, 0
    while first < len(images):
        part = images[first : first + BATCH_SIZES[turn % len(BATCH_SIZES)]]
        height, width = (min(image.shape[axis] for image in part) for axis in (1, 2))
        yield torch.stack([center_crop(image, height, width) for image in part])
        first, turn = first + len(part), turn + 1


def resize_batches(batches: Iterator[Tensor], preprocessing: Preprocessing) -> Iterator[Tensor]:
    """The batches resized to the model's resolution and to a size that is not square, in turn."""
    height, width = preprocessing.size
    sizes = ((height, width), (height * 5 // 4, width * 3 // 2))
    for number, batch in enumerate(batches):
        yield resize(batch, sizes[number % 2], preprocessing.interpolation)
