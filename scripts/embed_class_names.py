"""Write the class names of ImageNet-1k and ImageNet-12k into the package: `python scripts/embed_class_names.py`.

Needs timm, which ships the order of the classes and WordNet's words for them.
"""

from collections import Counter
from pathlib import Path

from timm.data import ImageNetInfo

FOLDER = Path(__file__).resolve().parents[1] / "src" / "coatnet" / "bundle" / "imagenet"
# WordNet's words are the same for both; every class needs a name of its own.
BY_HAND = {"n02012849": "crane (bird)", "n03126707": "crane (machine)"}


def main() -> None:
    """One line a class, in the order of the outputs: synset, tab, name; for ImageNet-12k the synset alone."""
    info = ImageNetInfo("imagenet-1k")
    synsets = info.label_names()
    words = [info.label_name_to_description(synset, detailed=False) for synset in synsets]
    first = [name.split(", ")[0] for name in words]
    count = Counter(first)
    names = [
        BY_HAND.get(s, short if count[short] == 1 else long)
        for s, short, long in zip(synsets, first, words, strict=True)
    ]
    assert len(set(names)) == len(names) == 1000
    lines = [f"{synset}\t{name}\n" for synset, name in zip(synsets, names, strict=True)]
    (FOLDER / "1k.tsv").write_text("".join(lines), encoding="utf-8")
    (FOLDER / "12k.txt").write_text("".join(f"{s}\n" for s in ImageNetInfo("imagenet-12k").label_names()))


if __name__ == "__main__":
    main()
