"""Arguments of the verb that writes a finished model for another program."""

import argparse
from collections.abc import Sequence

from coatnet.cli.arguments.parser import BUNDLE_HELP, Parser
from coatnet.export import FORMATS


def export_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "export",
        "Write a finished model for another program, check it against the bundle on real images, and report.\n"
        "  onnx          one file for ONNX Runtime and many others      needs coatnet[onnx]\n"
        "  openvino      two files, the fastest on CPUs                 needs coatnet[openvino]\n"
        "  torch-export  a graph that torch opens without this package\n"
        "  aoti          compiled for this kind of machine              needs a C++ compiler\n"
        "  triton        a model repository for Triton                  needs coatnet[onnx]\n"
        "  timm          models of timm's rows, for timm.create_model('local-dir:FOLDER', pretrained=True)\n"
        "  safetensors   the weights alone\n\n"
        "But for the last two, images uint8 (B, H, W, 3) of any size go in and probabilities come out.",
        "examples:\n"
        "  coatnet export runs/mine/bundle --format onnx --out exported\n"
        "  coatnet export runs/mine/bundle --format openvino --int8 --calibration path/to/folder --out small\n"
        "  coatnet export runs/mine/bundle --format torch-export --logits --out network",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="for which program")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write it, new")
    parser.add_argument("--logits", action="store_true", help="the bare network: normalised images in, logits out")
    parser.add_argument(
        "--dynamic-size", action="store_true", help="nothing is resized: the network sees an image at its own size"
    )
    parser.add_argument("--data", metavar="X", help="images to check it with, as of `evaluate` (some of the package)")
    parser.add_argument("--int8", action="store_true", help="openvino: integers of 8 bits, by NNCF (coatnet[int8])")
    parser.add_argument("--calibration", metavar="X", help="labelled data to calibrate and measure int8 with")
    parser.add_argument(
        "--max-drop", type=float, metavar="SHARE", help="accuracy that int8 may cost, 0.01 is one point (0.01)"
    )
    given = parser.parse(arguments)
    if given.int8 and given.calibration is None:
        parser.error("--int8 needs --calibration, labelled data such as that of the training")
    if not given.int8 and (given.calibration is not None or given.max_drop is not None):
        parser.error("--calibration and --max-drop are for --int8")
    if given.max_drop is None:
        given.max_drop = 0.01
    return given
