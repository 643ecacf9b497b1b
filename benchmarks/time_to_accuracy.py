"""Accuracy per minute: `coatnet train` by default beside a plain script on timm's networks, all from nothing.

    python benchmarks/time_to_accuracy.py --data fashion-mnist stamps clip-art --minutes 10 --seeds 0 1 2
    python benchmarks/time_to_accuracy.py --data path/to/folder --minutes 2 5 10 --contenders ours resnet18
    python benchmarks/time_to_accuracy.py --data fashion-mnist --fraction 0.01 0.1 1 --held-out 0.2 --minutes 5

Every contender learns from the same images on the same cores within the same minutes, which include starting Python
and decoding, one after the other, seed after seed. All are measured on the same held-out images at the end.

    ours        `coatnet train --max_minutes M`, in a process of its own, as it is by default
    the others  one script (`train_plainly`): AdamW, a cosine over the time that is left, warm-up, RandAugment, crops or
                shifts, mirroring, label smoothing, averaged weights, bf16 where it is faster,
                channels-last; each image is decoded once and kept in memory, reduced

`fashion-mnist` is measured on its 10,000 test images; garments may be mirrored, for which ours has the recipe
`fashion-mnist`. `stamps` and `clip-art` are Debian's tuxpaint-stamps-default and openclipart-png, with their top
folders as classes, and so is any other folder; a fifth of the images of each class is held out, by a hash of their
bytes, and files with the same bytes count once. `--fraction` takes that part of the training images of each class,
`--held-out` of the others: measuring is within the minutes, and large networks take minutes for 10,000 images.

OUT/results.json keeps every result, and the same command again runs what is missing. OUT/accuracy.png draws them.
"95 % of one model" is the interval of Wilson with the median accuracy of the seeds, from the number of held-out images;
"ours minus it" the mean difference of the seeds that both have, with its 95 % interval (paired, t).
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from idx import write_idx
from PIL import Image
from rich.console import Console
from rich.table import Table

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 20_000_000  # chosen: openclipart has drawings of 600 million, which would take minutes
MIN_CLASS, MAX_CLASS = 10, 300  # images of a class; smaller classes are left out, larger ones cut
HELD_OUT = 0.2
CLIP_ART_CLASSES = (
    *("animals", "buildings", "food", "geography", "office", "people"),
    *("plants", "recreation", "tools", "transportation"),
)
FOLDERS = {
    "stamps": ("/usr/share/tuxpaint/stamps", "tuxpaint-stamps-default", None),
    "clip-art": (
        "/usr/share/openclipart/png",
        "openclipart-png",
        CLIP_ART_CLASSES,
    ),
}
# Plain networks: timm's name, the side and the changes for images of up to 64 pixels, and those for larger ones. Small
# images are enlarged, or patches made smaller, so that the last stage has more than one cell; on 28 pixels that costs
# less than a stem without stride.
PLAIN: dict[str, tuple[str, tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]] = {
    "resnet18": ("resnet18", (64, {}), (128, {})),
    "convnext_atto": ("convnext_atto", (32, {"patch_size": 2}), (128, {})),
    "vit_tiny": ("vit_tiny_patch16_224", (28, {"img_size": 28, "patch_size": 4}), (128, {"img_size": 128})),
    "coatnet_pico": ("coatnet_pico_rw_224", (64, {"img_size": 64}), (128, {"img_size": 128})),
}
CONTENDERS = ("ours", *PLAIN)
START_UP_MINUTES = 0.1  # what Python and torch take before `coatnet train` counts its minutes
KEY = ("data", "fraction", "held_out", "minutes", "threads", "seed", "contender")


def main() -> None:
    if sys.argv[1:2] == ["--plain"]:
        print(json.dumps(train_plainly(**json.loads(sys.argv[2]))))
        return
    arguments = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # every contender inherits it
    arguments.out.mkdir(parents=True, exist_ok=True)
    for values in plan(arguments):
        results = read_results(arguments.out)
        if not any(all(each[name] == values[name] for name in KEY) for each in results):
            result = run(values, arguments.out)
            write_results(arguments.out, [*read_results(arguments.out), values | result])
            accuracy, low, high = middle([result])
            print(
                f"{values['data']} x {values['fraction']:g}, {values['minutes']:g} min, seed {values['seed']}, "
                f"{values['contender']}: {accuracy:.1f} % ({low:.1f} to {high:.1f}, "
                f"n = {result['n']:,}), {result['epochs']:.3g} epochs, {result['seconds']:.0f} s",
                flush=True,
            )
    results = read_results(arguments.out)
    print_table(results)
    draw(results, arguments.out / "accuracy.png")
    print(f"{arguments.out}/results.json, {arguments.out}/accuracy.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["fashion-mnist", *FOLDERS], help="the three by default")
    parser.add_argument("--fraction", nargs="+", type=float, default=[1.0], help="of the training images")
    parser.add_argument("--held-out", type=float, default=1.0, help="of the images to measure on")
    parser.add_argument("--minutes", nargs="+", type=float, default=[10.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="and cores")
    parser.add_argument("--out", type=Path, default=Path("runs/time-to-accuracy"))
    return parser.parse_args()


def plan(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What to run, in order: the contenders of a seed follow each other, so that a change of the machine meets all."""
    for seed in arguments.seeds:
        for data in arguments.data:
            for fraction in arguments.fraction:
                for minutes in arguments.minutes:
                    for contender in arguments.contenders:
                        values = (data, fraction, arguments.held_out, minutes, arguments.threads, seed, contender)
                        yield dict(zip(KEY, values, strict=True))


def run(values: dict[str, Any], out: Path) -> dict[str, Any]:
    """One contender's training in a process of its own: correct answers of n, epochs, and seconds from start to end."""
    folder = gather(values["data"], values["fraction"], values["held_out"], out / "data")
    started = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": str(values["threads"])}
    if values["contender"] == "ours":
        name = "-".join(str(values[name]).replace("/", "_") for name in KEY[:-1])
        run_folder = out / "runs" / name
        options = {"data": folder, "seed": values["seed"]}
        options["max_minutes"] = max(0.05, values["minutes"] - START_UP_MINUTES)
        named = ["fashion-mnist"] if values["data"].startswith("fashion-mnist") else []  # the recipe
        figures = train_ours(named, options, run_folder, environment)
        return {**figures, "seconds": time.time() - started}
    given = {
        "folder": str(folder),
        "network": values["contender"],
        "seed": values["seed"],
        "deadline": started + 60 * values["minutes"],
    }
    printed = execute([sys.executable, __file__, "--plain", json.dumps(given)], environment)
    return {**json.loads(printed.splitlines()[-1]), "seconds": time.time() - started}


def train_ours(recipe: list[str], options: dict[str, Any], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """`coatnet train` in a process of its own: correct answers of n, and epochs."""
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted benchmark: a resumed run would have more time
    given = [f"--{name}={value}" for name, value in {**options, "out": folder}.items()]
    execute([sys.executable, "-m", "coatnet", "train", *recipe, *given], environment)
    figures = json.loads((folder / "report.json").read_text())["figures"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {"correct": round(figures["top1"] * figures["n"]), "n": figures["n"], "epochs": last["epoch"]}


def execute(command: list[str], environment: dict[str, str]) -> str:
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
    return ran.stdout


# The images


def gather(data: str, fraction: float, held_out: float, out: Path) -> Path:
    """A folder that `coatnet train` and `read_images` open: IDX files, or train/ and val/ with links to the images."""
    name = data
    if data not in FOLDERS and not data.startswith("fashion-mnist"):  # other folders may have the same name
        name = f"{Path(data).name}-{hashlib.sha256(str(Path(data).resolve()).encode()).hexdigest()[:8]}"
    folder = out / f"{name}-{fraction:g}-{held_out:g}"
    if folder.is_dir():
        return folder
    from coatnet.system.files import atomic_folder

    write = write_garments if data.startswith("fashion-mnist") else link_images
    with atomic_folder(folder) as staged:
        write(data, fraction, held_out, staged)
    return folder


def write_garments(data: str, fraction: float, held_out: float, folder: Path) -> None:
    from coatnet import open_dataset

    splits = open_dataset(data)
    for name, dataset, share in (("train", splits.training, fraction), ("t10k", splits.validation, held_out)):
        order = np.random.default_rng(0).permutation(len(dataset))
        kept = [order[dataset.labels[order] == label] for label in range(10)]
        indices = np.sort(np.concatenate([each[: max(1, round(share * len(each)))] for each in kept]))
        images = np.stack([np.asarray(dataset.read(index)[0]).reshape(28, 28) for index in indices.tolist()])
        write_idx(folder, name, images, dataset.labels[indices])
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in splits.classes))


def link_images(data: str, fraction: float, measured: float, folder: Path) -> None:
    """Split the images below each top folder by a hash of their bytes."""
    place, package, classes = FOLDERS.get(data, (data, None, None))
    if not Path(place).is_dir():
        missing = f"install Debian's {package}" if package else "give a folder with a folder for each class"
        raise SystemExit(f"{place} is no folder: {missing}")
    seen: set[str] = set()
    for each in sorted(path for path in Path(place).iterdir() if path.is_dir()):
        if classes and each.name not in classes:
            continue
        by_hash = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(usable_images(each))}
        paths = [(key, by_hash[key]) for key in sorted(by_hash) if key not in seen][:MAX_CLASS]
        seen.update(by_hash)
        if len(paths) < MIN_CLASS:
            continue
        held_out = math.ceil(HELD_OUT * len(paths))
        learned = max(1, round(fraction * (len(paths) - held_out)))
        validated = max(1, round(measured * held_out))
        for split, part in (("val", paths[:validated]), ("train", paths[held_out:][:learned])):
            (folder / split / each.name).mkdir(parents=True)
            for key, path in part:
                (folder / split / each.name / f"{key[:16]}{path.suffix.lower()}").symlink_to(path.resolve())


def usable_images(folder: Path) -> Iterator[Path]:
    """Images that are not too large, nor the mirror image of another, as some stamps are."""
    Image.MAX_IMAGE_PIXELS = None  # only headers are read here
    for path in folder.rglob("*"):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.endswith(("_mirror", "_flip")) and path.is_file():
            try:
                with Image.open(path) as image:
                    if math.prod(image.size) <= MAX_PIXELS:
                        yield path
            except OSError:
                continue


# The plain script


def train_plainly(folder: str, network: str, seed: int, deadline: float) -> dict[str, Any]:
    """Train one of timm's networks until the deadline, in seconds since 1970, and measure its averaged weights."""
    started = time.time()
    from coatnet.system.hardware import multiplies_bf16, sleep_while_waiting_if_busy

    sleep_while_waiting_if_busy()  # as ours does, or a busy machine would stop this one alone
    import timm
    import torch
    from timm.utils.model_ema import ModelEmaV3
    from torch import nn
    from torch.utils.data import DataLoader

    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels, held_out, held_out_labels, classes = read_images(Path(folder))
    small = images[0].width <= 64
    name, *sides = PLAIN[network]
    side, changes = sides[0 if small else 1]
    channels = len(images[0].getbands())
    training_view, held_out_view = views(small, side)

    def load(views: Any, images: list[Image.Image], labels: list[int], training: bool) -> DataLoader:
        return DataLoader(
            Images(images, labels, views),
            batch_size,
            shuffle=training,
            drop_last=training,
            num_workers=1,
            persistent_workers=training,
            multiprocessing_context="fork",  # the worker shares the decoded images
            worker_init_fn=one_thread,
        )

    def prepare(batch: torch.Tensor) -> torch.Tensor:
        """Normalize images (B, C, H, W) of bytes, enlarged to the network's side if they are small."""
        batch = batch.to(device, non_blocking=True).to(memory_format=torch.channels_last).float().div_(127.5).sub_(1)
        return nn.functional.interpolate(batch, size=side, mode="bilinear") if batch.shape[-1] != side else batch

    batch_size = max(1, min(32 if len(images) < 5_000 else 64 if len(images) < 20_000 else 128, len(images)))
    model = timm.create_model(name, num_classes=classes, in_chans=channels, **changes)
    model = model.to(device, memory_format=torch.channels_last).train()
    decayed = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    peak = 1e-3 * math.sqrt(batch_size / 64)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak)
    average = ModelEmaV3(model, decay=0.998, use_warmup=True, warmup_gamma=10.0, warmup_power=1.0)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=multiplies_bf16(device))

    steps, first, batches = 0, time.time(), repeat(load(training_view, images, labels, True))
    durations: list[float] = []
    while True:
        now = time.time()
        step_seconds = statistics.median(durations[2:][-50:]) if len(durations) > 2 else 0.0  # the first ones allocate
        # The forward pass is a third of a step; a quarter more, and two seconds for a worker to start.
        end = deadline - 2 - 1.25 / 3 * step_seconds * len(held_out) / batch_size
        if steps and now + step_seconds > end:
            break
        done = min(1.0, (now - first) / max(end - first, 1e-9))
        rate = min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = peak * max(rate, 0.01)
        batch, targets = next(batches)
        with autocast():
            value = loss(model(prepare(batch)), targets.to(device))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        average.update(model, step=steps)
        durations.append(time.time() - now)

    correct = 0
    average.module.eval()
    with torch.inference_mode(), autocast():
        for batch, targets in load(held_out_view, held_out, held_out_labels, False):
            correct += int((average.module(prepare(batch)).argmax(1).cpu() == targets).sum())
    return {
        "correct": correct,
        "n": len(held_out),
        "epochs": steps * batch_size / len(images),
        "images_per_second": steps * batch_size / (now - first),
        "start_up_seconds": first - started,
    }


class Images:
    """Decoded images with labels as a dataset; `view` makes an image a tensor (C, H, W) of bytes."""

    def __init__(self, images: list[Image.Image], labels: list[int], view: Any) -> None:
        self.images, self.labels, self.view = images, labels, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.view(self.images[index]), self.labels[index]


def views(small: bool, side: int) -> tuple[Any, Any]:
    """The transforms of training and of held-out images: shifts for small images, crops for others."""
    from torchvision import transforms

    white = 0 if small else 255  # garments lie on black
    randomly = [transforms.RandomHorizontalFlip(), transforms.RandAugment(2, 9, fill=white), transforms.PILToTensor()]
    if small:
        return transforms.Compose([transforms.RandomCrop(28, padding=2), *randomly]), transforms.PILToTensor()
    crop = transforms.RandomResizedCrop(side, scale=(0.35, 1.0))
    return transforms.Compose([crop, *randomly]), transforms.Compose(
        [transforms.CenterCrop(side), transforms.PILToTensor()]
    )


def read_images(folder: Path) -> tuple[list[Image.Image], list[int], list[Image.Image], list[int], int]:
    """Images and labels to learn from, images and labels held out, and the number of classes."""
    if (folder / "classes.txt").exists():
        arrays = []
        for split in ("train", "t10k"):
            data = (folder / f"{split}-images-idx3-ubyte").read_bytes()
            arrays.append(
                [Image.fromarray(each) for each in np.frombuffer(data, np.uint8, offset=16).reshape(-1, 28, 28)]
            )
            arrays.append(list((folder / f"{split}-labels-idx1-ubyte").read_bytes()[8:]))
        return *arrays, 10
    classes = sorted(path.name for path in (folder / "train").iterdir())
    found: list[Any] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for split in ("train", "val"):
            paths = sorted((folder / split).glob("*/*"))
            found += [list(pool.map(read_reduced, paths)), [classes.index(path.parent.name) for path in paths]]
    return *found, len(classes)


def read_reduced(path: Path, shorter_side: int = 146) -> Image.Image:
    """An image on white, with its shorter side reduced to 128 / 0.875 pixels."""
    image = Image.open(path).convert("RGBA")
    scale = shorter_side / min(image.size)
    image = image.resize([max(shorter_side, round(scale * each)) for each in image.size], Image.Resampling.BICUBIC)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def repeat(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def one_thread(_: int) -> None:
    import torch

    torch.set_num_threads(1)


# The results


def read_results(out: Path) -> list[dict[str, Any]]:
    path = out / "results.json"
    return json.loads(path.read_text()) if path.exists() else []


def write_results(out: Path, results: list[dict[str, Any]]) -> None:
    from coatnet.system.files import atomic_write

    atomic_write(out / "results.json", json.dumps(results, indent=1) + "\n")


def grouped(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Results that differ in the seed alone, by (data, fraction, held_out, minutes, threads, contender)."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    names = [name for name in KEY if name != "seed"]
    order = {name: number for number, name in enumerate(CONTENDERS)}
    for each in sorted(results, key=lambda each: (*(each[name] for name in names[:-1]), order[each["contender"]])):
        groups.setdefault(tuple(each[name] for name in names), []).append(each)
    return groups


def middle(group: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Median accuracy over seeds, in percent, and the interval of Wilson of one model with it."""
    from coatnet.evaluation.metrics import wilson_interval

    accuracy = statistics.median(each["correct"] / each["n"] for each in group)
    n = group[0]["n"]
    low, high = wilson_interval(round(accuracy * n), n)
    return 100 * accuracy, 100 * low, 100 * high


def accuracies(results: Iterable[dict[str, Any]]) -> dict[int, float]:
    """Accuracy in percent by seed."""
    return {each["seed"]: 100 * each["correct"] / each["n"] for each in sorted(results, key=lambda each: each["seed"])}


def difference(values: dict[int, float], reference: dict[int, float]) -> str:
    """The mean difference of the seeds that both have, with its 95 % interval, as far as there are any."""
    from coatnet.study.statistics import paired_estimate

    found = paired_estimate(values, reference)
    if found is None:
        return ""
    return f"{found.mean:+.1f}" + ("" if found.interval is None else " ({:.1f} to {:.1f})".format(*found.interval))


def print_table(results: list[dict[str, Any]]) -> None:
    columns = ("data", "fraction", "held out", "threads", "minutes", "contender")
    table = Table(*columns, "top-1 %", "95 % of one model", "seeds", "ours minus it", "epochs", "took min")
    groups = grouped(results)
    for setting, group in groups.items():
        data, fraction, held_out, minutes, threads, contender = setting
        accuracy, low, high = middle(group)
        found, ours = accuracies(group), accuracies(groups.get((*setting[:-1], "ours"), []))
        ahead = "" if contender == "ours" else difference(ours, found)
        seeds = " ".join(f"{each:.1f}" for each in found.values())
        epochs, seconds = (statistics.median(each[name] for each in group) for name in ("epochs", "seconds"))
        shown = (Path(data).name, f"{fraction:g}", f"{held_out:g}", str(threads), f"{minutes:g}", contender)
        measured = (f"{accuracy:.1f}", f"{low:.1f} to {high:.1f}", seeds, ahead)
        table.add_row(*shown, *measured, f"{epochs:.3g}", f"{seconds / 60:.1f}")
    Console(width=160).print(table)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Median accuracy over the minutes, or contender beside contender if all had as many minutes.

    A panel is a data set, its fractions and a number of threads; dots are seeds, bars the intervals of the medians.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def panel_of(each: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(each[name] for name in ("data", "fraction", "held_out", "threads"))

    panels = sorted(set(map(panel_of, results)))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4 * len(panels) + 1, 4), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        inside = grouped([each for each in results if panel_of(each) == panel])
        found = [name for name in CONTENDERS if any(key[-1] == name for key in inside)]
        over_minutes = len({key[3] for key in inside}) > 1
        for place, contender in enumerate(found):
            groups = [group for key, group in inside.items() if key[-1] == contender]
            points = [middle(group) for group in groups]
            seconds = [statistics.median(each["seconds"] for each in group) for group in groups]
            x = [each / 60 for each in seconds] if over_minutes else [float(place)]
            color = f"C{CONTENDERS.index(contender)}"
            bars = np.array([(mid - low, high - mid) for mid, low, high in points]).T
            line = ("-o" if contender == "ours" else "--o") if over_minutes else "_"
            axis.errorbar(x, [each[0] for each in points], bars, fmt=line, color=color, label=contender, capsize=3)
            for x_of_group, group in zip(x, groups, strict=True):
                for each in group:
                    axis.plot(x_of_group, 100 * each["correct"] / each["n"], "o", ms=4, color=color, alpha=0.5)
        n = next(iter(inside.values()))[0]["n"]
        axis.set(ylabel="top-1, %", title=f"{Path(panel[0]).name} x {panel[1]:g} (n = {n:,}), {panel[3]} threads")
        axis.grid(alpha=0.3)
        if over_minutes:
            axis.set_xlabel("minutes")
            axis.legend(fontsize=8)
        else:
            axis.set_xticks(range(len(found)), found, fontsize=8, rotation=20)
            axis.set_xlabel(f"after {next(iter(inside))[3]:g} minutes")
            axis.margins(x=0.15)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
