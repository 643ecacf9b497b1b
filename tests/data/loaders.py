"""Batches of a small dataset as lists, for tests to compare."""

from coatnet.data.loader import BadImages, evaluation_batches, training_batches
from coatnet.data.transforms import Augmentation, Preprocessing

SMALL = Preprocessing(resolution=12, crop_fraction=1.0)


def train(dataset, *, first_step=0, num_steps=5, batch_size=8, num_workers=0, bad_images=None, **options):
    return list(
        training_batches(
            dataset,
            preprocessing=SMALL,
            augmentation=options.pop("augmentation", Augmentation("shift")),
            batch_size=batch_size,
            seed=7,
            first_step=first_step,
            num_steps=num_steps,
            num_workers=num_workers,
            bad_images=bad_images or BadImages(24),
            **options,
        )
    )


def evaluate(dataset, *, batch_size=10, num_workers=0, bad_images=None):
    return list(
        evaluation_batches(
            dataset,
            preprocessing=SMALL,
            batch_size=batch_size,
            num_workers=num_workers,
            bad_images=bad_images or BadImages(24),
        )
    )
