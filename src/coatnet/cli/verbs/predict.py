"""The verb that classifies images: as lines, or as a file."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from coatnet.cli.arguments.predict import predict_arguments
from coatnet.cli.verbs.exit_codes import FAILED, INTERRUPTED, TERMINATED
from coatnet.errors import one_line

if TYPE_CHECKING:
    from coatnet.inference.prediction import Prediction

FEW = 64  # images, which torch has named before another engine has made its graph


def predict(arguments: Sequence[str]) -> int:
    """Classify images."""
    given = predict_arguments(arguments)
    return predict_file(given) if given.out else predict_lines(given)


def predict_lines(given: argparse.Namespace) -> int:
    """A line an image, as soon as its batch is done."""
    from coatnet.data.find_images import expand_paths
    from coatnet.inference.prediction import predict as predict_images
    from coatnet.inference.predictor import Predictor

    few = len(list(islice(expand_paths(given.paths), FEW + 1))) <= FEW
    engine = "torch" if given.engine == "auto" and few else given.engine
    bad = 0
    predictor = Predictor(given.bundle, engine, given.precision, views=given.views)
    for answer in predict_images(predictor, given.paths, top_k=given.top_k, batch_size=given.batch_size):
        show_prediction(answer, given.json)
        bad += answer.error is not None
    return FAILED if bad else 0


def show_prediction(answer: "Prediction", as_json: bool) -> None:
    """One line; what is wrong with a bad file goes to standard error, so that the answers stay clean."""
    found = dict(zip(answer.classes, answer.probabilities, strict=True))
    if as_json:
        line = {"path": answer.name, "error": answer.error, "probabilities": found}
        print(json.dumps(line, ensure_ascii=False), flush=True)
    elif answer.error is not None:
        print(one_line(f"coatnet: error: {answer.name}: {answer.error}"), file=sys.stderr)
    else:
        likeliest = ", ".join(f"{name} {100 * p:.1f} %" for name, p in found.items())
        print(one_line(f"{answer.name}: {likeliest}"), flush=True)


def predict_file(given: argparse.Namespace) -> int:
    """A row an image; what is finished stays, whatever stops this."""
    from coatnet.inference.batch.partitions import own_rank
    from coatnet.inference.batch.parts import require_parquet
    from coatnet.inference.batch.run import Terminated, predict_to_file, stopped_by_sigterm
    from coatnet.inference.batch.samples import open_data
    from coatnet.inference.predictor import Predictor

    require_parquet(given.out)
    rank, world_size = own_rank()
    try:
        with stopped_by_sigterm():
            take_own_gpu()
            images = open_data(given.paths)
            predictor = Predictor(given.bundle, given.engine, given.precision, views=given.views)
            written = predict_to_file(predictor, images, given.out, top_k=given.top_k, batch_size=given.batch_size)
    except KeyboardInterrupt as stop:
        print(f"coatnet: {given.out}: stopped; the same command goes on from there", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    if written is None:
        print(f"{given.out}: process {rank} of {world_size} has done its part; the last to finish joins them")
        return 0
    for name, reason in written.bad:
        print(f"coatnet: error: {name}: {reason}", file=sys.stderr)
    if more := written.num_bad - len(written.bad):
        print(f"coatnet: error: and {more:,} more, in the column error", file=sys.stderr)
    left_out = f", {written.num_bad:,} of which could not be used" if written.num_bad else ""
    print(f"{given.out}: {written.num_images:,} images{left_out}")
    return FAILED if written.num_bad else 0


def take_own_gpu() -> None:
    """Under torchrun each process of a machine has a GPU of its own."""
    import torch

    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
