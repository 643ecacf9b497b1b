"""`coatnet predict --out`: parts of the images, one after the other, and the file when all are there."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from types import FrameType

from coatnet.errors import UserError
from coatnet.inference.batch.partitions import Plan, own_rank
from coatnet.inference.batch.parts import Parts, Predictions, require_parquet
from coatnet.inference.batch.predict_batch import name_batch, prepare_ahead
from coatnet.inference.batch.samples import Images
from coatnet.inference.engines.graph_cache import fingerprint
from coatnet.inference.prediction import check_amounts
from coatnet.inference.predictor import Predictor
from coatnet.system.files import file_lock
from coatnet.system.progress import ProgressBar


class Terminated(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would be a plain KeyboardInterrupt."""


def predict_to_file(
    predictor: Predictor, images: Images, out: str | Path, *, top_k: int = 5, batch_size: int = 32
) -> Predictions | None:
    """Write one row an image, in order, to the Parquet file `out`; None if other processes still have parts to do.

    Under torchrun a process does every WORLD_SIZE-th part, and the last to finish joins them; they never wait for each
    other. What is finished when all are stopped or killed stays, and the same call goes on from there, with any number
    of processes. A file that is finished is read, not made again.

    Memory holds a part of the rows and three batches of images.

    Raises:
        UserError: `out` is no .parquet, is there already or was begun with another model, other images or settings;
            another process does the same work; or the disk refuses.
    """
    check_amounts(top_k, batch_size)
    target = require_parquet(out)
    rank, world_size = own_rank()
    engine = predictor.engine
    plan = Plan(
        model=fingerprint(predictor.bundle),
        pictures=images.identity(),
        num_pictures=len(images),
        engine=engine.name,
        precision=engine.precision,
        views=predictor.views,
        top_k=min(top_k, len(predictor.classes)),
    )
    parts = Parts(target, plan)
    if finished := parts.finished():
        return finished
    try:
        parts.begin()
        with _alone(parts.folder, rank):
            share = range(rank, plan.num_parts, world_size)
            missing = parts.missing(share)
            # Looked at again, now that the folder is there: the last of the others may have joined and removed it.
            if finished := parts.finished():
                return finished
            total = sum(len(plan.part(number)) for number in share)
            with ProgressBar("predicting", total, "images", shown=rank == 0) as bar:  # their shares are alike
                bar.advance(total - sum(len(plan.part(number)) for number in missing))
                _predict_parts(predictor, images, parts, missing, batch_size, bar.advance)
        parts.join_if_complete()
    except OSError as error:
        if finished := parts.finished():  # the last of the others has joined them and removed the folder
            return finished
        advice = f"what is finished is kept in {parts.folder}, and the same command goes on with it"
        raise UserError(f"{out} could not be written: {error.strerror or error}; {advice}") from error
    return parts.finished()


def _predict_parts(
    predictor: Predictor,
    images: Images,
    parts: Parts,
    numbers: list[int],
    batch_size: int,
    advance: Callable[[float], None],
) -> None:
    indices = chain.from_iterable(map(parts.plan.part, numbers))
    # Threads prepare the next two batches, of this part or the next, while the engine has one.
    with closing(prepare_ahead(predictor, images, indices, most=2 * batch_size)) as prepared:
        for number in numbers:
            rows, size = [], len(parts.plan.part(number))
            while len(rows) < size:
                batch = list(islice(prepared, min(batch_size, size - len(rows))))
                rows += name_batch(predictor, batch, parts.plan.top_k)
                advance(len(batch))
            parts.write(number, rows)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt; only in the main thread are there signals."""

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


@contextmanager
def _alone(folder: Path, rank: int) -> Iterator[None]:
    try:
        with file_lock(folder / f"process-{rank}", wait=False):
            yield
    except BlockingIOError:
        raise UserError(f"another process is predicting into {folder}; wait for it, or give another name") from None
