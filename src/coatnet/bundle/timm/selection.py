"""Choose the pretrained CoAtNet that suits the images and the machine, for `init: auto` and `coatnet probe auto`.

timm's checkpoints are the only published ones; each was trained on photographs of 224 pixels or more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from coatnet.bundle.bundle import Bundle, load
from coatnet.bundle.hub import download
from coatnet.bundle.timm.catalog import PRETRAINED
from coatnet.data.splits import SMALL_IMAGE_PIXELS, Splits
from coatnet.errors import UserError, counted, nearest
from coatnet.model.complexity import embedded_complexities
from coatnet.model.registry import find_variant
from coatnet.system.files import user_path
from coatnet.system.hardware import gpu_bytes

AUTO = "auto"  # in place of a model's path or id; a folder of that name is ./auto


@dataclass(frozen=True)
class Choice:
    """A row of `CHOICES`: a checkpoint, and the least of machine and images that it is taken for.

    Attributes:
        name: of the checkpoint, a key of `PRETRAINED`.
        reason: why it is taken, in a few words.
        gpu_bytes: least memory of the GPU; 0 for CPUs and any GPU.
        num_images: least number of training images.
        side: least shorter side of the median image, pixels.
    """

    name: str
    reason: str
    gpu_bytes: float = 0
    num_images: int = 0
    side: int = 0

    @property
    def hub_id(self) -> str:
        return PRETRAINED[self.name].hub_id

    def describe(self) -> str:
        """The checkpoint and why it is taken: `timm/coatnet_nano_rw_224.sw_in1k (15.1 M parameters): the ...`."""
        return f"{self.hub_id} ({self.num_parameters / 1e6:.1f} M parameters): {self.reason}"

    @property
    def num_parameters(self) -> int:
        """Number of its parameters, four bytes each in the file of the weights."""
        variant = find_variant(PRETRAINED[self.name].architecture)
        return embedded_complexities()[variant.name][variant.resolution].parameters


# Chosen; the first row that fits is taken. A training step of 64 images in bf16 takes 45, 16, 11 and 6 GB
# (`simulate_step` of `planning.memory`); a third more is left to workspaces and other programs. On a CPU time is short,
# not memory: 2.4 billion multiply-accumulates an image against 4.4 (coatnet_0), 8.1 and 15. A step of the two largest
# takes two and six times as long as one of the third for 1.6 and 2.4 points on ImageNet-1k: too little for few images.
CHOICES = (
    Choice(
        "coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k",
        "the most accurate that is published, for many images of 384 pixels or more and a GPU of 64 GB or more",
        gpu_bytes=60e9,
        num_images=10_000,
        side=384,
    ),
    Choice(
        "coatnet_2_rw_224.sw_in12k_ft_in1k",
        "the most accurate at 224 pixels, for 10,000 images or more and a GPU of 24 GB or more",
        gpu_bytes=22e9,
        num_images=10_000,
    ),
    Choice(
        "coatnet_rmlp_1_rw2_224.sw_in12k_ft_in1k",
        "the smallest that has seen the 12,000 classes of ImageNet-12k, for a GPU of 16 GB or more",
        gpu_bytes=14e9,
    ),
    Choice("coatnet_0_rw_224.sw_in1k", "for a GPU of 8 GB or more", gpu_bytes=7.5e9),
    Choice(
        "coatnet_nano_rw_224.sw_in1k", "the cheapest to compute of those that are published, for CPUs and small GPUs"
    ),
)


def is_auto(source: object) -> bool:
    """Whether a model's source is `auto`. Raises UserError for a misspelled one."""
    hint = nearest(source, [AUTO]) if isinstance(source, str) and source != AUTO and "/" not in source else ""
    if hint and not user_path(str(source)).exists():
        raise UserError(f"there is no model {source!r}{hint}")
    return source == AUTO


def choose_pretrained(splits: Splits, device: str) -> Choice:
    """The pretrained network for these images on this device.

    Gray images are repeated to three channels. On processes with unlike GPUs, choices may differ: name an id there.

    Raises:
        UserError: the images are of 64 pixels or less, for which there is no pretrained CoAtNet; or there is no such
            device.
    """
    if is_small(splits):
        height, width = splits.summary.largest
        raise UserError(
            f"auto finds no pretrained CoAtNet for {splits.name}: its images have {width} x {height} pixels at most, "
            "and all that are published learned from photographs of 224 or more; `coatnet train` without init chooses "
            "a network for small images, and an id such as timm/coatnet_nano_rw_224.sw_in1k is taken whatever they are"
        )
    return choose_row(gpu_bytes(device), len(splits.training), splits.native_resolution)


def choose_row(gpu_memory: float, num_images: int, side: int) -> Choice:
    """The first row of `CHOICES` that fits.

    Args:
        gpu_memory: bytes of the GPU, 0 for a CPU.
        num_images: number of training images.
        side: shorter side of the median image, pixels.
    """
    given = (gpu_memory, num_images, side)
    return next(
        row
        for row in CHOICES
        if all(has >= least for has, least in zip(given, (row.gpu_bytes, row.num_images, row.side), strict=True))
    )


def is_small(splits: Splits) -> bool:
    """Whether the images are of 64 pixels or less."""
    return max(splits.summary.largest) <= SMALL_IMAGE_PIXELS


def load_pretrained(
    splits: Splits, device: str, say: Callable[[str], None], *, instead: str = "name a bundle or folder of this machine"
) -> tuple[str, Bundle]:
    """Load the network that `choose_pretrained` takes, from the hub or its cache.

    Args:
        splits: the images.
        device: name of the device, as in `choose_device`.
        say: gets one line before the download: which network, why, and how much there is to download.
        instead: what to do where it cannot be had, for the error.

    Returns:
        Its id with the commit, by which `load` finds it again without a network, and the bundle.

    Raises:
        UserError: no network suits, or it is not in the cache and the hub cannot be reached; nothing else is taken.
    """
    choice = choose_pretrained(splits, device)

    def announce(num_bytes: int) -> None:
        amount = f"{num_bytes / 1e6:,.0f} MB to download" if num_bytes else "in the cache already"
        say(f"auto takes {choice.describe()}; {amount}")

    try:
        folder = download(choice.hub_id, before=announce)
    except UserError as error:
        raise UserError(f"auto takes {choice.describe()}; but {error}; or {instead}") from None
    return f"{choice.hub_id}@{folder.name}", load(folder)


def is_choice(source: str) -> bool:
    """Whether `load_pretrained` may have returned this id, in this release or in another one."""
    repository, _, revision = source.partition("@")
    return bool(revision) and repository in {row.hub_id for row in PRETRAINED.values()}


def suggest_pretrained(splits: Splits, device: str) -> str:
    """A line for who trains untrained weights on few images: what `init: auto` would take."""
    choice = choose_pretrained(splits, device)
    return (
        f"note: {counted(len(splits.training), 'image')} are few to learn from with untrained weights; --init auto "
        f"would start from {choice.describe()}; about {4 * choice.num_parameters / 1e6:,.0f} MB to download"
    )
