"""Shares of a batch: together they are the batch, to the last blended pixel, however many processes take one."""

import numpy as np
import pytest
import torch

import coatnet
from coatnet.data.loader import BadImages, evaluation_batches, training_batches
from coatnet.data.mixing import Mixing, mix
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.training.distributed.processes import Processes, batch_share, share_cores

PREPROCESSING = Preprocessing(resolution=8, mean=(0.5,), std=(0.5,))


def batch(dataset, number, places):
    given = training_batches(
        dataset,
        preprocessing=PREPROCESSING,
        augmentation=Augmentation(placement="shift", shift=1, flip_rate=0.5),
        batch_size=20,
        seed=3,
        first_step=number,
        num_steps=1,
        num_workers=0,
        bad_images=BadImages(len(dataset)),
        batch_indices=places,
    )
    return next(iter(given))


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(mixup_alpha=0.8), Mixing(cutmix_alpha=0.8)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 20])
def test_the_shares_of_a_batch_together_equal_the_batch(world_size, mixing):
    dataset = coatnet.open_dataset("digits").training
    whole = mix(*batch(dataset, 90, None), num_classes=10, mixing=mixing, seed=5)
    images, targets, sizes = [], [], []
    for rank in range(world_size):
        places, num_extra = batch_share(20, mixing, Processes(rank, world_size))
        blended = mix(*batch(dataset, 90, places), num_classes=10, mixing=mixing, seed=5)
        images.append(blended[0][num_extra:])
        targets.append(blended[1][num_extra:])
        sizes.append(len(images[-1]))
    assert torch.equal(torch.cat(images), whole[0])
    assert torch.equal(torch.cat(targets), whole[1])
    assert max(sizes) - min(sizes) <= 1


def test_a_batch_that_is_too_small_for_the_processes_leaves_some_nothing():
    shares = [batch_share(2, Mixing(mixup_alpha=0.2), Processes(rank, 4)) for rank in range(4)]
    assert [len(share.positions) - share.num_extra for share in shares] == [0, 1, 0, 1]


@pytest.mark.parametrize("world_size", [1, 2, 5, 40])
def test_evaluation_gives_every_image_to_one_process(world_size):
    dataset = coatnet.open_dataset("digits").validation
    seen = [
        indices
        for rank in range(world_size)
        for *_, indices in evaluation_batches(
            dataset,
            preprocessing=PREPROCESSING,
            batch_size=16,
            num_workers=0,
            bad_images=BadImages(len(dataset)),
            first=rank,
            every=world_size,
        )
    ]
    assert np.array_equal(np.sort(torch.cat(seen).numpy()), np.arange(len(dataset)))


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("coatnet.training.distributed.processes.num_cores", lambda: 12)
    assert share_cores(5, Processes(0, 8, 0, 4), on_cpu=True).workers == 5
    assert share_cores("auto", Processes(0, 8, 0, 4), on_cpu=False).workers == 3
    assert share_cores("auto", Processes(0, 32, 0, 32), on_cpu=False).workers == 1


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "files", "decoded"),
    [
        (1, 1, 1, (0, 1), (0, 1)),
        (2, 1, 2, (0, 2), (0, 2)),
        (2, 1, 1, (1, 1), (0, 1)),  # OMP_NUM_THREADS=1
        (2, 2, 1, (0, 1), (0, 1)),
        (4, 1, 4, (1, 3), (0, 4)),
        (16, 1, 16, (5, 11), (2, 14)),
        (16, 2, 8, (2, 6), (1, 7)),
        (64, 1, 64, (8, 56), (8, 56)),
    ],
)
def test_workers_and_threads_together_take_no_more_than_the_cores(cores, ranks, threads, files, decoded, monkeypatch):
    monkeypatch.setattr("coatnet.training.distributed.processes.num_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    processes = Processes(0, ranks, 0, ranks)
    assert share_cores("auto", processes, on_cpu=True) == files
    assert share_cores("auto", processes, on_cpu=True, images="decoded") == decoded
    assert share_cores("auto", processes, on_cpu=True, images="arrays") == (0, threads)
    assert all(ranks * sum(share) <= cores for share in (files, decoded))
