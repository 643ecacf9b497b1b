"""Images a second of the input alone, on one core, beside torchvision's and timm's, alternately in one process.

    python benchmarks/input.py                  # folder and tar shards of JPEGs, IDX files, and an index of 3e9
    python benchmarks/input.py --size 2048x1536

Every contender decodes the same JPEGs, cuts a random resized crop of 224 pixels (bicubic, antialiased), flips half of
them, and gives normalized float32 batches; one process, one thread, the files in the page cache. The peers are
torchvision's ImageFolder with its transforms in a DataLoader, and timm's ImageDataset in timm's loader. The IDX rows
are 28 x 28 images, shifted by up to 2 pixels, beside torchvision's FashionMNIST on the same files.

The JPEGs are those of benchmarks/images.py, which have the fine detail of photographs.
"""

import argparse
import contextlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from idx import write_idx
from images import write_photographs
from rich.console import Console
from rich.table import Table
from rounds import alternate

from coatnet.data.loader import BadImages, training_batches
from coatnet.data.open import open_dataset
from coatnet.data.sampler import EpochSampler
from coatnet.data.shards.dataset import BlockSampler
from coatnet.data.shards.pack import pack
from coatnet.data.transforms import Augmentation, Preprocessing

RESOLUTION = 224
HALF = (0.5, 0.5, 0.5)
BILLIONS = 3 * 10**9
Work = Callable[[], int]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.size:
            width, height = map(int, size.split("x"))
            root = Path(folder) / size
            paths = [root / "train" / "ab"[number % 2] / f"{number}.jpg" for number in range(1, arguments.images + 1)]
            mean = write_photographs([root / "val" / "a" / "0.jpg", *paths], width, height)
            pack(root, root.with_name(f"{size}-packed"), num_workers=1)
            works = {
                "coatnet, folder": ours(root, Augmentation("crop"), arguments.batch_size),
                "coatnet, tar shards": ours(
                    root.with_name(f"{size}-packed"), Augmentation("crop"), arguments.batch_size
                ),
                "torchvision": torchvision_folder(root / "train", arguments.batch_size),
                "timm": timm_folder(root / "train", arguments.batch_size),
            }
            show(f"JPEGs of {size}, {mean / 1e3:,.0f} KB each", works, arguments.rounds)
        idx = write_garments(Path(folder))
        small = {
            "coatnet, IDX": ours(
                idx, Augmentation("shift"), 128, Preprocessing(28, crop_fraction=1.0, mean=(0.5,), std=(0.5,))
            ),
            "torchvision": torchvision_idx(Path(folder), 128),
        }
        show("IDX files of 28 x 28", small, arguments.rounds)
    show_index()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["500x375", "2048x1536"], metavar="WxH")
    parser.add_argument("--images", type=int, default=128, help="a round shows each once")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds; medians are printed")
    parser.add_argument("--smoke", action="store_true", help="a few images, to see that it runs")
    given = parser.parse_args()
    if given.smoke:
        given.size, given.images, given.batch_size, given.rounds = ["500x375"], 8, 4, 1
    return given


def ours(source: Path, augmentation: Augmentation, batch_size: int, preprocessing: Preprocessing | None = None) -> Work:
    dataset = open_dataset(source).training
    num_steps = len(dataset) // batch_size

    def work() -> int:
        batches = training_batches(
            dataset,
            preprocessing=preprocessing or Preprocessing(RESOLUTION),
            augmentation=augmentation,
            batch_size=batch_size,
            seed=0,
            first_step=0,
            num_steps=num_steps,
            num_workers=0,
            bad_images=BadImages(len(dataset)),
        )
        return count(images for images, _ in batches)

    return work


def torchvision_folder(root: Path, batch_size: int) -> Work:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(RESOLUTION, interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(HALF, HALF),
    ]
    dataset = ImageFolder(str(root), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    return lambda: count(images for images, _ in loader)


def timm_folder(root: Path, batch_size: int) -> Work:
    from timm.data import ImageDataset, create_loader

    loader = create_loader(
        ImageDataset(str(root)),
        input_size=(3, RESOLUTION, RESOLUTION),
        batch_size=batch_size,
        is_training=True,
        use_prefetcher=False,  # it moves batches to a GPU
        persistent_workers=False,
        num_workers=0,
        color_jitter=None,
        interpolation="bicubic",
        mean=HALF,
        std=HALF,
        device=torch.device("cpu"),
    )
    return lambda: count(images for images, _ in loader)


def write_garments(folder: Path) -> Path:
    """The excerpt of Fashion-MNIST that comes with the package, where both programs look for it."""
    splits = open_dataset("fashion-mnist-small")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, part in (("train", splits.training), ("t10k", splits.validation)):
        write_idx(raw, name, np.stack([part.read(index)[0] for index in range(len(part))]), part.labels)
    return raw


def torchvision_idx(root: Path, batch_size: int) -> Work:
    from torchvision import transforms
    from torchvision.datasets import FashionMNIST

    steps = [
        transforms.RandomCrop(28, padding=2),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(0.5, 0.5),
    ]
    dataset = FashionMNIST(str(root), transform=transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    return lambda: count(images for images, _ in loader)


def count(batches: Iterable[torch.Tensor]) -> int:
    return sum(len(images) for images in batches)


def rate(work: Work) -> float:
    """Images a second."""
    began = time.perf_counter()
    images = work()
    return images / (time.perf_counter() - began)


def show(title: str, works: dict[str, Work], rounds: int) -> None:
    """A row for each contender; the ratio is to the faster peer of the same round."""
    # The first round is not counted: imports, and files on their way into memory.
    rates = alternate({name: partial(rate, work) for name, work in works.items()}, rounds, warming=1)
    peers = [taken for name, taken in rates.items() if not name.startswith("coatnet")]
    best = [max(each) for each in zip(*peers, strict=True)]
    table = Table("contender", "images/s per core", "times the faster peer", "in the rounds", title=title)
    for name, taken in rates.items():
        ratios = sorted(own / other for own, other in zip(taken, best, strict=True))
        row = (name, f"{statistics.median(taken):,.0f}", f"{statistics.median(ratios):.2f}")
        table.add_row(*row, f"{ratios[0]:.2f} - {ratios[-1]:.2f}")
    Console(width=110).print(table)


def show_index() -> None:
    """An order of three billion images, from the middle of an epoch on."""
    table = Table("order", "ms for 1,024 positions", "MB more memory", title=f"{BILLIONS:,} images")
    for name, order in (("all images", EpochSampler(BILLIONS, 0)), ("blocks of 136", BlockSampler(BILLIONS, 0, 136))):
        before = resident()
        start, taken = 7 * BILLIONS + BILLIONS // 2, []
        for batch in range(1000):
            began = time.perf_counter()
            order.indices(start + batch * 1024 + np.arange(1024))
            taken.append(time.perf_counter() - began)
        table.add_row(name, f"{1000 * statistics.median(taken):.2f}", f"{(resident() - before) / 1e6:.1f}")
    Console(width=110).print(table)


def resident() -> int:
    """Bytes that this process has in memory at present (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
