"""`coatnet explain`: write what mattered to a model in images, or the relative biases it has learned, as PNG files."""

import argparse
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from coatnet.cli.parser import BUNDLE_HELP, FAILED, Parser, print_unreadable
from coatnet.errors import cut, one_line
from coatnet.system.terminal import echo, echo_summary

if TYPE_CHECKING:
    import PIL.Image

    from coatnet.bundle import Bundle
    from coatnet.data.decode import Scale
    from coatnet.inference import Predictor

IMAGES_AT_ONCE = 16
SHOWN_SIDES = (224, 1024)  # pixels; images are shown at a size between these


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "explain",
        "Write what mattered to a model in images: a PNG for each, the image and beside it the same under a heat map,\n"
        "blue for nothing to red for the most. An unreadable image gets its own line, and makes the exit code 1.\n"
        "With --biases, write the relative biases of each layer and head, which need no image.",
        "methods:\n"
        "  layercam   gradient times activation; fast, for one class (Jiang et al. 2021)\n"
        "  attention  attention rollout with the relative biases; of no class in particular (Abnar, Zuidema 2020)\n"
        "  occlusion  how the class falls when a patch is hidden; slow, a reference (Zeiler, Fergus 2014)\n\n"
        "examples:\n"
        "  coatnet explain runs/mine holiday.jpg --out heat\n"
        '  coatnet explain runs/mine more/images --class "tabby cat" --method occlusion\n'
        "  coatnet explain runs/mine --biases",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("paths", nargs="*", metavar="IMAGE", help="images and folders of images")
    parser.add_argument("--method", metavar="M", help="layercam, attention or occlusion (layercam)")
    parser.add_argument("--class", dest="target", metavar="NAME", help="class to explain (the likeliest of each image)")
    parser.add_argument(
        "--stage", type=int, metavar="N", help="for layercam: 0 for the stem, 1, 2, ... (the last convolutional)"
    )
    parser.add_argument("--out", default=".", metavar="DIR", help="folder for the PNG files (this one)")
    parser.add_argument("--biases", action="store_true", help="write the relative biases instead")
    parser.add_max_megapixels()
    given = parser.parse(arguments)
    if given.biases and (given.paths or given.method or given.target is not None or given.stage is not None):
        parser.error("--biases is about the network: give no image, method, class or stage with it")
    if not given.biases and not given.paths:
        parser.error("give images to explain, or --biases")
    return given


def run(arguments: Sequence[str]) -> int:
    """Explain images, or write the relative biases."""
    given = parse_arguments(arguments)
    from coatnet.system.files import user_path

    folder = user_path(given.out)
    if given.biases:
        from coatnet.bundle import load

        return write_biases(load(given.bundle), folder)
    from coatnet.inference import Predictor

    return explain_images(Predictor(given.bundle, "torch", "fp32", device="cpu"), given, folder)


def explain_images(predictor: "Predictor", given: argparse.Namespace, folder: Path) -> int:
    """Write a PNG and print a line for each image."""
    from coatnet.data.folder import expand_paths
    from coatnet.inference.explanation import Explanation, check_method
    from coatnet.system.files import atomic_files, require_outside_images, translate_write_errors

    method = given.method or "layercam"
    check_method(predictor.bundle.model, method, given.stage)  # before the folder is made
    if given.target is not None:
        predictor.class_index(given.target)
    how = "" if method == "layercam" else f".{method}"
    how += "" if given.stage is None else f".stage-{given.stage}"
    require_outside_images(folder, given.paths)
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found, taken, num_unreadable = expand_paths(given.paths), set[str](), 0
    while batch := list(islice(found, IMAGES_AT_ONCE)):
        readable = [path for path, error in batch if error is None]
        explained = iter(predictor.explain(readable, method=method, target=given.target, stage=given.stage))
        for path, error in batch:
            explanation = Explanation(str(path), error=error) if error else next(explained)
            if explanation.error is not None:
                print_unreadable({str(path): explanation.error})
                num_unreadable += 1
                continue
            file = new_name(folder, path.stem, explanation.target, taken, how)
            shown = open_upright(path, predictor.bundle.preprocessing.scale)
            both = side_by_side(shown, explanation.overlay(shown))
            with translate_write_errors(folder), atomic_files(file) as (staged,):
                both.save(staged)
            percent = f"{100 * explanation.probability:.1f} %"
            echo(one_line(f"{path}: {cut(explanation.target)} {percent}: {file}"))
    return FAILED if num_unreadable else 0


def new_name(folder: Path, stem: str, target: str, taken: set[str], how: str = "") -> Path:
    """A file name of image and class, and of what else is named, that no image before had: `holiday.tabby-cat.png`."""
    words = first_bytes("-".join("".join(c if c.isalnum() else " " for c in target).split())[:40], 80)
    name = f"{first_bytes(stem[:80], 120)}.{words or 'class'}{how}"
    candidates = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
    chosen = next(each for each in candidates if each.lower() not in taken)
    taken.add(chosen.lower())
    return folder / f"{chosen}.png"


def first_bytes(name: str, most: int) -> str:
    """The beginning of a part of a file name: file systems count bytes, of which a letter may take four."""
    return os.fsencode(name)[:most].decode(errors="ignore")


def open_upright(path: Path, scale: "Scale | None") -> "PIL.Image.Image":
    """An image as the model is given it, upright and on white, scaled to be looked at."""
    import PIL.Image

    from coatnet.data.channels import read_pixels, to_rgb
    from coatnet.data.datasets import read_image_file

    pixels = to_rgb(read_pixels(read_image_file(str(path), str(path)), str(path), scale))
    image = PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    least, most = SHOWN_SIDES
    if (longest := max(image.size)) > most:
        image.thumbnail((most, most))
    elif longest < least:
        factor = -(-least // longest)
        image = image.resize((factor * image.width, factor * image.height), PIL.Image.Resampling.NEAREST)
    return image


def side_by_side(left: "PIL.Image.Image", right: "PIL.Image.Image") -> "PIL.Image.Image":
    """Two images of one size beside each other on white."""
    import PIL.Image

    gap = 8
    both = PIL.Image.new("RGB", (2 * left.width + gap, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + gap, 0))
    return both


def write_biases(bundle: "Bundle", folder: Path) -> int:
    """Write a PNG for each layer with relative biases, a square for each head."""
    from coatnet.errors import UserError
    from coatnet.inference.explanation import draw_biases, relative_biases
    from coatnet.system.files import atomic_files, translate_write_errors

    layers = list(relative_biases(bundle))
    if not layers:
        raise UserError(f"{bundle.model.variant.name} has no relative biases; of the paper's, those with T stages have")
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, biases in layers:
        with translate_write_errors(folder), atomic_files(folder / f"biases-{name}.png") as (staged,):
            draw_biases(biases).savefig(staged, dpi=90)
        heads, offsets = len(biases), biases.shape[1] // 2
        echo_summary(one_line(f"{folder / f'biases-{name}.png'}: {heads} heads, offsets up to {offsets} cells"))
    return 0
