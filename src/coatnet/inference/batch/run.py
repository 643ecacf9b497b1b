"""Predict many images into one Parquet or CSV file, part by part (`coatnet predict --out`)."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from types import FrameType

import torch

from coatnet.data.decode import allowed_pixels
from coatnet.errors import UserError
from coatnet.inference.batch.parts import Parts, Plan, PredictionFile, require_table
from coatnet.inference.batch.samples import SampleSource, predict_batch, prepare_ahead
from coatnet.inference.graph_cache import fingerprint
from coatnet.inference.predictor import Predictor, check_at_least_one
from coatnet.system.files import only_process
from coatnet.system.launcher import read_launcher
from coatnet.system.progress import ProgressBar
from coatnet.version import __version__


class Terminated(KeyboardInterrupt):
    """Raised at SIGTERM, as KeyboardInterrupt is at Ctrl-C."""


def predict_to_file(
    predictor: Predictor, samples: SampleSource, out: str | Path, *, top_k: int = 5, batch_size: int = 32
) -> PredictionFile | None:
    """Classify all samples and write a Parquet or CSV file with one row per image, in order.

    Under torchrun each process computes every WORLD_SIZE-th part, and the last to finish joins them; processes do not
    wait for each other. Finished parts are kept when processes are stopped or killed, and the same call continues from
    there, with any number of processes. A complete file is read, not computed again.

    Memory holds the rows of one part and three batches of images.

    Args:
        predictor: the model.
        samples: the images, from `open_samples`.
        out: a `.parquet` or `.csv` file; in a CSV, lists are JSON.
        top_k: number of classes per image.
        batch_size: images computed together.

    Returns:
        The complete file, or None if other processes still have parts to compute.

    Raises:
        UserError: `out` ends neither in .parquet nor in .csv, or exists or was begun with another model, other images
            or settings; another process does the same work; or the disk refuses.
    """
    check_at_least_one(top_k=top_k, batch_size=batch_size)
    target = require_table(out)
    rank, world_size = read_launcher()[:2]
    engine = predictor.engine
    plan = Plan(
        model=fingerprint(predictor.bundle),
        versions=f"coatnet {__version__} and torch {torch.__version__}",
        images=samples.identity(),
        num_images=len(samples),
        engine=engine.name,
        precision=engine.precision,
        views=predictor.views,
        top_k=min(top_k, len(predictor.classes)),
        batch_size=batch_size,
        reject=predictor.reject,
        coverage=predictor.coverage,
        set_method=None if predictor.coverage is None else predictor.set_method,
        max_megapixels=allowed_pixels() / 1e6,
    )
    parts = Parts(target, plan)
    if finished := parts.finished():
        return finished
    try:
        parts.begin()
        with only_process(parts.folder / f"process-{rank}", f"predicting into {target}"):
            share = range(rank, plan.num_parts, world_size)
            missing = parts.missing(share)
            # Checked again, now that the folder is there: another process may have joined and removed it meanwhile.
            if finished := parts.finished():
                return finished
            total = sum(len(plan.part(number)) for number in share)
            with ProgressBar("predicting", total, "images", shown=rank == 0) as bar:  # shares are about equal
                bar.advance(total - sum(len(plan.part(number)) for number in missing))
                _predict_parts(predictor, samples, parts, missing, batch_size, bar.advance)
        parts.join_if_complete()
    except OSError as error:
        if finished := parts.finished():  # another process has joined them and removed the folder
            return finished
        advice = f"finished parts are kept in {parts.folder}, and the same command continues with them"
        raise UserError(f"{out} could not be written: {error.strerror or error}; {advice}") from error
    return parts.finished()


def _predict_parts(
    predictor: Predictor,
    samples: SampleSource,
    parts: Parts,
    numbers: list[int],
    batch_size: int,
    advance: Callable[[float], None],
) -> None:
    indices = chain.from_iterable(map(parts.plan.part, numbers))
    # Threads prepare the next two batches, of this part or the next, while the engine computes one.
    with closing(prepare_ahead(predictor, samples, indices, max_held=2 * batch_size)) as prepared:
        for number in numbers:
            rows, size = [], len(parts.plan.part(number))
            while len(rows) < size:
                batch = list(islice(prepared, min(batch_size, size - len(rows))))
                rows += predict_batch(predictor, batch, parts.plan.top_k)
                advance(len(batch))
            parts.write(number, rows)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise `Terminated`, as Ctrl-C raises KeyboardInterrupt. Without effect outside the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
