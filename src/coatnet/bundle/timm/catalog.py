"""The pretrained CoAtNets that timm publishes: hub ids, ImageNet-1k accuracies, preprocessing and class names.

Source: timm 1.0.31 (`default_cfgs`) and its results on ImageNet-1k validation, at the resolution in the name.
Class names are in the order of timm's outputs: ImageNet-1k in WordNet's words, ImageNet-12k by synset.
"""

from dataclasses import dataclass, field
from importlib.resources import files

from coatnet.data.transforms import Preprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING_224 = Preprocessing(crop_fraction=0.95)  # bicubic, mean and standard deviation 0.5
PREPROCESSING_NANO = Preprocessing(crop_fraction=0.9)


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint; `top1` and `top5` are fractions on ImageNet-1k, None for classifiers of ImageNet-12k."""

    name: str
    top1: float | None = None
    top5: float | None = None
    preprocessing: Preprocessing = field(default=PREPROCESSING_224)

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    @property
    def hub_id(self) -> str:
        return f"timm/{self.name}"


_CHECKPOINTS = (
    Pretrained(
        "coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k",
        0.87388,
        0.98312,
        Preprocessing(resolution=384, crop="squash", crop_fraction=1.0),
    ),
    Pretrained("coatnet_2_rw_224.sw_in12k_ft_in1k", 0.86582, 0.97896),
    Pretrained("coatnet_rmlp_2_rw_224.sw_in12k_ft_in1k", 0.86538, 0.97894),
    Pretrained("coatnet_rmlp_1_rw2_224.sw_in12k_ft_in1k", 0.84940, 0.96968),
    Pretrained("coatnet_rmlp_2_rw_224.sw_in1k", 0.84608, 0.96744),
    Pretrained("coatnet_1_rw_224.sw_in1k", 0.83620, 0.96382),
    Pretrained("coatnet_rmlp_1_rw_224.sw_in1k", 0.83350, 0.96452),
    Pretrained("coatnet_0_rw_224.sw_in1k", 0.82396, 0.95844),
    Pretrained(
        "coatnet_bn_0_rw_224.sw_in1k",
        0.82394,
        0.96194,
        Preprocessing(crop_fraction=0.95, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    ),
    Pretrained("coatnet_rmlp_nano_rw_224.sw_in1k", 0.82064, 0.95874, PREPROCESSING_NANO),
    Pretrained("coatnext_nano_rw_224.sw_in1k", 0.81998, 0.95888, PREPROCESSING_NANO),
    Pretrained("coatnet_nano_rw_224.sw_in1k", 0.81704, 0.95650, PREPROCESSING_NANO),
    Pretrained("coatnet_2_rw_224.sw_in12k"),
    Pretrained("coatnet_3_rw_224.sw_in12k"),
    Pretrained("coatnet_rmlp_1_rw2_224.sw_in12k"),
    Pretrained("coatnet_rmlp_2_rw_224.sw_in12k"),
)
PRETRAINED = {row.name: row for row in _CHECKPOINTS}


def pretrained_of(architecture: str) -> list[Pretrained]:
    """The checkpoints of an architecture, the most accurate first."""
    return [row for row in _CHECKPOINTS if row.architecture == architecture]


def imagenet_classes(num_classes: int) -> tuple[str, ...] | None:
    """The names of ImageNet-1k for 1,000 classes and of ImageNet-12k for 11,821; None for any other number."""
    if num_classes == 1_000:
        return tuple(words for _, words in imagenet_1k())
    if num_classes == 11_821:
        return tuple(_lines("12k.txt"))
    return None


def imagenet_1k() -> list[tuple[str, str]]:
    """Synset and words of each class of ImageNet-1k."""
    return [(synset, words) for synset, _, words in (line.partition("\t") for line in _lines("1k.tsv"))]


def _lines(name: str) -> list[str]:
    return (files("coatnet.bundle") / "imagenet" / name).read_text(encoding="utf-8").splitlines()
