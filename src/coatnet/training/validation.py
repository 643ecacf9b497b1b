"""Measuring averaged weights while training goes on; the processes share the images, and the figures are exact."""

from collections.abc import Callable
from contextlib import closing

from coatnet.data.datasets import Dataset
from coatnet.data.loader import BadImages
from coatnet.evaluation.metrics import Metrics
from coatnet.inference.logits import infer
from coatnet.training.learner import Learner

SMALLEST_BATCH = 64


def measure(
    learner: Learner,
    dataset: Dataset,
    *,
    batch_size: int,
    num_workers: int | None,
    bad_images: BadImages,
    told_to_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """The figures over all images, on every process; None if it was told to stop before the end.

    `told_to_stop` is asked after every batch, by all processes alike.
    """
    processes, metrics, first_images = learner.processes, Metrics(len(dataset.classes), dataset.multilabel), []
    batches = infer(
        learner.average.whole(),
        dataset,
        preprocessing=learner.recipe.preprocessing,
        batch_size=max(batch_size // processes.world_size, SMALLEST_BATCH),
        num_workers=num_workers,
        bad_images=bad_images,
        bf16=learner.bf16,
        first=processes.rank,
        every=processes.world_size,
    )
    working, stopped = True, False
    with closing(batches):
        while working and not stopped:
            batch = next(batches, None)
            if batch is not None:
                metrics.update(batch.outputs, batch.labels)
                first_images.append(int(batch.indices[0]))
            working = processes.sum([batch is not None])[0] > 0
            stopped = told_to_stop()
    if working:
        return None
    told = processes.gather(list(zip(first_images, metrics.batches, strict=True)))
    # In the order of the dataset, so that not even the last bit of a sum depends on the processes.
    metrics.batches = [
        part for _, part in sorted((each for of_one in told for each in of_one), key=lambda each: each[0])
    ]
    return metrics.compute()
