"""Class names of ImageNet in the order of timm's outputs: 1k in WordNet's words, 12k by synset."""

from importlib.resources import files


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
