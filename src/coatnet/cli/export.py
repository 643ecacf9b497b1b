"""`coatnet export`: write a trained model in the format of another program, and check it."""

import argparse
from collections.abc import Sequence
from textwrap import indent
from typing import TYPE_CHECKING

from coatnet.cli.parser import BUNDLE_HELP, Parser
from coatnet.errors import counted
from coatnet.export import FORMATS
from coatnet.system.terminal import echo_summary

if TYPE_CHECKING:
    from coatnet.export.export import ExportResult


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "export",
        "Write a trained model for another program, compare it with the bundle on real images, and report.\n"
        "  onnx          one file for ONNX Runtime and many others      needs coatnet[onnx]\n"
        "  openvino      two files, the fastest on CPUs                 needs coatnet[openvino]\n"
        "  torch-export  a graph that torch opens without this package\n"
        "  aoti          compiled for this kind of machine              needs a C++ compiler\n"
        "  triton        a model repository for Triton                  needs coatnet[onnx]\n"
        "  web           a page that classifies in the browser          needs coatnet[onnx], npm\n"
        "  executorch    the network for phones and small devices       needs coatnet[executorch]\n"
        "  space         a page made by Gradio, for a Space of the Hugging Face hub\n"
        "  timm          timm's architectures only, for timm.create_model('local-dir:FOLDER', pretrained=True)\n"
        "  safetensors   the weights alone\n\n"
        "All but the last four take images as uint8 (B, H, W, 3) of any size and return probabilities.",
        "examples:\n"
        "  coatnet export runs/mine --format onnx --out exported\n"
        "  coatnet export runs/mine --format openvino --int8 --calibration path/to/folder --out small\n"
        "  coatnet export runs/mine --format torch-export --logits --out network",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="see above")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder to write")
    parser.add_argument(
        "--logits", action="store_true", help="the network alone: takes normalized images and returns logits"
    )
    parser.add_argument(
        "--dynamic-size", action="store_true", help="do not resize: the network takes each image at its own size"
    )
    parser.add_argument(
        "--data", metavar="DATA", help="images to check it with, as of `evaluate` (some that come with the package)"
    )
    parser.add_argument("--int8", action="store_true", help="openvino: quantize to 8 bits with NNCF (coatnet[int8])")
    parser.add_argument(
        "--calibration", metavar="DATA", help="labeled images to calibrate int8 and measure its accuracy with"
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="SHARE",
        help="accuracy that int8 may lose; 0.01 is one percentage point (0.01)",
    )
    parser.add_argument("--fp16", action="store_true", help="web: store the weights in float16, half the size")
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="torch-export: where the graph runs, cpu or cuda (cpu)"
    )
    parser.add_max_megapixels()
    given = parser.parse(arguments)
    if given.int8 and given.calibration is None:
        parser.error("--int8 needs --calibration, labeled data such as that of the training")
    if not given.int8 and (given.calibration is not None or given.max_drop is not None):
        parser.error("--calibration and --max-drop are for --int8")
    if given.max_drop is None:
        given.max_drop = 0.01
    return given


def run(arguments: Sequence[str]) -> int:
    """Export a trained model and print how far the export is from it."""
    given = parse_arguments(arguments)
    from coatnet.bundle import load
    from coatnet.export.export import export_bundle
    from coatnet.system.progress import ProgressBar

    bundle = load(given.bundle)
    with ProgressBar("exporting") as bar:
        exported = export_bundle(
            bundle,
            given.format,
            given.out,
            logits=given.logits,
            dynamic_size=given.dynamic_size,
            data=given.data,
            calibration=given.calibration,
            max_drop=given.max_drop,
            fp16=given.fp16,
            device=given.device,
            progress=bar.update,
        )
    print_export(exported, given.format)
    return 0


def print_export(exported: "ExportResult", format: str) -> None:
    """Print what was written, how far it is from the bundle, and how to open it."""
    parity, small = exported.parity, exported.quantization
    echo_summary(
        f"{exported.folder}: on {counted(parity.num_images, 'image')} of {parity.data} within "
        f"{parity.probability_difference:.1e} of the bundle's probabilities, the same likeliest class for "
        f"{100 * parity.agreement:.1f} %"
    )
    if small is not None:
        first = small.speed[0]
        echo_summary(
            f"int8: {small.figure} {100 * small.after:.2f} % against {100 * small.before:.2f} % on "
            f"{counted(small.num_images, 'image')} of {small.data}, {small.bytes_after / 1e6:.1f} MB against "
            f"{small.bytes_before / 1e6:.1f} MB, {first.int8:.1f} ms against {first.fp32:.1f} ms an image"
        )
    if format == "web":
        from coatnet.export.web import sizes

        echo_summary(sizes(exported.folder))
        return
    echo_summary(f"Details are in parity.md. This classifies an image, as {exported.folder}/classify.py does:")
    echo_summary(indent(exported.snippet, "  "))
