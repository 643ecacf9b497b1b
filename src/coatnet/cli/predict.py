"""`coatnet predict`: classify images, as lines on standard output or as rows of a Parquet or CSV file."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from coatnet.cli.explain import new_name
from coatnet.cli.parser import (
    BUNDLE_HELP,
    FAILED,
    INTERRUPTED,
    TERMINATED,
    Parser,
    calibrated_options,
    print_unreadable,
)
from coatnet.errors import counted, cut, one_line, without_credentials
from coatnet.system.launcher import read_launcher
from coatnet.system.terminal import echo, echo_summary, report_wait

if TYPE_CHECKING:
    from coatnet.inference import Prediction, Predictor

FEW_IMAGES = 64  # so many are classified by torch before another engine has built its graph


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "predict",
        "Classify images: print one line per image or, with --out, write one row per image to a file. An\n"
        "unreadable image gets its own line or row, and makes the exit code 1. With --out there may be any number of\n"
        "images: in folders, in a manifest (.csv, .tsv, .parquet with a column path), in tar shards, here or behind a\n"
        "URL. The same command resumes after a stop; under torchrun every process takes its share.",
        "examples:\n"
        "  coatnet predict runs/mine holiday.jpg more/images\n"
        "  coatnet predict runs/mine more/images --top-k 1 --json > answers.jsonl\n"
        "  coatnet predict runs/mine s3://bucket/packed --out predictions.parquet\n"
        "  torchrun --nproc-per-node 8 -m coatnet predict runs/mine images.csv --out predictions.parquet",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images and folders of images; see above for --out")
    parser.add_argument("--out", metavar="FILE", help="new .parquet or .csv file to write")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="most likely classes to give (5)")
    parser.add_batch_size(32)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line, for a program")
    parser.add_engine()
    parser.add_views()
    parser.add_argument(
        "--tiles",
        metavar="SIDE",
        help="classify overlapping tiles of each image, so many pixels on their shorter side, or auto, the model's "
        "own size; their answers are averaged. TIFF of 8-bit gray or RGB and, for models of other values, any TIFF "
        "and .npy are read tile by tile, so they may be larger than memory; all else is decoded whole",
    )
    parser.add_argument(
        "--tile-overlap", type=float, metavar="F", help="with --tiles: fraction of a side that neighbors share (0.25)"
    )
    parser.add_argument("--each-tile", action="store_true", help="with --tiles: print a line for each tile as well")
    parser.add_argument(
        "--tile-maps", metavar="FOLDER", help="with --tiles: write each image with the likeliest class laid over it"
    )
    parser.add_calibrated()
    parser.add_max_megapixels()
    parser.add_device()
    given = parser.parse(arguments)
    if given.out and given.json:
        parser.error("--json is for lines, --out for a file: give one of them")
    if given.tiles is None:
        if given.tile_overlap is not None or given.each_tile or given.tile_maps:
            parser.error("--tile-overlap, --each-tile and --tile-maps say how --tiles are answered: give that as well")
    elif given.out:
        parser.error("--tiles prints lines, and --out writes rows of images: give one of them")
    elif given.tiles != "auto" and not (given.tiles.isdecimal() and int(given.tiles) > 0):
        parser.error(f"--tiles is a side in pixels, such as 512, or auto, got {given.tiles!r:.40}")
    return given


def run(arguments: Sequence[str]) -> int:
    """Classify images."""
    given = parse_arguments(arguments)
    if given.tiles is not None:
        return predict_tiles(given)
    return predict_to_table(given) if given.out else predict_to_stdout(given)


def predict_tiles(given: argparse.Namespace) -> int:
    """Print a line for each image, and one for each of its tiles if that is asked for."""
    from coatnet.data.decode import BadImage
    from coatnet.data.folder import expand_paths
    from coatnet.inference import Prediction
    from coatnet.inference.tiles import OVERLAP, classify_tiles
    from coatnet.system.files import atomic_files, require_outside_images, translate_write_errors, user_path

    if given.tile_maps:
        require_outside_images(user_path(given.tile_maps), given.paths)
    predictor, num_unreadable, taken = open_predictor(given, given.engine), 0, set[str]()
    side = None if given.tiles == "auto" else int(given.tiles)
    overlap = OVERLAP if given.tile_overlap is None else given.tile_overlap
    left_out: Counter[str] = Counter()
    for path, error in expand_paths(given.paths, left_out):
        try:
            if error is not None:
                raise BadImage(str(path), error)
            found = classify_tiles(
                predictor, path, side=side, overlap=overlap, top_k=given.top_k, batch_size=given.batch_size
            )
        except BadImage as bad:
            print_prediction(Prediction(bad.name, error=bad.reason), given.json)
            num_unreadable += 1
            continue
        for tile in found.each(given.top_k) if given.each_tile else ():
            print_prediction(tile, given.json)
        print_prediction(found.prediction, given.json)
        if given.tile_maps:
            with translate_write_errors(given.tile_maps):
                folder = user_path(given.tile_maps)
                folder.mkdir(parents=True, exist_ok=True)
                file = new_name(folder, path.stem, found.prediction.classes[0], taken)
                with atomic_files(file) as (staged,):
                    found.map().save(staged, "PNG")
    print_left_out(left_out)
    return FAILED if num_unreadable else 0


def predict_to_stdout(given: argparse.Namespace) -> int:
    """Print one line per image, as soon as its batch is computed."""
    from coatnet.data.folder import expand_paths

    with report_wait("looking for images"):
        few = len(list(islice(expand_paths(given.paths), FEW_IMAGES + 1))) <= FEW_IMAGES
    engine = "torch" if given.engine == "auto" and few else given.engine
    num_unreadable = 0
    predictor = open_predictor(given, engine)
    left_out: Counter[str] = Counter()
    predictions = predictor.predict_paths(
        given.paths, top_k=given.top_k, batch_size=given.batch_size, left_out=left_out
    )
    with report_wait("classifying the first images"):
        first = list(islice(predictions, 1))
    for prediction in chain(first, predictions):
        print_prediction(prediction, given.json)
        num_unreadable += prediction.error is not None
    print_left_out(left_out)
    return FAILED if num_unreadable else 0


def print_left_out(files: "Counter[str]") -> None:
    """Say on standard error which files of the folders were no images by the ending of their names."""
    from coatnet.data.folder import describe_left_out

    if files:
        found = f"{counted(files.total(), 'file')} in the folders left out, hidden or not images by their names"
        echo(f"coatnet: {found}: {describe_left_out(files)}", error=True)


def print_prediction(prediction: "Prediction", as_json: bool) -> None:
    """Print one line: to standard error if the image is unreadable, unless as JSON."""
    found = dict(zip(prediction.classes, prediction.probabilities, strict=True))
    if as_json:
        name = prediction.name if prediction.error is None else without_credentials(prediction.name)
        line: dict[str, Any] = {"path": name, "error": prediction.error, "probabilities": found}
        if prediction.novelty is not None:
            line |= {"novelty": round(prediction.novelty, 4), "unknown": prediction.unknown}
        if prediction.class_set is not None:
            line["set"] = list(prediction.class_set)
        echo(json.dumps(line, ensure_ascii=False), is_json=True)
    elif prediction.error is not None:
        print_unreadable({prediction.name: prediction.error})
    else:
        likeliest = ", ".join(f"{cut(name)} {100 * p:.1f} %" for name, p in found.items())
        if prediction.unknown:
            likeliest = (
                f"unknown (more foreign than {100 * (prediction.novelty or 0):.1f} % of known images); {likeliest}"
            )
        if prediction.class_set is not None:
            likeliest += f"; set: {', '.join(map(cut, prediction.class_set)) or 'none'}"
        echo(one_line(f"{prediction.name}: {likeliest}"))


def predict_to_table(given: argparse.Namespace) -> int:
    """Write one row per image; what is done is kept when the program stops."""
    from coatnet.inference.batch import open_samples, predict_to_file
    from coatnet.inference.batch.parts import require_table
    from coatnet.inference.batch.run import Terminated, stopped_by_sigterm
    from coatnet.system.parents import stop_with_launcher

    require_table(given.out)
    rank, world_size, local_rank, _ = read_launcher()
    try:
        with stopped_by_sigterm():
            stop_with_launcher()
            select_gpu(local_rank if "LOCAL_RANK" in os.environ else rank)
            images = open_samples(given.paths, others := Counter())
            print_left_out(others)
            predictor = open_predictor(given, given.engine)
            written = predict_to_file(predictor, images, given.out, top_k=given.top_k, batch_size=given.batch_size)
    except KeyboardInterrupt as stop:
        echo(one_line(f"coatnet: {given.out}: stopped; the same command resumes"), error=True)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    if written is None:
        echo_summary(f"{given.out}: process {rank} of {world_size} has done its part; the last to finish joins them")
        return 0
    print_unreadable(dict(written.bad))
    if more := written.num_bad - len(written.bad):
        echo(f"coatnet: error: and {more:,} more, in the column error", error=True)
    left_out = f", {written.num_bad:,} of which could not be used" if written.num_bad else ""
    if any("pip install" in error for _, error in written.bad):
        left_out += "; once the package is installed, remove the file, and the same command computes it anew"
    echo_summary(f"{given.out}: {counted(written.num_images, 'image')}{left_out}")
    return FAILED if written.num_bad else 0


def open_predictor(given: argparse.Namespace, engine: str) -> "Predictor":
    """The predictor that the options ask for."""
    from coatnet.inference import Predictor

    return Predictor(
        given.bundle,
        engine,
        given.precision,
        views=given.views,
        device=given.device,
        **calibrated_options(given),
    )


def select_gpu(local_rank: int) -> None:
    """Use the GPU of this process's local rank under torchrun, or of its rank where no launcher says which is local."""
    import torch

    if local_rank and torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
