"""Arguments of the verb that classifies images."""

import argparse
from collections.abc import Sequence

from coatnet.cli.arguments.parser import BUNDLE_HELP, Parser


def predict_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "predict",
        "Classify images, one line each, or with --out a row each in a Parquet file. A file that is no image gets\n"
        "its own line or row, and exit code 1. With --out there may be any number of them: in folders, in a manifest\n"
        "(.csv, .tsv, .parquet with a column path), in tar shards here or behind a URL. Stopped or killed, the same\n"
        "command goes on from there; under torchrun every process takes its part.",
        "examples:\n"
        "  coatnet predict runs/mine/bundle holiday.jpg more/images\n"
        "  coatnet predict runs/mine/bundle more/images --top-k 1 --json > answers.jsonl\n"
        "  coatnet predict runs/mine/bundle s3://bucket/packed --out predictions.parquet\n"
        "  torchrun --nproc-per-node 8 -m coatnet predict runs/mine/bundle images.csv --out predictions.parquet",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, and folders of images")
    parser.add_argument("--out", metavar="FILE", help=".parquet to write, new")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="answers for each image (5)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once (32)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line rather than words")
    parser.add_argument(
        "--engine", default="auto", metavar="E", help="torch, torch-compiled, openvino, onnxruntime (auto)"
    )
    parser.add_argument("--precision", default="auto", metavar="P", help="fp32 or bf16 (auto)")
    parser.add_argument("--views", default="one", metavar="V", help="one, flip, five-crop or ten-crop, averaged (one)")
    given = parser.parse(arguments)
    if given.out and given.json:
        parser.error("--json is for lines, --out for a file: give one of them")
    return given
