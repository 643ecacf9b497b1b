"""How answers move when the resolution changes, for three ways to resample the relative bias tables.

    python benchmarks/resampling.py runs/fashion-mnist/bundle --data fashion-mnist --resolution 20 24 28 36 48

bilinear: the paper's and ours (appendix A.1). bicubic: the same with another kernel. geometric: timm's, whose
positions lie closer to each other near the centre, and which crops instead of shrinking for a smaller grid. For each
resolution: top-1, how far logits move from bilinear's, as a share of their deviation, and how many answers change.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

import coatnet
from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.loader import BadImages, evaluation_batches
from coatnet.data.splits import Splits
from coatnet.evaluation.evaluate import open_recorded
from coatnet.model.network import CoAtNet
from coatnet.model.relative_bias import RelativeBias
from coatnet.model.resize import change_resolution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--data", required=True)
    parser.add_argument("--resolution", type=int, nargs="+", required=True)
    parser.add_argument("--images", type=int, default=2_000, help="of the held-out ones, evenly spread")
    arguments = parser.parse_args()
    bundle = coatnet.load(arguments.bundle)
    data = open_recorded(arguments.data, bundle)
    dataset = data.validation if isinstance(data, Splits) else data
    if dataset.classes != bundle.classes:
        raise SystemExit(f"{arguments.data}: its classes are not those of {arguments.bundle}")
    images, labels = read(bundle, dataset, arguments.images)

    table = Table("resolution", "policy", "top-1", "logits moved", "answers changed")
    for resolution in arguments.resolution:
        resized = F.interpolate(images, size=(resolution, resolution), mode="bicubic", antialias=True)
        logits = {policy: infer(resample_all(bundle.model, resolution, policy), resized) for policy in POLICIES}
        bilinear = logits["bilinear"]
        for policy, found in logits.items():
            moved = float((found - bilinear).abs().mean() / bilinear.std())
            changed = float((found.argmax(1) != bilinear.argmax(1)).float().mean())
            top1 = float((found.argmax(1) == labels).float().mean())
            table.add_row(str(resolution), policy, f"{100 * top1:.1f} %", f"{moved:.3f}", f"{100 * changed:.1f} %")
        table.add_section()
    Console(width=100).print(table)
    print(f"{bundle.model.variant.name}, tables made at {bundle.model.resolution} pixels, {len(labels):,} images")


def read(bundle: Bundle, dataset: Dataset, number: int) -> tuple[Tensor, Tensor]:
    """Images as the bundle sees them, and labels."""
    batches = evaluation_batches(
        dataset,
        preprocessing=bundle.preprocessing,
        batch_size=64,
        num_workers=0,
        bad_images=BadImages(len(dataset), budget=1.0),
    )
    found = [(images, labels) for images, labels, _ in track(batches, "reading", -(-len(dataset) // 64))]
    images, labels = (torch.cat(each) for each in zip(*found, strict=True))
    places = torch.linspace(0, len(labels) - 1, min(number, len(labels))).long()
    return images[places], labels[places]


def resample_all(model: CoAtNet, resolution: int, policy: str) -> CoAtNet:
    """A copy whose tables are those of another resolution."""
    copied = copy.deepcopy(model)
    tables = [module.table.detach().clone() for module in copied.modules() if isinstance(module, RelativeBias)]
    change_resolution(copied, resolution)
    with torch.no_grad():
        modules = [module for module in copied.modules() if isinstance(module, RelativeBias)]
        for module, table in zip(modules, tables, strict=True):
            module.table.copy_(POLICIES[policy](table, module.grid))
    return copied.eval()


def interpolate(table: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """`(A, 2H'-1, 2W'-1)` -> `(A, 2H-1, 2W-1)`."""
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    return F.interpolate(table[None], size=size, mode=mode, align_corners=False)[0]


def geometric(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """timm's own function, which keeps a table as (offsets, heads)."""
    heads, height, width = len(table), 2 * grid[0] - 1, 2 * grid[1] - 1
    found = resize_rel_pos_bias_table(table.flatten(1).T, new_window_size=grid, new_bias_shape=(height * width, heads))
    return found.T.reshape(heads, height, width)


POLICIES = {
    "bilinear": lambda table, grid: interpolate(table, grid, "bilinear"),
    "bicubic": lambda table, grid: interpolate(table, grid, "bicubic"),
    "geometric": geometric,
}


@torch.no_grad()
def infer(model: CoAtNet, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(100)])


if __name__ == "__main__":
    main()
